"""What to say about a budget that no legal shape meets: why, and the nearest shapes that are legal."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from halve.anatomy import CUT_AXES, Anatomy, Arch
from halve.cut.plan.sizes import is_legal, require_sizes
from halve.errors import PlanError
from halve.recipe.searching import ByteLimits, MemoryLimits
from halve.search.budgets import Range, budget_in_words
from halve.search.quantities import BYTES, Prices, in_words, price
from halve.search.space import Space, cut_axes

_NEAREST = 3
_AT_A_DEPTH = 16
"""Shapes of one depth that a family's config may refuse."""
_AROUND = 128
"""Sizes below and above a refused one among which one that is taken is looked for."""


def none_fits(prices: Prices, ranges: Sequence[Range]) -> PlanError:
    """The error for a budget that no legal shape meets. It names the nearest shapes that there are."""
    nearest = _nearest(prices, ranges)
    named = "; ".join(_shape_in_words(prices, ranges, arch) for arch in nearest)
    why, fix = _reason(prices, ranges)
    return PlanError(
        f"no legal shape has {budget_in_words(ranges)}",
        why=why,
        fix=f"nearest: {named}" if nearest else fix or "allow more in search.axes; halve inspect lists what can be cut",
    )


def _reason(prices: Prices, ranges: Sequence[Range]) -> tuple[str, str]:
    """The first bound that no shape meets even alone, or why they are not met together; and what to do, if known."""
    space = prices.space
    for r in ranges:
        values = [prices.values(r.quantity, r.limits, layers) for layers in space.depths]
        if any(r.holds(of_depth).any() for of_depth in values):
            continue
        if len(space) == 1:
            itself = ", the teacher itself" if _largest(space) == space.anatomy.sizes else ""
            has = _shape_in_words(prices, ranges, _largest(space))
            return f"search.axes and search.layers allow one shape alone: {has}{itself}", ""
        if too_large := _embeddings_above(prices, r):
            return too_large, ""
        least, most = (in_words(r.quantity, float(edge(values))) for edge in (np.min, np.max))
        if r.low <= float(np.max(values)) and r.high >= float(np.min(values)):
            in_steps = (
                f"{r.quantity} of legal shapes goes from {least} to {most} in steps, none of which is in that range"
            )
            return in_steps, ""
        return f"{r.quantity} of legal shapes is " + (least if least == most else f"between {least} and {most}"), ""
    if not any(_held(prices, ranges, layers).any() for layers in space.depths):
        return "each bound can be met alone, but no legal shape meets them together", ""
    alone = f"the teacher alone has that: {_shape_in_words(prices, ranges, _largest(space))}"
    return _refused(prices, ranges) or (alone, "")


def _largest(space: Space) -> Arch:
    return space.arch(space.depths[0], 0, 0)


def _embeddings_above(prices: Prices, r: Range) -> str:
    """What to say if the embeddings alone have more than a bound of parameters or bytes. Empty otherwise."""
    space = prices.space
    embeddings = float(space.tabulated.of_others[1].min())
    where = f"at hidden {int(space.sizes['hidden'].min())}, the narrowest that is allowed"
    if r.quantity in ("total", "active") and r.high < embeddings:
        return f"the embeddings alone have {in_words(r.quantity, embeddings)} parameters {where}"
    if isinstance(r.limits, ByteLimits | MemoryLimits) and r.high < embeddings * BYTES[r.limits.dtype]:
        taken = in_words(r.quantity, embeddings * BYTES[r.limits.dtype])
        return f"the embeddings alone take {taken} in {r.limits.dtype} {where}"
    return ""


def _refused(prices: Prices, ranges: Sequence[Range]) -> tuple[str, str] | None:
    """Which sizes the family's config refuses of shapes that meet the budget, why, and which it would take."""
    space = prices.space
    refused: dict[str, tuple[str, str]] = {}
    for layers in space.depths:
        places = np.argwhere(_held(prices, ranges, layers))
        _, firsts = np.unique(places[:, 0], return_index=True)
        for width, ffn in places[firsts[:_AT_A_DEPTH]]:
            if found := _refusal(space.anatomy, space.arch(layers, int(width), int(ffn))):
                refused.setdefault(found[0], found[1:])
    if not refused:
        return None
    sizes, (why, fix) = "; ".join(list(refused)[:_AT_A_DEPTH]), next(iter(refused.values()))
    return f"the config of {space.anatomy.family} refuses {sizes}: {why.rstrip('.')}", fix


def _refusal(anatomy: Anatomy, arch: Arch) -> tuple[str, str, str] | None:
    """The size that a family's config refuses, its reason, and the nearest sizes that it takes instead."""
    before = anatomy.sizes
    cut = {axis: getattr(arch, axis) for axis in sorted(cut_axes(before, arch, CUT_AXES))}
    for axis, size in cut.items():
        if axis not in ("heads", "kv_heads") and (why := _why_not(anatomy, before.at(**{axis: size}))):
            around = (range(size - 1, 0, -1), range(size + 1, getattr(before, axis) + 1))
            taken = [
                next((n for n in way[:_AROUND] if is_legal(anatomy, before.at(**{axis: n}))), None) for way in around
            ]
            near = " or ".join(str(n) for n in taken if n is not None)
            return f"{axis} {size}", why, f"allow other sizes in search.axes.{axis}" + f", such as {near}" * bool(near)
    why = _why_not(anatomy, arch)
    return (", ".join(f"{axis} {size}" for axis, size in cut.items()), why, "") if why else None


def _why_not(anatomy: Anatomy, arch: Arch) -> str:
    """Why a shape is refused; empty if it is not."""
    try:
        require_sizes(anatomy, arch)
    except PlanError as refusal:
        return refusal.why
    return ""


def _held(prices: Prices, ranges: Sequence[Range], layers: int) -> npt.NDArray[np.bool_]:
    """The widths that are in all ranges with so many layers."""
    held: npt.NDArray[np.bool_] = np.all([r.holds(prices.values(r.quantity, r.limits, layers)) for r in ranges], axis=0)
    return held


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
