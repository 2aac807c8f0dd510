"""Smaller students in a distillation: opened from what the nest stage wrote, trained with the largest, and saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from halve.anatomy import Anatomy, Arch, discover
from halve.anatomy.work import Costed, FlopsPerToken, taught_in_turns
from halve.cut.plan.nest import prefix_plan
from halve.cut.surgery.trim import cut_parts, trim
from halve.disk.files import read_object
from halve.recipe.rounds import nested_students
from halve.recipe.schema import Recipe
from halve.train.loop.loop import Lesson
from halve.train.nested import NestedStudents, Smaller, measuring_all, taking_turns
from halve.train.ranks import shards

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from halve.model.checkpoint import Checkpoint
    from halve.train.ranks.group import Ranks


NEST = "nest.json"
"""Beside the sorted model: for each smaller student `arch`, `layers` and `gains`, from large to small."""


def open_nest(model: PreTrainedModel, anatomy: Anatomy, path: Path) -> NestedStudents:
    """The students inside a sorted model, by the file `path` of the nest stage."""
    return NestedStudents(model, [_smaller(model, anatomy, entry) for entry in read_object(path)["sizes"]])


def _smaller(model: PreTrainedModel, anatomy: Anatomy, entry: Mapping[str, Any]) -> Smaller:
    plan = prefix_plan(anatomy, Arch.of(entry["arch"]), layers=entry["layers"])
    cut = trim(model, plan, anatomy, gains=entry["gains"])
    norms, names = discover(cut.config).norms, [name for name, _ in cut.named_parameters()]
    own = tuple(name for name in names if name.rpartition(".")[0] in norms)
    made_of = cut_parts(anatomy, plan, [name for name in names if name not in own])

    def shared(largest: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: part.of(largest) for name, part in made_of.items()}

    return Smaller(cut, own, shared)


def with_smaller(lesson: Lesson, nest: NestedStudents, recipe: Recipe, *, flops: FlopsPerToken) -> Lesson:
    """The lesson of the largest student, for all of them."""
    assert recipe.nest is not None
    turns = taking_turns(nest, lesson.objective, seed=recipe.seed, draws=recipe.nest.draws)
    heldout = None if lesson.heldout is None else measuring_all(nest, lesson.heldout)
    return replace(lesson, extra=nest, turns=turns, heldout=heldout, flops=flops)


def flops_of(nest: NestedStudents, student: Anatomy, teacher: Anatomy, recipe: Recipe) -> FlopsPerToken:
    """FLOPs per token of training: the teacher once, and as many students of mean size as a step draws."""
    assert recipe.nest is not None
    assert recipe.distill is not None
    training, draws = recipe.distill, recipe.nest.draws
    students = [student, *(discover(config) for config in nest.configs)]

    def of(context: int) -> float:
        costed = [Costed.of(student, context) for student in students]
        return taught_in_turns(costed, Costed.of(teacher, context), training, draws=draws)

    return of


def save_nest(
    nest: NestedStudents,
    recipe: Recipe,
    out: Path,
    *,
    dtype: torch.dtype,
    student: Checkpoint,
    record: Mapping[str, Any],
    ranks: Ranks,
) -> None:
    """Write every smaller student as an ordinary model folder: `out/nested-2/model` and so on."""
    for number, name in enumerate(nested_students(recipe), 1):
        folder = out / name / "model"
        shards.save(nest.filled(number), folder, dtype=dtype, extra_from=student.files, record=record, ranks=ranks)
