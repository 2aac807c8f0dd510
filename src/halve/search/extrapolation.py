"""Which finalist is ahead after the distillation: KL extrapolated from the last two rungs.

Between rungs KL falls about linearly in the logarithm of the tokens. So a finalist that trains faster can pass the one
that has the lowest KL at the last rung. On a teacher of 7M parameters the last rung alone chose the best of eight
finalists in three of five seeds, and the extrapolated KL in all five. The extrapolated gap of the last two finalists
was within 0.003 nats of the one that was measured after 2.5 times the tokens in four seeds, and 0.010 too large in the
fifth (LOG.md, 2026-12-01).

Shapes: C candidates, S samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

from jaxtyping import Float64
from torch import Tensor

from halve.model.measure import Estimate, difference
from halve.search.halving import TIE, ranking

REACH: Final = 2.5
"""How many times the tokens of the last rung KL is extrapolated at most: as far as it was measured."""


@dataclass(frozen=True)
class Overtaking:
    """One candidate is behind another at the last rung, and clearly ahead of it once both have trained longer."""

    row: int
    other: int
    behind: Estimate
    """KL at the last rung, less that of the other one."""
    ahead: Estimate
    """The extrapolated KL of the other one, less its own: more than a tie."""
    tokens: int
    """Where it is extrapolated to."""

    def as_dict(self) -> dict[str, Any]:
        """Plain data without the rows."""
        return {"behind": self.behind.as_dict(), "ahead": self.ahead.as_dict(), "tokens": self.tokens}


def overtaking(
    before_CS: Float64[Tensor, "candidates samples"],
    last_CS: Float64[Tensor, "candidates samples"],
    rungs: tuple[int, int],
    *,
    end: int,
) -> Overtaking | None:
    """The candidate that passes the one with the lowest KL before the end. None if no one clearly does.

    Arguments are the KL at the last two rungs, the tokens of these, and those of the distillation. The errors are
    paired: KL is extrapolated sample by sample.

    >>> import torch
    >>> before_CS = torch.tensor([[0.20, 0.22], [0.30, 0.31]], dtype=torch.float64)
    >>> last_CS = torch.tensor([[0.15, 0.17], [0.16, 0.17]], dtype=torch.float64)
    >>> found = overtaking(before_CS, last_CS, (1_000, 2_000), end=4_000)
    >>> found.row, found.other, round(found.ahead.value, 3), found.tokens
    (1, 0, 0.085, 4000)
    """
    tokens = min(end, round(REACH * rungs[1]))
    if tokens <= rungs[1]:
        return None
    steps = math.log(tokens / rungs[1]) / math.log(rungs[1] / rungs[0])
    end_CS = last_CS + (last_CS - before_CS) * steps
    leads, passes = ranking(last_CS)[0], ranking(end_CS)[0]
    ahead = difference(end_CS[leads], end_CS[passes])
    if not ahead.value > TIE * ahead.stderr:  # nor where there is one sample, which has no error
        return None
    return Overtaking(passes, leads, difference(last_CS[passes], last_CS[leads]), ahead, tokens)
