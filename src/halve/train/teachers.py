"""Who answers for the teacher: what is known of its distribution over the next token, batch by batch.

Shapes: N tokens (those that a batch predicts), D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from halve.head import Body, Head
from halve.train.batch import Batch, predictions

Answer = TypeVar("Answer", covariant=True)


@runtime_checkable
class Teacher(Protocol[Answer]):
    """Tells of every position that a batch predicts: `Hidden`, or `divergences.Sampled` where only draws are known."""

    def answer(self, batch: Batch) -> Answer:
        """Return what is known, on the batch's device; no gradient leads through it."""


class Hidden(NamedTuple):
    """All of it: the hidden states, and the head that makes logits of them."""

    states: Float[Tensor, "tokens hidden"]
    head: Head


@dataclass(frozen=True)
class Live:
    """A model that runs forward for every batch."""

    body: Body
    head: Head

    def answer(self, batch: Batch) -> Hidden:
        """Run the body."""
        with torch.inference_mode():
            return Hidden(predictions(self.body, batch), self.head)
