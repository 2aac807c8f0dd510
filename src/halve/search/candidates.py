"""The candidates of a search: a few shapes spread over the front, of several depths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from halve.anatomy import Anatomy, Arch
from halve.cut.plan.sizes import Candidate
from halve.errors import PlanError
from halve.recipe.searching import Search, ShapeBudget
from halve.search.budgets import Range, budget_in_words, resolve
from halve.search.finalists import DEPTHS
from halve.search.front import front, sizes_of
from halve.search.positions import require_fillable
from halve.search.quantities import Clock, Prices, Reals, in_words, price
from halve.search.space import cut_axes, legal_shapes
from halve.search.unmet import none_fits

_WIDER = ((1, 1), (2, 1), (4, 1), (4, 16))
"""How many percent behind the front a shape may be, and how many may be alike in cost and in the axes that they cut."""


@dataclass(frozen=True)
class Found:
    """What a search without weights says about a budget."""

    ranges: tuple[Range, ...]
    prices: Prices
    """The costs of all legal shapes."""
    front: tuple[Candidate, ...]
    """The shapes that use what the budget allows, the deepest first."""

    def costs(self, arch: Arch, kept_layers: Sequence[int]) -> list[Reals]:
        """What a shape with these layers has of every quantity of the budget."""
        space, clock = self.prices.space, self.prices.clock
        costs = [price(space.anatomy, arch, r.quantity, r.limits, clock, kept_layers=kept_layers) for r in self.ranges]
        return [np.array([cost]) for cost in costs]

    def allows(self, arch: Arch, kept_layers: Sequence[int]) -> bool:
        """Whether a shape with these layers meets the budget."""
        costs = self.costs(arch, kept_layers)
        return all(r.holds(cost).all() for r, cost in zip(self.ranges, costs, strict=True))


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

    Raises `PlanError` for bounds that contradict each other, for a cache that the model can never fill, and for a
    budget that no legal shape meets; it names the nearest shapes.
    """
    require_fillable(anatomy, budget)
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

    None is a part of another one. If the front has fewer, shapes up to 1, 2 and 4 percent behind it join, and then
    less even ones. If these are too few as well, there are fewer candidates: parts join only where there would be fewer
    than three depths. Deterministic: the same anatomy, budget and search give the same shapes.
    """
    pool, different = list(seen.front), _different([], seen.front)
    for slack, each in _WIDER:
        if len(different) >= count and len(_depths(different)) >= DEPTHS:
            break
        pool += front(seen.prices, seen.ranges, slack=slack, each=each)
        different = _different(different, pool)
    return _spread(_with_depths(different, pool), seen.prices.space.anatomy.sizes, count)


def _different(kept: Sequence[Candidate], more: Sequence[Candidate]) -> list[Candidate]:
    """These shapes and more: the largest first, none of which is a part of one that is there already, or holds it."""
    found, axes_NA = list(kept), sizes_of(kept)
    for shape in sorted(more, key=lambda shape: (-shape.counts.non_embedding, _deepest_first(shape.arch))):
        axes_A = sizes_of([shape])
        if not ((axes_NA >= axes_A).all(1) | (axes_NA <= axes_A).all(1)).any():
            found.append(shape)
            axes_NA = np.concatenate([axes_NA, axes_A])
    return found


def _depths(shapes: Sequence[Candidate]) -> set[int]:
    return {shape.arch.layers for shape in shapes}


def _with_depths(different: Sequence[Candidate], pool: Sequence[Candidate]) -> list[Candidate]:
    """These shapes and, where they have too few numbers of layers, the largest part of each further one."""
    found = list(different)
    for shape in sorted(pool, key=lambda shape: (-shape.counts.non_embedding, _deepest_first(shape.arch))):
        if len(_depths(found)) < DEPTHS and shape.arch.layers not in _depths(found):
            found.append(shape)
    return found


def within_budget(
    seen: Found, candidates: Sequence[Candidate], kept_layers: Mapping[int, tuple[int, ...]]
) -> list[Candidate]:
    """The candidates that meet the budget with the layers that they keep, by their number, counted with these.

    Raises `PlanError` if there is none; it names the nearest.
    """
    anatomy = seen.prices.space.anatomy
    counted = [
        Candidate(arch, anatomy.ledger.count(arch, kept_layers=kept), kept)
        for arch, kept in ((candidate.arch, kept_layers[candidate.arch.layers]) for candidate in candidates)
    ]
    met = [shape for shape in counted if seen.allows(shape.arch, shape.kept_layers or ())]
    if met:
        return met
    raise _none_with_its_layers(seen, counted)


def _none_with_its_layers(seen: Found, counted: Sequence[Candidate]) -> PlanError:
    def costs(shape: Candidate) -> list[tuple[Range, Reals]]:
        return list(zip(seen.ranges, seen.costs(shape.arch, shape.kept_layers or ()), strict=True))

    nearest = min(counted, key=lambda shape: sum(r.missed(cost).item() for r, cost in costs(shape)))
    has = ", ".join(f"{r.quantity} {in_words(r.quantity, cost.item())}" for r, cost in costs(nearest))
    sought, kept = (
        ", ".join(map(str, layers))
        for layers in (sorted(seen.prices.space.order[: nearest.arch.layers]), nearest.kept_layers or ())
    )
    return PlanError(
        f"no candidate has {budget_in_words(seen.ranges)} with the layers that it keeps",
        why=f"the nearest has {has}: {nearest.arch}, where layers {kept} stay; it was priced with layers {sought}",
        fix=f"search.layers.keep: [{kept}], so that shapes are priced with these; or widen search.budget",
    )


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
