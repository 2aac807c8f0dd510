"""Nested students: smaller models that are parts of the weights of one, trained with it.

A smaller student runs the family's own code. In every forward pass its parameters are parts of the largest student's,
taken anew, so that gradients flow into one set of weights. The weights of its norms are its own: fewer channels have
another spread, and a shared weight could suit only one size.

Every step draws one student or several. The draw is a function of the seed and the number of the step alone. In as many
steps as there are students, each is drawn equally often.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from halve.model.head import Body, Head, split
from halve.text.batch import Batch
from halve.train.loop.loop import Turns
from halve.train.objectives.logits import Heldout, Objective
from halve.train.teachers.live import Teacher

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

A = TypeVar("A")


@dataclass(frozen=True, eq=False)
class Smaller:
    """A smaller student: a model that was cut from the largest, and how its weights are taken from it."""

    model: PreTrainedModel
    own: tuple[str, ...]
    """The parameters that are its own, by name. They are trained from the values that the model has."""
    shared: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    """All others, from the largest student's parameters by name."""


class NestedStudents(nn.Module):
    """The students inside one model, counted from 0, the largest. Its parameters are those that are their own.

    The models of the smaller students lose the values of their parameters: they are read from the largest.
    """

    def __init__(self, largest: PreTrainedModel, smaller: Sequence[Smaller]) -> None:
        super().__init__()
        self._largest = (largest,)  # in a tuple: it is trained as a module of its own
        self._inside = tuple(_Inside.of(part) for part in smaller)
        self.own = nn.ModuleList(
            nn.ParameterDict({_key(name): nn.Parameter(value) for name, value in part.first.items()})
            for part in self._inside
        )
        self._device = largest.device
        for part in self._inside:
            for parameter in part.model.parameters():
                parameter.data = parameter.data.new_empty(0)

    def __len__(self) -> int:
        return 1 + len(self._inside)

    @property
    def configs(self) -> tuple[PretrainedConfig, ...]:
        """The configs of the smaller students."""
        return tuple(part.model.config for part in self._inside)

    def values(self, number: int) -> dict[str, Tensor]:
        """The parameters of a smaller student by name."""
        part, own = self._inside[number - 1], self.own[number - 1]
        assert isinstance(own, nn.ParameterDict)
        shared = part.shared(dict(self._largest[0].named_parameters()))
        return shared | {name: own[_key(name)] for name in part.first}

    def student(self, number: int, body: Body, head: Head) -> tuple[Body, Head]:
        """The body and the head of a student; `body` and `head` are the largest's.

        No head accumulates gradients by itself, because the losses of several students are added.
        """
        if number == 0:
            return body, replace(head, accumulates=False)
        part, values = self._inside[number - 1], self.values(number)
        self._follow(values[part.weight_name].device)
        inner = {short: values[name] for short, name in part.body_names.items()}
        bias = None if part.bias_name is None else values[part.bias_name]
        return Body(_With(part.body.module, inner)), replace(part.head, weight=values[part.weight_name], bias=bias)

    def _follow(self, device: torch.device) -> None:
        """Bring what the models compute by themselves, such as rotary frequencies, to the weights' device."""
        if device != self._device:
            for part in self._inside:
                part.model.to(device)
            self._device = device

    @torch.no_grad()
    def filled(self, number: int) -> PreTrainedModel:
        """The model of a smaller student with its values. It is then a model of its own."""
        part, values = self._inside[number - 1], self.values(number)
        for name, parameter in part.model.named_parameters():
            parameter.data = values[name].detach().clone()
        return part.model


@dataclass(frozen=True, eq=False)
class _Inside:
    """A smaller student, and the names of its parameters in its body and its head."""

    model: PreTrainedModel
    shared: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    first: dict[str, Tensor]
    """The values of its own parameters before training."""
    body: Body
    head: Head
    body_names: dict[str, str]
    """Names within the body, and the whole names."""
    weight_name: str
    bias_name: str | None

    @classmethod
    def of(cls, smaller: Smaller) -> _Inside:
        """Find the names. The check of `split` runs with the values that the model still has."""
        model = smaller.model.float() if smaller.model.dtype in (torch.bfloat16, torch.float16) else smaller.model
        body, head = split(model)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        parameters = dict(model.named_parameters())
        return cls(
            model,
            smaller.shared,
            {name: parameters[name].detach().clone() for name in smaller.own},
            body,
            head,
            {short: names[id(parameter)] for short, parameter in body.module.named_parameters()},
            names[id(head.weight)],
            None if head.bias is None else names[id(head.bias)],
        )


class _With(nn.Module):
    """A module that runs with other parameters than its own."""

    def __init__(self, module: nn.Module, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.module, self.values = module, dict(values)

    def forward(self, **inputs: Any) -> Any:
        return functional_call(self.module, self.values, kwargs=inputs)


def _key(name: str) -> str:
    return name.replace(".", "/")  # a module's own names have no dots


# ---- drawing


def students_of_step(seed: int, step: int, *, students: int, draws: int) -> tuple[int, ...]:
    """The students that learn in a step, counted from 1. Of so many steps as there are students each draws them alike.

    >>> sorted(student for step in (1, 2, 3) for student in students_of_step(0, step, students=3, draws=1))
    [0, 1, 2]
    """
    turn, place = divmod(step - 1, students)
    order = random.Random(f"nest {seed} {turn}").sample(range(students), students)
    return tuple(sorted(order[(place * draws + n) % students] for n in range(draws)))


def taking_turns(nest: NestedStudents, objective: Objective, *, seed: int, draws: int) -> Turns:
    """The steps of all students: the mean of the losses of those that a step draws."""

    def numbers_of(step: int) -> tuple[int, ...]:
        return students_of_step(seed, step, students=len(nest), draws=draws)

    def of_step(step: int) -> Objective:
        numbers = numbers_of(step)

        def together(body: Body, head: Head, batch: Batch) -> tuple[Tensor, int]:
            losses = [objective(*nest.student(number, body, head), batch) for number in numbers]
            return torch.stack([loss for loss, _ in losses]).mean(0), losses[0][1]

        return together

    return Turns(of_step, lambda step: " ".join(map(str, numbers_of(step))))


def measuring_all(nest: NestedStudents, figures: Heldout) -> Heldout:
    """The figures of the largest student, and `kl-2`, `kl-3`, ... of the others, from the second largest on."""

    def measure(body: Body, head: Head) -> Mapping[str, float]:
        others = {f"kl-{n + 1}": figures(*nest.student(n, body, head))["kl"] for n in range(1, len(nest))}
        return {**figures(body, head), **others}

    return measure


@dataclass
class Once(Generic[A]):
    """A teacher that runs once for a batch that several students learn from."""

    teacher: Teacher[A]
    last: list[tuple[Batch, A]] = field(default_factory=list)

    def answer(self, batch: Batch) -> A:
        """The teacher's answer, or the one that it gave for this very batch."""
        if not self.last or self.last[0][0] is not batch:
            self.last = [(batch, self.teacher.answer(batch))]
        return self.last[0][1]
