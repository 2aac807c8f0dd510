"""What a search will take, before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halve.anatomy import discover
from halve.anatomy.work import Costed
from halve.cut import cost
from halve.model.checkpoint import Checkpoint
from halve.pipeline import run as pipeline
from halve.preflight.check import check
from halve.preflight.forecast import forecast
from halve.preflight.sizes import planned_rounds
from halve.preflight.space import planned_disk
from halve.preflight.work import planned_work
from halve.recipe.schema import Recipe
from halve.report import tables
from halve.search import blocks
from halve.search.searched import planned_rungs, shapes_to_try

MakeRecipe = Callable[..., Recipe]
DISTILL = {"tokens": 40 * 4 * 32, "batch": 4}


BUDGET = {"non_embedding": "60%"}
FAST = {"decode_latency": {"max": "60%", "context": 64}}


def searching(
    make_recipe: MakeRecipe, budget: Any = BUDGET, prune: Any = None, distill: Any = None, **tournament: Any
) -> Recipe:
    search = {"budget": budget, "candidates": 3, "tournament": {"rungs": 2, **tournament}}
    return make_recipe(distill={**DISTILL, **(distill or {})}, prune=prune or {}, search=search)


def works(recipe: Recipe) -> dict[str, cost.Work]:
    teacher = Checkpoint.open(recipe.model)
    return planned_work(recipe, planned_rounds(recipe, teacher), teacher)


def model_bytes(recipe: Recipe) -> int:
    return planned_disk(recipe, planned_rounds(recipe, Checkpoint.open(recipe.model)), cuda=False).model_bytes


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
    assert "decode_latency at context 512 cannot be timed: this llama has less\n" in error
    assert "fix: set its context to 128 or less" in error
    assert len(found(context=129)) == 1
    assert not found(context=128)


def test_a_trial_without_rungs_has_no_tournament(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(prune={}, search={"budget": {"non_embedding": "60%"}, "method": "trial"})
    found = forecast(recipe)
    assert "trial" in found.flops
    assert not {"search", "cache-search"} & set(found.flops)


def test_where_only_times_bound_the_shapes_the_plan_is_an_upper_bound(
    make_recipe: MakeRecipe, recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    fast = searching(make_recipe, FAST)
    assert check(fast) == ()
    found, known = forecast(fast), works(recipe)
    assert (found.timed, found.trial) == (True, ((),))
    assert found.tokens["search"] == planned_rungs(fast, 3).budget
    for row in ("layers", "trial", "finalists", "search"):
        assert found.flops[row] >= known[row].flops, row
    tables.forecast_tables(found)
    tables.trial(found.trial)
    told = " ".join(capsys.readouterr().out.split())
    assert "the rows of the search are upper bounds" in told
    assert "chooses from" not in told
    few = searching(make_recipe, FAST, tokens=128)
    assert [error.what for error in check(few)] == [error.what for error in check(searching(make_recipe, tokens=128))]


def test_every_depth_is_compared_in_blocks(make_recipe: MakeRecipe) -> None:
    score = {"samples": 8, "micro_batch": 4, "depth": "logit_mse", "depth_pattern": "block"}
    search = {"budget": {"non_embedding": {"min": "20%", "max": "60%"}}, "candidates": 6, "method": "trial"}
    recipe = make_recipe(score=score, prune={}, search=search)
    anatomy = Checkpoint.open(recipe.model).anatomy
    removals = {4 - shape.arch.layers for shape in shapes_to_try(recipe, anatomy)} - {0}
    assert len(removals) > 1
    each = [cost.comparing(Costed.of(anatomy, 32), recipe.score, remove=remove).flops for remove in removals]
    assert works(recipe)["layers"].flops == sum(each)


@pytest.mark.parametrize("budget", [BUDGET, FAST])
def test_the_values_of_blocks_have_a_row(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: Any
) -> None:
    recipe = make_recipe(prune={}, search={"budget": budget, "candidates": 3, "method": "additive"})
    planned = forecast(recipe)
    assert planned.searches == ("values",)
    passed: list[int] = []
    num_tokens: list[int] = []

    def harm(bench: Any, model: Any) -> float:
        num_tokens.append(bench.reference.samples_BS.numel())
        passed.append(num_tokens[0] * Costed.of(discover(model.config), 32).whole)
        return float(len(passed))

    monkeypatch.setattr(blocks._Bench, "_harm", harm)
    monkeypatch.setattr(blocks._Bench, "_mask", lambda *_: lambda _, args, kwargs: (args, kwargs))
    pipeline.run(recipe, tmp_path / "run", only="search", needed=True)
    anatomy = Checkpoint.open(recipe.model).anatomy
    run = sum(passed) + num_tokens[0] * Costed.of(anatomy, 32).whole  # and the teacher's own pass
    if budget is BUDGET:
        assert planned.flops["values"] == pytest.approx(run, rel=0.01)
    assert planned.flops["values"] >= 0.99 * run


def test_adapters_take_less(make_recipe: MakeRecipe, recipe: Recipe) -> None:
    narrow = searching(make_recipe, train="lora", lora_rank=2)
    whole, found = forecast(recipe), forecast(narrow)
    assert found.tokens["search"] == whole.tokens["search"]
    assert found.flops["search"] < 0.8 * whole.flops["search"]
    assert 0 < found.memory["search"].moment_bytes < 0.3 * whole.memory["search"].moment_bytes
    assert found.memory["search"].gradient_bytes < 0.3 * whole.memory["search"].gradient_bytes
    assert found.disk.model_bytes < whole.disk.model_bytes


def test_kept_checkpoints_of_finalists_take_disk(make_recipe: MakeRecipe) -> None:
    kept = [
        model_bytes(
            searching(make_recipe, distill={"keep_checkpoints": n, "checkpoint_every": 1}, prune={"rotation": "none"})
        )
        for n in (1, 2, 4)
    ]
    assert 0 < 2 * (kept[1] - kept[0]) == kept[2] - kept[1]


def test_the_trial_of_a_search_finds_its_own_basis(make_recipe: MakeRecipe) -> None:
    recipe = searching(make_recipe, prune={"rotation": "pca"})
    anatomy = Checkpoint.open(recipe.model).anatomy
    (shape,) = planned_rounds(recipe, Checkpoint.open(recipe.model))
    archs = [candidate.arch for candidate in shapes_to_try(recipe, anatomy)]
    assert any(arch.hidden < anatomy.sizes.hidden for arch in archs)
    before = Costed.of(anatomy, 32)
    tried = cost.trying(before, shape.student, recipe.prune, recipe.score, archs, turned=True)
    assert works(recipe)["trial"] == tried + cost.turning(before, recipe.prune)


def test_finalists_are_scored_again_in_steps(make_recipe: MakeRecipe) -> None:
    once, thrice = (
        works(searching(make_recipe, prune={"steps": steps, "rotation": "none", "refit": "none"})) for steps in (1, 3)
    )
    teacher = Checkpoint.open(searching(make_recipe).model).anatomy
    passes = 3 * 3 * 8 * 32 * 0.3 * Costed.of(teacher, 32).body
    assert thrice["finalists"].flops > once["finalists"].flops + passes
