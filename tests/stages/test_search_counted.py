"""What a search writes down: who is asked, what it cost, and the choice of one that trains nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halve.anatomy import Arch
from halve.anatomy.work import Costed, distilling
from halve.cut.trial import Tried
from halve.disk.files import read_json
from halve.model.checkpoint import Checkpoint
from halve.pipeline import run as pipeline
from halve.preflight.forecast import forecast
from halve.recipe.schema import Recipe
from halve.recipe.tournaments import tournament_training
from halve.report.page import write_page
from halve.search import halving
from halve.search.choice import ChosenShape
from halve.search.counted import flops_by_part
from halve.search.searched import shapes_to_try
from halve.search.settled import Candidates

MakeRecipe = Callable[..., Recipe]
DISTILL = {"tokens": 20 * 4 * 32, "batch": 4, "lr": 3e-3, "min_lr": 1e-3, "warmup_steps": 1, "checkpoint_every": 3}
SEARCH: dict[str, Any] = {"budget": {"non_embedding": "60%"}, "candidates": 3, "axes": {"hidden": "frozen"}}


@pytest.fixture(scope="module")
def recipe(make_recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    items = [{"context": "The small cat", "choices": [" sees", " qqq"], "answer": 0} for _ in range(3)]
    path = tmp_path_factory.mktemp("items") / "next-word.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    tournament = {"tokens": 6 * 4 * 32, "rungs": 2, "choices": str(path)}
    return make_recipe(distill=DISTILL, prune={"refit_samples": 8}, search={**SEARCH, "tournament": tournament})


@pytest.fixture(scope="module")
def done(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search that has no room for ties, so that a finalist leaves early."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(halving, "SLACK", 1.0)
        return pipeline.run(recipe, tmp_path_factory.mktemp("search") / "run", only="search", needed=True)


@pytest.fixture(scope="module")
def found(done: Path) -> dict[str, Any]:
    tried = (done / "search/trial.jsonl").read_text().splitlines()
    return {**read_json(done / "search/results.json"), "tried": len(tried)}


def test_those_that_left_are_asked_as_well(found: dict[str, Any]) -> None:
    assert len([one for one in found["finalists"] if len(one["curve"]) == 3]) == 2, "one left after the first rung"
    assert {*found["choices"]["accuracies"]} == {"0", "1", "2"}


def test_the_cost_is_that_of_all_parts_as_they_were_done(found: dict[str, Any], recipe: Recipe) -> None:
    teacher = Checkpoint.open(recipe.model)
    before = Costed.of(teacher.anatomy, 32)
    flops, asked = found["flops"], tournament_training(recipe)
    planned = forecast(recipe).flops
    assert flops["layers"] == planned["layers"] > 0
    assert flops["cache"] == planned["cache-search"] == asked.tokens * before.body
    assert flops["trial"] == pytest.approx(planned["trial"], rel=1e-9)
    assert 0 < flops["finalists"] <= planned["finalists"]
    rungs = 0
    for finalist in found["finalists"]:
        student = Costed(teacher.anatomy, Arch.of(finalist["arch"]), 32, tuple(finalist["kept_layers"]))
        rungs += finalist["curve"][-1]["tokens"] * distilling(student, before, asked)
    assert flops["rungs"] == rungs <= planned["search"]
    assert recipe.distill is not None
    assert flops["run"] == pytest.approx(planned["distill"], rel=0.2), "the plan takes the first candidate"


def test_fewer_tries_cost_less(found: dict[str, Any], recipe: Recipe) -> None:
    """Counted is what was tried and cut, not what could have been."""
    teacher = Checkpoint.open(recipe.model)
    shapes = shapes_to_try(recipe, teacher.anatomy)
    archs = tuple(shape.arch for shape in shapes)
    finalists = [Tried(arch, tuple(range(arch.layers)), 1.0) for arch in archs[:2]]
    kept = {arch.layers: tuple(range(arch.layers)) for arch in archs}

    def counted(tried: tuple[Arch, ...], cut: int) -> dict[str, Any]:
        settled, tokens = Candidates(archs, tried, kept), [128] * cut
        return flops_by_part(recipe, teacher, settled, finalists[:cut], tokens, chosen=0)

    assert found["tried"] == len(archs)
    all_, few = counted(archs, 2), counted(archs[:2], 1)
    assert few["trial"] < all_["trial"]
    assert few["finalists"] < all_["finalists"]
    assert few["rungs"] < all_["rungs"]
    assert few["layers"] == all_["layers"]


@pytest.mark.parametrize("method", ["trial", "additive"])
def test_other_ways_to_choose(make_recipe: MakeRecipe, done: Path, tmp_path: Path, method: str) -> None:
    recipe = make_recipe(distill=DISTILL, prune={"refit_samples": 8}, search={**SEARCH, "method": method})
    out = tmp_path / "run"
    shutil.copytree(done, out)
    pipeline.run(recipe, out, only="search", needed=True)
    choice = ChosenShape.load(out / "search")
    assert choice.metrics["method"] == method
    assert len(choice.kept_layers) == choice.arch.layers
    found, page = read_json(out / "search/results.json"), tmp_path / "page.html"
    assert found["choice"]["arch"] == choice.arch.sizes
    assert found["choice"]["params"] == choice.metrics["params"]
    assert bool(found["tried"]) == (method == "trial")
    if method == "trial":
        assert choice.arch.sizes in [one["arch"] for one in found["tried"]]
    write_page(out, page)
    assert "<h2>Which shape</h2>" in page.read_text(encoding="utf-8")
