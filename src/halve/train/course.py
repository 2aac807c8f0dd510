"""The course of a run: what each step trains on and how fast, as a function of the step's number alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from halve.recipe import Training
from halve.train.batch import Batch


@runtime_checkable
class Samples(Protocol):
    """Packed samples whose order is a function of the step (see `corpus.Samples`)."""

    @property
    def context(self) -> int:
        """Tokens in a sample."""

    def batch(self, step: int, batch: int) -> Batch:
        """The samples of step `step`, counted from 0, of `batch` samples each."""


@dataclass(frozen=True)
class Course:
    """Steps are counted from 1; `step` 0 is the state before the first."""

    training: Training
    samples: Samples

    @property
    def steps(self) -> int:
        """How many whole optimizer steps cover the token budget."""
        return math.ceil(self.training.tokens / (self.training.batch * self.samples.context))

    def tokens(self, step: int) -> int:
        """Tokens that were trained on when `step` is done."""
        return step * self.training.batch * self.samples.context

    def batch(self, step: int) -> Batch:
        """The samples of a step, of all ranks together."""
        return self.samples.batch(step - 1, self.training.batch)

    def lr(self, step: int) -> float:
        """The rate of a step: linear warm-up, then a cosine that ends at `min_lr`."""
        training = self.training
        if step <= training.warmup_steps:
            return training.lr * step / training.warmup_steps
        done = (step - training.warmup_steps) / max(self.steps - training.warmup_steps, 1)
        return training.min_lr + (training.lr - training.min_lr) * 0.5 * (1 + math.cos(math.pi * done))
