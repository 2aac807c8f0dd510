"""Streamed Gram matrices: the sums of a least-squares problem over any number of tokens, in memory of width squared.

Legend: N tokens, X channels that explain, Y channels to be explained.
"""

from __future__ import annotations

import warnings

import torch
from jaxtyping import Float
from torch import Tensor

from halve.model.finite import require_finite

_MOST_SHRINKAGE = 1.0


class SingularGramWarning(UserWarning):
    """There are fewer tokens than channels, so only the ridge makes the solution unique."""


class Gram:
    """`xx = sum_n x_n x_n^T` and `yx = sum_n y_n x_n^T`; products in float32 (float64 if given), sums in float64."""

    def __init__(self, x_channels: int, y_channels: int = 0, *, device: torch.device | str = "cpu") -> None:
        self.xx_XX: Tensor = torch.zeros(x_channels, x_channels, dtype=torch.float64, device=device)
        self.yx_YX: Tensor = torch.zeros(y_channels, x_channels, dtype=torch.float64, device=device)
        self.yy: Tensor = torch.zeros((), dtype=torch.float64, device=device)
        """Of all y the sum of squares."""
        self.tokens = 0

    def add(self, x: Float[Tensor, "*tokens x"], y: Float[Tensor, "*tokens y"] | None = None) -> None:
        """Add tokens. Leading dimensions are flattened."""
        x_NX = raised(x).reshape(-1, x.shape[-1])
        self.xx_XX += x_NX.T @ x_NX
        if y is not None:
            y_NY = raised(y).reshape(-1, y.shape[-1]).to(x_NX.dtype)
            self.yx_YX += y_NY.T @ x_NX
            self.yy += y_NY.double().square().sum()
        self.tokens += len(x_NX)

    def check(self, what: str, *, scarce: bool = True) -> None:
        """Raise `CheckpointError` if a sum is not finite. With `scarce`, warn of fewer tokens than channels."""
        require_finite("activations", self.xx_XX, self.yx_YX, where=f" at {what}")
        if scarce and self.tokens < len(self.xx_XX):
            warnings.warn(
                f"{self.tokens} calibration tokens for {len(self.xx_XX)} channels at {what}:"
                " the refit rests on its ridge; leave out prune.refit_samples, or give more",
                SingularGramWarning,
                stacklevel=2,
            )


def shrinkage(gram: Gram) -> float:
    """The ridge that as few tokens as these ask for, relative to the mean diagonal; many tokens ask for next to none.

    Oracle approximating shrinkage of a covariance toward a multiple of the identity (Chen, Wiesel, Eldar and Hero 2010,
    arXiv 0907.4698, Eq. 23), written as a ridge. Its tokens are independent; those of a text are not, so that it is
    a lower bound.

    >>> gram = Gram(2)
    >>> gram.add(torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]))
    >>> round(shrinkage(gram), 3)
    1.0
    """
    channels = len(gram.xx_XX)
    moment_XX = gram.xx_XX / max(gram.tokens, 1)
    squares, trace = float(moment_XX.square().sum()), float(moment_XX.trace())
    spread = squares - trace**2 / channels
    if spread <= 0 or gram.tokens == 0:
        return _MOST_SHRINKAGE
    share = ((1 - 2 / channels) * squares + trace**2) / ((gram.tokens + 1 - 2 / channels) * spread)
    return min(share / (1 - share), _MOST_SHRINKAGE) if share < 1 else _MOST_SHRINKAGE


def raised(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The same values in float32, or in float64 if they already are."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))
