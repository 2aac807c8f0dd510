"""What a search will take, before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from halve.model.checkpoint import Checkpoint
from halve.preflight.check import check
from halve.preflight.forecast import forecast
from halve.preflight.sizes import planned_rounds
from halve.preflight.space import planned_disk
from halve.preflight.work import planned_work
from halve.recipe.schema import Recipe
from halve.report import tables
from halve.search.searched import planned_rungs, shapes_to_try

MakeRecipe = Callable[..., Recipe]
DISTILL = {"tokens": 40 * 4 * 32, "batch": 4}


def searching(make_recipe: MakeRecipe, **tournament: Any) -> Recipe:
    search = {"budget": {"non_embedding": "60%"}, "candidates": 3, "tournament": {"rungs": 2, **tournament}}
    return make_recipe(distill=DISTILL, prune={}, search=search)


@pytest.fixture(scope="module")
def recipe(make_recipe: MakeRecipe) -> Recipe:
    return searching(make_recipe)


def test_the_rows_of_a_search(recipe: Recipe) -> None:
    found = forecast(recipe)
    assert found.searches == tuple(
        stage for stage in found.flops if stage in ("cache-search", "finalists", "search", "layers", "trial")
    )
    assert {"cache-search", "search", "finalists", "trial"} <= set(found.searches)
    plan = planned_rungs(recipe, 3)
    assert found.tokens["search"] == plan.budget
    assert found.tokens["cache-search"] == plan.tokens[-1] == 16 * 4 * 32  # two fifths of distill.tokens
    assert "search" in found.memory
    assert (
        list(found.flops).index("cache-search") < list(found.flops).index("search") < list(found.flops).index("distill")
    )


def test_more_tokens_take_more(make_recipe: MakeRecipe, recipe: Recipe) -> None:
    teacher = Checkpoint.open(recipe.model)
    longer = searching(make_recipe, tokens=32 * 4 * 32)
    works = [planned_work(one, planned_rounds(one, teacher), teacher) for one in (recipe, longer)]
    assert works[1]["search"].flops == pytest.approx(2 * works[0]["search"].flops, rel=1e-3)
    assert works[1]["distill"].flops == works[0]["distill"].flops


def test_its_disk_is_counted(make_recipe: MakeRecipe, recipe: Recipe) -> None:
    teacher = Checkpoint.open(recipe.model)
    plain = make_recipe(distill=DISTILL, prune={"non_embedding_ratio": 0.6})
    disks = [planned_disk(one, planned_rounds(one, teacher), cuda=False) for one in (plain, recipe)]
    assert disks[1].model_bytes > disks[0].model_bytes
    hidden = teacher.anatomy.sizes.hidden
    assert disks[1].cache_bytes - disks[0].cache_bytes == 16 * 4 * 32 * hidden * 4


def test_the_first_candidate_stands_for_the_choice(recipe: Recipe) -> None:
    teacher = Checkpoint.open(recipe.model)
    (shape,) = planned_rounds(recipe, teacher)
    assert shape.after == shapes_to_try(recipe, teacher.anatomy)[0].arch


def test_the_dry_run_says_what_share_it_is(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    tables.forecast_tables(forecast(recipe))
    told = capsys.readouterr().out
    assert "the student of this plan is the search's first candidate" in told
    assert "search, at most" in told
    assert "the search takes at most" in told


def test_check_refuses_times_past_the_models_positions(make_recipe: MakeRecipe) -> None:
    def found(**limits: Any) -> list[str]:
        budget = {"decode_latency": {"max": "80%", **limits}}
        return [str(error) for error in check(make_recipe(prune={}, search={"budget": budget, "method": "trial"}))]

    (error,) = found()
    assert "decode_latency at context 512 cannot be timed: this llama has a context of 128\n" in error
    assert "fix: set its context to 116 or less" in error
    assert len(found(context=117)) == 1
    assert not found(context=116)


def test_a_trial_without_rungs_has_no_tournament(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(prune={}, search={"budget": {"non_embedding": "60%"}, "method": "trial"})
    found = forecast(recipe)
    assert "trial" in found.flops
    assert not {"search", "cache-search"} & set(found.flops)
