"""The config of the model in a GGUF file: what transformers reads from the header, and nothing that it passes over.

transformers takes the sizes and leaves out what it has no name for. A model built from that may open and compute
something else. So every setting of the header is either read, or compared with what the config says, or refused.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers import PretrainedConfig
from transformers.modeling_gguf_pytorch_utils import GGUF_TO_TRANSFORMERS_MAPPING, load_gguf_checkpoint
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from halve.anatomy import plausible
from halve.anatomy.configs import quiet
from halve.anatomy.quirks import GGUF_ARCHITECTURES
from halve.disk.gguf_header import GgufHeader
from halve.errors import CheckpointError

ROPE_FREQS = "rope_freqs.weight"
OWN_FOLDER = "give the model's own folder or hub name"
EMBEDDING = "token_embd.weight"
_LINEAR, _BY_PARTS = "linear", "llama3"
_F32 = 0
# Settings that transformers has no name for, or not in every architecture, and the config's key of the same meaning.
_TAKEN: Mapping[str, str] = {
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope.freq_base": "rope_theta",
}
# Settings that must say what the config says.
_COMPARED: Mapping[str, Callable[[PretrainedConfig], Any]] = {
    "attention.causal": lambda config: True,
    "attention.value_length": lambda config: _head_dim(config),
    "rope.dimension_count": lambda config: int(_head_dim(config) * _rope(config).get("partial_rotary_factor", 1.0)),
    "rope.freq_base_swa": lambda config: _rope(config, "sliding_attention").get("rope_theta"),
    "rope.scaling.attn_factor": lambda config: 1.0,
    "vocab_size": lambda config: config.vocab_size,
}
_SCALING = ("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length")
# What llama3's way of stretching has been published with; the file holds what came of it.
_PUBLISHED = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def require_package(path: Path) -> None:
    """Raise `CheckpointError` where the package is missing that reads GGUF."""
    if importlib.util.find_spec("gguf") is None:
        raise CheckpointError(
            f"cannot read {path}",
            why="the package gguf is not installed; GGUF files are an extra of halve",
            fix=f"pip install 'halve[gguf]', or {OWN_FOLDER}",
        )


def config_of(header: GgufHeader) -> PretrainedConfig:
    """The model's config, in bfloat16. Raises `CheckpointError` for what transformers would not read, or wrongly."""
    known = GGUF_ARCHITECTURES.get(header.architecture)
    if known is None:
        raise CheckpointError(
            f"{header.path} is of the unknown architecture {header.architecture}",
            why=f"it was measured that these are read rightly: {', '.join(sorted(GGUF_ARCHITECTURES))}",
            fix=OWN_FOLDER,
        )
    if EMBEDDING not in header.tensors:
        raise CheckpointError(f"{header.path} lacks {EMBEDDING}", why="every model has one", fix=OWN_FOLDER)
    try:
        with quiet():
            raw = load_gguf_checkpoint(str(header.path), return_tensors=False)["config"]
            config = _built(header, {**raw})
    except CheckpointError:
        raise
    except Exception as error:  # transformers and gguf raise many types here
        raise CheckpointError(
            f"the settings in {header.path} make no {header.architecture} config", why=str(error), fix=OWN_FOLDER
        ) from error
    _require_read(header, config, GGUF_TO_TRANSFORMERS_MAPPING["config"][known])
    _require_attention_scale(header, config)
    return config


def _built(header: GgufHeader, raw: dict[str, Any]) -> PretrainedConfig:
    for name in ("_model_name_or_path", "unk_token_id"):
        raw.pop(name, None)
    raw = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")) | raw
    kind = CONFIG_MAPPING[raw["model_type"]]
    default = kind()
    taken = {key: header.setting(name) for name, key in _TAKEN.items()}
    raw |= {key: value for key, value in taken.items() if value is not None}
    raw = {key: _shortest(value) if isinstance(value, float) else value for key, value in raw.items()}
    raw["dtype"] = "bfloat16"
    raw["vocab_size"] = header.tensors[EMBEDDING].shape[0]
    plausible.require_layers(raw, header.path)
    # what llama.cpp takes where the file does not say, whatever the family's usual size is
    heads, hidden = header.setting("attention.head_count"), header.setting("embedding_length")
    if hasattr(default, "num_key_value_heads") and header.setting("attention.head_count_kv") is None:
        raw["num_key_value_heads"] = heads
    if hasattr(default, "head_dim") and taken["head_dim"] is None:
        raw["head_dim"] = hidden // heads
    if hasattr(default, "sliding_window"):
        raw["sliding_window"] = taken["sliding_window"] or None
    if isinstance(getattr(default, "rope_parameters", None), dict):
        raw.setdefault("rope_theta", 10000.0)
        raw |= _scaling(header)
    config = kind.from_dict(raw)
    if ROPE_FREQS in header.tensors:
        config.rope_parameters = _by_parts(header, config)
    assert isinstance(config, PretrainedConfig)
    return config


def _shortest(value: float) -> float:
    """The number that single precision was given: 1e-06 comes back as 9.999999974752427e-07."""
    return float(str(np.float32(value))) if np.float32(value) == value else value


def _scaling(header: GgufHeader) -> dict[str, Any]:
    """How positions are stretched by one factor, if they are."""
    way = header.setting("rope.scaling.type")
    if way in (None, "none"):
        return {}
    factor = header.setting("rope.scaling.factor")
    if way != _LINEAR or not isinstance(factor, float):
        raise _passed_over(header, "rope.scaling.type", way)
    return {"rope_scaling": {"rope_type": _LINEAR, "factor": factor}}


def _by_parts(header: GgufHeader, config: PretrainedConfig) -> dict[str, Any]:
    """The rotary settings behind a table of one divisor for each frequency, if they are those that are in use."""
    table = header.tensors[ROPE_FREQS]
    divisors = _floats(header, ROPE_FREQS) if table.kind == _F32 and len(table.shape) == 1 else np.zeros(0)
    plain = _rope(config)
    width = int(_head_dim(config) * plain.get("partial_rotary_factor", 1.0)) // 2
    if divisors.shape == (width,) and (divisors == 1).all():
        return plain
    settings = {**plain, "rope_type": _BY_PARTS, "factor": float(divisors.max(initial=1.0)), **_PUBLISHED}
    trial = type(config).from_dict({**config.to_dict(), "rope_parameters": settings})
    stretched, _ = ROPE_INIT_FUNCTIONS[_BY_PARTS](trial, device=torch.device("cpu"))
    frequencies = plain["rope_theta"] ** -(np.arange(width) / width)
    if divisors.shape != (width,) or not np.allclose(frequencies / divisors, stretched.numpy(), rtol=1e-4, atol=0):
        raise CheckpointError(
            f"{header.path} stretches positions in an unknown way",
            why=f"the {divisors.size} divisors in {ROPE_FREQS} are not those of {_BY_PARTS} with"
            f" {', '.join(f'{key} {value:g}' for key, value in _PUBLISHED.items())}",
            fix=OWN_FOLDER,
        )
    return settings


def _floats(header: GgufHeader, name: str) -> NDArray[np.float64]:
    tensor = header.tensors[name]
    place = header.data_start + tensor.offset
    values = np.fromfile(header.path, "<f4", tensor.shape[0], offset=place) if place < header.size else np.zeros(0)
    return values.astype(np.float64)


def _require_read(header: GgufHeader, config: PretrainedConfig, mapping: Mapping[str, str | None]) -> None:
    read = {name for name, key in mapping.items() if key is not None} | set(_TAKEN) | set(_SCALING)
    prefix = f"{header.architecture}."
    for name, value in header.values.items():
        setting = name.removeprefix(prefix)
        if not name.startswith(prefix):
            continue
        known = _equal(value, _COMPARED[setting](config)) if setting in _COMPARED else setting in read
        if not known:
            raise _passed_over(header, setting, value)


def _equal(said: Any, meant: Any) -> bool:
    numbers = isinstance(said, int | float) and isinstance(meant, int | float)
    return bool(np.isclose(said, meant, rtol=1e-6, atol=0)) if numbers else bool(said == meant)


def _passed_over(header: GgufHeader, setting: str, value: Any) -> CheckpointError:
    return CheckpointError(
        f"{header.path} says {header.architecture}.{setting} {value}",
        why=f"transformers {transformers.__version__} passes over it, so its model would compute something else",
        fix=OWN_FOLDER,
    )


def _require_attention_scale(header: GgufHeader, config: PretrainedConfig) -> None:
    """Some families scale attention by a number of their own, which the file does not hold."""
    scale = getattr(config, "query_pre_attn_scalar", None)
    if scale is not None and scale != _head_dim(config):
        raise CheckpointError(
            f"{header.path} does not say how attention is scaled",
            why=f"its heads have {_head_dim(config)} channels, and models of {config.model_type} with other heads than"
            f" {scale} have a scale of their own",
            fix=OWN_FOLDER,
        )


def _head_dim(config: PretrainedConfig) -> int:
    head_dim = getattr(config, "head_dim", None)
    return int(head_dim or config.hidden_size // config.num_attention_heads)


def _rope(config: PretrainedConfig, kind: str = "full_attention") -> dict[str, Any]:
    """The rotary settings, in families with several kinds of layers those of one kind."""
    settings = getattr(config, "rope_parameters", None) or {}
    assert isinstance(settings, dict)
    return dict(settings.get(kind, settings))
