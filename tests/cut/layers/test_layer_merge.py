"""LaCo: the formula by hand, merged models, and the search on hand-made similarities."""

from __future__ import annotations

import math

import pytest
import torch
from families import config
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from halve.anatomy import Anatomy, discover
from halve.cut.layers.layer_merge import (
    Merge,
    apply_merges,
    collapse,
    kept_after,
    laco,
    laco_search,
    merge_layers,
    merges_of,
)
from halve.cut.plan.plan import select
from halve.cut.proof.twins import RandomScores, random_twin
from halve.cut.score.calibration import Calibration
from halve.cut.score.importance import token_cosine
from halve.cut.surgery.trim import trim
from halve.errors import AnatomyError, CheckpointError, CorpusError, PlanError

LAYERS = 6
Made = tuple[PreTrainedModel, Anatomy]


@pytest.fixture(scope="module")
def llama() -> Made:
    anatomy = discover(config("llama"))
    return random_twin(anatomy, seed=3), anatomy


@pytest.fixture(scope="module")
def samples() -> Tensor:
    return torch.randint(128, (3, 10), generator=torch.Generator().manual_seed(0))


def state(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def test_the_formula_by_hand() -> None:
    a, b, c = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[2.0, 2.0], [0.0, 1.0]]), torch.full((2, 2), 5.0)
    # 1 + (2 - 1) + (5 - 1) = 6; 2 + 0 + 3 = 5; 3 - 3 + 2 = 2; 4 - 3 + 1 = 2
    assert laco(a, [b, c]).tolist() == [[6.0, 5.0], [2.0, 2.0]]
    assert laco(a, []).equal(a)
    assert laco(a, [b]).equal(b)
    assert laco(a, [b, c]).equal(b + c - a)


def test_bfloat16_is_rounded_once() -> None:
    a = torch.tensor([256.0], dtype=torch.bfloat16)
    others = [torch.tensor([257.0 + 1.0]).bfloat16()] * 3
    small = [torch.tensor([v], dtype=torch.bfloat16) for v in (0.5, 0.5, 0.5)]
    assert laco(torch.zeros(1).bfloat16(), [*others, *small]).float().item() == 776.0  # 775.5 in steps of 4
    assert laco(a, small).dtype == torch.bfloat16


def test_groups_follow_from_kept_layers() -> None:
    assert merges_of([0, 1, 2], 3) == ()
    assert merges_of([1, 2, 5], 8) == (Merge(2, (3, 4)), Merge(5, (6, 7)))
    assert kept_after(merges_of([0, 3], 6), 6) == (0, 3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "olmo2"])
def test_kept_layers_carry_the_differences(family: str) -> None:
    anatomy = discover(config(family))
    model = random_twin(anatomy, seed=3)
    before = state(model)
    merged = merge_layers(model, anatomy, [1, 4])
    assert same(before, state(model)), "the teacher was changed"
    changed = 0
    for name, value in merged.named_parameters():
        layer = anatomy.layer_of(name)
        want = before[name]
        if layer in (1, 4):
            behind = {1: (2, 3), 4: (5,)}[layer]
            want = before[name] + sum(before[anatomy.in_layer(name, k)] - before[name] for k in behind)
            changed += 1
        torch.testing.assert_close(value.detach(), want, rtol=0, atol=1e-12)
    assert changed == 2 * len([n for n in before if anatomy.layer_of(n) == 0 and n in dict(model.named_parameters())])
    after = anatomy.sizes.at(layers=2)
    plan = select(anatomy, after, RandomScores(anatomy.sizes, 0), gain="none", kept_layers=[1, 4])
    student = trim(merged, plan, anatomy)
    names = [n for n in before if anatomy.layer_of(n) == 4]
    assert names
    for name in names:
        assert student.state_dict()[anatomy.in_layer(name, 1)].equal(merged.state_dict()[name])


def test_nothing_removed_changes_nothing(llama: Made) -> None:
    model, anatomy = llama
    assert same(state(merge_layers(model, anatomy, range(LAYERS))), state(model))


def test_merges_build_on_each_other(llama: Made) -> None:
    model, anatomy = llama
    twice = apply_merges(model, anatomy, [Merge(3, (4, 5)), Merge(1, (2, 3))])
    name = "model.layers.1.mlp.up_proj.weight"
    old = [model.state_dict()[anatomy.in_layer(name, i)] for i in range(LAYERS)]
    third = laco(old[3], [old[4], old[5]])
    assert twice.state_dict()[name].equal(laco(old[1], [old[2], third]))
    assert not twice.state_dict()[name].equal(merge_layers(model, anatomy, [0, 1]).state_dict()[name])


def test_layers_of_different_make_are_refused() -> None:
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 64, "num_experts": 4, "num_experts_per_tok": 2,
             "moe_intermediate_size": 32, "mlp_only_layers": [0, 1], "head_dim": 12}  # fmt: skip
    anatomy = discover(AutoConfig.for_model("qwen3_moe", **sizes))
    model = random_twin(anatomy, seed=0)
    assert merge_layers(model, anatomy, [0, 2])
    with pytest.raises(AnatomyError, match="cannot merge layers 2 into layer 1") as caught:
        merge_layers(model, anatomy, [0, 1, 3])
    assert "mlp" in caught.value.why


# ---- the search


def test_algorithm_1_by_hand() -> None:
    tried: list[tuple[Merge, ...]] = []
    good = {Merge(4, (5, 6)), Merge(2, (3, 4)), Merge(0, (1,))}

    def similarity(merges: tuple[Merge, ...]) -> float:
        tried.append(merges)
        return 0.9 if merges[-1] in good else 0.2

    found = collapse(8, 3, combine=3, interval=2, threshold=0.8, similarity=similarity)
    # 5 takes in 6 and 7: refused; 4 takes in 5 and 6: left 0 1 2 3 4 7; next place 2 (of 6 left, 3 are behind or at it)
    # 2 takes in 3 and 4: left 0 1 2 7; next place 0: one layer is left to go
    assert [merges[-1] for merges in tried] == [Merge(5, (6, 7)), Merge(4, (5, 6)), Merge(2, (3, 4)), Merge(0, (1,))]
    assert found == (Merge(4, (5, 6)), Merge(2, (3, 4)), Merge(0, (1,)))
    assert kept_after(found, 8) == (0, 2, 7)


def test_nothing_is_similar_enough() -> None:
    places: list[int] = []

    def similarity(merges: tuple[Merge, ...]) -> float:
        places.append(merges[-1].into)
        return 0.8

    assert collapse(8, 2, combine=4, interval=2, threshold=0.8, similarity=similarity) == ()
    assert places == [4, 3, 2, 1, 0]


def test_the_last_merge_does_not_overshoot() -> None:
    found = collapse(10, 8, combine=4, interval=2, threshold=0.0, similarity=lambda _: 1.0)
    assert found == (Merge(6, (7, 8)),)
    short = collapse(3, 2, combine=4, interval=1, threshold=0.0, similarity=lambda _: 1.0)
    assert short == (Merge(0, (1,)),)


@pytest.mark.parametrize("layers", [5, 3, 1])
def test_the_search_reaches_the_number_of_layers(llama: Made, samples: Tensor, layers: int) -> None:
    model, anatomy = llama
    before = state(model)
    found = laco_search(Calibration(model, anatomy, samples, 2), layers=layers, combine=3, interval=1)
    assert same(before, state(model)), "the search left something behind"
    assert len(found.kept) == layers
    assert kept_after(found.merges, LAYERS) == found.kept
    merged = apply_merges(model, anatomy, found.merges)
    after = anatomy.sizes.at(layers=layers)
    plan = select(anatomy, after, RandomScores(anatomy.sizes, 0), gain="none", kept_layers=found.kept)
    student = trim(merged, plan, anatomy)
    with torch.no_grad():
        pair = [m.base_model(samples, use_cache=False)[0] for m in (student, model)]
    assert found.similarity == pytest.approx(token_cosine(*pair).mean().item(), abs=1e-6)
    assert found.similarity > found.threshold
    micro = laco_search(Calibration(model, anatomy, samples, 3), layers=layers, combine=3, interval=1)
    assert micro.merges == found.merges


def test_another_rule_merges_and_searches(llama: Made, samples: Tensor) -> None:
    model, anatomy = llama
    old = state(model)
    new = apply_merges(model, anatomy, [Merge(1, (2, 3))], rule=lambda first, following: following[-1]).state_dict()
    for name in (n for n in old if anatomy.layer_of(n) == 1):
        assert new[name].equal(old[anatomy.in_layer(name, 3)]), name
    assert same(old, state(model))
    found = laco_search(
        Calibration(model, anatomy, samples, 3), layers=3, combine=3, interval=1, rule=lambda first, following: first
    )
    merged = apply_merges(model, anatomy, found.merges, rule=lambda first, following: first).state_dict()
    assert all(merged[name].equal(old[name]) for name in old)


def test_a_similar_layer_is_found(samples: Tensor) -> None:
    anatomy = discover(config("llama"))
    model = random_twin(anatomy, seed=3)
    with torch.no_grad():
        for i in (1, 2, 4, 5):  # layers that pass their input on
            for name in ("self_attn.o_proj", "mlp.down_proj"):
                model.get_submodule(f"model.layers.{i}.{name}").weight.zero_()
    found = laco_search(Calibration(model, anatomy, samples, 3), layers=4, combine=2, interval=1)
    # one layer taken in replaces the one in front of it: 3 takes the place of 2, which did nothing
    assert found.merges == (Merge(4, (5,)), Merge(2, (3,)))
    assert found.similarity == pytest.approx(1.0)
    assert found.threshold == 0.95


def test_a_measurement_is_made_once(llama: Made, samples: Tensor) -> None:
    model, anatomy = llama
    found = laco_search(Calibration(model, anatomy, samples, 3), layers=5, combine=2, interval=1, threshold=0.999)
    assert found.threshold < 0.999 - 0.05
    # one whole pass, and at most five places with one layer less
    assert found.passes <= 1 + 5 * 5 / 6 + 1e-9


def test_weights_come_back_after_an_exception(llama: Made, samples: Tensor) -> None:
    model, anatomy = llama
    before = state(model)
    calls = [0]

    def stop(*_: object) -> None:
        calls[0] += 1
        if calls[0] == 5:
            raise KeyboardInterrupt

    handle = model.model.norm.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        laco_search(Calibration(model, anatomy, samples, 3), layers=2, combine=3, interval=1)
    handle.remove()
    assert same(before, state(model))


@pytest.mark.parametrize("layers", [0, 6])
def test_a_number_of_layers_that_makes_no_sense(llama: Made, samples: Tensor, layers: int) -> None:
    with pytest.raises(PlanError, match=f"cannot collapse 6 layers to {layers}"):
        laco_search(Calibration(*llama, samples, 2), layers=layers)


def test_what_cannot_be_reached_is_said(llama: Made, samples: Tensor) -> None:
    with pytest.raises(PlanError, match="cannot collapse 6 layers to 1") as caught:
        laco_search(Calibration(*llama, samples, 3), layers=1, combine=2, interval=3)
    assert "leaves 4 at best" in caught.value.why


def test_no_samples_and_states_that_are_not_finite(llama: Made, samples: Tensor) -> None:
    model, anatomy = llama
    with pytest.raises(CorpusError, match="no samples"):
        laco_search(Calibration(model, anatomy, samples[:0], 2), layers=3)
    broken = random_twin(anatomy, seed=3)
    with torch.no_grad():
        broken.model.embed_tokens.weight[77] = math.nan
    with pytest.raises(CheckpointError, match="not finite"):
        laco_search(Calibration(broken, anatomy, torch.full((2, 4), 77), 2), layers=3)
