"""Models written as GGUF, with what llama.cpp's converter does to their weights on the way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, get_tensor_name_map
from gguf import quants as gguf_quants
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerFast

F32, F16, BF16, Q8_0 = (GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q8_0"))
Arrays = dict[str, NDArray[Any]]


def write_gguf(
    model: PreTrainedModel,
    out: Path,
    *,
    architecture: str = "llama",
    tokenizer: PreTrainedTokenizerFast | None = None,
    kind: GGMLQuantizationType = F32,
    changed: Mapping[str, Any] | None = None,
    tensors: Mapping[str, NDArray[Any] | None] | None = None,
) -> Path:
    """Write a model. `changed` settings and `tensors` take the place of its own; None leaves one out."""
    writer = GGUFWriter(out, architecture)
    settings = {**_settings(model, architecture), **_vocabulary(tokenizer, model.config.vocab_size), **(changed or {})}
    for name, value in settings.items():
        if value is not None:
            _add(writer, name, value)
    for name, array in {**converted(model, architecture), **(tensors or {})}.items():
        if array is not None:
            own = kind if array.ndim > 1 else F32
            writer.add_tensor(name, gguf_quants.quantize(array.astype(np.float32), own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def converted(model: PreTrainedModel, architecture: str) -> Arrays:
    """The tensors as llama.cpp wants them, by its names."""
    config = model.config
    number = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(number, config.num_hidden_layers)
    found: Arrays = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for part, array in _parts(name, value.float().numpy()).items():
            if architecture == "llama" and ".q_proj." in part:
                array = in_pairs(array, config.num_attention_heads)
            if architecture == "llama" and ".k_proj." in part:
                array = in_pairs(array, config.num_key_value_heads)
            if architecture.startswith("gemma") and part.endswith("norm.weight"):
                array = array + 1
            theirs = names.get_name(part, try_suffixes=(".weight", ".bias"))
            assert theirs is not None, part
            found[theirs] = array
    return found


def _parts(name: str, array: NDArray[Any]) -> Arrays:
    """Experts lie one behind the other in both, and with gate and up apart in a file."""
    if name.endswith("experts.gate_up_proj"):
        gate, up = np.split(array, 2, axis=1)
        stem = name.removesuffix("gate_up_proj")
        return {f"{stem}gate_proj.weight": gate, f"{stem}up_proj.weight": up}
    if name.endswith("experts.down_proj"):
        return {f"{name}.weight": array}
    return {name: array[0] if name.endswith("shared_expert_gate.weight") else array}


def in_pairs(array: NDArray[Any], heads: int) -> NDArray[Any]:
    """The rows of each head so that those lie side by side which transformers turns with those half a head away."""
    return array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def _settings(model: PreTrainedModel, architecture: str) -> dict[str, Any]:
    config = model.config
    rope = config.rope_parameters
    own = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": getattr(config, "rms_norm_eps", None),
        "attention.layer_norm_epsilon": getattr(config, "norm_epsilon", None),
        "rope.freq_base": float(rope.get("full_attention", rope)["rope_theta"]),
        "rope.freq_base_swa": rope.get("sliding_attention", {}).get("rope_theta"),
        "attention.key_length": getattr(config, "head_dim", None),
        "attention.value_length": getattr(config, "head_dim", None),
        "vocab_size": config.vocab_size,
        "attn_logit_softcapping": getattr(config, "attn_logit_softcapping", None),
        "final_logit_softcapping": getattr(config, "final_logit_softcapping", None),
        "attention.sliding_window": getattr(config, "sliding_window", None),
        "expert_count": getattr(config, "num_experts", None),
        "expert_used_count": getattr(config, "num_experts_per_tok", None),
        "expert_feed_forward_length": getattr(config, "moe_intermediate_size", None),
        "expert_shared_feed_forward_length": getattr(config, "shared_expert_intermediate_size", None),
    }
    if architecture == "llama":
        own["rope.dimension_count"] = config.head_dim
    return {f"{architecture}.{name}": value for name, value in own.items()}


def _vocabulary(tokenizer: PreTrainedTokenizerFast | None, size: int) -> dict[str, Any]:
    if tokenizer is None:
        return {"tokenizer.ggml.model": "none"}
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    assert len(tokens) == size
    special = set(tokenizer.all_special_tokens)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": tokenizer.bos_token_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.chat_template": tokenizer.chat_template,
    }


def _add(writer: GGUFWriter, name: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    elif isinstance(value, list):
        writer.add_array(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    else:
        writer.add_uint32(name, value)
