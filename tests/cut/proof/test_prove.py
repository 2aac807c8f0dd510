from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import ALSO, NO_GROUPS, PROVED, config
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, SmolLM3Config

import halve.cut.proof.prove as proof_module
from halve.anatomy import CUT_AXES, Anatomy, Expr, discover, lists
from halve.anatomy.configs import build
from halve.cut.proof.causal import check_causal
from halve.cut.proof.prove import SAME, fresh_logits, prove
from halve.cut.proof.twins import TwinKind, logits, random_twin, twin_plan
from halve.cut.surgery.trim import trim
from halve.errors import AnatomyError


@pytest.mark.parametrize("family", PROVED + ALSO)
def test_every_axis_is_proved(family: str) -> None:
    proof = prove(discover(config(family)), reopen=False)
    wanted = set(CUT_AXES) - ({"kv_heads"} if family in NO_GROUPS else set())
    assert {check.axis for check in proof.checks} == wanted
    assert {check.axis for check in proof.checks if check.name == "it can be scored"} == wanted
    assert [check for check in proof.checks if not check.passed] == []


def test_trimmed_twins_of_all_families_reopen_in_a_fresh_process(tmp_path: Path) -> None:
    expected, twin = {}, discover(config("llama")).twin()
    for family in PROVED:
        twin = discover(config(family)).twin()
        model = random_twin(twin, seed=0)
        for axis in CUT_AXES:
            if axis in twin.refusals:
                continue
            plan = twin_plan(axis, twin, 0)
            student = trim(model, plan, twin)
            counted = sum(p.numel() for p in student.parameters())
            assert counted == twin.ledger.count(plan.after, kept_layers=plan.layers).params
            student.save_pretrained(tmp_path / f"{family}-{axis}")
            expected[f"{family}-{axis}"] = logits(student, twin)
    found = fresh_logits(tmp_path, list(expected), twin)
    assert len(expected) == 5 * len(PROVED) - len(NO_GROUPS)
    for name, value in expected.items():
        logits_there = found[name]
        assert isinstance(logits_there, Tensor), logits_there
        assert (logits_there - value).abs().max() < SAME, name


def test_a_proof_reopens_in_a_fresh_process_by_itself() -> None:
    proof = prove(discover(config("qwen2")))
    assert sum(check.name == "reopens in plain transformers" for check in proof.checks) == 5
    assert all(check.passed for check in proof.checks)


@pytest.mark.parametrize(
    ("family", "suffix", "broken", "axis"),
    [
        ("phi3", "qkv_proj.weight", "kv_heads head_dim + heads head_dim + kv_heads head_dim, hidden", "heads"),
        ("phi3", "gate_up_proj.weight", "ffn 2, hidden", "ffn"),
        ("gpt_neox", "query_key_value.weight", "heads head_dim + heads head_dim + heads head_dim, hidden", "heads"),
        ("llama", "layernorm.weight", "72", "hidden"),
        ("qwen2", "q_proj.bias", "64", "heads"),
        ("olmo2", "q_norm.weight", "64", "heads"),
    ],
)
def test_a_broken_anatomy_is_refused(family: str, suffix: str, broken: str, axis: str) -> None:
    anatomy = discover(config(family))
    shape = tuple(Expr.parse(dim) for dim in broken.split(","))
    params = {name: shape if name.endswith(suffix) else old for name, old in anatomy.params.items()}
    proof = prove(replace(anatomy, params=params), reopen=False)
    assert axis in proof.refusals
    with pytest.raises(AnatomyError, match=rf"will not cut {axis} of {family}\n  why: the proof failed"):
        proof.demand(anatomy.sizes, anatomy.sizes.at(**{axis: 1}))


def test_leaving_out_any_parameter_shows_clearly() -> None:
    proof = prove(discover(config("llama")), reopen=False)
    controls = [check for check in proof.checks if "leaving out" in check.name]
    assert len(controls) == 4
    assert all(check.measure > 0.1 for check in controls)


def test_a_family_whose_heads_have_places_is_refused() -> None:
    """BLOOM's ALiBi gives every head a slope by its number: heads cannot be permuted, and the proof sees it."""
    proof = prove(discover(AutoConfig.for_model("bloom", hidden_size=64, n_head=4, n_layer=2)), reopen=False)
    assert "the proof failed" in proof.refusals["heads"]
    assert "layers" not in proof.refusals
    assert any(check.axis == "layers" and check.name == "it can be scored" for check in proof.checks)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen3_5_text", {"num_hidden_layers": 4}),  # one layer in four has heads
        ("youtu", {"num_hidden_layers": 2}),  # values are not as wide as head_dim says
        ("openai-gpt", {"n_layer": 2}),  # its neurons are a multiple of hidden
    ],
)
def test_what_is_proved_can_be_scored(family: str, changes: dict[str, Any]) -> None:
    proof = prove(discover(AutoConfig.for_model(family, **changes)), reopen=False)
    scored = {check.axis for check in proof.checks if check.name == "it can be scored" and check.passed}
    assert {"layers", "hidden", "heads"} <= scored
    assert scored == {axis for axis in CUT_AXES if axis not in proof.refusals}


def test_heads_that_never_reach_the_logits_prove_nothing() -> None:
    """Wide heads of DiffLlama overflow in float32, a norm makes zeros of that, and any permutation looks right."""
    anatomy = discover(AutoConfig.for_model("diffllama", num_key_value_heads=8, num_hidden_layers=4))
    dead = TwinKind(torch.float32, square=False, own_heads=True)
    (*_, last) = proof_module._try(anatomy, dead, ["heads"], seed=0, reopen=False)["heads"]
    assert not last.passed
    assert last.detail == "no parameter of it affects the logits"


def test_a_norm_inside_a_layer_stays_as_it_is_where_hidden_is_masked() -> None:
    """DiffLlama's norm over two heads has no weight that would tell its width."""
    twin = discover(AutoConfig.for_model("diffllama", num_key_value_heads=8, num_hidden_layers=4)).twin()
    model = random_twin(twin, seed=0)
    for axis in ("hidden", "ffn"):
        check = proof_module._check_trim(axis, model, twin, 0)
        assert check.passed, check


def test_an_axis_that_cannot_be_scored_is_refused() -> None:
    anatomy = discover(config("llama", num_hidden_layers=2))
    modules = {name: expr for name, expr in anatomy.modules.items() if not name.endswith("1.mlp.down_proj")}
    proof = prove(replace(anatomy, modules=modules), reopen=False)
    assert "it can be scored: no module of layer 1 reads it" in proof.refusals["ffn"]
    assert set(CUT_AXES) - set(proof.refusals) == {"layers", "hidden", "heads", "kv_heads"}


def test_mixtures_prove_what_is_not_refused() -> None:
    proof = prove(discover(AutoConfig.for_model("mixtral", num_hidden_layers=3)), reopen=False)
    assert {check.axis for check in proof.checks if check.passed} == {"layers", "hidden", "heads", "kv_heads"}
    assert "mixture of 8 experts" in proof.refusals["ffn"]


def test_the_twin_hides_nothing() -> None:
    twin = discover(config("qwen2")).twin()
    model = random_twin(twin, seed=0)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float64
        assert parameter.std() > 0.05, name


def test_hybrids_are_refused_by_axis() -> None:
    """Layers of several makes: attention is cut where there is some, also with a gate beside every query."""
    teacher = AutoConfig.for_model("qwen3_next", num_hidden_layers=4)
    proof = prove(discover(teacher), reopen=False)
    assert {"layers", "heads", "kv_heads"}.isdisjoint(proof.refusals)
    assert "mixture" in proof.refusals["ffn"]
    # kinds by index arithmetic: no period makes of the layers that stay what they were
    proof = prove(discover(AutoConfig.for_model("jamba", num_hidden_layers=8, num_experts=4)), reopen=False)
    assert "computes a layer's kind from its number" in proof.refusals["layers"]
    assert not {"heads", "kv_heads"} & set(proof.refusals)


def test_the_twin_of_a_list_that_is_too_long_has_one_too() -> None:
    """A cut that left such a list alone would move rotation to other layers: only a twin that has one shows it."""
    longer = [int((layer + 1) % 4 != 0) for layer in range(36)]
    small = {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 6, "num_key_value_heads": 3}
    anatomy = discover(
        SmolLM3Config(num_hidden_layers=8, no_rope_layers=longer, vocab_size=128, pad_token_id=None, **small)
    )
    twin = anatomy.twin()
    assert len(twin.config.no_rope_layers) == len(longer[8:12]) + twin.sizes.layers
    proof = prove(anatomy, reopen=False)
    assert [check for check in proof.checks if check.axis == "layers" and check.passed]


def test_layers_that_would_change_their_kind_are_not_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were lists of other lengths left as they are, the proof would fail and the cut would be refused."""
    longer = [int((layer + 1) % 4 != 0) for layer in range(36)]
    anatomy = discover(config("smollm3", no_rope_layers=longer))
    monkeypatch.setattr(lists, "layer_lists", lambda found, count: {"layer_types": found.layer_types})
    proof = prove(replace(anatomy, family="with the old lists"), reopen=False)
    assert "the proof failed" in proof.refusals["layers"]


@pytest.mark.parametrize("family", ["deepseek_v3", "ernie4_5_moe", "llama4_text"])
def test_layers_of_dense_first_and_interleaved_mixtures_are_proved(family: str) -> None:
    experts = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1} if family == "deepseek_v3" else {}
    own = {
        "deepseek_v3": {"num_experts_per_tok": 2, "moe_intermediate_size": 32},
        "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32},
        "llama4_text": {"num_local_experts": 4, "interleave_moe_layer_step": 2},
    }[family]
    teacher = AutoConfig.for_model(family, num_hidden_layers=6, **experts, **own)
    proof = prove(discover(teacher), reopen=False)
    assert "layers" not in proof.refusals
    assert [check for check in proof.checks if check.axis == "layers"]


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_model_that_looks_ahead_is_refused(family: str) -> None:
    small = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    anatomy = discover(AutoConfig.for_model(family, vocab_size=128, **small))
    for ask in (prove, check_causal):
        with pytest.raises(AnatomyError, match=rf"{family} is no causal.*\n.*later token.*\n  fix: .*is_decoder"):
            ask(anatomy)
    check_causal(discover(AutoConfig.for_model(family, vocab_size=128, is_decoder=True, **small)))


def test_tables_that_the_code_computes_are_no_weights() -> None:
    """MiniMax saves its causal decays as buffers: drawn at random they would let it look ahead."""
    small = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    check_causal(discover(small_config("minimax", intermediate_size=96, num_local_experts=4, **small)))


def test_no_decoder_is_taken_for_one_that_looks_ahead() -> None:
    for family in ("llama", "gemma3_text", "gpt2", "cohere2"):
        check_causal(discover(config(family)))


def small_config(family: str, **changes: object) -> PretrainedConfig:
    return AutoConfig.for_model(family, vocab_size=128, pad_token_id=None, bos_token_id=1, eos_token_id=2, **changes)


@pytest.mark.parametrize(
    ("family", "changes", "twin"),
    [
        # a rotary part of 64 channels does not fit in the small heads of the first twin
        ("gptj", {"n_layer": 2, "n_embd": 256, "n_head": 2, "n_inner": 96}, "float64, heads of the family's size"),
        # its mask holds the least float64, which its float32 softmax cannot
        ("xglm", {"num_layers": 2, "d_model": 64, "attention_heads": 4, "ffn_dim": 96}, "float32"),
        ("llama", {"num_hidden_layers": 2}, "float64"),
    ],
)
def test_a_twin_that_does_not_run_takes_no_axis_away(family: str, changes: dict[str, Any], twin: str) -> None:
    proof = prove(discover(small_config(family, **changes)), reopen=False)
    assert {check.twin for check in proof.checks if check.passed and check.axis == "ffn"} == {twin}
    assert not {"layers", "ffn"} & set(proof.refusals)


def test_code_that_wants_hidden_to_be_heads_times_head_dim_is_proved_on_such_a_twin() -> None:
    """Helium's output projection is hidden x hidden: without a word in quirks layers and ffn are cut all the same."""
    changes = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    anatomy = discover(small_config("helium", intermediate_size=96, head_dim=16, **changes))
    naive = replace(anatomy, coupled=False)
    proof = prove(naive, reopen=False)
    assert {check.twin for check in proof.checks if check.passed and check.axis == "layers"} == {
        "float64, hidden = heads x head_dim"
    }


def test_a_refusal_has_its_check_on_every_twin() -> None:
    proof = prove(discover(AutoConfig.for_model("bloom", hidden_size=64, n_head=4, n_layer=2)), reopen=False)
    failed = [check for check in proof.checks if check.axis == "heads"]
    assert not any(check.passed for check in failed)
    assert len({check.twin for check in failed}) == len(failed) == 2  # coupled code has square twins only
    assert proof.refusals["heads"].endswith("(on every twin: 2 tried)")


def test_an_axis_that_does_not_reopen_takes_no_other_away(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = proof_module.fresh_logits

    def one_breaks(scratch: Path, names: list[str], twin: Anatomy) -> dict[str, Tensor | str]:
        (scratch / "ffn" / "model.safetensors").write_bytes(b"")
        return whole(scratch, names, twin)

    monkeypatch.setattr(proof_module, "fresh_logits", one_breaks)
    monkeypatch.setattr(proof_module, "KINDS", proof_module.KINDS[:2])  # a process each
    proof = prove(discover(config("llama", num_hidden_layers=2)), seed=1)
    assert "reopens in plain transformers" in proof.refusals["ffn"]
    assert {"layers", "hidden", "heads", "kv_heads"}.isdisjoint(proof.refusals)


@pytest.mark.parametrize(
    ("family", "changes", "proved"),
    [
        ("mamba", {"num_hidden_layers": 3}, {"layers", "hidden", "ffn"}),
        ("mamba2", {"num_hidden_layers": 3}, {"layers"}),
        ("bamba", {"num_hidden_layers": 3, "attn_layer_indices": [1]}, {"layers", "ffn", "heads", "kv_heads"}),
    ],
)
def test_recurrent_families_are_proved_by_axis(family: str, changes: dict[str, Any], proved: set[str]) -> None:
    proof = prove(discover(AutoConfig.for_model(family, **changes)), reopen=False)
    assert set(CUT_AXES) - set(proof.refusals) == proved


@pytest.mark.parametrize("family", ["falcon", "gpt_bigcode"])
def test_queries_with_one_key_and_value_are_cut(family: str) -> None:
    """One matrix makes all queries and one key and value; hidden and heads go together."""
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
    proof = prove(discover(AutoConfig.for_model(family, **sizes)), reopen=False)
    assert {"layers", "hidden", "heads", "ffn"}.isdisjoint(proof.refusals)
    assert "share one key and value head" in proof.refusals["kv_heads"]


def test_latent_and_indexed_attention_have_small_twins() -> None:
    anatomy = discover(AutoConfig.for_model("deepseek_v32", num_hidden_layers=2, first_k_dense_replace=1))
    model = build(anatomy.twin(own_heads=True).config, device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000


def test_an_axis_under_another_name_is_not_made_small_as_well() -> None:
    """What deepseek_v4 calls the width of its experts is ffn: the twin's ffn is its width."""
    twin = discover(AutoConfig.for_model("deepseek_v4", num_hidden_layers=2)).twin()
    assert twin.config.moe_intermediate_size == twin.config.intermediate_size == twin.sizes.ffn


def test_twins_of_mixtures_are_small() -> None:
    """256 experts of a width of their own: the twin has four, and numbers in its shapes are those of four."""
    sizes = {"num_hidden_layers": 2, "num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 512}
    anatomy = discover(AutoConfig.for_model("qwen3_moe", **sizes))
    twin = anatomy.twin()
    model = random_twin(twin, seed=0)
    assert sum(parameter.numel() for parameter in model.parameters()) < 200_000
    for name, parameter in model.named_parameters():
        assert tuple(expr.size(twin.sizes.sizes) for expr in twin.params[name]) == tuple(parameter.shape), name
    assert {check.axis for check in prove(anatomy, reopen=False).checks if check.passed} >= {"layers", "heads"}
