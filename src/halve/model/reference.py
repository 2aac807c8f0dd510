"""A teacher's distributions on some samples, computed once for the many students that are compared with it.

Legend: N predictions, V vocabulary.
"""

from __future__ import annotations

import torch
from jaxtyping import Float64, Int
from torch import Tensor
from transformers import PreTrainedModel

from halve.model.head import split
from halve.model.measure import require_context, row_chunks

MOST_BYTES = 2**30
"""Probabilities in float32 take four bytes an entry."""


class Reference:
    """The teacher's probabilities after every token of the samples but the last, in float32.

    `measure.divergence` computes both models' distributions anew. Here a student costs its own pass, its logits and two
    sums over them. Students must have the teacher's vocabulary.

    Raises `CorpusError` if the samples are longer than the teacher's context.
    """

    def __init__(self, teacher: PreTrainedModel, samples_BS: Int[Tensor, "samples seq"], *, micro_batch: int) -> None:
        require_context(teacher.config, samples_BS.shape[1], "a sample")
        self.samples_BS, self.micro_batch = samples_BS, micro_batch
        self._probs: list[Tensor] = []
        self._entropies: list[Tensor] = []
        body, head = split(teacher)
        with torch.no_grad():
            for part_BS in torch.split(samples_BS, micro_batch):
                hidden_ND = body(part_BS.to(teacher.device))[:, :-1].flatten(0, 1)
                probs_NV = torch.empty(len(hidden_ND), head.weight.shape[0], device=teacher.device)
                for rows in row_chunks(*probs_NV.shape):
                    probs_NV[rows] = head.logits(hidden_ND[rows]).float().softmax(-1)
                self._probs.append(probs_NV)
                self._entropies.append(-torch.special.xlogy(probs_NV, probs_NV).sum(-1).double())

    @torch.no_grad()
    def divergences(self, student: PreTrainedModel) -> Float64[Tensor, " samples"]:
        """Of each sample the mean of KL(teacher || student) over its predictions, in nats:

        KL = sum_v p_t(v) log p_t(v) - sum_v p_t(v) z_s(v) + logsumexp z_s

        where z are logits. Rounding leaves some 1e-5 nats, which shows between models that are nearly equal.
        """
        body, head = split(student)
        means = []
        parts = zip(torch.split(self.samples_BS, self.micro_batch), self._probs, self._entropies, strict=True)
        for part_BS, probs_NV, entropy_N in parts:
            hidden_ND = body(part_BS.to(student.device))[:, :-1].flatten(0, 1)
            cross_N = torch.empty(len(hidden_ND), dtype=torch.float64, device=student.device)
            for rows in row_chunks(len(hidden_ND), probs_NV.shape[1]):
                logits_NV = head.logits(hidden_ND[rows]).float()
                expected_N = torch.bmm(probs_NV[rows, None].to(logits_NV.device), logits_NV[:, :, None])[:, 0, 0]
                cross_N[rows] = (logits_NV.logsumexp(-1) - expected_N).double()
            means.append((cross_N - entropy_N.to(cross_N.device)).view(len(part_BS), -1).mean(1).cpu())
        return torch.cat(means)


def affordable(samples: int, context: int, vocab: int) -> int:
    """How many of so many samples a reference holds within `MOST_BYTES`, two at least.

    >>> affordable(64, 512, 49_152), affordable(64, 512, 256_000)
    (10, 2)
    """
    return max(min(samples, 2), min(samples, MOST_BYTES // (4 * context * vocab)))
