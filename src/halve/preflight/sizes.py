"""The sizes before and after every round of a recipe, from the teacher's config alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig

from halve.anatomy import Anatomy, Arch, Counts, discover
from halve.anatomy.configs import resized
from halve.cut.plan.sizes import config_sizes, target
from halve.cut.proof.prove import prove
from halve.cut.repair.rotate import student_anatomy
from halve.model.checkpoint import Checkpoint
from halve.recipe.rounds import cuts_original, rounds
from halve.recipe.schema import Recipe
from halve.search.latency import needed
from halve.search.searched import proved_shapes, removable_search, searched_anatomy, shapes_to_try


@dataclass(frozen=True)
class PlannedRound:
    """The cut of one round: the model before, the sizes after, and the kept layers if the recipe names them."""

    before: Anatomy
    student: Anatomy
    """The anatomy of the student. Rotation may give it an untied head."""
    after: Arch
    kept_layers: tuple[int, ...] | None

    def counts(self, *, context: int = 4096) -> Counts:
        """The counts of the student."""
        return self.student.ledger.count(self.after, kept_layers=self.kept_layers, context=context)

    def config(self) -> PretrainedConfig:
        """The student's config. If the kept layers are not known yet, the first ones are used."""
        kept = tuple(range(self.after.layers)) if self.kept_layers is None else self.kept_layers
        return resized(self.student.config, config_sizes(self.student, self.after), kept_layers=kept)


def require_proved(found: Iterable[PlannedRound]) -> None:
    """Raise `AnatomyError` if a round cuts an unproved axis. The cut itself checks that the student reopens."""
    for shape in found:
        prove(shape.before, reopen=False).demand(shape.before.sizes, shape.after)


def require_met(recipe: Recipe, teacher: Checkpoint) -> None:
    """Raise `PlanError` for a budget of `search` that no legal shape of proved axes meets; it names the nearest shapes.

    Times are not measured here: their bounds are left out.
    """
    from halve.search.candidates import look

    assert recipe.search is not None
    anatomy = searched_anatomy(recipe, teacher.anatomy)
    refused = prove(teacher.anatomy, reopen=False).refusals
    for budget in filter(None, (recipe.search.budget, *recipe.search.targets)):
        look(anatomy, budget, removable_search(recipe, anatomy), refused=refused, timed=False)


def require_times_met(part: Recipe, teacher: Checkpoint, *, times: Path) -> None:
    """Raise what a round's search will raise for bounds of times, before there are scores; it names the nearest shapes.

    `times` is the file from which the search then reads them. They are measured if it does not have them, which takes
    minutes at most. A search without such bounds measures nothing.
    """
    assert part.search is not None
    assert part.search.budget is not None, "a round searches one size"
    if needed(part.search.budget):
        proved_shapes(part, teacher.anatomy, times=times)


def planned_rounds(
    recipe: Recipe, teacher: Checkpoint, *, chosen: Mapping[int, Arch] | None = None
) -> tuple[PlannedRound, ...]:
    """The sizes before and after every round, from the teacher's config alone.

    Which layers a round drops may be known only after scoring. Until then, the first layers are taken as the kept ones.
    The size that a search or a trial chooses is known only after it. Until then, the first candidate of a search stands
    for it, and a cut in width alone for the choice of a trial. `chosen` are other shapes to plan with, by their round.
    Raises `CheckpointError`, `AnatomyError` and `PlanError`.
    """
    planned: list[PlannedRound] = []
    for number, part in enumerate(rounds(recipe), 1):
        anatomy = teacher.anatomy if cuts_original(recipe, number) else discover(planned[-1].config())
        student = student_anatomy(anatomy, part.prune)
        if chosen is not None and number in chosen:
            after, kept = chosen[number], None
        elif part.search is not None:
            after, kept = shapes_to_try(part, anatomy)[0].arch, None
        else:
            after, kept = target(student, part.prune)
        planned.append(PlannedRound(anatomy, student, after, kept))
    return tuple(planned)
