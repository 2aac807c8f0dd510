"""Held-out documents that students of a real model are measured on, with the teacher's distributions kept in a file.

Legend: N predictions, D documents, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float64, Int64
from torch import Tensor
from transformers import PreTrainedModel

from halve.model import measure
from halve.model.head import Body, Head, split


@dataclass(frozen=True)
class Measured:
    """Of every document the mean over its predictions."""

    kl: Float64[Tensor, " documents"]
    """KL(teacher || student) in nats."""
    nll: Float64[Tensor, " documents"]
    """The student's nats."""
    agreement: Float64[Tensor, " documents"]
    """The share of predictions in which both rank the same token first."""


class Held:
    """Documents and the teacher's distributions on them: four bytes an entry of the vocabulary.

    `path` is the file of the distributions. Processes that map it share its memory, and it is computed once.
    """

    def __init__(
        self, teacher: PreTrainedModel, documents: Sequence[tuple[str, Int64[Tensor, "1 tokens"]]], path: Path
    ) -> None:
        self.kinds = [kind for kind, _ in documents]
        self.ids = [ids for _, ids in documents]
        self.predictions_D = torch.tensor([ids.shape[1] - 1 for ids in self.ids])
        if not path.exists():
            _keep(teacher, self.ids, path)
        kept = torch.load(path, mmap=True, weights_only=True)
        assert all(torch.equal(*both) for both in zip(kept["ids"], self.ids, strict=True)), f"{path} is of other text"
        self.probs, self.entropies, self.teacher_nll_D = kept["probs"], kept["entropies"], kept["nll"]
        self.first = [probs_NV.argmax(-1) for probs_NV in self.probs]

    def measured(self, student: PreTrainedModel) -> Measured:
        """A student on every document."""
        return self.of(*split(student))

    @torch.no_grad()
    def of(self, body: Body, head: Head) -> Measured:
        """Of a student in two parts. KL is the cross entropy less the entropy, as in `halve.model.reference`."""
        figures = torch.empty(3, len(self.ids), dtype=torch.float64)
        for i, ids in enumerate(self.ids):
            z_NV = head.logits(body(ids)[0, :-1])
            logsumexp_N = z_NV.logsumexp(-1)
            expected_N = torch.bmm(self.probs[i][:, None], z_NV[:, :, None])[:, 0, 0]
            figures[0, i] = ((logsumexp_N - expected_N).double() - self.entropies[i]).mean()
            figures[1, i] = (logsumexp_N - z_NV.gather(-1, ids[0, 1:, None])[:, 0]).double().mean()
            figures[2, i] = (z_NV.argmax(-1) == self.first[i]).double().mean()
        return Measured(*figures)

    def line(self, student: Measured) -> dict[str, Any]:
        """Means over all predictions with standard errors over documents, by kind of text, and KL by document."""
        kl, nll = (measure.average(values, self.predictions_D) for values in (student.kl, student.nll))
        perplexity = measure.perplexity(student.nll, self.predictions_D)
        by_kind = {
            kind: round(measure.average(student.kl[which], self.predictions_D[which]).value, 4)
            for kind in dict.fromkeys(self.kinds)
            for which in [torch.tensor([one == kind for one in self.kinds])]
        }
        return {
            "kl": [kl.value, kl.stderr],
            "nll": [nll.value, nll.stderr],
            "perplexity": [perplexity.value, perplexity.stderr],
            "agreement": measure.average(student.agreement, self.predictions_D).value,
            "kl_by_kind": by_kind,
            "kl_by_document": [round(value, 5) for value in student.kl.tolist()],
        }

    def about(self) -> dict[str, Any]:
        """What the page needs of the documents, and the teacher's own figures."""
        perplexity = measure.perplexity(self.teacher_nll_D, self.predictions_D)
        return {
            "documents": len(self.ids),
            "predictions": int(self.predictions_D.sum()),
            "predictions_by_document": self.predictions_D.tolist(),
            "perplexity": [perplexity.value, perplexity.stderr],
        }

    def mean_kl(self, student: PreTrainedModel) -> float:
        """The mean KL over all predictions."""
        return measure.average(self.measured(student).kl, self.predictions_D).value


@torch.no_grad()
def _keep(teacher: PreTrainedModel, documents: Sequence[Tensor], path: Path) -> None:
    """Write the teacher's distributions, their entropies and its nats."""
    body, head = split(teacher)
    probs, entropies, nll = [], [], []
    for ids in documents:
        logits_NV = head.logits(body(ids)[0, :-1])
        nll.append(-measure.token_log_probs(logits_NV, ids[0, 1:]).double().mean())
        probs.append(logits_NV.softmax(-1))
        entropies.append(-torch.special.xlogy(probs[-1], probs[-1]).sum(-1).double())
    partial = path.with_suffix(f".{os.getpid()}")
    torch.save({"ids": list(documents), "probs": probs, "entropies": entropies, "nll": torch.stack(nll)}, partial)
    partial.replace(path)
