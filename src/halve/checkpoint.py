"""Opening and saving models, so that what goes in is sound and what comes out opens everywhere.

In: safetensors only, no code from a checkpoint, every tensor there and finite. Out: an ordinary Hugging Face
folder whose config.json spells out `head_dim`, and says rope settings and precision in the words of
transformers 4 and 5 both, so that other runtimes read the same numbers.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from halve.card import model_card
from halve.errors import CheckpointError, RecipeError, TokenizerError
from halve.recipe import Device, Dtype
from halve.rundir import disk_guard, sync, sync_tree
from halve.soundness import CONFIG, TOKENIZER_FILES, fingerprint, locate, read_config, read_headers

__all__ = [
    "check_tokenizer",
    "fingerprint",
    "load_config",
    "load_model",
    "load_tokenizer",
    "quiet",
    "resolve_device",
    "save_model",
]

GENERATION, RECORD, CARD = "generation_config.json", "halve.json", "README.md"


def load_config(source: str | Path) -> transformers.PretrainedConfig:
    """The configuration of a model folder (a config alone will do) or hub name.

    Raises `CheckpointError` for a folder without a sound config.json, a model type that this transformers
    does not know, and one that has no causal language model.
    """
    folder = locate(source, config_only=True)
    raw = read_config(folder)
    kind = raw["model_type"]
    if kind not in CONFIG_MAPPING:
        own_code = "; the code it brings is never run" if "auto_map" in raw else ""
        raise CheckpointError(
            f"unknown model_type {kind!r} in {folder / CONFIG}",
            why=f"transformers {transformers.__version__} has no such architecture{own_code}",
            fix="use a newer transformers if it has the architecture, or another model",
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises many types here
        raise CheckpointError(
            f"{folder / CONFIG} is not a valid {kind} config",
            why=str(error),
            fix="take the config.json that belongs to the model",
        ) from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise CheckpointError(
            f"{source} is not a causal language model",
            why=f"transformers has no causal language model of type {kind}",
            fix="give a model that generates text",
        )
    return config


def load_model(source: str | Path, *, dtype: Dtype = "auto", device: str = "cpu") -> transformers.PreTrainedModel:
    """A model in evaluation mode, every weight of it read from the checkpoint.

    `dtype="auto"` keeps the checkpoint's own precision. Raises `CheckpointError` for anything but sound,
    complete, finite safetensors of a known architecture; no tensor is silently made up or left out.
    """
    folder = locate(source)
    config = load_config(folder)
    read_headers(folder)
    try:
        with quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                trust_remote_code=False,
                local_files_only=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # refused below, with both shapes
                output_loading_info=True,
            )
    except Exception as error:  # transformers raises many types here
        raise CheckpointError(
            f"cannot load {source}", why=str(error), fix="check that config.json belongs to these weights"
        ) from error
    _refuse_misfits(folder, info)
    _refuse_dead_weights(folder, model)
    return model.eval().to(device)


def load_tokenizer(source: str | Path) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub name. Raises `TokenizerError`."""
    folder = locate(source)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES[:1] + TOKENIZER_FILES[4:9]):
        raise TokenizerError(
            f"{source} has no tokenizer",
            why="neither tokenizer.json nor another vocabulary is in the folder",
            fix="copy the tokenizer files of the teacher into it",
        )
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises many types here
        raise TokenizerError(
            f"cannot load the tokenizer of {source}", why=str(error), fix="copy the tokenizer files again"
        ) from error
    return tokenizer


def check_tokenizer(
    tokenizer: transformers.PreTrainedTokenizerBase,
    config: transformers.PretrainedConfig,
    *,
    source: str | Path,
) -> None:
    """Raise `TokenizerError` if the tokenizer makes ids that the model has no embedding for.

    A model may have more rows than the tokenizer has ids (a padded vocabulary), never fewer.
    """
    vocab = config.get_text_config().vocab_size
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest < 0 or largest >= vocab:
        raise TokenizerError(
            f"the tokenizer of {source} is not the model's",
            why=f"its largest id is {largest}, the model's vocabulary has {vocab} entries",
            fix="use the tokenizer that the model was trained with",
        )


def resolve_device(device: Device) -> str:
    """`cpu` or `cuda`; auto takes CUDA where there is one. Raises `RecipeError` for cuda without one."""
    found = torch.cuda.is_available()
    if device == "cuda" and not found:
        raise RecipeError(
            "device cuda is not there",
            why="torch sees no CUDA device",
            fix="--device cpu, or a torch with CUDA",
        )
    return ("cuda" if found else "cpu") if device == "auto" else device


def save_model(
    model: transformers.PreTrainedModel,
    folder: str | Path,
    *,
    extra_from: str | Path | None,
    record: Mapping[str, Any] | None,
) -> None:
    """Write an ordinary Hugging Face folder, whole or not at all.

    `extra_from` is the model whose tokenizer, chat template and generation config are copied; `record`
    becomes halve.json and a short model card. An earlier model in `folder` is replaced. Raises `DiskError` when
    the device is full and `CheckpointError` for a folder that holds something else.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / CONFIG).is_file() and any(folder.iterdir()):
        raise CheckpointError(
            f"{folder} is in the way",
            why="it is not empty and holds no model that could be replaced",
            fix="choose a new folder",
        )
    draft = folder.with_name(f".{folder.name}.tmp")
    try:
        with disk_guard(folder):
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            _write_weights(model, draft)
            _write_config(draft, model.config)
            _copy_extras(None if extra_from is None else locate(extra_from), draft)
            if record is not None:
                _write_object(draft / RECORD, record)
                (draft / CARD).write_text(model_card(record), encoding="utf-8")
            sync_tree(draft)
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(draft, folder)
            sync(folder.parent)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and reports off the screen; what they say becomes our errors."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _refuse_misfits(folder: Path, info: Mapping[str, Any]) -> None:
    if info["mismatched_keys"]:
        name, found, wanted = sorted(info["mismatched_keys"])[0]
        raise CheckpointError(
            f"{folder} has {name} in shape {tuple(found)}",
            why=f"by its config.json the shape is {tuple(wanted)}",
            fix="take the config.json that belongs to these weights",
        )
    for key, what, why in (
        ("missing_keys", "lacks", "it would be filled with random numbers"),
        (
            "unexpected_keys",
            "has an extra tensor",
            "by its config.json the model has no such weight; it would be lost",
        ),
    ):
        if info[key]:
            first, more = sorted(info[key])[0], len(info[key]) - 1
            others = f" and {more} more" if more else ""
            raise CheckpointError(
                f"{folder} {what} {first}{others}",
                why=why,
                fix="take the config.json that belongs to these weights",
            )


def _refuse_dead_weights(folder: Path, model: transformers.PreTrainedModel) -> None:
    """Refuse NaN and infinities anywhere, and zeros everywhere or in the whole embedding."""
    embedding = model.get_input_embeddings().weight
    living = False
    for name, weight in model.named_parameters():
        low, high = torch.aminmax(weight.detach())
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise CheckpointError(
                f"{name} of {folder} is not finite",
                why="it holds NaN or infinity",
                fix="take a checkpoint from before the training run diverged",
            )
        zero = bool(low == 0) and bool(high == 0)
        living |= weight.ndim > 1 and not zero
        if zero and weight is embedding:
            living = False
            break
    if not living:
        raise CheckpointError(
            f"the weights of {folder} are all zero",
            why="the embedding, or every matrix, holds zeros alone, so it can teach nothing",
            fix="take a trained checkpoint; this one may have been saved from an empty (meta) model",
        )


def _write_weights(model: transformers.PreTrainedModel, draft: Path) -> None:
    """`save_pretrained` writes into the model's config; it gets copies."""
    config, generation = model.config, model.generation_config
    model.config = copy.deepcopy(config)
    model.generation_config = GenerationConfig()
    try:
        with quiet():
            model.save_pretrained(draft)
    finally:
        model.config, model.generation_config = config, generation
    for file in draft.glob("*.safetensors"):
        file.chmod((draft / CONFIG).stat().st_mode)  # safetensors writes files that others cannot read
    (draft / GENERATION).unlink(missing_ok=True)
    if generation is not None:
        generation.to_json_file(draft / GENERATION)


def _write_config(draft: Path, config: transformers.PretrainedConfig) -> None:
    """Complete the config.json that `save_pretrained` wrote with what other readers need."""
    raw = json.loads((draft / CONFIG).read_text(encoding="utf-8"))
    head_dim = _undeclared_head_dim(config)
    if head_dim is not None:
        raw["head_dim"] = head_dim
    plain = _read_back(config, raw)
    spelled: dict[str, Any] = {}
    for extra in (_old_precision(raw), _old_rope(raw), _older_rope(config, raw)):
        # a family whose code reads an old key differently keeps its own spelling alone
        if _read_back(config, {**raw, **extra}, but=extra) == _without(plain, extra):
            spelled |= extra
    _write_object(draft / CONFIG, raw | spelled)


def _undeclared_head_dim(config: transformers.PretrainedConfig) -> int | None:
    """The head size, where the config leaves it out and the model's code would read it; found by trying."""
    text = config.get_text_config()
    heads, hidden = getattr(text, "num_attention_heads", None), getattr(text, "hidden_size", None)
    if text is not config or getattr(config, "head_dim", None) or not heads or not hidden:
        return None
    head_dim = int(hidden) // int(heads)
    shapes = []
    for tried in (head_dim, 2 * head_dim):
        attempt = copy.deepcopy(config)
        attempt.head_dim = tried
        try:
            with torch.device("meta"), quiet():
                model = AutoModelForCausalLM.from_config(attempt, trust_remote_code=False)
        except Exception:  # the family's code refuses another head size
            return None
        shapes.append({name: weight.shape for name, weight in model.state_dict().items()})
    return head_dim if shapes[0] != shapes[1] else None


def _old_precision(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {"torch_dtype": raw["dtype"]} if "dtype" in raw else {}


def _old_rope(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Version 4's spelling of `rope_parameters`; without it that version takes theta 10000, no scaling."""
    rope = raw.get("rope_parameters")
    if not isinstance(rope, dict) or not rope:
        return {}
    old: dict[str, Any] = {}
    if isinstance(rope.get("sliding_attention"), dict):
        old["rope_local_base_freq"] = rope["sliding_attention"].get("rope_theta")
    rope = rope.get("full_attention", rope)
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        return {}
    old["rope_theta"] = rope["rope_theta"]
    if "partial_rotary_factor" in rope:
        old["partial_rotary_factor"] = rope["partial_rotary_factor"]
    scaling = {key: value for key, value in rope.items() if key not in old}
    old["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else scaling
    return old


def _older_rope(config: transformers.PretrainedConfig, raw: Mapping[str, Any]) -> dict[str, Any]:
    """GPT-NeoX's names of the same, for a config class that takes them in (others just keep them)."""
    old = _old_rope(raw)
    names = {"rotary_emb_base": old.get("rope_theta"), "rotary_pct": old.get("partial_rotary_factor")}
    taken = set(names) - set(_read_back(config, {**raw, **names}))
    return {name: value for name, value in names.items() if name in taken and value is not None}


def _read_back(
    config: transformers.PretrainedConfig, raw: Mapping[str, Any], *, but: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What this transformers makes of a raw config, without the keys of `but`."""
    with quiet():
        return _without(type(config).from_dict(copy.deepcopy(dict(raw))).to_dict(), but or {})


def _without(values: Mapping[str, Any], keys: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}


def _copy_extras(source: Path | None, draft: Path) -> None:
    if source is None:
        return
    for name in (*TOKENIZER_FILES, GENERATION):
        if (source / name).is_file():
            shutil.copyfile(source / name, draft / name)
    if (source / "additional_chat_templates").is_dir():
        shutil.copytree(source / "additional_chat_templates", draft / "additional_chat_templates")


def _write_object(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
