"""Exact counts of families that a plain product of sizes gets wrong: nothing may fall out, caches are as cached."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from families import config
from transformers import AutoConfig, DeepseekV3Config, FalconConfig, PretrainedConfig, Qwen3NextConfig

from halve.anatomy import Anatomy, Expr, discover, plausible
from halve.anatomy.configs import build, resized
from halve.anatomy.discover import _verify
from halve.errors import AnatomyError, CheckpointError

FALCON_7B = FalconConfig(
    hidden_size=4544, num_attention_heads=71, num_hidden_layers=32, vocab_size=65024, alibi=False, bias=False
)


def check_counts(anatomy: Anatomy) -> None:
    model = build(anatomy.config, device="meta")
    assert set(anatomy.params) == {name for name, _ in model.named_parameters()}
    assert anatomy.ledger.count(anatomy.sizes).params == sum(p.numel() for p in model.parameters())


def cache(anatomy: Anatomy, **sizes: int) -> int | None:
    return anatomy.ledger.count(anatomy.sizes.at(**sizes)).kv_cache_bytes_per_token


def test_deepseek_v3_has_671_billion_parameters_and_37_of_them_are_active() -> None:
    anatomy = discover(DeepseekV3Config())
    check_counts(anatomy)
    counts = anatomy.ledger.count(anatomy.sizes)
    assert counts.params == 671_026_404_352
    assert round(counts.active_params / 1e9, 1) == 37.6  # its card says 37 without the embedding's 0.9
    # a latent vector of 512 and a rotated key of 64 for each of 61 layers, in two bytes
    assert counts.kv_cache_bytes_per_token == 61 * (512 + 64) * 2
    fewer = resized(anatomy.config, {}, kept_layers=(0, 1, 3, 60))
    found = anatomy.ledger.count(anatomy.sizes.at(layers=4), kept_layers=(0, 1, 3, 60))
    assert found.params == sum(p.numel() for p in build(fewer, device="meta").parameters())


def test_falcon_7b_has_one_key_value_head() -> None:
    anatomy = discover(FALCON_7B)
    check_counts(anatomy)
    assert (anatomy.sizes.heads, anatomy.sizes.kv_heads) == (71, 1)
    assert cache(anatomy) == 32 * 2 * 64 * 2
    assert "share one key and value head" in anatomy.refusals["kv_heads"]
    assert anatomy.twin().sizes.kv_heads == 1


def test_layers_with_a_state_cache_nothing() -> None:
    anatomy = discover(Qwen3NextConfig())
    check_counts(anatomy)
    # 12 of 48 layers attend: keys and values of 2 heads of 256, in two bytes
    assert cache(anatomy) == 12 * 2 * 2 * 256 * 2
    first_three = anatomy.ledger.count(anatomy.sizes.at(layers=3), kept_layers=(0, 1, 2))
    assert first_three.kv_cache_bytes_per_token == 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gemma3_text", "gpt_neox"])
def test_a_cache_of_full_heads_follows_the_sizes(family: str) -> None:
    anatomy = discover(config(family))
    sizes = anatomy.sizes
    assert cache(anatomy) == 2 * 2 * sizes.layers * sizes.kv_heads * sizes.head_dim
    heads = {"heads": 2, "kv_heads": 2 if sizes.heads == sizes.kv_heads else 1}
    coupled = {"hidden": 2 * sizes.head_dim} if anatomy.coupled else {}
    assert cache(anatomy, layers=4, **heads, **coupled) == 2 * 2 * 4 * heads["kv_heads"] * sizes.head_dim


def test_a_cache_that_cannot_be_read_is_unknown() -> None:
    assert cache(discover(AutoConfig.for_model("bert", num_hidden_layers=2))) is None


@pytest.mark.parametrize(
    "teacher",
    [
        AutoConfig.for_model("jamba", num_hidden_layers=8),
        AutoConfig.for_model("olmoe", num_hidden_layers=2),
        AutoConfig.for_model("recurrent_gemma", num_hidden_layers=3),
        AutoConfig.for_model("lfm2", num_hidden_layers=2),
        AutoConfig.for_model("bamba", num_hidden_layers=2),
        AutoConfig.for_model("zamba2"),
        AutoConfig.for_model("ernie4_5_moe", num_hidden_layers=3),
        AutoConfig.for_model("glm_moe_dsa", num_hidden_layers=4),
    ],
    ids=lambda teacher: teacher.model_type,
)
def test_nothing_falls_out_of_the_count(teacher: PretrainedConfig) -> None:
    anatomy = discover(teacher)
    check_counts(anatomy)
    if anatomy.unknown:
        assert {"hidden", "ffn", "heads", "kv_heads"} <= set(anatomy.refusals)


def test_a_twin_of_what_is_unknown_is_counted_as_it_is() -> None:
    anatomy = discover(AutoConfig.for_model("recurrent_gemma", num_hidden_layers=3, num_attention_heads=4))
    assert anatomy.unknown
    check_counts(anatomy.twin())


def test_a_count_that_is_not_the_models_is_an_error() -> None:
    anatomy = discover(config("llama"))
    model = build(anatomy.config, device="meta")
    name = anatomy.norms[0] + ".weight"
    wrong = replace(anatomy, params={**anatomy.params, name: (Expr.parse("hidden + 1"),)})
    missing = replace(anatomy, params={n: shape for n, shape in anatomy.params.items() if n != name})
    for broken in (wrong, missing):
        with pytest.raises(AnatomyError, match="cannot count the parameters of llama"):
            _verify(broken, model)


def test_experts_that_rest_are_those_of_the_mixture_alone() -> None:
    """A convolution's weight has three dimensions, too, and every token goes through it."""
    anatomy = discover(AutoConfig.for_model("jamba", num_hidden_layers=2, num_experts=4, num_experts_per_tok=1))
    counts = anatomy.ledger.count(anatomy.sizes)
    sizes = anatomy.sizes
    assert counts.params - counts.active_params == 3 * 3 * sizes.hidden * sizes.ffn


@pytest.mark.parametrize(
    ("family", "name"),
    [("llama", "max_position_embeddings"), ("gpt2", "n_positions"), ("llama", "num_key_value_heads")],
)
def test_a_model_has_at_least_one_of_each(family: str, name: str) -> None:
    with pytest.raises(CheckpointError, match=f"has {name}: 0\n  why: a model has .*\n  fix: take the config.json"):
        plausible.require_plausible(config(family, **{name: 0}), Path("config.json"))
