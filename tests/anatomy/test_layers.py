"""What a config says of its layers, and that layers keep their kind when others go."""

from __future__ import annotations

from itertools import combinations

import pytest
from families import config
from transformers import AutoConfig, PretrainedConfig, SmolLM3Config

from halve.anatomy import discover
from halve.anatomy.configs import build, resized
from halve.anatomy.kinds import changed, kinds, require_same
from halve.anatomy.lists import layer_lists
from halve.errors import AnatomyError

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}


def smollm3_with_a_longer_list() -> SmolLM3Config:
    """The list of the 36 layers of the released model over a model of eight."""
    longer = [int((layer + 1) % 4 != 0) for layer in range(36)]
    return SmolLM3Config(num_hidden_layers=8, no_rope_layers=longer, vocab_size=128, pad_token_id=None, **SMALL)


def mixture(family: str, layers: int = 8, **changes: object) -> PretrainedConfig:
    return AutoConfig.for_model(family, num_hidden_layers=layers, vocab_size=128, **{**SMALL, **changes})


def test_a_list_longer_than_the_model_is_deep_is_cut_along() -> None:
    teacher = smollm3_with_a_longer_list()
    assert layer_lists(teacher, 8)["no_rope_layers"] == [1, 1, 1, 0, 1, 1, 1, 0]
    student = resized(teacher, {}, kept_layers=(0, 2, 3, 5, 6, 7))
    assert student.no_rope_layers == [1, 1, 0, 1, 1, 0]
    rotated = [layer.self_attn.use_rope for layer in build(student, device="meta").model.layers]
    assert rotated == [1, 1, 0, 1, 1, 0]


def test_a_cycle_of_kinds_is_spelled_out() -> None:
    """Two recurrent layers, one with attention, and so on: whichever layers stay keep their kinds."""
    anatomy = discover(AutoConfig.for_model("recurrent_gemma", num_hidden_layers=7))
    assert "layers" not in anatomy.refusals
    student = resized(anatomy.config, {}, kept_layers=(1, 2, 5, 6))
    assert student.block_types == ["recurrent", "attention", "attention", "recurrent"]


def test_a_list_that_is_too_short_is_what_the_family_makes_of_none() -> None:
    teacher = smollm3_with_a_longer_list()
    teacher.no_rope_layers = []
    assert resized(teacher, {}, kept_layers=(2, 3, 4)).no_rope_layers == [1, 0, 1]


def test_lists_of_other_lengths_that_are_not_about_layers_are_left_alone() -> None:
    teacher = config("llama", eos_token_id=[1, 2, 3], some_list=[1, 2])
    student = resized(teacher, {}, kept_layers=(0, 1))
    assert (student.eos_token_id, student.some_list) == ([1, 2, 3], [1, 2])


@pytest.mark.parametrize(
    ("teacher", "kept", "written"),
    [
        (mixture("deepseek_v3"), (0, 2, 5), {"first_k_dense_replace": 2}),
        (mixture("glm4_moe"), (1, 2, 3), {"first_k_dense_replace": 0}),
        (mixture("ernie4_5_moe", moe_layer_start_index=3, moe_layer_end_index=5), (1, 2, 4, 7), (2, 2)),
        (mixture("afmoe", num_dense_layers=2), (1, 3, 4), {"num_dense_layers": 1}),
        (mixture("llama4_text", interleave_moe_layer_step=2), (1, 2, 5), {"moe_layers": [0, 2]}),
        (mixture("qwen3_moe", decoder_sparse_step=2, mlp_only_layers=[3]), (1, 2, 3, 5), {"mlp_only_layers": [1, 2]}),
        (mixture("jamba", 16, expert_layer_period=4, attn_layer_period=4, attn_layer_offset=0), (0, 4, 8, 12), None),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_counts_and_periods_are_rewritten(
    teacher: PretrainedConfig, kept: tuple[int, ...], written: dict[str, object] | tuple[int, int] | None
) -> None:
    path = "model.layers"
    before = kinds(build(teacher, device="meta").get_submodule(path))
    assert len(set(before)) > 1
    assert changed(before, teacher, path, kept) is None
    student = resized(teacher, {}, kept_layers=kept)
    if isinstance(written, tuple):
        assert (student.moe_layer_start_index, student.moe_layer_end_index) == written
    for name, value in written.items() if isinstance(written, dict) else ():
        assert getattr(student, name) == value


@pytest.mark.parametrize("family", ["deepseek_v3", "llama4_text", "qwen3_next", "ernie4_5_moe", "gpt_neo"])
def test_any_layers_may_go_where_a_config_can_say_so(family: str) -> None:
    own = {"attention_types": [[["global", "local"], 3]]} if family == "gpt_neo" else {}
    teacher = mixture(family, 6, **own) if family != "gpt_neo" else AutoConfig.for_model(family, num_layers=6, **own)
    model = build(teacher, device="meta")
    path = "transformer.h" if family == "gpt_neo" else "model.layers"
    before = kinds(model.get_submodule(path))
    for kept in combinations(range(6), 4):
        assert changed(before, teacher, path, kept) is None, kept


def test_a_rewritten_config_is_read_back_as_it_is() -> None:
    teacher = AutoConfig.for_model("gpt_neo", num_layers=6, attention_types=[[["global", "local"], 3]])
    student = resized(teacher, {}, kept_layers=(0, 2, 3))
    again = type(student).from_dict(student.to_dict())
    assert again.attention_layers == student.attention_layers == ["global", "global", "local"]


def test_a_kind_that_no_config_can_keep_is_refused() -> None:
    teacher = mixture("jamba", attn_layer_period=4, attn_layer_offset=1)
    with pytest.raises(
        AnatomyError, match=r"(?s)cannot keep layers 0, 1, 3.*of jamba\n  why: .*layer 3 would be layer 2"
    ):
        require_same(teacher, "model.layers", (0, 1, 3, 5, 6))
    assert "computes a layer's kind from its number" in discover(teacher).refusals["layers"]


def test_a_first_layer_of_its_own_is_seen_though_every_list_is_cut_along() -> None:
    teacher = mixture("modernbert-decoder", 6, hidden_size=64, pad_token_id=0)
    assert "attn_norm LayerNorm instead of Identity" in discover(teacher).refusals["layers"] or (
        "attn_norm Identity instead of LayerNorm" in discover(teacher).refusals["layers"]
    )
