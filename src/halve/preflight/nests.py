"""Students inside the student before a run: their sizes, and what cannot be combined with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from halve.anatomy import Anatomy, Arch, discover
from halve.anatomy.work import Costed
from halve.cut import cost
from halve.cut.apply import FEW_SAMPLES
from halve.cut.cost import Work
from halve.cut.plan.nest import nested_sizes
from halve.cut.plan.sizes import budget_of
from halve.cut.proof.prove import prove
from halve.errors import RecipeError
from halve.model.checkpoint import Checkpoint
from halve.preflight.memory import Memory
from halve.preflight.sizes import PlannedRound, planned_rounds
from halve.recipe.schema import Recipe


def planned_nest(recipe: Recipe, shapes: Sequence[PlannedRound]) -> tuple[Anatomy, tuple[Arch, ...]]:
    """The anatomy of the student, and the sizes of all students inside it, itself first.

    Raises `PlanError` for sizes that do not nest.
    """
    anatomy = discover(shapes[0].config())
    return anatomy, (anatomy.sizes,) if recipe.nest is None else nested_sizes(anatomy, recipe.nest)


def check_nest(recipe: Recipe, teacher: Checkpoint) -> None:
    """Refuse what cannot be combined with `nest`, sizes that do not nest, and axes that are not proved."""
    if recipe.nest is None:
        return
    for key, why, fix in _refused(recipe, teacher):
        raise RecipeError(f"nest cannot be combined with {key}", why=why, fix=fix)
    anatomy, sizes = planned_nest(recipe, planned_rounds(recipe, teacher))
    for arch in sizes[1:]:
        prove(teacher.anatomy, reopen=False).demand(anatomy.sizes, arch)


def nesting(recipe: Recipe, student: Costed, sizes: Sequence[Arch]) -> Work:
    """The work of the nest stage: the student's scores, and the gains of each smaller one's norms."""
    gains = (cost.gaining(student, arch, recipe.prune, samples=FEW_SAMPLES) for arch in sizes[1:])
    return sum(gains, cost.scoring(student, recipe.score))


def nest_memory(memory: Memory, student: Anatomy, sizes: Sequence[Arch], draws: int) -> Memory:
    """The memory of the largest student's training with students inside it, at most.

    Each student that a step draws keeps what it passes through until the backward pass, a smaller one also a float32
    copy of its weights.
    """
    copies = 4 * sum(student.ledger.count(arch).params for arch in sizes[1:][:draws])
    return replace(memory, passing_bytes=draws * memory.passing_bytes + copies)


def _refused(recipe: Recipe, teacher: Checkpoint) -> Iterator[tuple[str, str, str]]:
    """Keys of the recipe that do not go with `nest`, each with the reason and a remedy."""
    if recipe.then:
        yield "then", "all students of a nest are trained together, in one round", "leave out then, or nest"
    if recipe.correct is not None and recipe.corrects_beside:
        yield "correct.when: beside", "its students would learn from a teacher that changes", "correct.when: before"
    if recipe.search is not None:
        yield (
            "search",
            "the students lie inside the largest, whose sizes are known only after the search",
            "sizes by hand in the section prune: those that a search without nest has chosen",
        )
    if recipe.prune.shape == "trial" and budget_of(teacher.anatomy, recipe.prune) is not None:
        yield (
            "a trial",
            "the students lie inside the largest, whose sizes are known only after the trial",
            "sizes by hand in the section prune, or shape: width",
        )
    training = recipe.distill
    if training is None:
        yield "a recipe without distill", "the students get their norms in training", "add distill, or leave out nest"
        return
    if training.baselines:
        yield "distill.baselines", "a baseline trains one model on the same tokens", "leave out baselines"
    if training.intermediate is not None:
        yield (
            "distill.intermediate",
            "a map of states has one width, the students have several",
            "leave out intermediate",
        )
    if training.activation_checkpointing != "none":
        yield (
            "distill.activation_checkpointing",
            "layers run again in the backward pass, when their parameters are no longer those of the drawn student",
            "activation_checkpointing: none, and a smaller micro_batch",
        )
    if training.compile:
        yield "distill.compile", "layers would be compiled anew for each size", "compile: false"
