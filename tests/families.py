"""The families that must be proved, each with a small config of its own class."""

from __future__ import annotations

from transformers import AutoConfig, PretrainedConfig

PROVED = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi",
    "phi3",
    "nemotron",
    "olmo",
    "olmo2",
    "granite",
    "smollm3",
    "starcoder2",
    "gpt_neox",
    "gpt2",
    "stablelm",
    "cohere2",
    "glm4",
]
# Also proved, though nothing is written for them.
ALSO = ["arcee", "seed_oss", "cohere", "olmo3", "apertus", "exaone4", "ernie4_5"]
COUPLED = ("gpt_neox", "gpt2", "stablelm")
LAYER_NORM = ("phi", "nemotron", "olmo", "starcoder2", "gpt_neox", "gpt2", "stablelm", "cohere2", "cohere")
NO_GROUPS = ("gpt_neox", "gpt2")

_SIZES = {"num_hidden_layers": 6, "hidden_size": 96, "num_attention_heads": 6, "vocab_size": 128}
_OWN = {
    "gpt2": {"n_inner": 160},
    "gpt_neox": {"intermediate_size": 160},
    # one layer in four attends to everything, so that lists with an entry a layer are not all alike
    "cohere2": {"layer_types": ["sliding_attention"] * 3 + ["full_attention"] + ["sliding_attention"] * 2},
    "smollm3": {"no_rope_layers": [1, 1, 1, 0, 1, 1]},
}


def config(family: str, **changes: object) -> PretrainedConfig:
    """A config of six small layers whose hidden is not heads x head_dim unless the family's code says so."""
    values: dict[str, object] = {**_SIZES, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
    if family not in NO_GROUPS:
        values |= {"intermediate_size": 160, "num_key_value_heads": 3}
    if family not in COUPLED:
        values["head_dim"] = 20
    return AutoConfig.for_model(family, **{**values, **_OWN.get(family, {}), **changes})
