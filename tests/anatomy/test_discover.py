from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from families import ALSO, COUPLED, PROVED, config
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from halve.anatomy import Anatomy, discover
from halve.anatomy.configs import build, resized
from halve.anatomy.discover import _looked_at
from halve.anatomy.lists import layer_lists
from halve.errors import AnatomyError, HalveError, PlanError


def made_of(anatomy: Anatomy, suffix: str) -> str:
    name = next(name for name in anatomy.params if name.endswith(suffix))
    return ", ".join(str(expr) for expr in anatomy.params[name])


@pytest.mark.parametrize(
    ("family", "suffix", "expected"),
    [
        ("llama", "q_proj.weight", "heads head_dim, hidden"),
        ("llama", "down_proj.weight", "hidden, ffn"),
        ("phi3", "qkv_proj.weight", "heads head_dim + kv_heads head_dim + kv_heads head_dim, hidden"),
        ("phi3", "gate_up_proj.weight", "ffn + ffn, hidden"),
        ("gpt2", "c_attn.weight", "hidden, heads head_dim + heads head_dim + heads head_dim"),
        ("gpt_neox", "query_key_value.weight", "heads 3 head_dim, hidden"),
        ("olmo2", "q_norm.weight", "heads head_dim"),
        ("qwen3", "q_norm.weight", "head_dim"),
        ("stablelm", "k_proj.weight", "kv_heads head_dim, hidden"),
        ("gpt2", "wpe.weight", "1024, hidden"),
    ],
)
def test_what_weights_are_made_of(family: str, suffix: str, expected: str) -> None:
    assert made_of(discover(config(family)), suffix) == expected


@pytest.mark.parametrize("family", PROVED + ALSO)
def test_every_parameter_is_known_and_counted(family: str) -> None:
    anatomy = discover(config(family))
    model = build(anatomy.config, device="meta")
    assert set(anatomy.params) == {name for name, _ in model.named_parameters()}
    counts = anatomy.ledger.count(anatomy.sizes)
    assert counts.params == sum(p.numel() for p in model.parameters())
    assert anatomy.coupled == (family in COUPLED)
    assert anatomy.tied == bool(anatomy.config.tie_word_embeddings)
    # the points that importance is read at exist in every layer
    for axis in ("hidden", "ffn", "heads"):
        assert all(anatomy.readers(axis)), axis


@settings(max_examples=25)
@given(
    family=st.sampled_from([family for family in PROVED if family not in COUPLED]),
    hidden=st.integers(2, 12),
    ffn=st.integers(1, 99),
    heads=st.sampled_from([(2, 1), (4, 2), (6, 3), (3, 3)]),
    layers=st.sets(st.integers(0, 5), min_size=1),
)
def test_counts_at_any_sizes_equal_the_model_that_is_built(
    family: str, hidden: int, ffn: int, heads: tuple[int, int], layers: set[int]
) -> None:
    anatomy = discover(config(family))
    sizes = {"hidden": hidden * 12, "ffn": ffn, "heads": heads[0], "kv_heads": heads[1], "head_dim": 20}
    kept = tuple(sorted(layers))
    model = build(resized(anatomy.config, sizes, kept_layers=kept), device="meta")
    counts = anatomy.ledger.count(anatomy.sizes.at(**sizes, layers=len(kept)), kept_layers=kept)
    assert counts.params == sum(p.numel() for p in model.parameters())
    tables = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    assert counts.non_embedding == sum(p.numel() for p in model.parameters() if id(p) not in tables)


def test_a_family_that_no_code_knows() -> None:
    class UnheardOfConfig(LlamaConfig):
        model_type = "unheard_of"

    class UnheardOfForCausalLM(LlamaForCausalLM):
        config_class = UnheardOfConfig

    AutoConfig.register("unheard_of", UnheardOfConfig)
    AutoModelForCausalLM.register(UnheardOfConfig, UnheardOfForCausalLM)
    anatomy = discover(config("unheard_of"))
    assert anatomy.family == "unheard_of"
    assert made_of(anatomy, "o_proj.weight") == "hidden, heads head_dim"
    assert not {"layers", "hidden", "ffn", "heads", "kv_heads"} & set(anatomy.refusals)


def test_mixtures_are_refused_by_axis() -> None:
    anatomy = discover(AutoConfig.for_model("mixtral", num_hidden_layers=2))
    assert "mixture of 8 experts" in anatomy.refusals["ffn"]
    assert "hidden" not in anatomy.refusals
    assert anatomy.mixers[:2] == ("model.layers.0.mlp.gate", "model.layers.0.mlp.experts")
    counts = anatomy.ledger.count(anatomy.sizes)
    expert = 2 * 8 * 3 * 4096 * 14336
    assert counts.active_params == counts.params - expert * 6 // 8


def test_what_cannot_be_cut_alone_is_said() -> None:
    assert "every query head has its own" in discover(config("gpt2")).refusals["kv_heads"]
    assert "rotary" in discover(config("llama")).refusals["head_dim"]


def test_a_coupled_family_that_no_guess_fits_is_refused_by_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    for guesses in ("COUPLED", "MULTI_QUERY"):
        monkeypatch.setattr(sys.modules[_looked_at.__module__], guesses, {})
    teacher = AutoConfig.for_model("falcon", num_hidden_layers=2, hidden_size=64, num_attention_heads=4)
    anatomy = _looked_at(teacher)  # past what this process knows of equal configs
    assert "shapes cannot tell the two apart" in anatomy.refusals["hidden"]
    assert "shapes cannot tell the two apart" in anatomy.refusals["heads"]
    assert "ffn" not in anatomy.refusals


def test_a_model_that_is_no_decoder_is_refused() -> None:
    with pytest.raises(AnatomyError, match=r"cannot build t5 as a causal language model"):
        discover(AutoConfig.for_model("t5"))


@pytest.mark.parametrize(
    ("family", "message"),
    [
        (
            "gemma3",
            r"gemma3 wraps a language model in other parts\n  why: .*gemma3_text.*vision_config.*\n  fix: save the",
        ),
        ("gemma4_text", "cannot find out what gemma4_text is made of"),
    ],
)
def test_what_is_no_plain_decoder_is_refused_in_three_lines(family: str, message: str) -> None:
    with pytest.raises(HalveError, match=message):
        discover(AutoConfig.for_model(family))


def test_a_family_without_attention_has_no_heads() -> None:
    anatomy = discover(AutoConfig.for_model("mamba", num_hidden_layers=2))
    assert "counts no heads" in anatomy.refusals["heads"]
    assert "counts no heads" in anatomy.refusals["kv_heads"]
    assert not {"layers", "hidden", "ffn"} & set(anatomy.refusals)
    assert made_of(anatomy, "in_proj.weight") == "ffn + ffn, hidden"
    counts = anatomy.ledger.count(anatomy.sizes)
    assert counts.params == sum(p.numel() for p in build(anatomy.config, device="meta").parameters())
    assert not hasattr(anatomy.twin().config, "head_dim")


@pytest.mark.parametrize(
    ("family", "changes", "width"),
    [
        ("bamba", {"attn_layer_indices": [1], "num_hidden_layers": 3}, "mamba_d_head"),
        ("mamba2", {"num_hidden_layers": 2}, "head_dim"),
    ],
)
def test_widths_of_recurrent_states_follow_hidden(family: str, changes: dict[str, Any], width: str) -> None:
    """Their validators want as many channels in the state as hidden has, expanded: no other sizes would build."""
    teacher = AutoConfig.for_model(family, **changes)
    anatomy = discover(teacher)
    assert not [reason for reason in anatomy.refusals.values() if "builds at no other sizes" in reason]
    assert "layers" not in anatomy.refusals
    twin = anatomy.twin().config
    assert getattr(twin, width) < getattr(teacher, width)
    twin.validate()
    assert getattr(resized(teacher, {"hidden": teacher.hidden_size // 2}), width) == getattr(teacher, width) // 2


def test_groups_are_even_at_every_point() -> None:
    """Differential attention splits them in two."""
    anatomy = discover(AutoConfig.for_model("diffllama", num_hidden_layers=2, num_key_value_heads=8))
    assert not {"hidden", "ffn", "heads", "kv_heads"} & set(anatomy.refusals)


@pytest.mark.parametrize("family", ["gemma3_text", "cohere2", "smollm3", "qwen2"])
def test_lists_with_an_entry_a_layer_are_cut_along(family: str) -> None:
    teacher = config(family)
    student = resized(teacher, {}, kept_layers=(0, 3, 5))
    assert layer_lists(teacher, 6)
    for name, values in layer_lists(teacher, 6).items():
        assert getattr(student, name) == [values[i] for i in (0, 3, 5)], name


def test_layer_numbers_are_renumbered() -> None:
    teacher = AutoConfig.for_model("qwen3_moe", num_hidden_layers=6, mlp_only_layers=[1, 4])
    assert resized(teacher, {}, kept_layers=(0, 4, 5)).mlp_only_layers == [1]


def test_sizes_that_the_family_refuses() -> None:
    with pytest.raises(PlanError, match="llama does not accept hidden 97"):
        resized(config("llama"), {"hidden": 97})


def test_discovery_reads_no_weights_and_changes_no_config() -> None:
    teacher = config("gemma3_text")
    before = teacher.to_dict()
    anatomy = discover(teacher)
    twin = anatomy.twin()
    assert teacher.to_dict() == before
    assert twin.sizes.hidden < teacher.hidden_size
    assert torch.device("meta") == build(teacher, device="meta").device
