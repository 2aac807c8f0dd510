"""The additive way, as a baseline: what each block is worth is measured alone, and the best sum within the budget wins.

Published searches over blocks (such as Puzzle, arXiv 2411.19146, Sec. 3) measure the harm of each replaced block alone,
with all others whole, and choose one alternative for each by integer programming. Here the student is an ordinary
config, so that all kept layers share one width, and a layer is kept at that width or removed:

    minimize    sum_w y_w c_w + sum_l (1 - sum_w z_lw) g_l + sum_lw z_lw k_lw
    subject to  sum_w y_w = 1,   z_lw <= y_w,   sum_d n_d = 1,   sum_lw z_lw = sum_d n_d d
                sum_w z_lw = 1 for every layer l that stays
                low_q <= sum_w y_w a_qw + sum_lw z_lw b_qlw <= high_q for every quantity q of the budget

`c_w` is the harm of what width w changes outside the layers, `k_lw` that of layer l at this width, and `g_l` that of
its removal. Harm is the KL to the teacher. `n_d` says that d layers are kept. Of quantity q, `a_qw` is outside of the
layers and `b_qlw` in layer l. A sum of such values knows nothing of two blocks that replace each other, which is why
this is a baseline.

Shapes: W widths, L layers, D numbers of layers, K layers that stay.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from halve.cut.plan.sizes import Array
from halve.errors import PlanError


@dataclass(frozen=True, eq=False)
class BlockValues:
    """The harm of every alternative."""

    outside_W: Array
    kept_LW: Array
    gone_L: Array


@dataclass(frozen=True, eq=False)
class BlockSum:
    """A quantity that adds up over blocks, and what it may be in all."""

    name: str
    outside_W: Array
    layer_LW: Array
    low: float
    high: float

    def constraint(self, depths: int, slack: float) -> LinearConstraint:
        """Its row of the program, with a range that is smaller at both ends by the share `slack`."""
        row = np.concatenate([self.outside_W, self.layer_LW.ravel(), np.zeros(depths)])
        scale = max(bound for bound in (self.low, self.high, 1e-300) if bound < math.inf)
        # the solver's tolerances are absolute
        return LinearConstraint(row / scale, self.low * (1 + slack) / scale, self.high * (1 - slack) / scale)


@dataclass(frozen=True)
class Program:
    """The best sum: the number of its width, the layers that it keeps, and its value."""

    width: int
    layers: tuple[int, ...]
    value: float


def solve_blocks(
    values: BlockValues,
    sums: Sequence[BlockSum],
    *,
    depths: Sequence[int],
    keep: Collection[int] = (),
    whole: int | None = None,
    slack: float = 0.0,
) -> Program:
    """The shape with the smallest sum of harms whose quantities are in their ranges, by integer programming.

    It has one of the numbers of layers in `depths`, and all layers of `keep`. `whole` is the number of the teacher's
    width, at which at least one layer goes. The solver may exceed a range by a millionth. With `slack` ranges are
    smaller by this share at both ends. Raises `PlanError` if there is none.

    >>> one = np.ones(1)
    >>> kept = np.zeros((3, 1))
    >>> values = BlockValues(0 * one, kept, gone_L=np.array([0.5, 0.1, 0.3]))
    >>> size = BlockSum("total", 10 * one, kept + 5, 15.0, 20.0)
    >>> solve_blocks(values, [size], depths=[1, 2, 3]).layers
    (0, 2)
    >>> solve_blocks(values, [size], depths=[1, 2], keep=[1]).layers
    (0, 1)
    """
    num_layers, num_widths = values.kept_LW.shape
    gain_LW = values.kept_LW - values.gone_L[:, None]
    of_widths, of_layers, of_depths = np.eye(num_widths), np.eye(gain_LW.size), np.array(depths, dtype=float)
    none_W, none_Z, none_D = np.zeros(num_widths), np.zeros(gain_LW.size), np.zeros(len(depths))
    one_width = np.concatenate([none_W + 1, none_Z, none_D])
    one_depth = np.concatenate([none_W, none_Z, none_D + 1])
    as_deep = np.concatenate([none_W, none_Z + 1, -of_depths])
    of_width = np.hstack([np.tile(-of_widths, (num_layers, 1)), of_layers, np.zeros((gain_LW.size, len(depths)))])
    constraints = [
        LinearConstraint(one_width, 1, 1),
        LinearConstraint(one_depth, 1, 1),
        LinearConstraint(as_deep, 0, 0),
        LinearConstraint(of_width, -np.inf, 0),
        *(each.constraint(len(depths), slack) for each in sums),
    ]
    if keep:
        kept_KL = np.eye(num_layers)[sorted(keep)]
        stays = np.hstack([np.zeros((len(keep), num_widths)), np.kron(kept_KL, none_W + 1)])
        constraints.append(LinearConstraint(np.hstack([stays, np.zeros((len(keep), len(depths)))]), 1, 1))
    if whole is not None:
        in_whole = np.concatenate([none_W, np.tile(of_widths[whole], num_layers), none_D])
        constraints.append(LinearConstraint(in_whole, 0, num_layers - 1))
    cost = np.concatenate([values.outside_W, gain_LW.ravel(), none_D])
    solution = milp(cost, integrality=np.ones(len(cost)), bounds=Bounds(0, 1), constraints=constraints)
    if solution.x is None:
        raise PlanError(
            f"no sum of blocks has {', '.join(each.name for each in sums)}",
            why="every kept layer has the same width, and none of the widths meets it with a number of layers that is"
            " allowed",
            fix="widen search.budget or search.layers, or choose search.method: tournament",
        )
    chosen = np.round(solution.x[: num_widths + gain_LW.size]).astype(bool)
    width = int(np.flatnonzero(chosen[:num_widths])[0])
    kept = np.flatnonzero(chosen[num_widths:].reshape(num_layers, num_widths)[:, width])
    return Program(width, tuple(int(layer) for layer in kept), float(solution.fun + values.gone_L.sum()))
