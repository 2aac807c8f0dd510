"""When each phase of a training begins, and its settings: plain numbers, known before anything is read.

A teacher may have been trained in phases, the last on better text; 2407.14679 (Table 20) asks which of its texts the
student should see.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from halve.recipe.schema import Training


@dataclass(frozen=True)
class Span:
    """Steps `first`, `first + 1`, ... (counted from 1) with the same mixture, context and peak learning rate."""

    first: int
    steps: int
    tokens_before: int
    context: int
    lr: float
    weights: Mapping[str, float] | None
    """Weights of the mixture's parts by name; None are those of the recipe."""

    def tokens(self, step: int, *, batch: int) -> int:
        """Tokens that were trained on when `step` is done."""
        return self.tokens_before + (step - self.first + 1) * batch * self.context


def spans(training: Training, context: int) -> tuple[Span, ...]:
    """The steps of a training, in spans with the same settings: one, and one more for each phase.

    A phase begins at the first step before which `from_tokens` tokens have been trained on. The start of a phase and
    the end of the training are rounded up to whole steps. Settings that a phase does not name keep their values. A step
    keeps its number of samples, so twice the context means twice the tokens per step. If two phases begin within one
    step, the first of them has no steps.
    """
    now = Span(1, 0, 0, context, training.lr, None)
    planned = []
    for phase, end in zip((None, *training.phases), _ends(training), strict=True):
        if phase is not None:
            now = replace(
                now,
                first=now.first + now.steps,
                tokens_before=now.tokens(now.first + now.steps - 1, batch=training.batch),
                context=phase.context or now.context,
                lr=phase.lr or now.lr,
                weights=phase.mixture or now.weights,
            )
        missing = max(end - now.tokens_before, 0)
        now = replace(now, steps=math.ceil(missing / (training.batch * now.context)))
        planned.append(now)
    return tuple(planned)


def rate(step: int, *, steps: int, peak: float, end: float, warmup_steps: int) -> float:
    """The learning rate of a step (counted from 1): linear warm-up to `peak`, then a cosine that is `end` at `steps`.

    >>> [rate(step, steps=5, peak=1.0, end=0.0, warmup_steps=2) for step in (1, 2, 5)]
    [0.5, 1.0, 0.0]
    """
    if step <= warmup_steps:
        return peak * step / warmup_steps
    done = (step - warmup_steps) / max(steps - warmup_steps, 1)
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * done))


def _ends(training: Training) -> list[int]:
    """Tokens at which each span ends."""
    return [*(phase.from_tokens for phase in training.phases), training.tokens]
