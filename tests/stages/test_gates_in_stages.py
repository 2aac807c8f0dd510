"""A gate that does not count is named in the journal and in the metrics of its stage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from task_rows import write_rows

from halve.model.checkpoint import Checkpoint
from halve.recipe.schema import Recipe
from halve.stages import distill

NOT_ARMED = "the teacher is not above chance by three standard errors"


def test_a_gate_that_is_not_armed_is_written_down(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """The tiny teacher solves nothing, and ifeval has no rows."""
    rows = write_rows(tmp_path / "a.jsonl", [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(4)])
    gates = {"every": 256, "tasks": {"gsm8k": 0, "ifeval": 0}, "max_new_tokens": 2}
    training = {"tokens": 256, "batch": 4, "eval_samples": 2, "warmup_steps": 1, "gates": gates}
    recipe = make_recipe(distill=training, evaluate={"data": {"gsm8k": str(rows)}})
    teacher = Checkpoint.open(recipe.model)
    inputs = {"teacher": teacher, "student": teacher, "variant": "student", "cache": tmp_path / "cache"}
    metrics = distill.run(recipe, out=tmp_path / "out", **inputs)
    first = json.loads((tmp_path / "out" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert first["step"] == 0
    assert first["gates_not_armed"]["gsm8k (0)"] == NOT_ARMED
    assert first["gates_not_armed"]["ifeval (0)"].startswith("no data, it wants evaluate.data: {ifeval: FILE}")
    assert metrics["gates"]["armed"] == {}
    assert metrics["gates"]["not_armed"] == first["gates_not_armed"]
    assert distill.run(recipe, out=tmp_path / "out", **inputs)["gates"] == metrics["gates"], "after a resumption too"
    controls = make_recipe(distill={**training, "gates": None})
    assert "gates" not in distill.run(controls, out=tmp_path / "plain", **inputs)
