"""A search of which some finalists leave early: who is asked, and what it cost."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from halve.disk.files import read_json
from halve.pipeline import run as pipeline
from halve.recipe.schema import Recipe
from halve.search import halving

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
def found(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What is found where there is no room for ties."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(halving, "SLACK", 1.0)
        run = pipeline.run(recipe, tmp_path_factory.mktemp("search") / "run", only="search", needed=True)
    results: dict[str, Any] = read_json(run / "search/results.json")
    return results


def test_those_that_left_are_asked_as_well(found: dict[str, Any]) -> None:
    assert len([one for one in found["finalists"] if len(one["curve"]) == 3]) == 2, "one left after the first rung"
    assert {*found["choices"]["accuracies"]} == {"0", "1", "2"}
