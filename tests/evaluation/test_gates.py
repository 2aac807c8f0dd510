"""Gates: armed where the teacher is above chance, and a warning when a task collapses while KL falls."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from task_rows import small_model, write_rows
from transformers import PreTrainedTokenizerFast

from halve.evaluation import asking, gates
from halve.evaluation.asking import Answered
from halve.evaluation.gates import TaskGate
from halve.model.checkpoint import Checkpoint
from halve.preflight.check import check
from halve.recipe.evaluations import Evaluate, Gates
from halve.recipe.schema import Recipe
from halve.stages import distill

WORDS = ("ant", "bee", "cow", "dog", "elk", "fox", "gnu", "hen", "ibex", "jay", "koi", "lynx")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Questions whose answers are numbers, each another one."""
    listed = [{"question": f"How many legs has {word}?", "answer": f"#### {i + 10}"} for i, word in enumerate(WORDS)]
    return write_rows(tmp_path / "gsm8k.jsonl", listed)


@pytest.fixture
def gate(rows: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Callable[[], TaskGate]:
    section = Gates(every=100, tasks={"gsm8k": 0}, max_new_tokens=4)
    evaluate = Evaluate(data={"gsm8k": str(rows)})
    return lambda: TaskGate.of(section, evaluate, tokenizer, context=4096, file=tmp_path / "gates.json", seed=0)


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Any:
    return Checkpoint.open(small_model(tmp_path / "model", tokenizer)).load()


def answering(monkeypatch: pytest.MonkeyPatch, texts: list[str]) -> None:
    """Let every model answer these texts, through the harness's filters and scores."""

    def ask(lm_eval: Any, wrapped: Any, *rest: Any) -> Answered:
        wrapped.generate_until = lambda requests: texts[: len(requests)]
        return own(lm_eval, wrapped, *rest)

    own = _ASK
    monkeypatch.setattr(asking, "_ask", ask)


_ASK = asking._ask
RIGHT = [f" #### {i + 10}" for i in range(len(WORDS))]


def test_a_teacher_above_chance_arms_it(
    gate: Callable[[], TaskGate], model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch, RIGHT)
    made = gate()
    assert made.needs_teacher
    made.arm(model)
    assert not gate().needs_teacher, "its answers are kept"
    note = made._notes["teacher"]["gsm8k (0)"]
    assert (note["score"], note["armed"], note["above_chance"]["value"]) == (1.0, True, 1.0)
    assert [gate().due(before, before + 60, last=False) for before in (0, 60, 120, 180)] == [False, True, False, True]
    assert gate().due(10, 20, last=True)


@pytest.mark.parametrize("texts", [[" #### 10"] * 12, [*RIGHT[:2], *[" ?"] * 10]])
def test_a_teacher_near_chance_does_not(
    texts: list[str], gate: Callable[[], TaskGate], model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first answers alike: right once, wherever the answers stand. The second knows two of twelve."""
    answering(monkeypatch, texts)
    made = gate()
    made.arm(model)
    assert not made._notes["teacher"]["gsm8k (0)"]["armed"]
    assert not made.due(0, 1000, last=True)


def test_a_collapse_while_kl_falls_is_a_warning(
    gate: Callable[[], TaskGate], model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch, RIGHT)
    gate().arm(model)
    assert gate().measure(model, {"kl": 0.5}) == {"gates": {"gsm8k (0)": 1.0}}
    answering(monkeypatch, [*RIGHT[:10], " ?", " ?"])
    assert "gate_warnings" not in gate().measure(model, {"kl": 0.4}), "two of twelve may be luck"
    answering(monkeypatch, [*RIGHT[:3], *[" ?"] * 9])
    assert "gate_warnings" not in gate().measure(model, {"kl": 0.6}), "KL rises: the training itself goes wrong"
    line = gate().measure(model, {"kl": 0.3})
    assert line["gates"] == {"gsm8k (0)": 0.25}
    assert line["gate_warnings"]["gsm8k (0)"].startswith("gsm8k (0) fell from 1.000 to 0.250 while KL fell from 0.5")


def test_a_distillation_writes_them_into_its_journal(
    make_recipe: Callable[..., Recipe], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"every": 256, "tasks": {"gsm8k": 0}, "max_new_tokens": 2}
    training = {"tokens": 512, "batch": 4, "eval_every": 2, "eval_samples": 2, "warmup_steps": 1, "gates": asked}
    recipe = make_recipe(distill=training, evaluate={"data": {"gsm8k": str(rows)}})
    assert check(recipe) == ()
    teacher = Checkpoint.open(recipe.model)
    answering(monkeypatch, RIGHT)
    out = tmp_path / "out"
    distill.run(recipe, teacher=teacher, student=teacher, variant="student", cache=tmp_path / "cache", out=out)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {line["step"]: line["gates"] for line in lines if "gates" in line} == {
        2: {"gsm8k (0)": 1.0},
        4: {"gsm8k (0)": 1.0},
    }
    plain = make_recipe(distill={**training, "gates": None})
    for name, section in (("with", recipe), ("without", plain)):
        distill.run(
            section, teacher=teacher, student=teacher, variant="student", cache=tmp_path / "cache", out=tmp_path / name
        )
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("with", "without")]
    assert weights[0] == weights[1], "they measure, and change nothing"


def test_gates_without_data_are_known_before_a_run(make_recipe: Callable[..., Recipe], rows: Path) -> None:
    training = {"tokens": 512, "batch": 4, "gates": {"every": 256}}
    (error,) = check(make_recipe(distill=training, evaluate={"data": {"gsm8k": str(rows)}}))
    assert error.what == "the gate ifeval of distill.gates has no data"
    assert gates.SURE == 3.0
