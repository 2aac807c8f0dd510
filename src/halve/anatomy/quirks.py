"""Facts about families that shapes cannot show. The only file that names families.

Add a line here when `halve inspect` refuses an axis that you know how to cut, and the proof passes with it.
`layout` maps the end of a parameter's name to what its dimensions are made of, dimensions separated by commas.
A fused weight whose blocks follow each other in the usual order (q, k, v; gate, up) needs no line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Quirk:
    """What is special about a family."""

    layout: Mapping[str, str] = field(default_factory=dict)
    scaled_embedding: bool = False
    """The code multiplies embeddings by sqrt(hidden), so a cut of `hidden` changes the factor."""
    coupled: bool = False
    """The code runs only with hidden = heads x head_dim, although it builds with other sizes."""


def _projections(read: tuple[str, ...], rows: str, write: tuple[str, ...]) -> dict[str, str]:
    """Matrices whose rows are made of heads, with their biases, and such whose columns are."""
    return {
        **{f"{name}.weight": f"{rows}, hidden" for name in read},
        **{f"{name}.bias": rows for name in read},
        **{f"{name}.weight": "hidden, heads head_dim" for name in write},
    }


_BLOCKS = "heads head_dim + heads head_dim + heads head_dim"
# In some families hidden = heads x head_dim is built into the code, and a dimension of that length may be the one or
# the other. The first guess there, by names that many share; it holds where it has the shape that was solved for.
COUPLED: Mapping[str, str] = {
    **_projections(
        ("q_proj", "k_proj", "v_proj", "query", "key", "value", "Wq", "Wk", "Wv", "q_attn"),
        "heads head_dim",
        (
            "o_proj",
            "out_proj",
            "self_attn.dense",
            "self_attention.dense",
            "attention.dense",
            "attention.output.dense",
            "attn.c_proj",
            "attn.Wo",
        ),
    ),
    **_projections(("query_key_value",), "heads 3 head_dim", ()),
    **_projections(("Wqkv", "qkv_proj"), _BLOCKS, ()),
}
# A second guess: all queries, then one key and one value for all of them.
MULTI_QUERY: Mapping[str, str] = _projections(
    ("query_key_value", "attn.c_attn"), "heads head_dim + head_dim + head_dim", ()
)
# Conv1D stores its weight the other way round.
_COUPLED_GPT2 = {
    "attn.c_attn.weight": f"hidden, {_BLOCKS}",
    "attn.c_attn.bias": _BLOCKS,
    "attn.c_proj.weight": "heads head_dim, hidden",
}

QUIRKS: Mapping[str, Quirk] = {
    "biogpt": Quirk(scaled_embedding=True),
    "bitnet": Quirk(layout={"self_attn.attn_sub_norm.weight": "heads head_dim"}, coupled=True),
    "gemma": Quirk(scaled_embedding=True),
    "gemma2": Quirk(scaled_embedding=True),
    "gemma3_text": Quirk(scaled_embedding=True),
    "gpt2": Quirk(layout=_COUPLED_GPT2),
    "helium": Quirk(coupled=True),
    "openai-gpt": Quirk(layout=_COUPLED_GPT2),
    **dict.fromkeys(
        ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"),
        Quirk(
            layout={"self_attn.q_proj.weight": "heads 2 head_dim, hidden", "self_attn.q_proj.bias": "heads 2 head_dim"}
        ),
    ),
    "vaultgemma": Quirk(scaled_embedding=True),
}

# The names that configs give to an axis, the usual one first. transformers' own `attribute_map` resolves most.
KEYS: Mapping[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "ffn": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff", "dff", "dim_ff"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads"),
    "head_dim": ("head_dim", "d_head"),
    "vocab": ("vocab_size",),
}
# How many positions there are; a model without such a number has no limit.
POSITION_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
# Sizes that must equal another axis and have a key of their own.
FOLLOWERS: Mapping[str, str] = {"word_embed_proj_dim": "hidden"}
# Heads of a recurrent state: the keys of their width and count, whose product is hidden times the third's value.
STATES: tuple[tuple[str, str, str], ...] = (
    ("mamba_d_head", "mamba_n_heads", "mamba_expand"),
    ("mamba_headdim", "n_mamba_heads", "mamba_expand"),
    ("head_dim", "num_heads", "expand"),
)
# What a twin has few of or makes narrow, where these are no axes: experts, those that a token goes to, their neurons.
TWIN_SIZES: Mapping[str, int] = {
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "moe_top_k", "top_k_experts", "n_group"), 2),
    "topk_group": 1,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 32),
    "index_n_heads": 4,
    **dict.fromkeys(("mamba_d_state", "state_size", "mamba_chunk_size", "chunk_size"), 16),
    "rescale_every": 1,
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_intermediate_size", "moe_hidden_size"), 24),
}
EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
# Lists of layer numbers, renumbered when layers go; lists with one entry a layer are found by their length.
INDEX_LISTS = (
    *("mlp_only_layers", "moe_layers", "full_attn_idxs", "attn_layer_indices"),
    *("hybrid_layer_ids", "local_layer_ids"),
)
# Lists whose length says nothing about layers.
OTHER_LISTS = (
    *("eos_token_id", "architectures", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids"),
    *("time_step_limit", "attention_types"),
)
# Runs of kinds, [[kinds, times], ...], that the family's code spells out into a list with an entry a layer.
RUNS: Mapping[str, str] = {"attention_types": "attention_layers"}
# Lists of kinds that repeat until every layer has one.
CYCLES = ("block_types",)
# The first so many layers are of one kind; where a list says it layer by layer as well, the list is cut along, too.
PREFIX_COUNTS = ("max_window_layers", "first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
# The number of the last layer of a kind; -1 means the last layer of the model.
LAST_LAYERS = ("moe_layer_end_index",)
# One layer in so many is of another kind: number % period == offset, or the last of each period where no key says so.
PERIODS: Mapping[str, str | None] = {
    "attn_layer_period": "attn_layer_offset",
    "expert_layer_period": "expert_layer_offset",
    "moe_layer_interval": None,
}
# The last layer of each period is a mixture, but for those that a list of layer numbers excepts.
SPARSE_STEP = ("decoder_sparse_step", "mlp_only_layers")

# GGUF files: llama.cpp's name of an architecture, and transformers' name of its settings. Of these it was measured that
# the model that is read is the one that llama.cpp's converter was given (docs/decisions/0021).
GGUF_ARCHITECTURES: Mapping[str, str] = {
    **{name: name for name in ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "starcoder2")},
    "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
}
# The kind of vocabulary whose text is split by a rule that the file names: the rules that are GPT-2's, and those that
# are GPT-2's with every digit a word of its own. transformers knows the others, or they are refused.
GGUF_BYTE_LEVEL = "gpt2"
GGUF_PLAIN_SPLITS = ("gpt-2", "phi-2", "trillion")
GGUF_DIGITS_APART = ("codeshell", "command-r", "exaone", "mellum2", "minerva-7b", "refact", "smollm", "starcoder")
# Rules by which a word that is an entry is not merged from its parts. llama.cpp puts BOS in front of text by the same
# rules, where a file does not say whether it wants it.
GGUF_WHOLE_WORDS = (
    *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "jina-v5-nano", "lfm2", "midm-2.0"),
    *("pixtral", "tekken"),
)
# The kind of vocabulary in which spaces are entries, and one is put in front of text. Of these transformers puts it
# there itself, or not, as the family wants it.
GGUF_SPACES = "llama"
GGUF_OWN_SPACES = ("gemma2", "gemma3", "phi3")


def quirk(family: str) -> Quirk:
    """The family's entry; an empty one where nothing is special."""
    return QUIRKS.get(family, Quirk())
