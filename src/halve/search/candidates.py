"""The candidates of a search: a few shapes spread over the front, of several depths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from halve.anatomy import Anatomy, Arch
from halve.cut.plan.sizes import Candidate
from halve.recipe.searching import Search, ShapeBudget
from halve.search.budgets import Range, resolve
from halve.search.front import front
from halve.search.quantities import Clock, Prices
from halve.search.space import cut_axes, legal_shapes
from halve.search.unmet import none_fits


@dataclass(frozen=True)
class Found:
    """What a search without weights says about a budget."""

    ranges: tuple[Range, ...]
    prices: Prices
    """The costs of all legal shapes."""
    front: tuple[Candidate, ...]
    """The shapes that use what the budget allows, the deepest first."""


def look(
    anatomy: Anatomy,
    budget: ShapeBudget,
    search: Search,
    *,
    clock: Clock | None = None,
    refused: Mapping[str, str] | None = None,
    timed: bool = True,
) -> Found:
    """The front of the legal shapes under a budget. Reads no weights and builds no model.

    `anatomy` is the one for the student's sizes (`rotate.student_anatomy`); `refused` are other axes that are not cut,
    with reasons. `clock` is needed if the budget bounds times, unless these are left out (`timed`).

    Raises `PlanError` for bounds that contradict each other and for a budget that no legal shape meets; it names the
    nearest shapes.
    """
    allowed = replace(anatomy, refusals={**anatomy.refusals, **(refused or {})})
    ranges = resolve(allowed, budget, clock=clock, timed=timed)
    space = legal_shapes(allowed, search)
    prices = Prices(space, clock)
    shapes = front(prices, ranges) if ranges else []
    if ranges and not shapes:
        raise none_fits(prices, ranges)
    return Found(ranges, prices, tuple(shapes))


def candidates_of(seen: Found, count: int) -> tuple[Candidate, ...]:
    """So many shapes spread over the front, the deepest first; of at least three depths where the front has them.

    If the front has fewer, shapes up to 1, 2 and 4 percent behind it join. Deterministic: the same anatomy, budget and
    search give the same shapes.
    """
    shapes = list(seen.front)
    for slack in (1, 2, 4):
        if len(shapes) < count:
            shapes = list(dict.fromkeys((*shapes, *front(seen.prices, seen.ranges, slack=slack))))
    return _spread(shapes, seen.prices.space.anatomy.sizes, count)


def _spread(shapes: Sequence[Candidate], before: Arch, count: int) -> tuple[Candidate, ...]:
    """So many of these shapes, the deepest first, at depths and in choices of axes that differ.

    Depths are divided evenly between the deepest, cut in width alone, and the shallowest, cut in layers alone. Each
    part gives in turn the shape whose choice of axes has been taken least often, of those the most even one.
    """
    depths = sorted({shape.arch.layers for shape in shapes}, reverse=True)
    parts = [set(part.tolist()) for part in np.array_split(depths, max(1, min(count, len(depths))))]
    left = {id(shape): shape for shape in shapes}
    chosen: list[Candidate] = []
    taken: Counter[frozenset[str]] = Counter()
    while len(chosen) < min(count, len(shapes)):
        for part in parts:
            here = [shape for shape in left.values() if shape.arch.layers in part]
            if not here or len(chosen) == count:
                continue
            pick = min(here, key=lambda shape: (taken[cut_axes(before, shape.arch)], *_order(before, shape.arch)))
            chosen.append(left.pop(id(pick)))
            taken[cut_axes(before, pick.arch)] += 1
    return tuple(sorted(chosen, key=lambda shape: _deepest_first(shape.arch)))


def _order(before: Arch, arch: Arch) -> tuple[float, tuple[int, ...]]:
    """How unevenly a shape cuts its width, then its sizes, so that the order never depends on chance."""
    kept = np.log([getattr(arch, axis) / getattr(before, axis) for axis in ("hidden", "ffn", "heads")])
    return round(float(kept.max() - kept.min()), 6), _deepest_first(arch)


def _deepest_first(arch: Arch) -> tuple[int, ...]:
    return (-arch.layers, -arch.hidden, -arch.kv_heads, -arch.heads, -arch.ffn)
