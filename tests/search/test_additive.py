"""The integer program of the baseline: against trying everything, and where it is wrong by its nature."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from halve.errors import PlanError
from halve.search.additive import BlockValues, Program, solve_blocks


def drawn(seed: int, *, layers: int = 5, widths: int = 4) -> BlockValues:
    draw = np.random.default_rng(seed)
    shares = np.linspace(0.4, 1.0, widths)
    return BlockValues(
        outside_W=draw.random(widths) * (1 - shares),
        kept_LW=draw.random((layers, widths)) * (1 - shares),
        gone_L=draw.random(layers),
        outside_params_W=np.round(100 * shares),
        layer_params_LW=np.round(draw.integers(40, 60, (layers, 1)) * shares),
    )


def by_trying(values: BlockValues, least: float, most: float) -> Program | None:
    num_layers, num_widths = values.kept_LW.shape
    best: Program | None = None
    for width in range(num_widths):
        for count in range(1, num_layers + 1):
            for kept in combinations(range(num_layers), count):
                params = values.outside_params_W[width] + values.layer_params_LW[list(kept), width].sum()
                gone = [layer for layer in range(num_layers) if layer not in kept]
                harm = values.outside_W[width] + values.kept_LW[list(kept), width].sum() + values.gone_L[gone].sum()
                if least <= params <= most and (best is None or harm < best.value):
                    best = Program(width, kept, float(harm))
    return best


@pytest.mark.parametrize("seed", range(12))
def test_it_is_the_best_of_all(seed: int) -> None:
    values = drawn(seed)
    most = 0.6 * (values.outside_params_W[-1] + values.layer_params_LW[:, -1].sum())
    expected, found = by_trying(values, 0.9 * most, most), solve_blocks(values, least=0.9 * most, most=most)
    assert expected is not None
    assert (found.width, found.layers) == (expected.width, expected.layers)
    assert found.value == pytest.approx(expected.value)


def test_a_budget_that_no_sum_meets() -> None:
    with pytest.raises(PlanError, match="no sum of blocks has between 1 and 2 parameters"):
        solve_blocks(drawn(0), least=1.0, most=2.0)


def test_it_removes_both_of_two_layers_that_replace_each_other() -> None:
    """Each alone can go for nothing, together they cannot. A sum does not see this."""
    flat = np.zeros((4, 1))
    gone_L = np.array([0.4, 0.0, 0.0, 0.3])
    found = solve_blocks(BlockValues(np.zeros(1), flat, gone_L, np.zeros(1), flat + 10), least=20.0, most=20.0)
    assert found.layers == (0, 3)
    assert found.value == 0.0
