"""FLOPs per token, from the anatomy alone: of a forward pass and its parts, and of training. Counted only here.

A matrix product counts two FLOPs per entry of the matrix. A backward pass counts twice its forward pass: one product
for the gradient of the inputs and one for the gradient of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from halve.anatomy.arch import Arch
from halve.anatomy.discover import Anatomy
from halve.recipe.schema import Correct, Distill

FlopsPerToken = Callable[[int], float]
"""FLOPs per token of training, by the length of the context."""


@dataclass(frozen=True)
class Costed:
    """A model with these sizes that reads samples of `context` tokens. The properties give FLOPs per token."""

    anatomy: Anatomy
    arch: Arch
    context: int
    kept_layers: tuple[int, ...] | None = None
    """Which layers it has, if that is known."""

    @classmethod
    def of(cls, anatomy: Anatomy, context: int) -> Costed:
        """The model with its own sizes."""
        return cls(anatomy, anatomy.sizes, context)

    @property
    def whole(self) -> int:
        """A forward pass with logits."""
        return self._forward(self.context)

    @property
    def head(self) -> int:
        """The logits."""
        return 2 * self.arch.vocab * self.arch.hidden

    @property
    def body(self) -> int:
        """A forward pass without logits."""
        return self.whole - self.head

    @property
    def matrices(self) -> int:
        """A forward pass without the products of attention, which has no weights."""
        return self._forward(0)

    @property
    def attention(self) -> int:
        """The products of attention in all layers."""
        return self.whole - self.matrices

    def at(self, arch: Arch) -> Costed:
        """The same with other sizes."""
        return replace(self, arch=arch)

    def _forward(self, context: int) -> int:
        return self.anatomy.ledger.count(self.arch, kept_layers=self.kept_layers, context=context).flops_per_token


def learning(model: Costed) -> int:
    """Training a model: three times its forward pass, `3 (2N + a) + 6 V H`."""
    return 3 * model.whole


def correcting(teacher: Costed, section: Correct) -> int:
    """A correction: three times the forward pass.

    Frozen matrices have no weight gradient and count twice. Attention has no weights.
    """
    return learning(teacher) - (0 if section.method == "full" else teacher.matrices)


def answering(teacher: Costed, training: Distill) -> int:
    """The teacher in distillation: only its head if its hidden states are cached, nothing if its logits are."""
    return {"none": teacher.whole, "hidden": teacher.head, "logits": 0}[training.cache]


def distilling(student: Costed, teacher: Costed, training: Distill) -> int:
    """Distillation: `(2N_T + a_T) + 3 (2N_S + a_S) + V (6 H_S + 2 H_T)`, less what a cache saves the teacher."""
    return learning(student) + answering(teacher, training)


def distilling_adapters(student: Costed, teacher: Costed, training: Distill) -> int:
    """The same where adapters alone are trained: the student's frozen matrices have no weight gradient."""
    return distilling(student, teacher, training) - student.matrices


def taught_in_turns(students: Sequence[Costed], teacher: Costed, training: Distill, *, draws: int) -> float:
    """Distillation of students inside a student: the teacher once, and as many of mean size as a step draws."""
    return answering(teacher, training) + draws * sum(map(learning, students)) / len(students)


def by_context(work: Callable[..., int], *anatomies: Anatomy) -> FlopsPerToken:
    """One of these functions for whole models, by the length of the context: `by_context(learning, student)`."""
    return lambda context: float(work(*(Costed.of(anatomy, context) for anatomy in anatomies)))
