"""What candidates are cut from: layers that go together, values of blocks, and which candidates are finalists."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from halve.anatomy import Arch
from halve.cut.layers import chosen as choosing
from halve.cut.layers.depth import DepthChoice
from halve.cut.plan.plan import select
from halve.cut.plan.sizes import Candidate
from halve.cut.surgery.trim import trim
from halve.cut.trial import Tried
from halve.model.checkpoint import Checkpoint
from halve.recipe.schema import Recipe, Score, Search
from halve.search import blocks
from halve.search.additive import Program, solve_blocks
from halve.search.blocks import _Bench, additive_choice
from halve.search.candidates import candidates_of, look
from halve.search.finalists import choose_finalists
from halve.search.quantities import Reals, price
from halve.search.searched import joint_comparison
from halve.search.space import Space
from halve.search.workshop import Workshop
from halve.stages import score


@pytest.fixture(scope="module")
def shop(make_recipe: Callable[..., Recipe], tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    recipe = make_recipe(prune={"non_embedding_ratio": 0.6, "refit_samples": 8})
    place, teacher = tmp_path_factory.mktemp("shop"), Checkpoint.open(tiny_llama)
    score.run(recipe, teacher=teacher, cache=place / "data", out=place)
    archs = [teacher.anatomy.sizes.at(layers=3)]
    return Workshop.open(recipe, teacher, scores=place / "scores.safetensors", archs=archs, cache=place / "data")


def test_layers_go_together(shop: Workshop) -> None:
    found = shop.layers({4, 3, 2, 1})
    assert {depth: len(kept) for depth, kept in found.items()} == {4: 4, 3: 3, 2: 2, 1: 1}
    assert set(found[1]) < set(found[2]) < set(found[3]) < set(found[4])


def test_the_recipes_own_criterion_is_used(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    choose = choosing.choose

    def noted(*args: Any, **given: Any) -> DepthChoice:
        found = choose(*args, **given)
        used.append((found.criterion, found.pattern))
        return found

    monkeypatch.setattr(choosing, "choose", noted)
    shares = {}
    for depth in ("bi", "random", "nll", "angular"):
        score = Score.model_validate({**shop.recipe.score.model_dump(), "depth": depth})
        own = replace(shop, recipe=shop.recipe.model_copy(update={"score": score}))
        shares[depth] = own.layers({3, 2, 1})
    assert used == [(name, "greedy") for name in ("logit_mse", "random", "nll", "angular")]
    assert len({tuple(sorted(kept.items())) for kept in shares.values()}) > 1


@pytest.mark.parametrize("pattern", ["block", "greedy"])
def test_block_importance_is_used_with_a_pattern_of_sets(pattern: str) -> None:
    score = Score.model_validate({"depth": "bi", "depth_pattern": pattern})
    assert joint_comparison(score) == score


def test_the_recipes_own_comparison_of_sets_is_used(shop: Workshop) -> None:
    of_blocks = shop.recipe.score.model_copy(update={"depth": "bi", "depth_pattern": "block"})
    kept = shop.compared({2}, of_blocks)[2]
    gone = [layer for layer in range(4) if layer not in kept]
    assert gone[1] == gone[0] + 1


def test_kept_layers_are_those_that_the_trial_keeps(shop: Workshop, tmp_path: Path) -> None:
    sizes = shop.calibration.anatomy.sizes
    (tried,) = shop.tried([sizes.at(layers=2)], {2: (0, 3)}, path=tmp_path / "trial.jsonl")
    assert tried.kept_layers == (0, 3)


def test_a_masked_layer_is_a_narrower_layer(shop: Workshop) -> None:
    """Masked in every layer, it is the trimmed model: the harm of one layer is what trimming it alone would do."""
    bench = _Bench(shop.calibration.first(4), shop.scores)
    anatomy = shop.calibration.anatomy
    narrow = anatomy.sizes.at(ffn=40)
    plan = select(anatomy, narrow, bench.scores, gain="none")
    ids_BS = shop.calibration.samples_BS[:2]
    names = [name for name in anatomy.modules if name.endswith("down_proj")]
    hooks = [
        shop.calibration.model.get_submodule(name).register_forward_pre_hook(
            bench._mask(name, plan, layer), with_kwargs=True
        )
        for layer, name in enumerate(names)
    ]
    with torch.no_grad():
        masked = shop.calibration.model(ids_BS).logits
        for hook in hooks:
            hook.remove()
        trimmed = trim(shop.calibration.model, plan, anatomy)(ids_BS).logits
    torch.testing.assert_close(masked, trimmed)
    harms = [bench.masked(layer, narrow) for layer in range(4)]
    assert all(0 < harm < bench.trimmed(narrow, range(4)) for harm in harms)
    assert bench.masked(0, anatomy.sizes) == 0.0


def test_the_additive_choice_is_within_the_candidates_parameters(shop: Workshop) -> None:
    anatomy = shop.calibration.anatomy
    archs = [anatomy.sizes.at(layers=3, ffn=40), anatomy.sizes.at(layers=2, ffn=64), anatomy.sizes.at(layers=4, ffn=24)]
    candidates = [Candidate(arch, anatomy.ledger.count(arch)) for arch in archs]
    found = additive_choice(shop.calibration, shop.scores, candidates)
    params = [candidate.counts.params for candidate in candidates]
    assert min(params) <= anatomy.ledger.count(found.arch).params <= max(params)
    assert found.arch.ffn in {24, 40, 64}
    assert len(found.kept_layers) == found.arch.layers


class Steady:
    """A second a layer, and half of one besides."""

    def prefill_seconds(self, space: Space, layers: int, *, batch: int, context: int) -> Reals:
        return np.full((1, 1), 0.5 + layers)

    decode_seconds = prefill_seconds


ADDITIVE: list[dict[str, Any]] = [
    {"budget": {"memory": {"max": "50%", "batch": 4, "context": 8192}}},
    {"budget": {"total": {"max": "90%"}}, "layers": {"max": 3, "keep": [1, 3]}},
    {"budget": {"total": {"max": "90%"}}, "axes": {"layers": [1, 3]}},
    {"budget": {"total": {"max": "90%"}}, "axes": {"layers": [1]}},
    {"budget": {"weight_bytes": {"min": "60%"}}},
    {"budget": {"flops": "60%", "active": {"min": "20%"}, "non_embedding": {"max": "70%"}}},
    {"budget": {"decode_latency": "3s"}},
    {"budget": {"throughput": {"min": 0.4, "batch": 1}}},
]


@pytest.mark.parametrize("asked", ADDITIVE, ids=lambda asked: "+".join((*asked["budget"], *([*asked][1:]))))
def test_the_additive_choice_is_within_the_budget_and_the_layers(shop: Workshop, asked: dict[str, Any]) -> None:
    search, anatomy = Search.model_validate(asked), shop.calibration.anatomy
    assert search.budget is not None
    seen = look(anatomy, search.budget, search, clock=Steady())
    found = additive_choice(shop.calibration, shop.scores, candidates_of(seen, 8), seen)
    for r in seen.ranges:
        cost = price(anatomy, found.arch, r.quantity, r.limits, Steady(), kept_layers=found.kept_layers)
        assert r.low <= cost <= r.high
    assert len(found.kept_layers) == found.arch.layers
    assert found.arch.layers in seen.prices.space.depths
    assert {*search.layers.keep} <= {*found.kept_layers}
    assert found.arch != anatomy.sizes


def test_a_choice_that_the_solvers_tolerance_lets_through_is_not_taken(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    anatomy, slacks = shop.calibration.anatomy, []
    search = Search.model_validate({"budget": {"total": {"max": "60%"}}})
    assert search.budget is not None
    seen = look(anatomy, search.budget, search)

    def lax(*args: Any, slack: float, **given: Any) -> Program:
        slacks.append(slack)
        found = solve_blocks(*args, slack=slack, **given)
        return replace(found, layers=(0, 1, 2, 3), width=0) if slack < 5e-6 else found

    monkeypatch.setattr(blocks, "solve_blocks", lax)
    candidates = [Candidate(anatomy.sizes, anatomy.ledger.count(anatomy.sizes)), *candidates_of(seen, 4)]
    found = additive_choice(shop.calibration, shop.scores, candidates, seen)
    assert slacks == pytest.approx([0.0, 1e-6, 1e-5])
    assert seen.allows(found.arch, found.kept_layers)


def test_finalists_are_of_several_depths() -> None:
    sizes = Arch(layers=1, hidden=8, ffn=8, heads=2, kv_heads=2, head_dim=4, vocab=9)
    tried = [Tried(sizes.at(layers=4, ffn=ffn), (), 1.0 + ffn / 100) for ffn in range(1, 9)]
    tried += [Tried(sizes.at(layers=3), (), 2.0), Tried(sizes.at(layers=2), (), 3.0), Tried(sizes, (), 9.0)]
    found = choose_finalists(tried, 5)
    assert [one.arch.layers for one in found] == [4, 4, 4, 3, 2]
    assert [one.kl for one in found] == sorted(one.kl for one in found)
    assert [one.arch.layers for one in choose_finalists(tried, 2)] == [4, 3]
    assert len(choose_finalists(tried[:2], 5)) == 2


def test_layers_that_are_to_stay_stay(shop: Workshop) -> None:
    free = shop.layers({2})[2]
    gone = next(layer for layer in range(4) if layer not in free)
    search = Search.model_validate({"budget": {"total": "50%"}, "layers": {"keep": [gone]}})
    bound = replace(shop, recipe=shop.recipe.model_copy(update={"search": search}))
    found = bound.layers({3, 2, 1})
    assert all(gone in kept for kept in found.values())
    assert found[1] == (gone,)
