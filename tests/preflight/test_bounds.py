"""What no machine or model could do is refused by `check`, in a moment."""

from __future__ import annotations

import importlib.util
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halve.preflight.check import check
from halve.preflight.forecast import forecast
from halve.recipe.schema import Recipe

MakeRecipe = Callable[..., Recipe]
TRAINING = {"tokens": 512, "batch": 4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill": {**TRAINING, "batch": 10**12}}, "distill cannot hold 1,000,000,000,000 samples of 32 tokens"),
        ({"correct": {**TRAINING, "batch": 10**12}}, "correct cannot hold"),
        ({"distill": {**TRAINING, "batch": 10**14, "micro_batch": 1}}, "distill cannot hold"),
        ({"then": [{"prune": {"ffn": 24}, "distill": {**TRAINING, "batch": 10**12}}]}, "distill of round 2 cannot"),
        ({"correct": {**TRAINING, "method": "lora", "lora_rank": 10**9}}, "lora_rank 1000000000 is larger than"),
        ({"prune": {"non_embedding_ratio": 1e-9}}, "no valid sizes have about 1 "),
        ({"prune": {"drop_layers": "0-999999999"}}, "cannot drop layers 0-999999999"),
        ({"prune": {"drop_layers": "9"}}, "cannot drop layers 9\n  why: the model has layers 0 to 3"),
        ({"prune": {"drop_layers": "7-9"}}, "cannot drop layers 7-9"),
        ({"prune": {"drop_layers": "9" * 5000}}, "cannot read '999"),
        ({"prune": {"drop_layers": "\u00b2"}}, "cannot read '\u00b2' as layers"),
        ({"prune": {"drop_layers": "1-\u00b2"}}, "cannot read '1-\u00b2' as layers"),
        ({"prune": {"drop_layers": "0,3-2"}}, "cannot read '0,3-2' as layers"),
        ({"evaluate": {"prompts": ["word " * 200]}}, r"the prompt 'word .* of evaluate\.prompts has \d+ tokens"),
        ({"evaluate": {"prompts": ["word"], "completion_tokens": 90_000}}, "evaluate.completion_tokens 90000 more"),
    ],
)
def test_what_cannot_be_done_is_refused_by_check(
    make_recipe: MakeRecipe, changes: dict[str, Any], message: str
) -> None:
    began = time.process_time()
    found = check(make_recipe(**changes), ranks=1)
    assert len(found) == 1
    assert re.search(message, str(found[0]))
    assert time.process_time() - began < 5


def test_a_step_for_ranks_that_are_not_known_yet_is_not_held_against_this_machine(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(distill={**TRAINING, "batch": 10**12})
    assert check(recipe) == ()
    (error,) = check(recipe, ranks=10)
    assert error.what.startswith("distill cannot hold 100,000,000,000 samples")


def test_more_processes_than_a_machine_can_start(make_recipe: MakeRecipe, corpus: Path) -> None:
    data = make_recipe().data.model_dump() | {"workers": 10**6}
    assert [error.what for error in check(make_recipe(data=data))] == [
        "data.workers 1000000 is more than this machine can start"
    ]


@pytest.mark.parametrize("section", ["evaluate", "score"])
def test_an_item_longer_than_the_context(make_recipe: MakeRecipe, tmp_path: Path, section: str) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps({"context": "word " * 200, "choices": ["a", "b"], "answer": 0}) + "\n")
    asked: dict[str, Any] = {"evaluate": {"choices": [str(path)]}, "score": {"depth": "task", "depth_task": str(path)}}
    (error,) = check(make_recipe(**{section: asked[section]}))
    assert "the model's context has 128" in error.what


def test_replicas_need_ranks_where_it_is_known_how_many_there_are(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(distill={**TRAINING, "replicas": 2})
    assert [error.what for error in check(recipe, ranks=1)] == ["1 rank does not make 2 replicas"]
    assert check(recipe, ranks=4) == ()
    assert check(recipe) == (), "the job that runs it may have as many as it needs"


def test_a_correction_beside_takes_the_ranks_and_samples_of_its_distillation(make_recipe: MakeRecipe) -> None:
    beside = {"tokens": 10**9, "when": "beside"}
    recipe = make_recipe(correct=beside, distill={**TRAINING, "batch": 6})
    assert check(recipe, ranks=3) == ()
    assert forecast(recipe, ranks=3).place.ranks == 3
    hub = recipe.model_copy(update={"data": recipe.data.model_copy(update={"train": ("hub:some/text",)})})
    assert forecast(hub).disk.text_bytes < 10**6


def test_a_correction_beside_needs_the_package_of_its_optimizer(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = {**TRAINING, "when": "beside", "optimizer": "adamw8bit"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (error,) = check(make_recipe(correct=beside, distill=TRAINING))
    assert error.what == "optimizer: adamw8bit needs the package torchao"
