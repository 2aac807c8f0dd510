"""The additive way, as a baseline: what each block is worth is measured alone, and the best sum within the budget wins.

Published searches over blocks (such as Puzzle, arXiv 2411.19146, Sec. 3) measure the harm of each replaced block alone,
with all others whole, and choose one alternative for each by integer programming. Here the student is an ordinary
config, so that all kept layers share one width, and a layer is kept at that width or removed:

    minimize    sum_w y_w c_w + sum_l (1 - sum_w z_lw) g_l + sum_lw z_lw k_lw
    subject to  sum_w y_w = 1,   z_lw <= y_w,   sum_lw z_lw >= 1,   least <= parameters(y, z) <= most

`c_w` is the harm of what width w changes outside the layers, `k_lw` that of layer l at this width, and `g_l` that of
its removal. Harm is the KL to the teacher. A sum of such values knows nothing of two blocks that replace each other,
which is why this is a baseline.

Shapes: W widths, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from halve.cut.plan.sizes import Array
from halve.errors import PlanError


@dataclass(frozen=True, eq=False)
class BlockValues:
    """The harm of every alternative, and the parameters that it leaves."""

    outside_W: Array
    kept_LW: Array
    gone_L: Array
    outside_params_W: Array
    layer_params_LW: Array


@dataclass(frozen=True)
class Program:
    """The best sum: the number of its width, the layers that it keeps, and its value."""

    width: int
    layers: tuple[int, ...]
    value: float


def solve_blocks(values: BlockValues, *, least: float, most: float) -> Program:
    """The shape with the smallest sum of harms whose parameters are between `least` and `most`, by integer programming.

    Raises `PlanError` if there is none.

    >>> one = np.ones(1)
    >>> kept = np.zeros((3, 1))
    >>> gone = np.array([0.5, 0.1, 0.3])
    >>> solve_blocks(BlockValues(0 * one, kept, gone, 10 * one, kept + 5), least=15.0, most=20.0).layers
    (0, 2)
    """
    num_layers, num_widths = values.kept_LW.shape
    gain_LW = values.kept_LW - values.gone_L[:, None]
    cost = np.concatenate([values.outside_W, gain_LW.ravel()])
    params = np.concatenate([values.outside_params_W, values.layer_params_LW.ravel()])
    one_width = np.concatenate([np.ones(num_widths), np.zeros(gain_LW.size)])
    some_layer = np.concatenate([np.zeros(num_widths), np.ones(gain_LW.size)])
    of_width = np.hstack([np.tile(-np.eye(num_widths), (num_layers, 1)), np.eye(gain_LW.size)])
    scale = max(most, 1.0)  # the solver's tolerances are absolute
    solution = milp(
        cost,
        integrality=np.ones(len(cost)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_width, 1, 1),
            LinearConstraint(some_layer, 1, num_layers),
            LinearConstraint(of_width, -np.inf, 0),
            LinearConstraint(params / scale, least / scale, most / scale),
        ],
    )
    if solution.x is None:
        raise PlanError(
            f"no sum of blocks has between {least:,.0f} and {most:,.0f} parameters",
            why="every kept layer has the same width, and none of the widths meets it with any number of layers",
            fix="widen search.budget, or choose search.method: tournament",
        )
    chosen = np.round(solution.x).astype(bool)
    width = int(np.flatnonzero(chosen[:num_widths])[0])
    kept = np.flatnonzero(chosen[num_widths:].reshape(num_layers, num_widths)[:, width])
    return Program(width, tuple(int(layer) for layer in kept), float(solution.fun + values.gone_L.sum()))
