"""Configs of published models by transformers' own classes, with the sizes that their config.json names."""

from __future__ import annotations

from typing import Any

from transformers import Gemma3TextConfig, LlamaConfig, PretrainedConfig, Qwen3Config


def _llama3(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def published(name: str) -> PretrainedConfig:
    """The config of the model with this name on the hub."""
    config = _CONFIGS[name]()
    config.dtype = "bfloat16"
    return config


_CONFIGS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": lambda: LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
    ),
    "meta-llama/Llama-3.2-1B-Instruct": lambda: LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131_072,
        rms_norm_eps=1e-5,
        rope_parameters=_llama3(32.0),
        tie_word_embeddings=True,
    ),
    "meta-llama/Llama-3.1-8B": lambda: LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131_072,
        rms_norm_eps=1e-5,
        rope_parameters=_llama3(8.0),
        tie_word_embeddings=False,
    ),
    "Qwen/Qwen3-0.6B": lambda: Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40_960,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
    ),
    "google/gemma-3-1b-it": lambda: Gemma3TextConfig(
        architectures=["Gemma3ForCausalLM"],
        vocab_size=262_144,
        hidden_size=1152,
        intermediate_size=6912,
        num_hidden_layers=26,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        max_position_embeddings=32_768,
        rms_norm_eps=1e-6,
        sliding_window=512,
        query_pre_attn_scalar=256,
        tie_word_embeddings=True,
    ),
}
