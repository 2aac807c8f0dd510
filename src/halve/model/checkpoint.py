"""A user's model, opened once. Stages pass it on as a `Checkpoint`.

The source is a Hugging Face folder, a hub name, or a GGUF file, of which such a folder is made when weights are needed.
Only safetensors are read, and no code from a checkpoint ever runs. Every tensor must be there, finite and of the shape
that the config implies. All checks of models are here, in `disk.soundness` and, for GGUF files, in `model.gguf`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from halve.anatomy import Anatomy, discover, plausible
from halve.anatomy.configs import build, quiet, require_text
from halve.disk import plain_json, soundness
from halve.disk.gguf_header import is_gguf
from halve.disk.soundness import CONFIG, TOKENIZER_FILES, TensorHeader
from halve.errors import CheckpointError, CorpusError, RecipeError, TokenizerError
from halve.model import loading
from halve.model.gguf.file import GgufFile
from halve.model.precision import computing_dtype, stored_dtype
from halve.process.waits import bytes_in_words, wait
from halve.recipe.schema import Device, Dtype

__all__ = ["Checkpoint", "load_config", "resolve_device"]

_VOCABULARIES = TOKENIZER_FILES[:1] + TOKENIZER_FILES[4:9] + TOKENIZER_FILES[-2:]
_PROBE = "The quick brown fox, 0123!\n\tna\u00efve \u6f22\u5b57 \U0001f600 \x01"
"""Characters of one to four bytes. A tokenizer whose files are incomplete fails at one of them."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model. Its parts are read when they are first used, and then kept.

    >>> Checkpoint.open("no/such/folder/here")
    Traceback (most recent call last):
    halve.errors.CheckpointError: there is no model no/such/folder/here
      why: no such folder, and it is no hub name
      fix: give an existing folder
    """

    source: str
    """What the user called it: a folder, a hub name or a GGUF file."""
    folder: Path
    """The folder of its config.json, or the GGUF file. Weights of a hub name may not be there yet (see `files`)."""
    gguf: GgufFile | None = None
    """The GGUF file, if the source is one."""

    @classmethod
    def open(cls, source: str | Path, *, home: Path | None = None) -> Checkpoint:
        """Find a model folder (a config alone will do for its anatomy), hub name or GGUF file.

        `home` is where the folder is kept that is made of a GGUF file; without it that is a temporary one. Raises
        `CheckpointError`.
        """
        if is_gguf(source):
            gguf = GgufFile.open(source, home=home)
            return cls(str(source), gguf.path, gguf)
        return cls(str(source), soundness.locate(source, config_only=True))

    @property
    def hub(self) -> str | None:
        """The hub name, where the source is one."""
        return None if Path(self.source).expanduser() == self.folder else self.source

    @cached_property
    def files(self) -> Path:
        """The folder with weights and tokenizer; a hub name is downloaded, a GGUF file dequantized.

        Raises `CheckpointError`.
        """
        return soundness.locate(self.source) if self.gguf is None else self.gguf.folder

    @cached_property
    def config(self) -> transformers.PretrainedConfig:
        """The configuration. Copy it before you change it.

        Raises `CheckpointError` for a folder without a valid config.json, for a model type that this transformers does
        not know, and for one that has no causal language model. Raises `AnatomyError` for one that wraps a language
        model in other parts.
        """
        if self.gguf is not None:
            return _require_causal(self.gguf.config, self.source, self.folder)
        return _read_config(self.folder, self.source, self.hub)

    @cached_property
    def anatomy(self) -> Anatomy:
        """What the model is made of, from its config alone. Raises `AnatomyError`."""
        return discover(self.config)

    @cached_property
    def headers(self) -> Mapping[str, TensorHeader]:
        """Every tensor of the weights, from the files' headers. Raises `CheckpointError` for what is not sound."""
        return soundness.read_headers(self.files, hub=self.hub)

    @cached_property
    def weights(self) -> Sequence[Path]:
        """The files that the model is loaded from, in the order of their names. Raises `CheckpointError`."""
        return soundness.weight_files(self.files, hub=self.hub)

    @cached_property
    def tokenizer(self) -> transformers.PreTrainedTokenizerBase:
        """The tokenizer. Raises `TokenizerError`."""
        return _load_tokenizer(self.files if self.gguf is None else self.gguf.shell, self.source, self.hub)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over config.json and the files that the model is loaded from, in the order of their names."""
        return soundness.model_fingerprint(self.files)

    def require_tokenizer(self) -> None:
        """Raise `TokenizerError` if the tokenizer reads no text or its vocabulary has ids without an embedding.

        A model may have more rows than the tokenizer has ids (a padded vocabulary). It may have fewer only if the
        missing ones are tokens that were added to the tokenizer later. Then only text with such a token is refused.
        """
        vocab = self.config.get_text_config().vocab_size
        added = self.tokenizer.added_tokens_decoder
        largest = max((token for token in self.tokenizer.get_vocab().values() if token not in added), default=-1)
        if largest < 0 or largest >= vocab:
            raise TokenizerError(
                f"the tokenizer of {self.source} is not the model's",
                why=f"its largest id is {largest}, the model's vocabulary has {vocab} entries",
                fix="use the tokenizer that the model was trained with",
            )
        if self.gguf is None:
            _require_ids(self.files / TOKENIZER_FILES[0], self.tokenizer, vocab)
        try:
            self.tokenizer(_PROBE)
        except Exception as error:  # the library's own type of error is Exception itself
            raise TokenizerError(
                f"the tokenizer of {self.source} cannot read text", why=str(error), fix="copy the tokenizer files again"
            ) from error

    def require_embedded(self, largest: int, where: str) -> None:
        """Raise `CorpusError` if `largest`, the largest id of a text, has no embedding."""
        vocab = self.config.get_text_config().vocab_size
        if largest >= vocab:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise CorpusError(
                f"{where} holds {token}, which the model has no embedding for",
                why=f"it is token {largest} of the tokenizer, the model's vocabulary has {vocab} entries",
                fix=f"remove {token} from the text, or give a model whose embedding has a row for it",
            )

    def load(self, *, dtype: Dtype = "auto", device: str = "cpu") -> transformers.PreTrainedModel:
        """A new model in evaluation mode, every weight of it read from the checkpoint.

        `dtype="auto"` keeps the checkpoint's own precision. Raises `CheckpointError` for anything but sound,
        complete, finite safetensors of a known architecture. No tensor is silently initialized or left out.
        """
        _sound = self.config, self.headers
        size = sum(path.stat().st_size for path in self.weights)
        with wait(f"loading {self.source} ({bytes_in_words(size)})"):
            model = loading.load(self.files, self.config, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
            loading.require_parameters(self.files, model, self.parameters)
            return model.eval().to(device)

    def load_to_run(self, *, dtype: Dtype = "auto", device: str = "cpu") -> transformers.PreTrainedModel:
        """The same for a stage that does not train: in float32 on a CPU that multiplies the own precision slowly.

        What is saved of such a model belongs in `precision.stored_dtype`.
        """
        computing = computing_dtype(dtype, self.config, on_cpu=torch.device(device).type == "cpu")
        own = computing == stored_dtype(dtype, self.config)
        return self.load(dtype=dtype if own else "float32", device=device)

    def require_weights(self) -> None:
        """Raise `CheckpointError` unless, by their headers, the files hold exactly the tensors of the model."""
        if self.gguf is not None:
            self.gguf.require_weights()
            return
        loading.require_tensors(self.files, self.config, self.headers)

    @cached_property
    def parameters(self) -> frozenset[str]:
        """The names of the model's parameters in its own code. A tied table is listed once."""
        return frozenset(name for name, _ in build(self.config, device="meta").named_parameters())


def load_config(source: str | Path) -> transformers.PretrainedConfig:
    """The configuration of a model folder (a config alone will do) or hub name: `Checkpoint.open(source).config`."""
    return Checkpoint.open(source).config


def resolve_device(device: Device) -> str:
    """`cpu` or `cuda`; auto takes CUDA where there is one. Raises `RecipeError` for cuda without one."""
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise RecipeError(
            "device cuda is not there",
            why="torch sees no CUDA device",
            fix="--device cpu, or a torch with CUDA",
        )
    return ("cuda" if has_cuda else "cpu") if device == "auto" else device


def _read_config(folder: Path, source: str, hub: str | None) -> transformers.PretrainedConfig:
    raw = soundness.read_config(folder, hub=hub)
    plausible.require_layers(raw, folder / CONFIG)
    kind = raw["model_type"]
    if kind not in CONFIG_MAPPING:
        own_code = "; the code it brings is never run" if "auto_map" in raw else ""
        raise CheckpointError(
            f"unknown model_type {kind!r} in {folder / CONFIG}",
            why=f"transformers {transformers.__version__} has no such architecture{own_code}",
            fix="use a newer transformers if it has the architecture, or another model",
        )
    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            if config._attn_implementation not in (None, "eager", "sdpa"):
                config._attn_implementation = None  # how it was trained, not what the model is
    except Exception as error:  # transformers raises many types here
        raise CheckpointError(
            f"{folder / CONFIG} is not a valid {kind} config",
            why=str(error),
            fix="take the config.json that belongs to the model",
        ) from error
    return _require_causal(config, source, folder / CONFIG)


def _require_causal(config: transformers.PretrainedConfig, source: str, path: Path) -> transformers.PretrainedConfig:
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        require_text(config)
        raise CheckpointError(
            f"{source} is not a causal language model",
            why=f"transformers has no causal language model of type {config.model_type}",
            fix="give a decoder-only language model",
        )
    plausible.require_plausible(config, path)
    return config


def _load_tokenizer(folder: Path, source: str, hub: str | None) -> transformers.PreTrainedTokenizerBase:
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        soundness.refuse_incomplete(hub, *_VOCABULARIES)
        raise TokenizerError(
            f"{source} has no tokenizer",
            why=f"neither tokenizer.json nor another vocabulary is in {'its repository' if hub else 'the folder'}",
            fix=f"hf download {hub} --local-dir FOLDER, copy the model's tokenizer files into FOLDER, and give that"
            if hub
            else "copy the tokenizer files of the teacher into it",
        )
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises many types here
        raise TokenizerError(
            f"cannot load the tokenizer of {source}",
            why=str(error),
            fix="copy the tokenizer files again"
            if (folder / TOKENIZER_FILES[0]).is_file()
            else f"put the model's {TOKENIZER_FILES[0]} into the folder, or pip install sentencepiece tiktoken",
        ) from error
    if not isinstance(
        tokenizer.model_max_length, int | float
    ):  # warns of text that is too long, which is checked elsewhere
        tokenizer.model_max_length = VERY_LARGE_INTEGER
    return tokenizer


def _require_ids(path: Path, tokenizer: transformers.PreTrainedTokenizerBase, vocab: int) -> None:
    """Refuse a tokenizer.json with ids beyond the model's that change when it is loaded.

    The library numbers added tokens after the vocabulary and ignores the ids in the file.
    """
    if max(tokenizer.get_vocab().values()) < vocab or not path.is_file():
        return
    for token in plain_json.parse_json(path.read_text(encoding="utf-8")).get("added_tokens", ()):
        loaded = tokenizer.convert_tokens_to_ids(token["content"])
        if token["id"] >= vocab and loaded != token["id"]:
            raise TokenizerError(
                f"{path} gives {token['content']} the id {token['id']}",
                why=f"it is loaded as {loaded}, so the file is not what the tokenizer's library writes",
                fix="copy the tokenizer files again, or correct that id",
            )
