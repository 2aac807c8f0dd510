"""How far the ranks of candidates before a training agree with those after it, and whose quality got worse.

Shapes: C candidates, S held-out samples, R rungs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from jaxtyping import Float64
from scipy.stats import kendalltau
from torch import Tensor

from halve.model.measure import Estimate, difference
from halve.search.halving import TIE

DRAWS: Final = 400
"""Bootstrap draws. The ends of the interval then vary by about a hundredth from seed to seed."""
_LEVEL: Final = 0.95
RANKED: Final = 4
"""Candidates that an interval needs. Three have four values of tau, and the same order in nearly every draw."""


@dataclass(frozen=True)
class Agreement:
    """Kendall's tau-b between two rankings of the same candidates, and its 95 % interval over held-out samples.

    With a single sample, fewer than `RANKED` candidates, or the same value in nearly every draw there is no interval,
    and its ends are None.
    """

    tau: float
    low: float | None
    high: float | None
    candidates: int


@dataclass(frozen=True)
class Rise:
    """A candidate (a row of the measurements) whose KL was higher at a rung than at the one before."""

    row: int
    rung: int
    by: Estimate


def rank_agreement(
    before_CS: Float64[Tensor, "candidates samples"], after_CS: Float64[Tensor, "candidates samples"], *, seed: int
) -> Agreement | None:
    """Kendall's tau between the candidates' mean KL before and after. None for fewer than two candidates.

    The interval is a percentile bootstrap: samples are drawn with replacement, the same for both sides, because both
    were measured on the same samples. It says how far the ranks depend on the samples, not on the candidates.

    >>> before_CS = torch.tensor([[1.0, 1.1], [2.0, 2.1], [3.0, 3.1]], dtype=torch.float64)
    >>> rank_agreement(before_CS, before_CS.flip(0), seed=0)
    Agreement(tau=-1.0, low=None, high=None, candidates=3)
    """
    if len(before_CS) < 2:
        return None
    tau = _tau(before_CS.mean(1), after_CS.mean(1))
    if math.isnan(tau):
        return None
    samples = before_CS.shape[1]
    if samples == 1 or len(before_CS) < RANKED:
        return Agreement(tau, None, None, len(before_CS))
    draws = torch.randint(samples, (DRAWS, samples), generator=torch.Generator().manual_seed(seed))
    taus = np.array([_tau(before_CS[:, drawn].mean(1), after_CS[:, drawn].mean(1)) for drawn in draws])
    low, high = np.nanquantile(taus, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    if low == high:
        return Agreement(tau, None, None, len(before_CS))
    return Agreement(tau, float(low), float(high), len(before_CS))


def rises(kl_RCS: Float64[Tensor, "rungs candidates samples"]) -> tuple[Rise, ...]:
    """Where a candidate's KL rises from one rung to the next by more than `TIE` paired standard errors.

    A short distillation that makes a candidate worse ranks it by its learning rate and not by its shape. Rungs that a
    candidate did not reach are NaN.
    """
    worse = []
    for rung in range(1, len(kl_RCS)):
        for row in range(kl_RCS.shape[1]):
            by = difference(kl_RCS[rung, row], kl_RCS[rung - 1, row])
            if by.value > TIE * by.stderr:
                worse.append(Rise(row, rung, by))
    return tuple(worse)


def _tau(before_C: Tensor, after_C: Tensor) -> float:
    return float(kendalltau(before_C.numpy(), after_C.numpy()).statistic)
