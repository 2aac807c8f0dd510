"""Stand-ins for stages, and recipes of one round and of three."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from stand_ins import BASELINES, CORRECT, DISTILL, THEN, MakeRecipe, stand_ins

from halve.recipe.schema import Recipe


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """The calls of stages, as (stage's folder, arguments); a model by the folder that it lies in."""
    return stand_ins(monkeypatch)


@pytest.fixture
def full(make_recipe: MakeRecipe) -> Callable[..., Recipe]:
    def make(**changes: Any) -> Recipe:
        distill = {**DISTILL, "baselines": BASELINES, **changes.pop("distill", {})}
        return make_recipe(**{"correct": CORRECT, "distill": distill, **changes})

    return make


@pytest.fixture
def rounds(full: Callable[..., Recipe]) -> Callable[..., Recipe]:
    def make(**changes: Any) -> Recipe:
        return full(**{"then": THEN, "distill": {"baselines": []}, **changes})

    return make
