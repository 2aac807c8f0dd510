"""Continuous teacher correction: the teacher learns the corpus while the student learns from it.

2408.11796 (Sec. 4.2 and its figure on this) prunes the teacher as it was, distils from a teacher that is corrected in
the same run, and finds no loss against a teacher that was corrected first. Every step the teacher answers, then the
student moves, then the teacher: on the same samples, by cross-entropy, with an optimizer of its own.

Shapes: N tokens, D hidden.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from halve.anatomy import discover
from halve.errors import TrainError
from halve.model.head import Body, Head
from halve.recipe.schema import Correct, Distill
from halve.text import schedule
from halve.text.batch import Batch, predictions
from halve.text.course import Course
from halve.train.loop import loop, watch
from halve.train.loop.optimizers import make_optimizer
from halve.train.loop.step import Trained, apply, gradients
from halve.train.objectives import logits as objectives
from halve.train.ranks import blocks, shards
from halve.train.teachers.live import Hidden

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class Correction:
    """A teacher that answers and learns: a `Teacher` for the objective and a `Beside` for the loop."""

    trained: Trained
    learner: shards.Learner
    section: Correct
    steps: int
    """It learns in the first so many steps and stays what it is after them."""
    precision: Callable[[], torch.autocast]
    device: str
    flops: watch.FlopsPerToken

    def answer(self, batch: Batch) -> Hidden:
        """Run the body as it is by now."""
        # not inference mode: what sharding keeps of this pass is used again in one that has a way back
        with torch.no_grad():
            states_ND, head = predictions(self.learner.body, batch), self.learner.head()
        self.learner.rest()
        return Hidden(states_ND, head)

    def step(self, parts: Sequence[Batch], *, step: int) -> Mapping[str, float]:
        """Correct the teacher by the micro-batches of step `step`: `teacher_loss`, `teacher_grad_norm`.

        Nothing after the last of its steps. Raises `TrainError` where its loss is not finite.
        """
        if step > self.steps:
            return {}
        head = self.learner.head()
        objective = objectives.cross_entropy()

        def summed(part: Batch) -> tuple[Tensor, int]:
            with self.precision():
                return objective(self.learner.body, head, part.to(self.device))

        found = gradients(self.trained, summed, parts, settle=lambda: self.learner.settle(head))
        if not (math.isfinite(found.loss) and math.isfinite(found.norm)):
            raise TrainError(
                f"the teacher's loss is not finite at step {step}",
                why=f"corrected beside the student, its loss is {found.loss}, its gradient's norm {found.norm}",
                fix=f"lower lr (now {self.section.lr:g}) in the section correct, or correct it before: when: before",
            )
        apply(self.trained, found, lr=self.rate(step), clip=self.section.clip)
        return {"teacher_loss": found.loss, "teacher_grad_norm": found.norm}

    def work(self, context: int, *, step: int) -> float:
        """FLOPs a token of learning: nothing after the last of its steps."""
        return self.flops(context) if step <= self.steps else 0.0

    def rate(self, step: int) -> float:
        """The teacher's learning rate at a step, by its section and over its own steps."""
        own = self.section
        return schedule.rate(step, steps=self.steps, peak=own.lr, end=own.min_lr, warmup_steps=own.warmup_steps)

    def measuring(self, student: objectives.Heldout, own: objectives.Heldout) -> objectives.Heldout:
        """Return what measures the student and, as `teacher_ce`, by `own`, the teacher of that moment."""

        def measure(body: Body, head: Head) -> Mapping[str, float]:
            figures = {**student(body, head), "teacher_ce": own(self.learner.body, self.learner.head())["ce"]}
            self.learner.rest()
            return figures

        return measure


def correction(
    model: PreTrainedModel, section: Correct, distill: Distill, course: Course, *, device: str
) -> Correction:
    """Make a teacher ready to be corrected while it teaches, in place, as float32 masters; see `adapters.choose` first.

    What both models share is the distillation's: samples, micro-batches, precision, ranks. The section says how the
    teacher moves, and for how many tokens (rounded up to whole steps, at most those of the distillation).
    """
    shared = section.model_copy(update={"precision": distill.precision, "replicas": distill.replicas})
    learner = shards.learner(model, shared, device=device, half=loop.is_half(shared, device))
    between = [parameter for layer in blocks.layers(model) for parameter in layer.parameters()]
    trained = Trained({"teacher": model}, make_optimizer(model.parameters(), shared, between=between))
    steps = min(1 + bisect_left(range(1, course.steps + 1), section.tokens, key=course.tokens), course.steps)
    work = watch.correction_work(discover(model.config), section)
    return Correction(trained, learner, section, steps, lambda: loop.autocast(shared, device), device, work)
