"""What a recipe's search compares: the shapes that it tries, the layers that they keep, and its tournament's rungs."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from halve.anatomy import Anatomy
from halve.cut.plan.sizes import Candidate
from halve.cut.proof.prove import prove
from halve.cut.repair.rotate import student_anatomy
from halve.recipe.schema import Recipe, Score
from halve.recipe.tournaments import tournament_training
from halve.search.candidates import candidates_of, look
from halve.search.halving import Ladder, ladder
from halve.search.latency import TimeTable, needed

TRIED: Final = 4
"""Shapes that are tried for each finalist."""
TIMES: Final = "times.json"


def shapes_to_try(recipe: Recipe, anatomy: Anatomy, *, times: Path | None = None) -> tuple[Candidate, ...]:
    """The shapes over proved axes that the search of a recipe tries on this model, the deepest first.

    `times` is the file of measured times, made if it is not there. Without it, bounds of times are left out; if there
    are no others, the teacher itself stands for the shapes.

    `recipe` is that of a round: with `targets`, each has its own. Raises `PlanError` for a budget that no shape meets.
    """
    assert recipe.search is not None
    search, student = recipe.search, student_anatomy(anatomy, recipe.prune)
    assert search.budget is not None, "a round searches one size"
    clock = (
        TimeTable.measured(student, search, path=times, device=recipe.device)
        if times is not None and needed(search.budget)
        else None
    )
    refused = prove(anatomy, reopen=False).refusals
    seen = look(student, search.budget, search, clock=clock, refused=refused, timed=clock is not None)
    if not seen.ranges:
        return (Candidate(student.sizes, student.ledger.count(student.sizes)),)
    return candidates_of(seen, TRIED * search.candidates)


def planned_rungs(recipe: Recipe, finalists: int) -> Ladder:
    """The rungs of a recipe's tournament. Raises `RecipeError` if it has too few tokens for them."""
    assert recipe.search is not None
    asked, training = recipe.search.tournament, tournament_training(recipe)
    step = training.batch * recipe.data.context
    return ladder(finalists, tokens=training.tokens, rungs=asked.rungs, keep=asked.keep, step=step)


def joint_comparison(score: Score) -> Score:
    """How a search compares layers: never by adding up what single layers are worth.

    By the recipe's own comparison if that is of blocks or greedy. Else greedily, one layer at a time: the one without
    which the remaining model's logits change least (arXiv 2402.09025, Sec. 3; arXiv 2511.16664).
    """
    if score.depth_pattern != "single":
        return score
    return score.model_copy(update={"depth": "logit_mse", "depth_pattern": "greedy"})
