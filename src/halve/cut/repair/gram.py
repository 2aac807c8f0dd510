"""Streamed Gram matrices: the sums of a least-squares problem over any number of tokens, in memory of width squared.

Legend: N tokens, X channels that explain, Y channels to be explained.
"""

from __future__ import annotations

import warnings

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from halve.model.finite import require_finite


class SingularGramWarning(UserWarning):
    """There are fewer tokens than channels, so only the ridge makes the solution unique."""


class Gram:
    """`xx = sum_n x_n x_n^T` and `yx = sum_n y_n x_n^T`; products in float32 (float64 if given), sums in float64."""

    def __init__(self, x_channels: int, y_channels: int = 0, *, device: torch.device | str = "cpu") -> None:
        self.xx_XX: Tensor = torch.zeros(x_channels, x_channels, dtype=torch.float64, device=device)
        self.yx_YX: Tensor = torch.zeros(y_channels, x_channels, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, x: Float[Tensor, "*tokens x"], y: Float[Tensor, "*tokens y"] | None = None) -> None:
        """Add tokens. Leading dimensions are flattened."""
        x_NX = raised(x).reshape(-1, x.shape[-1])
        self.xx_XX += x_NX.T @ x_NX
        if y is not None:
            self.yx_YX += raised(y).reshape(-1, y.shape[-1]).to(x_NX.dtype).T @ x_NX
        self.tokens += len(x_NX)

    def check(self, what: str) -> None:
        """Raise `CheckpointError` if a sum is not finite. Warn if there were fewer tokens than channels."""
        require_finite("activations", self.xx_XX, self.yx_YX, where=f" at {what}")
        if self.tokens < len(self.xx_XX):
            warnings.warn(
                f"{self.tokens} calibration tokens for {len(self.xx_XX)} channels at {what}:"
                " the refit rests on its ridge; give prune.refit_samples more",
                SingularGramWarning,
                stacklevel=2,
            )


def raised(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The same values in float32, or in float64 if they already are."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def ridge(
    xx_XX: Float64[Tensor, "x x"],
    yx_YX: Float64[Tensor, "y x"],
    prior_YX: Float[Tensor, "y x"],
    *,
    strength: float,
) -> Float64[Tensor, "y x"]:
    """The matrix that best predicts y from x, with a penalty for the distance from a prior:

        argmin_W  sum_n |y_n - W x_n|^2 + r |W - prior|^2,   r = strength * mean diagonal of xx

    This is ridge regression toward the weights that the cut left, instead of toward zero. Where the data give no
    information, nothing changes. Where nothing was cut, the prior is already exact and is returned. Solved in float64
    by Cholesky. Channels that are zero on every token keep their prior.

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
