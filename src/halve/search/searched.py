"""What a recipe's search compares: the shapes that it tries, the layers that they keep, and its tournament's rungs."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Final

from halve.anatomy import Anatomy
from halve.cut.plan.sizes import Candidate
from halve.cut.proof.prove import prove
from halve.cut.repair.rotate import student_anatomy
from halve.errors import PlanError
from halve.recipe.schema import Recipe, Score, Search
from halve.recipe.searching import TimeLimits
from halve.recipe.tournaments import tournament_training
from halve.search.candidates import Found, candidates_of, look
from halve.search.halving import Ladder, ladder
from halve.search.latency import TimeTable, needed
from halve.search.positions import require_positions
from halve.search.space import legal_shapes

TRIED: Final = 4
"""Shapes that are tried for each finalist."""
TIMES: Final = "times.json"


def shapes_to_try(recipe: Recipe, anatomy: Anatomy, *, times: Path | None = None) -> tuple[Candidate, ...]:
    """The shapes over proved axes that the search of a recipe tries on this model, the deepest first.

    Without `times`, bounds of times are left out; if there are no others, the teacher itself stands for the shapes.
    Raises `PlanError` for a budget that no shape meets.
    """
    return shapes_of(recipe, seen_by(recipe, anatomy, times=times))


def proved_shapes(recipe: Recipe, anatomy: Anatomy, *, times: Path) -> tuple[Found, tuple[Candidate, ...]]:
    """What the search of a recipe allows on this model, and the shapes that it tries, over proved axes.

    Raises `PlanError` for a budget that no shape meets, and `AnatomyError` for an axis whose proof fails.
    """
    seen = seen_by(recipe, anatomy, times=times)
    shapes = shapes_of(recipe, seen)
    proof = prove(anatomy, reopen=False)  # the prune stage proves that the student reopens
    for shape in shapes:
        proof.demand(anatomy.sizes, shape.arch)
    return seen, shapes


def seen_by(recipe: Recipe, anatomy: Anatomy, *, times: Path | None = None) -> Found:
    """What the search of a recipe allows on this model.

    `times` is the file of measured times, made if it is not there. Without it, bounds of times are left out. `recipe`
    is that of a round: with `targets`, each has its own. Raises `PlanError` for a budget that no shape meets, and for
    times at a context that the model does not have.
    """
    assert recipe.search is not None
    student = searched_anatomy(recipe, anatomy)
    search = removable_search(recipe, student)
    assert search.budget is not None, "a round searches one size"
    require_positions(student, search.budget)
    clock = (
        TimeTable.measured(student, search, path=times, device=recipe.device)
        if times is not None and needed(search.budget)
        else None
    )
    refused = prove(anatomy, reopen=False).refusals
    return look(student, search.budget, search, clock=clock, refused=refused, timed=clock is not None)


def searched_anatomy(recipe: Recipe, anatomy: Anatomy) -> Anatomy:
    """The anatomy for the sizes of a search. Raises `PlanError` if some shapes would untie a tied head."""
    student = student_anatomy(anatomy, recipe.prune)
    if student.tied != anatomy.tied:
        raise PlanError(
            "prune.untie is not combined with search",
            why="the head is untied where hidden is cut and nowhere else, so shapes would be counted unequally",
            fix="leave prune.untie out, or search first and prune to the sizes that it finds",
        )
    return student


def removable_search(recipe: Recipe, anatomy: Anatomy) -> Search:
    """The section `search`, without numbers of layers that no contiguous block leaves, if blocks are compared.

    `anatomy` is the one for the student's sizes. A block that holds one of `search.layers.keep` is never removed, so
    that it fits between two of them. Raises `PlanError` if no number of layers is left.
    """
    assert recipe.search is not None
    search, keep, total = recipe.search, recipe.search.layers.keep, anatomy.sizes.layers
    if recipe.score.depth_pattern != "block" or search.method == "additive" or not keep:
        return search
    deepest = max(legal_shapes(anatomy, search).depths)
    longest = max(end - start - 1 for start, end in pairwise((-1, *sorted(keep), total)))
    if deepest < total - longest:
        raise PlanError(
            f"cannot remove {total - deepest} of {total} layers and keep {', '.join(map(str, sorted(keep)))}",
            why=f"score.depth_pattern: block removes layers beside each other, and between these are at most {longest}",
            fix="score.depth_pattern: greedy; or keep fewer layers by name, or allow more layers in all",
        )
    layers = search.layers.model_copy(update={"min": max(search.layers.min or 1, total - longest)})
    return search.model_copy(update={"layers": layers})


def shapes_of(recipe: Recipe, seen: Found) -> tuple[Candidate, ...]:
    """The shapes that the search of a recipe tries, the deepest first; without a bound the teacher itself."""
    assert recipe.search is not None
    student = seen.prices.space.anatomy
    if not seen.ranges:
        return (Candidate(student.sizes, student.ledger.count(student.sizes)),)
    return candidates_of(seen, TRIED * recipe.search.candidates)


def bounded_by_times_alone(recipe: Recipe) -> bool:
    """Whether the budget of a round's search bounds nothing but times. Its shapes are then known once these are
    measured.
    """
    assert recipe.search is not None
    assert recipe.search.budget is not None, "a round searches one size"
    return all(isinstance(limits, TimeLimits) for limits in recipe.search.budget.bounds.values())


def planned_rungs(recipe: Recipe, finalists: int) -> Ladder:
    """The rungs of a recipe's tournament. Raises `RecipeError` if it has too few tokens for them."""
    assert recipe.search is not None
    asked, training = recipe.search.tournament, tournament_training(recipe)
    step = training.batch * recipe.data.context
    return ladder(finalists, tokens=training.tokens, rungs=asked.rungs, keep=asked.keep, step=step)


def joint_comparison(score: Score) -> Score:
    """How a search compares layers: never by adding up what single layers are worth.

    By the recipe's own comparison if that is of blocks or greedy. Else greedily, one layer at a time, by the recipe's
    criterion. In the place of block importance, which is the default, it is the one without which the remaining model's
    logits change least (arXiv 2402.09025, Sec. 3; arXiv 2511.16664). A recipe that a run saves has its defaults written
    out, so block importance that is asked for is told from the default by its pattern alone.
    """
    if score.depth_pattern != "single":
        return score
    depth = "logit_mse" if score.depth == "bi" else score.depth
    return score.model_copy(update={"depth": depth, "depth_pattern": "greedy"})
