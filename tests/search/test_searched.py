"""What a recipe's search leaves out before it tries a shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from halve.errors import PlanError
from halve.model.checkpoint import Checkpoint
from halve.preflight.check import check
from halve.recipe.schema import Recipe
from halve.search.searched import shapes_to_try

MakeRecipe = Callable[..., Recipe]
IN_BLOCKS = {"samples": 8, "micro_batch": 4, "depth": "logit_mse", "depth_pattern": "block"}

GREEDY = {**IN_BLOCKS, "depth_pattern": "greedy"}


@pytest.fixture
def searching(make_recipe: MakeRecipe) -> MakeRecipe:
    """A search of the tiny llama's four layers, in which any depth meets the budget."""

    def made(score: dict[str, Any] = IN_BLOCKS, method: str = "trial", **layers: Any) -> Recipe:
        budget = {"non_embedding": {"min": "20%", "max": "60%"}}
        search = {"budget": budget, "candidates": 6, "method": method, "layers": layers}
        return make_recipe(score=score, prune={}, search=search)

    return made


def depths(recipe: Recipe) -> set[int]:
    return {shape.arch.layers for shape in shapes_to_try(recipe, Checkpoint.open(recipe.model).anatomy)}


def test_blocks_fit_between_the_layers_that_stay(searching: MakeRecipe) -> None:
    assert depths(searching(keep=[1, 2])) == {3, 4}
    assert min(depths(searching(keep=[0, 3]))) == 2
    assert min(depths(searching(GREEDY, keep=[1, 2]))) == 2
    assert min(depths(searching(method="additive", keep=[1, 2]))) == 2
    assert check(searching(keep=[1, 2])) == ()


def test_no_depth_is_left(searching: MakeRecipe) -> None:
    recipe = searching(max=2, keep=[1, 2])
    with pytest.raises(PlanError, match="cannot remove 2 of 4 layers and keep 1, 2") as caught:
        depths(recipe)
    assert "between these are at most 1" in caught.value.why
    assert [error.what for error in check(recipe)] == [caught.value.what]
