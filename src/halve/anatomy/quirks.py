"""What a family's shapes cannot tell. The only file that names families.

Add a line here when `halve inspect` refuses an axis that you know how to cut, and the proof passes with it.
`layout` maps the end of a parameter's name to what its dimensions are made of, dimensions separated by commas.
A fused weight whose blocks simply follow each other (q, k, v; gate, up) needs no line: that is the first guess.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Quirk:
    """What is special about a family."""

    layout: Mapping[str, str] = field(default_factory=dict)
    scaled_embedding: bool = False
    """The code multiplies embeddings by sqrt(hidden), so that a cut of `hidden` changes the factor."""


# In these families hidden = heads x head_dim is built into the code, and a dimension of that
# length may be the one or the other.
_COUPLED_GPT2 = {
    "attn.c_attn.weight": "hidden, heads head_dim + heads head_dim + heads head_dim",
    "attn.c_attn.bias": "heads head_dim + heads head_dim + heads head_dim",
    "attn.c_proj.weight": "heads head_dim, hidden",
}
_COUPLED_NEOX = {
    "attention.query_key_value.weight": "heads 3 head_dim, hidden",
    "attention.query_key_value.bias": "heads 3 head_dim",
    "attention.dense.weight": "hidden, heads head_dim",
}
_COUPLED_BLOOM = {
    "self_attention.query_key_value.weight": "heads 3 head_dim, hidden",
    "self_attention.query_key_value.bias": "heads 3 head_dim",
    "self_attention.dense.weight": "hidden, heads head_dim",
}
_COUPLED_STABLELM = {
    "self_attn.q_proj.weight": "heads head_dim, hidden",
    "self_attn.q_proj.bias": "heads head_dim",
    "self_attn.o_proj.weight": "hidden, heads head_dim",
}
_COUPLED_OPT = {
    "self_attn.q_proj.weight": "heads head_dim, hidden",
    "self_attn.q_proj.bias": "heads head_dim",
    "self_attn.k_proj.weight": "heads head_dim, hidden",
    "self_attn.k_proj.bias": "heads head_dim",
    "self_attn.v_proj.weight": "heads head_dim, hidden",
    "self_attn.v_proj.bias": "heads head_dim",
    "self_attn.out_proj.weight": "hidden, heads head_dim",
}

QUIRKS: Mapping[str, Quirk] = {
    "bloom": Quirk(layout=_COUPLED_BLOOM),
    "gemma": Quirk(scaled_embedding=True),
    "gemma2": Quirk(scaled_embedding=True),
    "gemma3_text": Quirk(scaled_embedding=True),
    "gpt2": Quirk(layout=_COUPLED_GPT2),
    "gpt_neox": Quirk(layout=_COUPLED_NEOX),
    "opt": Quirk(layout=_COUPLED_OPT),
    "stablelm": Quirk(layout=_COUPLED_STABLELM),
}

# The names that configs give to an axis, the usual one first. transformers' own `attribute_map` resolves most.
KEYS: Mapping[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "ffn": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff"),
    "heads": ("num_attention_heads", "n_head"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads"),
    "head_dim": ("head_dim",),
    "vocab": ("vocab_size",),
}
# Sizes that must equal another axis and have a key of their own.
FOLLOWERS: Mapping[str, str] = {"word_embed_proj_dim": "hidden"}
EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
# Lists of layer numbers, renumbered when layers go; lists with one entry a layer are found by their length.
INDEX_LISTS = ("mlp_only_layers",)
# Lists whose length says nothing about layers.
OTHER_LISTS = ("eos_token_id", "architectures", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids")
# The first so many layers attend to everything; used only where no list says it layer by layer.
PREFIX_COUNTS = ("max_window_layers",)


def quirk(family: str) -> Quirk:
    """The family's entry; an empty one where nothing is special."""
    return QUIRKS.get(family, Quirk())
