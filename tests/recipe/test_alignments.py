"""The keys of a step of alignment, and combinations that make no sense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from halve.errors import RecipeError
from halve.recipe import read as reading

BASE: dict[str, Any] = {
    "name": "a",
    "model": "owner/name",
    "data": {"train": ["t.txt"], "valid": ["v.txt"]},
    "prune": {"ffn": 4},
}


def parsed(step: dict[str, Any]) -> Any:
    recipe = reading.parse(
        {**BASE, "align": [{"data": ["pairs.jsonl"], **step}]}, folder=Path("/recipes"), source="the test"
    )
    return recipe.align[0]


def test_paths_are_those_of_the_recipe() -> None:
    step = parsed({"kind": "rpo", "data": ["pairs.jsonl", "hub:owner/name"], "rewards": "model", "reward_model": "./j"})
    assert step.data == ("/recipes/pairs.jsonl", "hub:owner/name")
    assert step.reward_model == "/recipes/j"


def test_a_step_takes_one_pass_if_nothing_is_said() -> None:
    assert parsed({"kind": "sft"}).passes == 1.0
    assert parsed({"kind": "sft", "epochs": 2.5}).passes == 2.5
    assert parsed({"kind": "sft", "tokens": 100}).passes is None


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"kind": "ppo"}, "sft"),
        ({"kind": "sft", "beta": 0.2}, "beta does not belong to a step of kind sft"),
        ({"kind": "sft", "answers": 4}, "answers does not belong to a step of kind sft"),
        ({"kind": "dpo", "eta": 2.0}, "eta does not belong to a step of kind dpo"),
        ({"kind": "ipo", "form": "squared"}, "form does not belong to a step of kind ipo"),
        ({"kind": "rpo", "messages_field": "m"}, "messages_field does not belong to a step of kind rpo"),
        ({"kind": "rpo", "tokens": 5, "epochs": 1}, "give tokens or epochs, not both"),
        ({"kind": "rpo", "batch": 8, "micro_batch": 3}, "batch 8 is not a multiple of micro_batch 3"),
        ({"kind": "rpo", "rewards": "model"}, "belong together"),
        ({"kind": "rpo", "reward_model": "j"}, "belong together"),
        ({"kind": "rpo", "answers": 4}, "new answers have no rewards in the data"),
        ({"kind": "rpo", "answers": 1, "rewards": "gsm8k"}, "greater than or equal to 2"),
        ({"kind": "rpo", "answers": 65, "rewards": "gsm8k"}, "less than or equal to 64"),
        ({"kind": "rpo", "eta": 0}, "greater than 0"),
        ({"kind": "rpo", "data": []}, "at least 1"),
    ],
)
def test_what_makes_no_sense_is_refused(step: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parsed(step)


def test_an_unknown_key_is_named_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"align.0.warm_up_steps(.|\n)*did you mean warmup_steps"):
        parsed({"kind": "rpo", "warm_up_steps": 3})
