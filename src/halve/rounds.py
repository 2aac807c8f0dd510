"""Rounds of iterative compression: prune, distill, prune the student again (2407.14679: 15B to 8B to 4B).

Each round reads like a recipe of its own, on the last student. Its stages and models carry its number from
the second round on: prune-2, distill-2-ce; pruned-2, ce-2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from halve.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from halve.anatomy import Anatomy, Arch, Counts
    from halve.checkpoint import Checkpoint


@dataclass(frozen=True)
class Shape:
    """What one round cuts: the model before, the sizes after and, where the recipe names them, the kept layers."""

    before: Anatomy
    student: Anatomy
    """What the student's sizes are those of: rotation may give it a head of its own."""
    after: Arch
    kept_layers: tuple[int, ...] | None

    def counts(self, *, context: int = 4096) -> Counts:
        """What the student costs."""
        return self.student.ledger.count(self.after, kept_layers=self.kept_layers, context=context)

    def config(self) -> PretrainedConfig:
        """The student's; the first layers stand for those kept where they are not named yet."""
        from halve.anatomy.configs import resized
        from halve.cut.sizes import config_sizes

        kept = tuple(range(self.after.layers)) if self.kept_layers is None else self.kept_layers
        return resized(self.student.config, config_sizes(self.student, self.after), kept_layers=kept)


def rounds(recipe: Recipe) -> tuple[Recipe, ...]:
    """The recipe of each round: the run's own, with that round's `prune` and `distill` and without `then`."""
    first = recipe.model_copy(update={"then": ()})
    return (
        first,
        *(first.model_copy(update={"prune": step.prune, "distill": step.distill}) for step in recipe.then),
    )


def learns_from_previous(recipe: Recipe, number: int) -> bool:
    """Whether the student of round `number` (from 1) learns from the last student instead of the run's teacher."""
    return number > 1 and recipe.then[number - 2].teacher == "previous"


def named(base: str, number: int, variant: str = "") -> str:
    """The name of a stage or a model in round `number`.

    >>> named("prune", 1), named("distill", 2, "ce"), named("distilled", 3)
    ('prune', 'distill-2-ce', 'distilled-3')
    """
    return "-".join(part for part in (base, str(number) if number > 1 else "", variant) if part)


def parsed(name: str) -> tuple[str, int, str]:
    """The base, the round and the variant of a name that `named` gave.

    >>> parsed("prune"), parsed("distill-2-ce"), parsed("distill-ce")
    (('prune', 1, ''), ('distill', 2, 'ce'), ('distill', 1, 'ce'))
    """
    base, _, rest = name.partition("-")
    number, _, variant = rest.partition("-")
    return (base, int(number), variant) if number.isdigit() else (base, 1, rest)


def shapes(recipe: Recipe, teacher: Checkpoint) -> tuple[Shape, ...]:
    """The sizes before and after every round, from the teacher's config alone.

    Which layers a round drops may be known only when they are scored: until then the first ones stand for those
    that are kept. Raises `CheckpointError`, `AnatomyError` and `PlanError`.
    """
    from halve.anatomy import discover
    from halve.cut.rotate import student_anatomy
    from halve.cut.sizes import target

    anatomy = teacher.anatomy
    found: list[Shape] = []
    for part in rounds(recipe):
        own = student_anatomy(anatomy, part.prune)
        after, kept = target(own, part.prune)
        found.append(Shape(anatomy, own, after, kept))
        if len(found) <= len(recipe.then):
            anatomy = discover(found[-1].config())
    return tuple(found)
