"""What fits the shape of the plan and not every shape that a trial or a search may choose, told before a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from talking import conversations, with_chat

from halve.model.checkpoint import Checkpoint
from halve.preflight.check import check
from halve.preflight.sizes import planned_rounds
from halve.preflight.work import trials
from halve.recipe.schema import Recipe

MakeRecipe = Callable[..., Recipe]
DISTILL = {"tokens": 512, "batch": 4}
LAST_LAYER = {**DISTILL, "intermediate": {"layers": {3: 3}}}
SEARCH = {"budget": {"non_embedding": "60%"}, "candidates": 3, "axes": {"hidden": "frozen"}, "method": "trial"}
WAYS: dict[str, dict[str, Any]] = {
    "search": {"search": SEARCH, "prune": {}},
    "trial": {"prune": {"non_embedding_ratio": 0.5}},
}


def shapes(recipe: Recipe) -> list[Any]:
    return [*trials(recipe, planned_rounds(recipe, Checkpoint.open(recipe.model)))[0]]


@pytest.mark.parametrize("way", WAYS)
def test_states_of_a_layer_that_some_shapes_lack(make_recipe: MakeRecipe, way: str) -> None:
    recipe = make_recipe(distill=LAST_LAYER, **WAYS[way])
    assert {arch.layers for arch in shapes(recipe)} >= {3, 4}
    (error,) = check(recipe)
    assert f"names the student's layer 3, if the {way} chooses layers" in error.what
    assert ("narrow search.axes and search.layers" if way == "search" else "prune.shape: width") in error.fix
    of_all = {**DISTILL, "intermediate": {"layers": {3: -1}}}
    assert check(make_recipe(distill=of_all, **WAYS[way])) == ()


@pytest.mark.parametrize("way", WAYS)
def test_a_later_round_that_keeps_more_than_some_shapes_have(make_recipe: MakeRecipe, way: str) -> None:
    then = [{"prune": {"layers": 4, "ffn": 4}, "distill": DISTILL}]
    (error,) = check(make_recipe(distill=DISTILL, then=then, **WAYS[way]))
    assert error.what.startswith("cannot keep 4 of ")
    assert f"if the {way} chooses layers" in error.what
    sibling = [{**then[0], "cut": "original"}]
    assert check(make_recipe(distill=DISTILL, then=sibling, **WAYS[way])) == ()


def test_a_trial_of_a_later_round_is_looked_at_too(make_recipe: MakeRecipe) -> None:
    later = {"prune": {"non_embedding_ratio": 0.5}, "distill": {**DISTILL, "intermediate": {"layers": {2: 2}}}}
    (error,) = check(make_recipe(prune={"ffn": 60}, distill=DISTILL, then=[later]))
    assert "names the student's layer 2, if the trial chooses layers" in error.what
    assert "prune.shape: width in round 2" in error.fix


def test_adapters_of_an_alignment_fit_the_narrowest_shape(
    make_recipe: MakeRecipe, tiny_llama: Path, tmp_path: Path
) -> None:
    model = with_chat(tiny_llama, tmp_path / "model")
    step = {"kind": "sft", "data": [str(conversations(tmp_path / "talks.jsonl", 4))], "method": "lora"}
    searched = {"model": str(model), "search": {**SEARCH, "axes": {}}, "prune": {}, "distill": DISTILL}
    recipe = make_recipe(**searched)
    planned = planned_rounds(recipe, Checkpoint.open(recipe.model))[0].after.hidden
    narrowest = min(arch.hidden for arch in shapes(recipe))
    assert narrowest < planned
    (error,) = check(make_recipe(**searched, align=[{**step, "lora_rank": planned}]))
    assert f"larger than the student's hidden {narrowest}, if the search chooses" in error.what
    assert check(make_recipe(**searched, align=[{**step, "lora_rank": narrowest}])) == ()
