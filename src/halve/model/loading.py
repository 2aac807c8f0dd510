"""From safetensors files to a model: exactly the tensors of the model, each finite and of the right shape.

`require_tensors` runs transformers' own loader on tensors that have shapes but no data. So it finds a mismatch before a
weight is read, even if the loader renames, fuses or splits tensors. `load` reads the weights.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from halve.anatomy.configs import build, quiet
from halve.disk.soundness import ADAPTER, GENERATION, INDEX, WEIGHTS, TensorHeader
from halve.errors import CheckpointError
from halve.model.finite import require_finite

# Buffers that older versions of transformers saved with the weights; the code computes them itself.
_OLD_BUFFERS = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")
# Tensors that quantization tools save next to packed weights, by the end of the name.
_OF_QUANTIZED = (
    ".weight_scale",
    ".weight_scale_inv",
    ".weight_packed",
    ".input_scale",
    ".qweight",
    ".qzeros",
    ".scales",
    ".g_idx",
    ".absmax",
    ".quant_map",
    ".SCB",
)
_PLAIN_DTYPES = ("F64", "F32", "F16", "BF16")
_CHUNK_ENTRIES = 1 << 24


def require_tensors(folder: Path, config: PretrainedConfig, headers: Mapping[str, TensorHeader]) -> None:
    """Raise `CheckpointError` unless names, shapes and types of these tensors are the model's. Weights are not read.

    If the config ties the head to the embedding and the files hold both, the two are compared: transformers would keep
    a head that differs, and a cut would lose it.
    """
    _refuse_adapter(folder)
    _refuse_packed(folder, headers)
    _refuse_generation(folder)
    model = build(config, device="meta")
    empty = {name: torch.empty(header.shape, device="meta") for name, header in headers.items()}
    how: dict[str, Any] = {"state_dict": empty, "device_map": {"": "meta"}}
    _refuse_misfits(folder, _loaded(type(model), None, config, dtype=torch.float32, **how)[1])
    _refuse_a_head_of_its_own(folder, model, headers)


def load(folder: Path, config: PretrainedConfig, *, dtype: torch.dtype | str) -> PreTrainedModel:
    """The model of these files in main memory, with a config of its own. Raises `CheckpointError`."""
    _refuse_adapter(folder)
    with _with_whole_index(folder) as whole:
        model, info = _loaded(AutoModelForCausalLM, whole, config, dtype=dtype)
    _refuse_misfits(folder, info)
    _refuse_dead_weights(folder, model)
    return model


def require_parameters(folder: Path, model: PreTrainedModel, names: frozenset[str]) -> None:
    """Raise `CheckpointError` unless the loaded model has exactly the parameters that its config implies."""
    loaded = {name for name, _ in model.named_parameters()}
    if loaded == names:
        return
    other = sorted(loaded ^ names)[0]
    raise CheckpointError(
        f"{folder} loads as another model than its config.json describes",
        why=f"{other} is a parameter of {'the loaded model' if other in loaded else 'the config'} alone",
        fix="for a head of its own beside a tied embedding set tie_word_embeddings to false; merge or remove adapters",
    )


def _loaded(
    kind: Any, folder: Path | None, config: PretrainedConfig, *, dtype: torch.dtype | str, **how: Any
) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """The model that transformers loads from a folder or `state_dict`, and its report on missing and extra tensors."""
    try:
        with quiet():
            model, info = kind.from_pretrained(
                folder,
                config=copy.deepcopy(config),
                dtype=dtype,
                trust_remote_code=False,
                local_files_only=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # refused by the caller, with both shapes
                output_loading_info=True,
                **how,
            )
    except Exception as error:  # transformers raises many types here
        raise CheckpointError(
            f"cannot load {folder or 'these weights'}",
            why=str(error),
            fix="check that config.json belongs to these weights",
        ) from error
    return model, info


@contextmanager
def _with_whole_index(folder: Path) -> Iterator[Path]:
    """The folder, or a view of it with a complete index if its index lacks metadata that transformers requires."""
    index = folder / INDEX
    raw = json.loads(index.read_text(encoding="utf-8")) if index.is_file() and not (folder / WEIGHTS).is_file() else {}
    if not raw or isinstance(raw.get("metadata"), dict):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="halve-index-") as scratch:
        view = Path(scratch)
        for path in folder.iterdir():
            if path.name != INDEX:
                (view / path.name).symlink_to(path.resolve())
        (view / INDEX).write_text(json.dumps({**raw, "metadata": {}}), encoding="utf-8")
        yield view


def _refuse_adapter(folder: Path) -> None:
    """Refuse an adapter next to the weights: transformers would load it into the model if peft is installed."""
    if (folder / ADAPTER).is_file():
        raise CheckpointError(
            f"{folder} holds an adapter beside the weights",
            why=f"{ADAPTER} says that the model is these weights and the adapter's together",
            fix=f"merge it (peft: merge_and_unload, then save_pretrained), or move {ADAPTER} away to leave it out",
        )


def _refuse_generation(folder: Path) -> None:
    """Refuse wrong values in generation_config.json. transformers skips a file that is not JSON, but fails on those."""
    if not (folder / GENERATION).is_file():
        return
    try:
        with quiet():
            GenerationConfig.from_pretrained(folder, local_files_only=True)
    except OSError:
        return
    except Exception as error:  # transformers raises many types here
        raise CheckpointError(
            f"{folder / GENERATION} keeps the model from being loaded",
            why=str(error),
            fix="correct the file or remove it",
        ) from error


def _refuse_packed(folder: Path, headers: Mapping[str, TensorHeader]) -> None:
    for name, header in headers.items():
        if header.dtype not in _PLAIN_DTYPES and len(header.shape) > 1 and name.endswith(".weight"):
            raise _quantized(folder, name, f"is {header.dtype}")


def _quantized(folder: Path, name: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"the weights of {folder} are quantized",
        why=f"{name} {what}: only kernels of its own read such weights, and they can neither be cut nor trained",
        fix="give the checkpoint that it was quantized from, or one that was dequantized to bfloat16",
    )


def _refuse_misfits(folder: Path, info: Mapping[str, Any]) -> None:
    if packed := sorted(name for name in info["unexpected_keys"] if name.endswith(_OF_QUANTIZED)):
        raise _quantized(folder, packed[0], "belongs to packed weights")
    if info["mismatched_keys"]:
        name, shape, wanted = sorted(info["mismatched_keys"])[0]
        raise CheckpointError(
            f"{folder} has {name} in shape {tuple(shape)}",
            why=f"by its config.json the shape is {tuple(wanted)}",
            fix="take the config.json that belongs to these weights",
        )
    missing = sorted(info["missing_keys"])
    extra = sorted(name for name in info["unexpected_keys"] if not name.endswith(_OLD_BUFFERS))
    if missing:
        raise CheckpointError(
            f"{folder} lacks {_first(missing)}",
            why="it would be filled with random numbers",
            fix="set tie_word_embeddings to true in config.json if the model's head is its embedding"
            if _is_head(missing)
            else "take the config.json that belongs to these weights, or download the weights again",
        )
    if extra:
        raise CheckpointError(
            f"{folder} has an extra tensor {_first(extra)}",
            why="by its config.json the model has no such weight; it would be lost",
            fix="take the config.json that belongs to these weights",
        )


def _is_head(missing: list[str]) -> bool:
    return len(missing) == 1 and missing[0].endswith(("lm_head.weight", "embed_out.weight"))


def _first(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _refuse_a_head_of_its_own(folder: Path, model: PreTrainedModel, headers: Mapping[str, TensorHeader]) -> None:
    """Refuse names that the model ties to one parameter if they differ in the files."""
    names: dict[int, list[str]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        names.setdefault(id(value), []).append(name)
    for shared in names.values():
        first, *others = [name for name in shared if name in headers] or [""]
        for other in others:
            if not _same(folder, headers, first, other):
                raise CheckpointError(
                    f"{folder} ties {other} to {first}, and the two differ",
                    why="its config.json makes them one table, and the files hold two: one of them would be lost",
                    fix="set tie_word_embeddings to false in config.json to keep both, or remove one of them",
                )


def _same(folder: Path, headers: Mapping[str, TensorHeader], one: str, other: str) -> bool:
    """Whether two tensors of the files are equal, compared some rows at a time."""
    if headers[one].shape != headers[other].shape:
        return False
    with (
        safe_open(folder / headers[one].file, framework="pt") as left,
        safe_open(folder / headers[other].file, framework="pt") as right,
    ):
        a, b = left.get_slice(one), right.get_slice(other)
        rows, width = headers[one].shape[0], max(1, headers[one].shape[-1])
        step = max(1, _CHUNK_ENTRIES // width)
        return all(torch.equal(a[i : i + step], b[i : i + step]) for i in range(0, rows, step))


def _refuse_dead_weights(folder: Path, model: PreTrainedModel) -> None:
    """Refuse NaN and infinities anywhere, and zeros everywhere or in the whole embedding."""
    embedding = model.get_input_embeddings().weight
    living = False
    for name, weight in model.named_parameters():
        low, high = torch.aminmax(weight.detach())
        require_finite(
            f"{name} of {folder}",
            low,
            high,
            verb="is",
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
