"""The page's section about gates: scores of tasks during a distillation."""

from __future__ import annotations

import re
from typing import Any

from halve.report import charts
from halve.report.page import Run, _gates

GSM8K, IFEVAL, MBPP = "gsm8k (5)", "ifeval (0)", "mbpp (0)"
COLLAPSE = f"{IFEVAL} fell from 0.500 to 0.125 while KL fell from 0.9 to 0.3"
TOLD = {"armed": {GSM8K: 0.25, IFEVAL: 0.5}, "not_armed": {MBPP: "the teacher is near chance"}}
LOG: list[dict[str, Any]] = [
    {"step": 0, "tokens": 0, "gates_not_armed": TOLD["not_armed"]},
    {"step": 1, "tokens": 100, "loss": 2.0},
    {"step": 2, "tokens": 200, "gates": {GSM8K: 0.0, IFEVAL: 0.5}},
    {"step": 4, "tokens": 400, "gates": {GSM8K: 0.125, IFEVAL: 0.125}, "gate_warnings": {IFEVAL: COLLAPSE}},
]


def test_each_task_is_a_curve_beside_the_teachers_score() -> None:
    section = charts.gates({"distilled": LOG, "ce": LOG[:2]}, {"distilled": TOLD})
    assert section is not None
    assert [figure.title for figure in section.figures] == [GSM8K, IFEVAL]
    for figure, last in zip(section.figures, ("0.125", "0.125"), strict=True):
        assert figure.svg.count('class="curve distilled"') == figure.svg.count('class="level"') == 1
        assert f"<title>Distilled student: {last}</title>" in figure.svg
    heights = [
        float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", re.findall(r"curve [^>]*", section.figures[1].svg)[0])
    ]
    assert heights[0] < heights[1], "a score that falls goes down the page"


def test_warnings_and_tasks_that_do_not_count_are_told() -> None:
    section = charts.gates({"distilled": LOG}, {"distilled": TOLD})
    assert section is not None
    assert f"Warning: {COLLAPSE}." in section.note
    assert f"{MBPP} does not count: the teacher is near chance." in section.note


def test_none_is_armed() -> None:
    """The reasons alone, also where no journal is left."""
    section = charts.gates({}, {"distilled": {**TOLD, "armed": {}}})
    assert section is not None
    assert (section.figures, MBPP in section.note) == ((), True)
    assert charts.gates({"distilled": LOG}, {}) is None


def test_they_are_those_of_the_manifests() -> None:
    stages = {
        "correct": {"metrics": {}},
        "score": {},
        "distill": {"metrics": {"gates": TOLD}},
        "distill-2": {"metrics": {"gates": TOLD}},
        "distill-ce": {"metrics": {"ce": 1.0}},
    }
    run = Run({}, stages, (), None, {}, {}, {})
    assert _gates(run) == {"distilled": TOLD, "distilled-2": TOLD}
