"""Whether a config can be that of a decoder-only language model at all, before anything is built from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from halve.anatomy.configs import key
from halve.anatomy.quirks import KEYS, POSITION_KEYS
from halve.errors import CheckpointError

MOST_LAYERS = 10_000
MOST_OF_AN_AXIS = 10_000_000
"""Upper bound for any other axis. The widest existing models are far below it."""

MOST_EPS = 0.1
"""Upper bound for what norms add to a variance. Above it, and below zero, they do not normalize."""

_ROPE = ("rope_theta", "factor")
_WINDOWS = ("sliding_window", "attention_chunk_size", "local_attention")


def require_layers(raw: Mapping[str, Any], path: Path) -> None:
    """Refuse more layers than any model has, because configs make lists of that length when they are read."""
    for name, value in raw.items():
        if isinstance(value, Mapping):
            require_layers(value, path)
        elif name in KEYS["layers"] and isinstance(value, int) and value > MOST_LAYERS:
            raise _refusal(path, name, value, f"a model has between 1 and {MOST_LAYERS:,}")


def require_plausible(config: PretrainedConfig, path: Path) -> None:
    """Refuse sizes that no model has, empty attention windows, and a text part that transformers did not read.

    Raises `CheckpointError` naming the config's own key.
    """
    try:
        text = config.get_text_config()
    except ValueError as error:
        raise _refusal(path, "several parts that read text", config.model_type, str(error)) from error
    if not isinstance(text, PretrainedConfig):
        raise _refusal(path, "text_config", f"a {type(text).__name__}", f"{config.model_type} has no such part")
    if config.is_encoder_decoder:
        raise _refusal(path, "is_encoder_decoder", True, "halve reads decoder-only language models")
    for axis in KEYS:
        try:
            name = key(text, axis)
            size = getattr(text, name) if name else None
        except Exception:  # transformers has its own type for a size that differs between layers
            continue
        most = MOST_LAYERS if axis == "layers" else MOST_OF_AN_AXIS
        if isinstance(size, int) and not 1 <= size <= most:
            raise _refusal(path, str(name), size, f"a model has between 1 and {most:,}")
    for name in POSITION_KEYS:
        positions = getattr(text, name, None)
        if isinstance(positions, int) and positions < 1:
            raise _refusal(path, text.attribute_map.get(name, name), positions, "a model has one position at least")
    for name in _WINDOWS:
        window = getattr(text, name, None)
        if isinstance(window, int) and window < 1 and _has_layers(text, "sliding_attention", "chunked_attention"):
            raise _refusal(path, name, window, "a window sees one token at least")
    if getattr(text, "sliding_window", 1) is None and _has_layers(text, "sliding_attention"):
        raise _refusal(path, "sliding_window", None, "layer_types has layers with such a window")

    _require_precision(config, path)
    _require_norms(text, path)
    _require_rotations(getattr(text, "rope_parameters", None), path)


def _require_precision(config: PretrainedConfig, path: Path) -> None:
    """Refuse a dtype that is not floating-point, because weights are loaded in the dtype of the config."""
    dtype = config.dtype
    known = isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize >= torch.half.itemsize
    if not known and dtype is not None and not isinstance(dtype, str):
        raise _refusal(path, "dtype", dtype, "weights are float16, bfloat16, float32 or float64")


def _require_norms(config: PretrainedConfig, path: Path) -> None:
    for name, value in vars(config).items():
        if name.endswith(("_eps", "_epsilon")) and isinstance(value, int | float) and not 0 <= value <= MOST_EPS:
            raise _refusal(path, name, value, f"what a norm adds to a variance lies between 0 and {MOST_EPS}")


def _require_rotations(found: Any, path: Path) -> None:
    """Refuse a rotary base or factor that is zero, negative or infinite. Angles are powers of base over factor."""
    if not isinstance(found, Mapping):
        return
    for name, value in found.items():
        _require_rotations(value, path)  # each kind of layer may have its own values
        if name in _ROPE and isinstance(value, int | float) and not 0 < value < math.inf:
            raise _refusal(path, name, value, "positions are turned by angles that are made from a positive number")


def _has_layers(config: PretrainedConfig, *kinds: str) -> bool:
    return any(kind in kinds for kind in getattr(config, "layer_types", None) or ())


def _refusal(path: Path, name: str, value: Any, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} has {name}: {value!r:.60}",
        why=why,
        fix="take the config.json that belongs to the model",
    )
