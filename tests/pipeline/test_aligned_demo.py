"""The whole stage of alignment on the demo's teacher, which writes English: distilled, aligned and asked in one run."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from talking import SHORT_CHAT, conversations, preferences, write_lines
from task_rows import write_data

from halve.demo.run import TEACHER
from halve.pipeline import run as pipeline
from halve.recipe.schema import Recipe

SECONDS = 120
"""Of a processor, for the run of a recipe with all its parts."""


@pytest.fixture(scope="module")
def demo(make_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    folder = tmp_path_factory.mktemp("demo")
    model = Path(shutil.copytree(TEACHER, folder / "teacher"))
    (model / "chat_template.jinja").write_text(SHORT_CHAT, encoding="utf-8")
    usual = {"batch": 8, "micro_batch": 8, "lr": 1e-4, "warmup_steps": 2, "context": 64}
    recipe = make_recipe(
        model=str(model),
        data={
            "train": [str(conversations(folder / "talks.jsonl", 80))],
            "valid": [str(conversations(folder / "held.jsonl", 20, seed=1))],
            "context": 64,
            "messages_field": "messages",
        },
        prune={"ffn": 256, "rotation": "none", "refit": "none"},
        distill={"tokens": 2048, "batch": 8},
        evaluate={
            "samples": 8,
            "speed": False,
            "completion_tokens": 2,
            "tasks": {"arc_easy": 0, "winogrande": 0},
            "data": {task: str(write_data(folder, task, 12)) for task in ("arc_easy", "winogrande")},
        },
        align=[
            {**usual, "kind": "sft", "data": [str(conversations(folder / "asked.jsonl", 80, seed=2))]},
            {**usual, "kind": "rpo", "data": [str(write_lines(folder / "pairs.jsonl", preferences(112)))]},
        ],
    )
    began = time.process_time()
    pipeline.run(recipe, folder / "run")
    return folder / "run", time.process_time() - began


def metrics(run: Path, stage: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / stage / "manifest.json").read_text())["metrics"]
    return found


def test_it_takes_less_than_two_minutes(demo: tuple[Path, float]) -> None:
    assert demo[1] < SECONDS


def test_both_steps_learn_on_what_they_were_not_trained_on(demo: tuple[Path, float]) -> None:
    run, _ = demo
    before, after = (metrics(run, "align-sft")[f"nats_{when}"] for when in ("before", "after"))
    assert after["value"] < before["value"] - 2 * (before["stderr"] + after["stderr"])
    told = metrics(run, "align-2-rpo")["accuracy"]
    assert told["value"] - 2 * told["stderr"] > 0.5


def test_every_model_on_the_way_is_asked(demo: tuple[Path, float]) -> None:
    run, _ = demo
    scores = json.loads((run / "evaluate/results.json").read_text())["tasks"]["scores"]
    assert len(scores) == 5, "the teacher, the cut, the distilled student, and one after each step"
    assert all(len(of_model) == 2 for of_model in scores.values())
