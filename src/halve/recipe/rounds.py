"""Rounds: prune, distill, prune the student or the teacher again (2407.14679: 15B to 8B to 4B).

Each round is like a recipe of its own for the model that it cuts. From the second round on, the names of its stages and
models have the number of the round: prune-2, distill-2-ce; pruned-2, ce-2. A search of several sizes is a round for
each of them, all cut from the teacher.
"""

from __future__ import annotations

from contextlib import suppress

from halve.errors import RecipeError
from halve.recipe.schema import Recipe, Score, Training
from halve.recipe.tournaments import tournament_training

TOGETHER = ("correct", "search", "distill")
"""Sections whose stages run on several ranks together. Other stages run on one rank while the others wait."""


def rounds(recipe: Recipe) -> tuple[Recipe, ...]:
    """The recipe of each round: that of the run, with its `prune`, `distill` and `search`, and without `then`."""
    first = recipe.model_copy(update={"then": ()})
    if recipe.search is not None and recipe.search.targets:
        return tuple(first.model_copy(update={"search": search}) for search in recipe.search.of_each_target)
    later = first.model_copy(update={"search": None})
    return (
        first,
        *(later.model_copy(update={"prune": step.prune, "distill": step.distill}) for step in recipe.then),
    )


def trainings(recipe: Recipe) -> dict[str, Training]:
    """Every section with a training of its own, by its name in errors, in the order in which they run.

    A correction beside the distillations is part of their trainings.
    """
    by_name: dict[str, Training] = {}
    if recipe.correct is not None and recipe.corrects_before:
        by_name["correct"] = recipe.correct
    if recipe.search is not None and recipe.search.method == "tournament":
        with suppress(RecipeError):  # `check` reports it once
            by_name["search.tournament"] = tournament_training(recipe)
    for number, part in enumerate(rounds(recipe), 1):
        if part.distill is not None:
            by_name["distill" if number == 1 else f"distill of round {number}"] = part.distill
    return by_name


def learns_from_previous(recipe: Recipe, number: int) -> bool:
    """Whether the student of round `number` (from 1) learns from the last student instead of the run's teacher."""
    return number > 1 and bool(recipe.then) and recipe.then[number - 2].teacher == "previous"


def cuts_original(recipe: Recipe, number: int) -> bool:
    """Whether round `number` (from 1) cuts the run's teacher instead of the last student."""
    return number == 1 or not recipe.then or recipe.then[number - 2].cut == "original"


def scored_in(recipe: Recipe, number: int) -> int:
    """The round whose scores rank the parts that round `number` cuts.

    All rounds that cut the run's teacher share those of the first, unless these compare sets of layers: such a
    comparison depends on how many layers are dropped. A search compares sets of layers by itself.
    """
    shared = recipe.search is not None or not compares(recipe.score)
    return 1 if cuts_original(recipe, number) and shared else number


def compares(score: Score) -> bool:
    """Whether layers are chosen by more than the block importance of single layers."""
    return (score.depth, score.depth_pattern) != ("bi", "single")


def nested_students(recipe: Recipe) -> tuple[str, ...]:
    """The names of the students inside the student: nested-2 is the second largest."""
    return tuple(named("nested", number) for number in range(2, 2 + (len(recipe.nest.sizes) if recipe.nest else 0)))


def evaluated_models(recipe: Recipe) -> tuple[str, ...]:
    """The names of the models that are evaluated, in the order of the report: those that `pipeline.order` makes."""
    listed = list(enumerate(rounds(recipe), 1))
    beside = [named("corrected", number) for number, part in listed if part.corrects_beside]
    made = ["corrected"] if recipe.corrects_before else []
    for number, part in listed:
        made.append(named("pruned", number))
        if part.distill is not None:
            made += [named("distilled", number), *(named(variant, number) for variant in part.distill.baselines)]
    made += [named("aligned", number, step.kind) for number, step in enumerate(recipe.align, 1)]
    inside = nested_students(recipe) if recipe.distill is not None else ()
    return ("teacher", *beside, *made, *inside)


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
