"""The ways to split a budget between depth and width: the shapes that a trial cuts, refits and compares.

The family's own config accepts every shape: invalid ones are left out before the most even one is chosen.

Legend: W widths, L layers, K kinds of layers, F choices of ffn, A axes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from halve.anatomy import Anatomy, Arch
from halve.cut.plan.sizes import BUDGET_TOLERANCE, budget_of, can, is_legal, rank_candidates, step_of, widths
from halve.recipe.schema import Prune

_Integers = npt.NDArray[np.int64]

COARSEST = 16
"""Shapes of a list that are looked at, about: of 30 layers every second number, of 10 every one. Neighbors of a deep
model differ by less than the samples can tell."""


def to_try(anatomy: Anatomy, prune: Prune, *, refused: Mapping[str, str] | None = None) -> list[list[Arch]]:
    """The shapes that `prune` leaves to a trial. Empty if sizes are given or `shape` is not trial.

    `anatomy` is the one for the student's sizes (`rotate.student_anatomy`). `refused` are other axes that are not cut.
    """
    budget = budget_of(anatomy, prune)
    if budget is None or prune.shape != "trial":
        return []
    allowed = replace(anatomy, refusals={**anatomy.refusals, **(refused or {})})
    return [thinned(family) for family in list_shapes(allowed, budget[0], total=budget[1])]


def thinned(family: Sequence[Arch]) -> list[Arch]:
    """Every second, third, ... shape of a long list, its middle always among them.

    >>> sizes = Arch(layers=1, hidden=8, ffn=8, heads=2, kv_heads=2, head_dim=4, vocab=9)
    >>> [arch.layers for arch in thinned([sizes.at(layers=n) for n in range(40, 0, -1)])][:4]
    [40, 38, 36, 34]
    """
    step, middle = max(1, round(len(family) / COARSEST)), len(family) // 2
    return list(family[middle % step :: step])


def list_shapes(anatomy: Anatomy, budget: int, *, total: bool = True) -> list[list[Arch]]:
    """The ways to split a budget between depth and width, in lists by what is cut in addition to layers, deepest first.

        ffn                                     the residual stream and attention kept
        ffn and groups of heads                 the residual stream kept
        hidden, ffn and groups of heads
        hidden and ffn                          attention kept, as 2408.11796 (Sec. 6) advises

    Each list has at most one shape for each number of layers: the valid one that shrinks its axes most evenly. A pure
    depth cut is the last entry of the last list. So that no shape wins by its size, none exceeds the budget by more
    than twice the distance of the nearest shape, or one percent. None is below the budget by more than twice that.
    A process lists them once, because a check, a plan and a cut ask for the same shapes.
    """
    key = (type(anatomy.config), repr(anatomy), budget, total)
    if key not in _listed:
        _listed[key] = _list_shapes(anatomy, budget, total=total)
    return [list(family) for family in _listed[key]]


_listed: dict[tuple[type, str, int, bool], list[list[Arch]]] = {}


def _list_shapes(anatomy: Anatomy, budget: int, *, total: bool) -> list[list[Arch]]:
    depths = range(anatomy.sizes.layers, 0, -1) if can(anatomy, "layers") else [anatomy.sizes.layers]
    listed = []
    for axes, cut in _families(anatomy).items():
        counted = _Counted.of(anatomy, cut, total=total)
        most_even = (_most_even(anatomy, axes, counted, layers, budget) for layers in depths)
        listed.append([entry for entry in most_even if entry is not None])
    near = max(0.01, 2 * min((abs(over) for family in listed for over, _ in family), default=0.0))
    near = min(near, BUDGET_TOLERANCE)
    within = [[arch for over, arch in family if -2 * near <= over <= near] for family in listed]
    return [family for family in within if family]


@dataclass(frozen=True, eq=False)
class _Counted:
    """Parameter counts of all widths: linear in ffn, and a sum over the first layers."""

    widths: list[Arch]
    outside_W: _Integers
    """Parameters outside the layers."""
    layers_LW: _Integers
    """The part of each layer that does not depend on ffn."""
    neurons_LW: _Integers
    """Parameters of one neuron in each layer."""

    @classmethod
    def of(cls, anatomy: Anatomy, widths: list[Arch], *, total: bool) -> _Counted:
        """Each kind of layer is counted once, without neurons and with one."""
        ledger = anatomy.ledger
        kinds = list(dict.fromkeys(ledger.layers))
        places = [ledger.layers.index(kind) for kind in kinds]

        def count(width: Arch, ffn: int, *kept: int) -> int:
            counts = ledger.count(width.at(ffn=ffn, layers=len(kept)), kept_layers=kept)
            return counts.params if total else counts.non_embedding

        outside_W = np.array([count(width, 0) for width in widths])
        empty_KW = np.array([[count(width, 0, place) for width in widths] for place in places])
        single_KW = np.array([[count(width, 1, place) for width in widths] for place in places])
        kind_L = [kinds.index(kind) for kind in ledger.layers]
        return cls(widths, outside_W, (empty_KW - outside_W)[kind_L], (single_KW - empty_KW)[kind_L])

    def sizes(self, axis: str) -> _Integers:
        """Of every width the size of an axis."""
        return np.array([getattr(width, axis) for width in self.widths])


def _most_even(
    anatomy: Anatomy, axes: tuple[str, ...], counted: _Counted, layers: int, budget: int
) -> tuple[float, Arch] | None:
    """The valid width for this number of layers that shrinks most evenly, and how far over the budget it is.

    Each width has the ffn that comes closest to the budget.
    """
    before, step = anatomy.sizes, step_of(anatomy.sizes.ffn)
    fixed_W = counted.outside_W + counted.layers_LW[:layers].sum(0)
    each_W = counted.neurons_LW[:layers].sum(0)
    ffn_FW = np.full((1, len(fixed_W)), before.ffn)
    if can(anatomy, "ffn"):
        below_W = np.maximum(1, (budget - fixed_W) // np.maximum(each_W, 1) // step) * step
        ffn_FW = np.minimum(np.stack([below_W, below_W + step]), before.ffn)
    over_FW = (fixed_W + each_W * ffn_FW) / budget - 1
    nearest_W = np.abs(over_FW).argmin(0)[None]
    ffn_W, over_W = (np.take_along_axis(of_FW, nearest_W, 0)[0] for of_FW in (ffn_FW, over_FW))
    kept_AW = np.stack([(ffn_W if axis == "ffn" else counted.sizes(axis)) / getattr(before, axis) for axis in axes])
    for index in np.argsort(rank_candidates(np.abs(over_W), kept_AW), kind="stable"):
        arch = counted.widths[index].at(layers=layers, ffn=int(ffn_W[index]))
        if arch != before and is_legal(anatomy, arch):
            return float(over_W[index]), arch
    return None


def _families(anatomy: Anatomy) -> dict[tuple[str, ...], list[Arch]]:
    """For each set of axes that are cut: every size of these axes, with the full ffn."""
    before, all_widths = anatomy.sizes, widths(anatomy)
    if anatomy.coupled or not (can(anatomy, "ffn") and can(anatomy, "hidden")):
        return {("hidden", "ffn"): all_widths}
    if not can(anatomy, "kv_heads") or before.kv_heads == 1:
        return {("ffn",): [before], ("hidden", "ffn"): all_widths}
    per_group = before.heads // before.kv_heads
    groups = [{"heads": g * per_group, "kv_heads": g} for g in range(before.kv_heads - 1, 0, -1)]
    return {
        ("ffn",): [before],
        ("ffn", "kv_heads"): [before.at(**group) for group in groups],
        ("hidden", "ffn", "kv_heads"): [arch.at(**group) for arch in all_widths[1:] for group in groups],
        ("hidden", "ffn"): all_widths,
    }
