"""The integer program of the baseline: against trying everything, and where it is wrong by its nature."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from halve.errors import PlanError
from halve.search.additive import BlockSum, BlockValues, Program, solve_blocks


def drawn(seed: int, *, layers: int = 5, widths: int = 4) -> BlockValues:
    draw = np.random.default_rng(seed)
    shares = np.linspace(0.4, 1.0, widths)
    return BlockValues(
        outside_W=draw.random(widths) * (1 - shares),
        kept_LW=draw.random((layers, widths)) * (1 - shares),
        gone_L=draw.random(layers),
    )


def size(seed: int, least: float, most: float, *, layers: int = 5, widths: int = 4) -> BlockSum:
    """A quantity of `drawn`, with a range in shares of the whole."""
    draw = np.random.default_rng(100 + seed)
    shares = np.linspace(0.4, 1.0, widths)
    outside_W, layer_LW = np.round(100 * shares), np.round(draw.integers(40, 60, (layers, 1)) * shares)
    whole = outside_W[-1] + layer_LW[:, -1].sum()
    return BlockSum("size", outside_W, layer_LW, least * whole, most * whole)


def by_trying(
    values: BlockValues, sums: list[BlockSum], depths: list[int], keep: tuple[int, ...] = ()
) -> Program | None:
    num_layers, num_widths = values.kept_LW.shape
    best: Program | None = None
    for width in range(num_widths):
        for kept in (kept for count in depths for kept in combinations(range(num_layers), count)):
            costs = [each.outside_W[width] + each.layer_LW[list(kept), width].sum() for each in sums]
            gone = [layer for layer in range(num_layers) if layer not in kept]
            harm = values.outside_W[width] + values.kept_LW[list(kept), width].sum() + values.gone_L[gone].sum()
            fits = all(each.low <= cost <= each.high for each, cost in zip(sums, costs, strict=True))
            if fits and {*keep} <= {*kept} and (best is None or harm < best.value):
                best = Program(width, kept, float(harm))
    return best


def assert_same(found: Program, expected: Program | None) -> None:
    assert expected is not None
    assert (found.width, found.layers) == (expected.width, expected.layers)
    assert found.value == pytest.approx(expected.value)


@pytest.mark.parametrize("seed", range(12))
def test_it_is_the_best_of_all(seed: int) -> None:
    values, sums, depths = drawn(seed), [size(seed, 0.54, 0.6)], [1, 2, 3, 4, 5]
    assert_same(solve_blocks(values, sums, depths=depths), by_trying(values, sums, depths))


@pytest.mark.parametrize("seed", range(6))
def test_it_is_the_best_of_those_that_meet_all_bounds(seed: int) -> None:
    values, sums, depths, keep = drawn(seed), [size(seed, 0.4, 0.8), size(seed + 50, 0.0, 0.7)], [2, 4], (1, 3)
    found = solve_blocks(values, sums, depths=depths, keep=keep)
    assert_same(found, by_trying(values, sums, depths, keep))
    assert len(found.layers) in depths
    assert {*keep} <= {*found.layers}


def test_the_whole_teacher_is_no_choice() -> None:
    values = BlockValues(np.array([0.5, 0.0]), np.zeros((3, 2)), np.array([0.1, 0.2, 0.3]))
    assert solve_blocks(values, [], depths=[3, 2], whole=1).layers == (1, 2)
    assert_same(solve_blocks(values, [], depths=[3], whole=1), Program(0, (0, 1, 2), 0.5))


@pytest.mark.parametrize("slack", [0.0, 1e-6, 1.0])
def test_a_budget_that_no_sum_meets(slack: float) -> None:
    with pytest.raises(PlanError, match="no sum of blocks has size\n"):
        solve_blocks(drawn(0), [size(0, 0.001, 0.002)], depths=[1, 2, 3, 4, 5], slack=slack)


def test_slack_keeps_away_from_a_bound() -> None:
    flat = np.zeros((3, 1))
    values = BlockValues(np.zeros(1), flat, np.full(3, 1.0))
    at_most = BlockSum("size", np.zeros(1), flat + 10, 0.0, 20.0)
    assert len(solve_blocks(values, [at_most], depths=[1, 2, 3]).layers) == 2
    assert len(solve_blocks(values, [at_most], depths=[1, 2, 3], slack=1e-4).layers) == 1


def test_it_removes_both_of_two_layers_that_replace_each_other() -> None:
    """Each alone can go for nothing, together they cannot. A sum does not see this."""
    flat = np.zeros((4, 1))
    values = BlockValues(np.zeros(1), flat, gone_L=np.array([0.4, 0.0, 0.0, 0.3]))
    found = solve_blocks(values, [BlockSum("size", np.zeros(1), flat + 10, 20.0, 20.0)], depths=[1, 2, 3, 4])
    assert found.layers == (0, 3)
    assert found.value == 0.0
