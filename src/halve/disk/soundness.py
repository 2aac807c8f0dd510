"""Is this a sound safetensors checkpoint? Answered from names, JSON and file headers, without torch.

A source is a folder or a hub name. `locate` turns it into a folder. `read_config` and `read_headers` check the content
and raise `CheckpointError` for everything that would load wrongly or run code: pickles, remote code, kernels from the
hub, missing and truncated files.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, errors, snapshot_download, try_to_load_from_cache
from safetensors import SafetensorError, safe_open

from halve.disk import plain_json
from halve.disk.files import file_sha256
from halve.disk.folders import is_interrupted
from halve.disk.gguf_header import SUFFIX, begins_as_gguf
from halve.errors import CheckpointError
from halve.process.fresh import distrust

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
GENERATION, ADAPTER = "generation_config.json", "adapter_config.json"
TEMPLATES = "additional_chat_templates"
"""The folder of named chat templates, in a model's folder."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
    "sentencepiece.bpe.model",
    "tekken.json",
)
TERMS = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY", "COPYING")
"""How the names of files with terms of use begin."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
_HUB_PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "README.md", *(f"{name}*" for name in TERMS))
# consolidated files repeat the weights in another layout; subfolders are needed only for chat templates (.jinja)
_HUB_IGNORED = ("consolidated*", "*/*.[!j]*", "*/*.json*", "*.py", *PICKLES)
_MAX_HEADER_BYTES = 100 << 20


@dataclass(frozen=True)
class TensorHeader:
    """The entry of one tensor in a safetensors header."""

    file: str
    dtype: str
    shape: tuple[int, ...]


def locate(source: str | Path, *, config_only: bool = False) -> Path:
    """The folder of a source; a hub name is downloaded (or taken from the hub's cache).

    Only JSON, safetensors, tokenizer files and terms of use are ever downloaded. Raises `CheckpointError`.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        distrust(folder)
        return folder
    name = str(source)
    if begins_as_gguf(folder):
        raise CheckpointError(
            f"{name} is not called a GGUF file",
            why=f"its content is that of one, and such files are known by the ending {SUFFIX}",
            fix=f"rename it, or make a link to it that ends in {SUFFIX}, and give that",
        )
    if folder.exists():
        raise CheckpointError(f"{name} is not a folder", why="a model is a folder", fix="give the folder it is in")
    if not _HUB_NAME.fullmatch(name) or name.startswith("."):
        raise CheckpointError(
            f"there is no model {name}",
            why="no such folder, and it is no hub name",
            fix="give an existing folder",
        )
    patterns: Sequence[str] = (CONFIG,) if config_only else _HUB_PATTERNS
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=list(_HUB_IGNORED)))
    except Exception as error:  # the client also raises errors of its transport layer
        raise _unavailable(name, error) from error


def _unavailable(name: str, error: Exception) -> CheckpointError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403):
        return CheckpointError(
            f"cannot get model {name} from the hub",
            why="there is no such folder here, and the hub does not show such a model without permission",
            fix="check the spelling; for a private or gated model ask for access and run: hf auth login",
        )
    if isinstance(error, OSError) and isinstance(try_to_load_from_cache(name, CONFIG), str):
        return _incomplete(name, _unreached(error))
    return CheckpointError(
        f"cannot get model {name}",
        why=f"there is no such folder here, the hub's cache has none, and {_unreached(error)}",
        fix="check the spelling; if it is a model of the hub, run this once with a network and without"
        f" HF_HUB_OFFLINE, or: hf download {name}",
    )


def _unreached(error: Exception) -> str:
    if isinstance(error, errors.OfflineModeIsEnabled) or isinstance(error.__cause__, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE forbids to ask the hub"
    return f"the hub cannot be reached: {_first_line(error.__cause__ or error)}"


def _incomplete(name: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"the download of {name} is incomplete",
        why=f"only a part of it is in the hub's cache here, and {reason}",
        fix=f"run this once with a network and without HF_HUB_OFFLINE, or: hf download {name}",
    )


def refuse_incomplete(hub: str | None, *wanted: str) -> None:
    """Raise `CheckpointError` if the hub's repository has, or may have, one of these missing files.

    `hub` is the name of the repository. For a folder it is None, and nothing is expected.
    """
    if hub is None:
        return
    try:
        listed = {file.rfilename for file in HfApi().model_info(hub).siblings or ()}
    except Exception as error:  # the client also raises errors of its transport layer
        raise _incomplete(hub, _unreached(error)) from error
    if listed & set(wanted):
        raise _incomplete(hub, "the download did not end")


def is_terms(path: Path) -> bool:
    """Whether a file has terms of use."""
    return path.name.upper().startswith(TERMS) and path.suffix not in (".py", *(name[1:] for name in PICKLES))


def read_config(folder: Path, *, hub: str | None = None) -> dict[str, Any]:
    """The raw config.json of a folder; `CheckpointError` if it is missing, broken or asks for code.

    `hub` is the name under which the folder was downloaded, if it was.
    """
    path = folder / CONFIG
    if not path.is_file():
        refuse_incomplete(hub, CONFIG)
        if is_interrupted(folder):
            raise CheckpointError(
                f"the model in {folder} is not complete",
                why="halve was killed while it replaced the model in that folder",
                fix="run the command that writes it again",
            )
        raise CheckpointError(
            f"{hub or folder} has no {CONFIG}",
            why="its repository has none, and a model needs one" if hub else "a model folder needs one",
            fix="give the model's repository in the format of transformers"
            if hub
            else f"give the GGUF file in it: {gguf[0]}"
            if (gguf := sorted(folder.glob("*.gguf")))
            else "give a Hugging Face model folder",
        )
    raw = _read_object(path)
    if not isinstance(raw.get("model_type"), str):
        raise CheckpointError(
            f"{path} names no model_type",
            why="transformers needs it to know the architecture",
            fix="take the config.json that belongs to the model",
        )
    _refuse_code(raw, path)
    return raw


def weight_files(folder: Path, *, hub: str | None = None) -> list[Path]:
    """The safetensors files from which a model is loaded, in the order of their names. Empty if there are none.

    There may be other files with the same weights in another layout. Raises `CheckpointError` for an index that does
    not match.
    """
    single, index = folder / WEIGHTS, folder / INDEX
    if single.is_file():  # transformers, too, takes the single file before the index
        return [single]
    if not index.is_file():
        return []
    files = []
    for name in sorted(set(_weight_map(index).values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{index} names {name}", why="weights must be safetensors files beside it", fix=_AGAIN
            )
        if not (folder / name).is_file():
            refuse_incomplete(hub, name)
            raise CheckpointError(f"{folder / name} is missing", why=f"{INDEX} names it", fix=_AGAIN)
        files.append(folder / name)
    return files


def read_headers(folder: Path, *, hub: str | None = None) -> dict[str, TensorHeader]:
    """Every tensor of a checkpoint, by the headers. The size of each file is checked against its header.

    Raises `CheckpointError` for pickles, missing or truncated files, and an index that does not match.
    """
    files = weight_files(folder, hub=hub)
    if not files:
        _refuse_pickle(folder)
        refuse_incomplete(hub, WEIGHTS, INDEX)
        raise _no_weights(folder, hub)
    tensors = {name: header for path in files for name, header in _read_header(path).items()}
    weight_map = {} if files == [folder / WEIGHTS] else _weight_map(folder / INDEX)
    lost = sorted(set(weight_map) - set(tensors))
    if lost:
        raise CheckpointError(
            f"{folder} lacks {lost[0]}",
            why=f"{INDEX} places it in {weight_map[lost[0]]}, which has no such",
            fix=_AGAIN,
        )
    return tensors


def _no_weights(folder: Path, hub: str | None) -> CheckpointError:
    if hub:
        return CheckpointError(
            f"{hub} has no safetensors weights",
            why=f"its repository has neither {WEIGHTS} nor {INDEX}; pickles (.bin) are not read, they can run any code",
            fix="give a repository with safetensors, or convert it on a machine you can lose",
        )
    return CheckpointError(
        f"{folder} has no weights",
        why=f"neither {WEIGHTS} nor {INDEX} is there",
        fix="give a folder with safetensors weights; halve plan and --dry-run do with a config alone",
    )


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = _read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map", why="it must name each tensor's file", fix=_AGAIN)
    return {name: str(file) for name, file in weight_map.items()}


def model_fingerprint(folder: Path) -> str:
    """SHA-256 over config.json and the files from which the model is loaded, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted([folder / CONFIG, *weight_files(folder)]):
        digest.update(f"{path.name}:{file_sha256(path)}\n".encode())
    return digest.hexdigest()


_AGAIN = "copy or download the model again"


def _read_header(path: Path) -> dict[str, TensorHeader]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = struct.unpack("<Q", start)[0] if len(start := file.read(8)) == 8 else None
        if length is None or length > _MAX_HEADER_BYTES or 8 + length > size:
            raise CheckpointError(
                f"{path} is truncated or not a safetensors file",
                why=f"its header does not fit into its {size} bytes",
                fix=_AGAIN,
            )
        text = file.read(length)
    try:
        header = plain_json.parse_json(text)
        header.pop("__metadata__", None)
        tensors = {
            name: TensorHeader(
                file=path.name,
                dtype=entry["dtype"],
                shape=tuple(entry["shape"]),
            )
            for name, entry in header.items()
        }
        expected = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"{path} is not a safetensors file", why=f"its header cannot be read: {error}", fix=_AGAIN
        ) from error
    if size != expected:
        raise CheckpointError(
            f"{path} is {'truncated' if size < expected else 'too long'}",
            why=f"it has {size} bytes and its header promises {expected}",
            fix=_AGAIN,
        )
    try:
        with safe_open(path, framework="numpy"):  # its own rules for shapes, types and places
            return tensors
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a safetensors file", why=str(error), fix=_AGAIN) from error


def _refuse_code(value: Any, path: Path) -> None:
    """Refuse settings that make transformers download kernels and run them. `auto_map` is never followed anyway."""
    if isinstance(value, list):
        for item in value:
            _refuse_code(item, path)
    if not isinstance(value, dict):
        return
    for key, item in value.items():
        if "attn_implementation" in key or "experts_implementation" in key:
            names = item.values() if isinstance(item, dict) else (item,)
            if any("/" in str(name) or ":" in str(name) for name in names):
                raise CheckpointError(
                    f"{path} asks for {key} {item}",
                    why="that would run code from the hub, and no code that a checkpoint names ever runs",
                    fix=f"remove {key} from {path.name}",
                )
        _refuse_code(item, path)
    if value.get("quantization_config"):
        raise CheckpointError(
            f"{path} is of a quantized model",
            why="quantized weights can neither be cut nor trained",
            fix="give the checkpoint it was quantized from",
        )
    if value.get("transformers_weights"):
        raise CheckpointError(
            f"{path} redirects to weights in {value['transformers_weights']}",
            why=f"weights are read from {WEIGHTS} or {INDEX} only",
            fix="rename the file and remove transformers_weights",
        )


def _refuse_pickle(folder: Path) -> None:
    for pattern in PICKLES:
        for path in sorted(folder.glob(pattern)):
            raise CheckpointError(
                f"{path} is a pickle checkpoint",
                why="a pickle can run any code when it is opened; only safetensors are read",
                fix="get the safetensors version of the model, or convert it on a machine you can lose",
            )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = plain_json.parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}", why=str(error), fix=_AGAIN) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"cannot read {path}", why="it is not a JSON object", fix=_AGAIN)
    return value


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
