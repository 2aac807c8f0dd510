"""The weights that explain an output best, and how far data can be trusted to say so.

A ridge regression is pulled toward the weights that a cut leaves. How strong the pull must be depends on how many
tokens there are for each channel, on their spectrum and on the error of the layers before. So it is chosen for each
matrix by its error on tokens that were not fitted. Where no strength lowers that error, the weights of the cut stay.

Legend: N tokens, X channels that explain, Y channels to be explained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from halve.cut.repair.gram import Gram

FIXED: Final = 1e-3
"""The strength where none is chosen, relative to the mean diagonal of the Gram matrix."""
STRENGTHS: Final = tuple(10.0**power for power in (-6, -5, -4, -3, -2, -1, 0, 1, 2))
"""What is tried, the same way; above the last one hardly more than the prior is left."""


class Problem:
    """What a matrix is to explain, on tokens that are fitted and on tokens that are held back."""

    def __init__(self, x_channels: int, y_channels: int, *, device: torch.device) -> None:
        self.fitted = Gram(x_channels, y_channels, device=device)
        self.held = Gram(x_channels, y_channels, device=device)

    def add(self, x: Float[Tensor, "*tokens x"], y: Float[Tensor, "*tokens y"], *, held: bool) -> None:
        """Take tokens in."""
        (self.held if held else self.fitted).add(x, y)

    def solve(self, prior_YX: Float[Tensor, "y x"], *, strength: float, what: str) -> Fit:
        """With the ridge that the held tokens choose; without such tokens, with this strength.

        Raises `CheckpointError` where a sum is not finite, and warns with `SingularGramWarning` where a ridge that is
        not chosen meets fewer tokens than channels.
        """
        self.fitted.check(what, scarce=not self.held.tokens)
        if self.held.tokens:
            self.held.check(what, scarce=False)
            return chosen_ridge(self.fitted, self.held, prior_YX)
        return Fit(ridge(self.fitted.xx_XX, self.fitted.yx_YX, prior_YX, strength=strength), strength, float("nan"))


@dataclass(frozen=True, eq=False)
class Fit:
    """A matrix, the strength that made it, and the share of the cut's error on unfitted tokens that it leaves.

    The strength is infinite where the weights of the cut stay, and the share then 1. Without tokens to tell, it is nan.
    """

    weight_YX: Float64[Tensor, "y x"]
    strength: float
    error: float


def chosen_ridge(fitted: Gram, held: Gram, prior_YX: Float[Tensor, "y x"]) -> Fit:
    """The ridge regression on the tokens of `fitted` whose strength explains the tokens of `held` best.

    From 1e-3 the strength is raised or lowered by factors of ten for as long as the error on `held` falls: four solves
    are usual. `held` must know the outputs' own sum of squares.
    """
    prior_YX = prior_YX.double()
    gap_YX = held.yx_YX - prior_YX @ held.xx_XX
    start = float(held.yy) - 2 * float((prior_YX * held.yx_YX).sum()) + float((prior_YX @ held.xx_XX * prior_YX).sum())

    def tried(index: int) -> Fit:
        weight_YX = ridge(fitted.xx_XX, fitted.yx_YX, prior_YX, strength=STRENGTHS[index])
        change_YX = weight_YX - prior_YX
        saved = 2 * float((change_YX * gap_YX).sum()) - float((change_YX @ held.xx_XX * change_YX).sum())
        return Fit(weight_YX, STRENGTHS[index], 1 - saved / start if start > 0 else 1.0)

    first = STRENGTHS.index(FIXED)
    best = tried(first)
    for way in (range(first + 1, len(STRENGTHS)), range(first - 1, -1, -1)):
        begun = best
        for index in way:
            following = tried(index)
            if not following.error < best.error:
                break
            best = following
        if best is not begun:
            break
    return best if best.error < 1 else Fit(prior_YX, float("inf"), 1.0)


def ridge(
    xx_XX: Float64[Tensor, "x x"],
    yx_YX: Float64[Tensor, "y x"],
    prior_YX: Float[Tensor, "y x"],
    *,
    strength: float,
) -> Float64[Tensor, "y x"]:
    """The matrix that explains y by x best, held near a prior:

        argmin_W  sum_n |y_n - W x_n|^2 + r |W - prior|^2,   r = strength * mean diagonal of xx

    Ridge regression toward the weights that a cut leaves instead of toward zero: where data say nothing, nothing
    changes, and where nothing was cut, the prior explains everything and comes back. Solved in float64 by Cholesky.
    Channels that are zero on every token keep their prior.

    >>> one = torch.ones(1, 1, dtype=torch.float64)
    >>> round(ridge(4 * one, 8 * one, 0 * one, strength=1.0).item(), 9)  # sum of squares 4, ridge 4: half way to 8 / 4
    1.0
    """
    prior_YX = prior_YX.double()
    r = strength * xx_XX.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    regular_XX = xx_XX + r * torch.eye(len(xx_XX), dtype=torch.float64, device=xx_XX.device)
    gap_YX = yx_YX - prior_YX @ xx_XX
    result: Tensor = prior_YX + torch.cholesky_solve(gap_YX.T, torch.linalg.cholesky(regular_XX)).T
    return result
