"""One factor on what a tied head reads, where a refit cannot solve for the head.

A refit predicts the teacher's states with an error, and the norms make what it predicts as long as the truth. So the
logits of the student are too large for what it knows. A head of its own is solved for; a tied one is the embedding
table and stays. Then one factor on the final norm takes its place. docs/decisions/0034-final-gain.md measures it.

Legend: N tokens, D the teacher's hidden, K the student's, V vocab.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor

from halve.model.head import Head
from halve.model.measure import row_chunks

FACTORS: Final = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)
"""What is tried; the result lies between them."""
MOST_TOKENS: Final = 2_048
"""One unknown needs few tokens, and each costs a row of logits of both models."""
_LEAST_GAIN: Final = 1e-4
"""Nats a token. Less is rounding."""
_ONE: Final = FACTORS.index(1.0)


@dataclass(frozen=True, eq=False)
class TiedHead:
    """A student's head behind a norm whose weight may be scaled. `norm_bias` is what the norm adds to it."""

    head: Head
    norm_bias: Tensor | None

    def logits(self, read_NK: Float[Tensor, "tokens k"]) -> tuple[Tensor, Tensor]:
        """Before the soft-cap: the part that a factor scales, [N, V], and the part that it does not."""
        plain = replace(self.head, bias=None, softcap=None)
        fixed_V = torch.zeros((), device=read_NK.device)
        if self.norm_bias is not None:
            read_NK = read_NK - self.norm_bias
            fixed_V = plain.logits(self.norm_bias[None])[0]
        if self.head.bias is not None:
            fixed_V = fixed_V + self.head.scale * self.head.bias
        return plain.logits(read_NK), fixed_V


def best_factor(pairs: Iterable[tuple[Tensor, Tensor]], student: TiedHead, teacher: Head) -> float:
    """The factor on the final norm's weight at which the student's distributions are closest to the teacher's.

    `pairs` are outputs of both final norms: [N, K] of the student, whose norm is as it was, and [N, D] of the teacher.
    The mean KL(teacher || student) is computed for a few factors on at most `MOST_TOKENS` tokens, and the vertex of the
    parabola through the best three is taken. 1 where nothing is gained.
    """
    sums_F, seen = torch.zeros(len(FACTORS), dtype=torch.float64), 0
    for read_NK, wanted_ND in pairs:
        rows = min(len(read_NK), MOST_TOKENS - seen)
        for part in row_chunks(rows, teacher.weight.shape[0]):
            probs_NV = teacher.logits(wanted_ND[:rows][part]).float().softmax(-1)
            scaled_NV, fixed_V = student.logits(read_NK[:rows][part])
            for i, factor in enumerate(FACTORS):
                sums_F[i] += _cross_entropy(probs_NV, factor * scaled_NV + fixed_V, student.head.softcap)
        seen += rows
        if seen == MOST_TOKENS:
            break
    return _lowest(sums_F / seen) if seen else 1.0


def _cross_entropy(probs_NV: Tensor, logits_NV: Tensor, softcap: float | None) -> float:
    """Summed over tokens. It is the KL and what does not depend on the student."""
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    expected_N = torch.linalg.vecdot(probs_NV, logits_NV.float())
    return float((logits_NV.float().logsumexp(-1) - expected_N).sum(dtype=torch.float64))


def _lowest(losses_F: Tensor) -> float:
    """Where the loss is lowest, by a parabola through the lowest value and its neighbors.

    >>> round(_lowest(torch.tensor([(factor - 0.93) ** 2 for factor in FACTORS])), 6)
    0.93
    """
    best = int(losses_F.argmin())
    if losses_F[_ONE] - losses_F[best] < _LEAST_GAIN:
        return 1.0
    if best in (0, len(FACTORS) - 1):
        return FACTORS[best]
    before, at, after = losses_F[best - 1 : best + 2].tolist()
    step = FACTORS[best] - FACTORS[best - 1]
    return float(FACTORS[best] + step / 2 * (before - after) / (before - 2 * at + after))
