"""Stages that write down that they were called, and the recipe that has every stage."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halve.model.checkpoint import Checkpoint
from halve.recipe.schema import Recipe

MakeRecipe = Callable[..., Recipe]
CORRECT = {"tokens": 640, "batch": 4}
DISTILL = {"tokens": 640, "batch": 4}
BASELINES = ["ce", "random_init", "random_prune"]
ALL = [
    "correct",
    "score",
    "prune",
    "distill",
    "distill-ce",
    "distill-random_init",
    "prune-random",
    "distill-random_prune",
    "evaluate",
    "report",
]
ALWAYS = {"evaluate", "report"}
THEN = [
    {"prune": {"ffn": 32}, "distill": DISTILL},
    {"prune": {"hidden": 24}, "distill": {**DISTILL, "baselines": ["ce", "random_prune"]}, "teacher": "previous"},
]


def _folders(arguments: Any) -> Any:
    """Arguments with the folders of opened models instead of the models."""
    if isinstance(arguments, Checkpoint):
        return arguments.folder
    if isinstance(arguments, dict):
        return {name: _folders(value) for name, value in arguments.items()}
    return arguments


def stand_ins(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """The calls of stages, as (stage's folder, arguments); a model by the folder that it lies in."""
    made: list[tuple[str, dict[str, Any]]] = []

    def stage(recipe: Recipe, *, out: Path, **arguments: Any) -> dict[str, Any]:
        made.append((out.name.removeprefix(".").removesuffix(".work"), _folders(arguments)))
        (out / "model").mkdir(exist_ok=True)
        (out / "model" / "weights").write_text(str(len(made)))
        return {"calls": len(made)}

    def report(run: Path, out: Path) -> None:
        made.append(("report", {"run": run}))
        (out / "report.html").touch()

    for name in ("correct", "score", "prune", "cache", "distill", "evaluate"):
        monkeypatch.setattr(importlib.import_module(f"halve.stages.{name}"), "run", stage)
    monkeypatch.setattr("halve.report.page.write_report", report)
    return made
