"""The front: for every number of layers, the shapes that use what the budget allows.

With as many layers as a shape on the front, no other legal shape comes closer to the goal of one quantity without being
farther from that of another. Differences below one percent do not count. A shape that is a part of another one on the
front is left out, and so is one with less than half of the parameters of the largest. Of shapes that cost the same, the
front has for each choice of axes the one that shrinks them most evenly. Which axes are best to cut is for measurements
to say.

Legend: W choices of hidden and heads, F choices of ffn, N shapes, K quantities, R distinct costs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from halve.anatomy.many import Integers
from halve.cut.plan.sizes import Candidate, is_legal, rank_candidates
from halve.search.budgets import Range
from halve.search.quantities import Prices, Reals

STEP = 0.01
"""Costs that differ by less than this share of their goal count as equal."""
LEAST_SHARE = 0.5
"""A shape with less than this share of the non-embedding parameters of the largest one on the front is left out: where
time is bounded, the deepest shapes that are fast enough are hardly wider than a head."""
_SIZES = ("layers", "hidden", "ffn", "heads", "kv_heads")
_PATIENCE = 32
"""Shapes of equal cost that a family's config may refuse before others are looked at."""


def front(prices: Prices, ranges: Sequence[Range], *, slack: int = 0, each: int = 1) -> list[Candidate]:
    """The front of a space under a budget, the deepest first, the most even first. Empty if no shape fits.

    With `slack`, shapes that are so many percent behind the front are in it too. With `each`, it has so many shapes
    for every choice of axes that cost the same.
    """
    shapes = [shape for layers in prices.space.depths for shape in _at_depth(prices, ranges, layers, slack, each)]
    axes_NA = sizes_of(shape.candidate for shape in shapes)
    away_NK = np.array([s.away for s in shapes]).reshape(-1, len(ranges))
    most = max((shape.candidate.counts.non_embedding for shape in shapes), default=0)
    return [
        shape.candidate
        for shape, axes_A, away_K in zip(shapes, axes_NA, away_NK, strict=True)
        if shape.candidate.counts.non_embedding >= LEAST_SHARE * most
        and not _inside(axes_NA, axes_A, away_NK <= away_K + STEP - slack * STEP)
    ]


def sizes_of(shapes: Iterable[Candidate]) -> Integers:
    """The axes that a shape may cut, a row for each: a part of a shape has no larger one."""
    rows = [[getattr(shape.arch, axis) for axis in _SIZES] for shape in shapes]
    return np.array(rows, dtype=np.int64).reshape(-1, len(_SIZES))


def _inside(axes_NA: Integers, axes_A: Integers, near_NK: npt.NDArray[np.bool_]) -> bool:
    """Whether a shape is a part of another one, which has no smaller axis, and which is about as near to the goals."""
    larger_N = (axes_NA >= axes_A).all(1) & (axes_NA > axes_A).any(1)
    return bool((larger_N & near_NK.all(1)).any())


@dataclass(frozen=True)
class _Placed:
    """A shape, and how far it is from the goal of each quantity."""

    candidate: Candidate
    away: tuple[float, ...]


def _at_depth(prices: Prices, ranges: Sequence[Range], layers: int, slack: int, each: int) -> Iterator[_Placed]:
    space = prices.space
    values_KWF = np.stack([prices.values(r.quantity, r.limits, layers) for r in ranges])
    fits_WF = np.all([r.holds(values_WF) for r, values_WF in zip(ranges, values_KWF, strict=True)], axis=0)
    width_N, ffn_N = np.nonzero(fits_WF)
    if not len(width_N):
        return
    away_KN = np.stack([r.away(values_WF[fits_WF]) for r, values_WF in zip(ranges, values_KWF, strict=True)])
    level_KN = np.floor(away_KN / STEP).astype(np.int64)
    levels_KR, level_of_N = np.unique(level_KN, axis=1, return_inverse=True)
    best_R = _least(levels_KR, slack)
    kept_AN = np.stack([_kept(prices, axis, width_N, ffn_N) for axis in ("hidden", "ffn", "heads")])
    cut_N = (kept_AN < 1).astype(np.int64).T @ np.array([1, 2, 4])
    uneven_N = _unevenness(away_KN.max(0), kept_AN)
    order_N = np.lexsort((ffn_N, width_N, uneven_N))
    chosen: Counter[tuple[int, int]] = Counter()
    looked: Counter[tuple[int, int]] = Counter()
    for n in order_N[best_R[level_of_N[order_N]]]:
        kind = (int(level_of_N[n]), int(cut_N[n]))
        if chosen[kind] >= each or looked[kind] >= each * _PATIENCE:
            continue
        looked[kind] += 1
        arch = space.arch(layers, int(width_N[n]), int(ffn_N[n]))
        if arch != space.anatomy.sizes and is_legal(space.anatomy, arch):
            chosen[kind] += 1
            counted = Candidate(arch, space.anatomy.ledger.count(arch, kept_layers=space.order[:layers]))
            yield _Placed(counted, tuple(away_KN[:, n].tolist()))


def _kept(prices: Prices, axis: str, width_N: Integers, ffn_N: Integers) -> Reals:
    """The share of an axis that each shape keeps."""
    sizes = prices.space.sizes[axis]
    kept = sizes[0, ffn_N] if axis == "ffn" else sizes[width_N, 0]
    shares: Reals = kept / getattr(prices.space.anatomy.sizes, axis)
    return shares


def _unevenness(away_N: Reals, kept_AN: Reals) -> Reals:
    """As `rank_candidates`, over the axes that a shape cuts."""
    shrunk_AN = np.log(kept_AN)
    least_N = np.where(shrunk_AN < 0, shrunk_AN, -np.inf).max(0)
    filled_AN = np.where(shrunk_AN < 0, shrunk_AN, np.where(np.isfinite(least_N), least_N, 0.0))
    return rank_candidates(away_N, np.exp(filled_AN))


def _least(levels_KR: Integers, slack: int = 0) -> npt.NDArray[np.bool_]:
    """Which costs no other one is below: by `slack` or more in every quantity, and by more in one.

    >>> levels = np.array([[0, 1, 1, 2], [2, 1, 2, 0]])
    >>> _least(levels).tolist(), _least(levels, 1).tolist()
    ([True, True, False, True], [True, True, True, True])
    """
    order_R = np.argsort(levels_KR.sum(0), kind="stable")
    alive_R = np.ones(levels_KR.shape[1], dtype=bool)
    for r in order_R:
        if alive_R[r]:
            behind_R = np.all(levels_KR >= levels_KR[:, r : r + 1] + slack, axis=0)
            behind_R[r] = False
            alive_R &= ~behind_R
    return alive_R
