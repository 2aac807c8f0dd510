"""The front of a budget, the candidates of a search, and the finalists among them."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from budgeted import anatomy, archs, looked, search

from halve.anatomy import Arch
from halve.cut.plan.sizes import Candidate, is_legal
from halve.cut.trial import Tried
from halve.search.candidates import candidates_of
from halve.search.finalists import choose_finalists
from halve.search.quantities import Prices, price
from halve.search.space import is_part, legal_shapes

# ---- the front

BUDGETS: list[dict[str, Any]] = [
    {"non_embedding": "50%"},
    {"total": {"min": "40%", "max": "60%"}, "flops": "55%"},
    {"memory": {"max": "50%", "context": 8192}, "non_embedding": {"max": "70%"}},
    {"weight_bytes": {"min": "60%"}},
]


@pytest.mark.parametrize("budget", BUDGETS, ids=lambda budget: "+".join(budget))
def test_no_legal_shape_as_deep_is_nearer_to_every_goal(budget: dict[str, Any]) -> None:
    found = looked(budget)
    prices = Prices(legal_shapes(anatomy(), search(budget)))
    assert found.front
    for layers in {shape.arch.layers for shape in found.front}:
        values = [prices.values(r.quantity, r.limits, layers) for r in found.ranges]
        fits = np.all([r.holds(of) for r, of in zip(found.ranges, values, strict=True)], axis=0)
        away = np.stack([np.floor(r.away(of)[fits] * 100) for r, of in zip(found.ranges, values, strict=True)])
        for shape in (shape for shape in found.front if shape.arch.layers == layers):
            at = [price(anatomy(), shape.arch, r.quantity, r.limits) for r in found.ranges]
            assert all(r.low <= value <= r.high for r, value in zip(found.ranges, at, strict=True))
            own = [np.floor(abs(value / r.goal - 1) * 100) for r, value in zip(found.ranges, at, strict=True)]
            nearer = (away <= np.array(own)[:, None]).all(0) & (away < np.array(own)[:, None]).any(0)
            places = np.argwhere(fits)[nearer]
            better = [prices.space.arch(layers, int(w), int(f)) for w, f in places]
            assert not any(is_legal(anatomy(), arch) and arch != anatomy().sizes for arch in better)


def test_a_part_of_another_shape_is_left_out() -> None:
    found = [shape.arch for shape in looked({"memory": {"max": "60%", "context": 8192}, "total": {"max": "80%"}}).front]
    axes = ("layers", "hidden", "ffn", "heads", "kv_heads")
    for arch in found:
        assert not any(
            other != arch and all(getattr(other, axis) >= getattr(arch, axis) for axis in axes) for other in found
        )


def test_no_shape_on_the_front_is_less_than_half_as_large_as_another() -> None:
    for budget in BUDGETS:
        sizes = [shape.counts.non_embedding for shape in looked(budget).front]
        assert 2 * min(sizes) >= max(sizes)


def test_the_whole_space_is_counted() -> None:
    found = looked({"non_embedding": "50%"})
    assert len(found.prices.space) == 8 * 12 * 4 * 64


# ---- candidates


@pytest.mark.parametrize("budget", BUDGETS[:3], ids=lambda budget: "+".join(budget))
def test_candidates_are_of_three_depths_and_always_the_same(budget: dict[str, Any]) -> None:
    found = archs(budget)
    assert len(set(found)) == len(found) == 8
    assert len({arch.layers for arch in found}) >= 3
    assert [arch.layers for arch in found] == sorted((arch.layers for arch in found), reverse=True)
    assert found == archs(budget)
    assert len({arch.layers for arch in archs(budget, 3)}) == 3


def test_candidates_differ_in_which_axes_they_cut() -> None:
    whole = anatomy().sizes
    cut = {
        tuple(getattr(arch, axis) < getattr(whole, axis) for axis in ("hidden", "ffn", "kv_heads"))
        for arch in archs({"non_embedding": "50%"})
    }
    assert len(cut) >= 4


def test_memory_of_a_long_context_is_met_by_groups_and_depth() -> None:
    whole = anatomy().sizes
    found = archs({"memory": {"max": "40%", "context": 100_000, "batch": 4}})
    assert all(arch.kv_heads * arch.layers <= 0.4 * whole.kv_heads * whole.layers for arch in found)
    assert {1, 2, 3} <= {arch.kv_heads for arch in found}, "fewer groups in deep shapes, more in shallow ones"
    assert all(a.kv_heads <= b.kv_heads for a in found for b in found if a.layers > b.layers)
    assert all(arch.heads / arch.kv_heads == 2 and arch.head_dim == 16 for arch in found), "uniform, groups kept whole"


FLAT: list[dict[str, Any]] = [
    {"flops": "70%"},
    {"memory": {"max": "60%", "context": 999_999}},
    {"memory": {"max": "60%", "context": 8192, "batch": 4}},
    {"non_embedding": "50%"},
    {"total": {"min": "40%", "max": "60%"}, "flops": "55%"},
]


@pytest.mark.parametrize("budget", FLAT, ids=lambda budget: "+".join(budget))
def test_no_candidate_is_a_part_of_another_one(budget: dict[str, Any]) -> None:
    for count in (3, 12, 32):
        found = archs(budget, count)
        assert not any(is_part(one, other) for one, other in permutations(found, 2))
        assert min(3, len(found)) <= len({arch.layers for arch in found})
        assert {shape.arch for shape in looked(budget).front} <= {*found} or len(found) == count


def test_as_many_candidates_as_asked_where_so_many_differ() -> None:
    budget = {"non_embedding": "60%"}
    assert len(looked(budget).front) < 32
    assert len(archs(budget, 32)) == 32
    assert len(archs({"flops": "70%"}, 32)) < 32


def test_a_part_joins_for_its_depth_alone() -> None:
    budget = {"total": {"max": "70%"}}
    seen = looked(budget, axes={"hidden": "frozen", "ffn": "frozen", "kv_heads": "frozen"})
    (deepest,) = seen.front
    shallower = [Candidate(deepest.arch.at(layers=n), deepest.counts) for n in (4, 3, 2)]
    wide = replace(seen, front=(deepest, *shallower))
    assert [shape.arch.layers for shape in candidates_of(wide, 8)] == [5, 4, 3]


# ---- finalists


def test_a_part_of_a_better_finalist_waits_for_all_others() -> None:
    sizes = Arch(layers=4, hidden=8, ffn=80, heads=2, kv_heads=2, head_dim=4, vocab=9)
    parts = [Tried(sizes.at(ffn=ffn), (), 1.0 + (80 - ffn) / 100) for ffn in (80, 76, 72, 68)]
    others = [Tried(sizes.at(hidden=4 + n, ffn=100 - n, layers=5 - n), (), 5.0 + n) for n in (0, 1, 2)]
    found = choose_finalists([*parts, *others], 4)
    assert found == [parts[0], *others]
    assert choose_finalists([*parts, *others], 6) == [*parts[:3], *others]
    assert choose_finalists(parts, 3) == parts[:3]
