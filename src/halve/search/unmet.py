"""What to say about a budget that no legal shape meets: why, and the nearest shapes that are legal."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from halve.anatomy import Arch
from halve.cut.plan.sizes import is_legal
from halve.errors import PlanError
from halve.search.budgets import Range, budget_in_words
from halve.search.quantities import Prices, in_words, price
from halve.search.space import Space

_NEAREST = 3
_AT_A_DEPTH = 16
"""Shapes of one depth that a family's config may refuse."""


def none_fits(prices: Prices, ranges: Sequence[Range]) -> PlanError:
    """The error for a budget that no legal shape meets. It names the nearest shapes that there are."""
    nearest = _nearest(prices, ranges)
    named = "; ".join(_shape_in_words(prices, ranges, arch) for arch in nearest)
    return PlanError(
        f"no legal shape has {budget_in_words(ranges)}",
        why=_reason(prices, ranges),
        fix=f"nearest: {named}" if nearest else "allow more in search.axes; halve inspect lists what can be cut",
    )


def _reason(prices: Prices, ranges: Sequence[Range]) -> str:
    """The first bound that no shape meets even alone, or that they cannot be met together."""
    space = prices.space
    for r in ranges:
        values = [prices.values(r.quantity, r.limits, layers) for layers in space.depths]
        if any(r.holds(of_depth).any() for of_depth in values):
            continue
        least, most = (in_words(r.quantity, float(edge(values))) for edge in (np.min, np.max))
        narrowest = int(space.sizes["hidden"].min())
        embeddings = float(space.tabulated.of_others[1].min())
        if r.quantity in ("total", "active") and r.high < embeddings:
            return (
                f"the embeddings alone have {in_words(r.quantity, embeddings)} parameters at hidden {narrowest},"
                " the narrowest that is allowed"
            )
        if r.low <= float(np.max(values)) and r.high >= float(np.min(values)):
            return f"{r.quantity} of legal shapes goes from {least} to {most} in steps, none of which is in that range"
        return f"{r.quantity} of legal shapes is between {least} and {most}"
    if any(_all_hold(prices, ranges, layers) for layers in space.depths):
        return f"the config of {space.anatomy.family} refuses the shapes that would, or they are the teacher itself"
    return "each bound can be met alone, but no legal shape meets them together"


def _all_hold(prices: Prices, ranges: Sequence[Range], layers: int) -> bool:
    """Whether a width with so many layers is in all ranges."""
    held = [r.holds(prices.values(r.quantity, r.limits, layers)) for r in ranges]
    return bool(np.all(held, axis=0).any())


def _nearest(prices: Prices, ranges: Sequence[Range]) -> list[Arch]:
    """Of the depths that come nearest, the legal shape that misses the budget by the smallest factor."""
    space = prices.space
    missed: list[tuple[float, Arch]] = []
    for layers in space.depths:
        missed_WF = sum(
            (r.missed(prices.values(r.quantity, r.limits, layers)) for r in ranges),
            start=np.zeros((len(space.widths), len(space.ffns))),
        )
        for place in np.argsort(missed_WF, axis=None, kind="stable")[:_AT_A_DEPTH]:
            width, ffn = np.unravel_index(place, missed_WF.shape)
            arch = space.arch(layers, int(width), int(ffn))
            if arch != space.anatomy.sizes and is_legal(space.anatomy, arch):
                missed.append((float(missed_WF[width, ffn]), arch))
                break
    missed.sort(key=lambda entry: entry[0])
    return [arch for _, arch in missed[:_NEAREST]]


def _shape_in_words(prices: Prices, ranges: Sequence[Range], arch: Arch) -> str:
    space = prices.space
    costs = [
        f"{r.quantity} "
        + in_words(r.quantity, price(space.anatomy, arch, r.quantity, r.limits, prices.clock, kept_layers=space.keep))
        for r in ranges
    ]
    return f"{', '.join(costs)} (layers {arch.layers}, {_width_in_words(prices.space, arch)})"


def _width_in_words(space: Space, arch: Arch) -> str:
    return f"hidden {arch.hidden}, ffn {arch.ffn}, heads {arch.heads}/{arch.kv_heads}"
