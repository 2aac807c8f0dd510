"""Continuous teacher correction: the teacher is corrected while the student learns from it.

2408.11796 (Sec. 4.2 and its figure) prunes the original teacher, distills from a teacher that is corrected in the same
run, and finds the student as good as with a teacher that was corrected first. In every step the teacher computes its
answers, then the student is updated, and then the teacher. The teacher trains on the same samples by cross-entropy,
with its own optimizer.

Shapes: N tokens, D hidden.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from halve.anatomy import discover
from halve.anatomy.work import FlopsPerToken, by_context, correcting
from halve.errors import TrainError
from halve.model.finite import is_finite, not_finite
from halve.model.head import Body, Head
from halve.recipe.schema import Correct, Distill
from halve.text import schedule
from halve.text.batch import Batch, predictions
from halve.text.course import Course
from halve.train.loop import loop
from halve.train.loop.optimizers import make_optimizer
from halve.train.loop.step import Trained, apply, gradients
from halve.train.objectives import logits as objectives
from halve.train.ranks import blocks, shards
from halve.train.ranks.group import ALONE, Ranks
from halve.train.teachers.live import Hidden

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class Correction:
    """A teacher that answers and is trained: a `Teacher` for the objective and a `Beside` for the loop."""

    trained: Trained
    learner: shards.Learner
    section: Correct
    steps: int
    """How many steps it is trained for, from the first step on. After them it stays unchanged."""
    precision: Callable[[], torch.autocast]
    device: str
    flops: FlopsPerToken

    def answer(self, batch: Batch) -> Hidden:
        """Run the body with its current weights."""
        # not inference mode: sharding keeps tensors of this pass and uses them in a pass with gradients
        with torch.no_grad():
            states_ND, head = predictions(self.learner.body, batch), self.learner.head()
        self.learner.rest()
        return Hidden(states_ND, head)

    def step(self, parts: Sequence[Batch], *, step: int) -> Mapping[str, float]:
        """Correct the teacher by the micro-batches of step `step`: `teacher_loss`, `teacher_grad_norm`.

        Does nothing after the last of its steps. Raises `TrainError` if its loss is not finite.
        """
        if step > self.steps:
            return {}
        head = self.learner.head()
        objective = objectives.cross_entropy()

        def summed(part: Batch) -> tuple[Tensor, int]:
            with self.precision():
                return objective(self.learner.body, head, part.to(self.device))

        settle, ranks = partial(self.learner.settle, head), self.learner.ranks
        step_gradients = gradients(self.trained, summed, parts, settle=settle, ranks=ranks)
        if not is_finite(step_gradients.loss, step_gradients.norm):
            raise not_finite(
                "the teacher's loss",
                verb="is",
                where=f" at step {step}",
                why=f"corrected beside the student, its loss is {step_gradients.loss},"
                f" its gradient's norm {step_gradients.norm}",
                fix=f"lower lr (now {self.section.lr:g}) in the section correct, or correct it before: when: before",
                kind=TrainError,
            )
        apply(self.trained, step_gradients, lr=self.rate(step), clip=self.section.clip)
        return {"teacher_loss": step_gradients.loss, "teacher_grad_norm": step_gradients.norm}

    def work(self, context: int, *, step: int) -> float:
        """FLOPs per token of its training. Zero after the last of its steps."""
        return self.flops(context) if step <= self.steps else 0.0

    def rate(self, step: int) -> float:
        """The teacher's learning rate at a step, by the section `correct` and over its own steps."""
        section = self.section
        return schedule.rate(
            step, steps=self.steps, peak=section.lr, end=section.min_lr, warmup_steps=section.warmup_steps
        )

    def measuring(self, student: objectives.Heldout, own: objectives.Heldout) -> objectives.Heldout:
        """Return a measurement of the student that also measures the current teacher with `own`, as `teacher_ce`."""

        def measure(body: Body, head: Head) -> Mapping[str, float]:
            figures = {**student(body, head), "teacher_ce": own(self.learner.body, self.learner.head())["ce"]}
            self.learner.rest()
            return figures

        return measure


def correction(
    model: PreTrainedModel,
    section: Correct,
    distill: Distill,
    course: Course,
    *,
    device: str,
    ranks: Ranks = ALONE,
) -> Correction:
    """Prepare a teacher, in place, to be corrected while it teaches, as float32 masters. Call `adapters.choose` first.

    Samples, micro-batches, precision and ranks are those of the distillation. The section says how the teacher is
    trained, and for how many tokens (rounded up to whole steps, at most those of the distillation).
    """
    shared = section.model_copy(update={"precision": distill.precision, "replicas": distill.replicas})
    learner = shards.learner(model, shared, device=device, half=loop.is_half(shared, device), ranks=ranks)
    between = [parameter for layer in blocks.layers(model) for parameter in layer.parameters()]
    trained = Trained({"teacher": model}, make_optimizer(model.parameters(), shared, between=between))
    steps = min(1 + bisect_left(range(1, course.steps + 1), section.tokens, key=course.tokens), course.steps)
    work = by_context(partial(correcting, section=section), discover(model.config))
    return Correction(trained, learner, section, steps, lambda: loop.autocast(shared, device), device, work)
