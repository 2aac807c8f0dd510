"""The page's section about alignment, from the answers of made-up models to the cells of its tables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from task_rows import write_data
from transformers import PreTrainedTokenizerFast

from halve.evaluation.asking import Answered, read_exam
from halve.evaluation.session import TaskSession
from halve.recipe.evaluations import Evaluate
from halve.report import aligned
from halve.report.sections import Cell, PageSection, Table

CHAIN = ("distilled", "aligned-sft", "aligned-2-rpo")
MINUS = "\N{MINUS SIGN}"
VALUES: Mapping[str, Mapping[str, tuple[float, ...]]] = {
    "arc_easy (0)": {
        "teacher": (1, 1, 1, 1),
        "distilled": (1, 0, 0, 0),
        "random_init": (0, 0, 0, 0),
        "aligned-sft": (1, 1, 0, 1),
        "aligned-2-rpo": (0, 1, 0, 0),
    },
    "ifeval (0)": {
        "teacher": (0, 0, 0, 0),
        "distilled": (1, 0.5, 0.25, 0.25),
        "random_init": (0, 0, 0, 0),
        "aligned-sft": (1, 1, 0.5, 0.5),
        "aligned-2-rpo": (1, 1, 0, 0),
    },
}
METRICS = {"arc_easy (0)": "acc_norm", "ifeval (0)": "average"}


def answered(key: str, values: tuple[float, ...]) -> Answered:
    """Four answers that were counted so by the main metric. Another metric counts all of them as wrong."""
    items = [{"part": key, "item": i, "request": "ab"} for i in range(4)]
    return Answered(items, {"acc": [0.0] * 4, METRICS[key]: [float(value) for value in values]}, [None] * 4)


@pytest.fixture
def tasks(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Any:
    """What the evaluation writes of the tasks. The baseline stands between the student and its first step."""
    data = {task: str(write_data(tmp_path, task, 4)) for task in ("arc_easy", "ifeval")}
    section = Evaluate(tasks={"arc_easy": 0, "ifeval": 0, "winogrande": 5}, data=data)
    session = TaskSession(read_exam(section, context=4096), tokenizer, tmp_path)
    for name in VALUES["ifeval (0)"]:
        session.answers[name] = {key: answered(key, values[name]) for key, values in VALUES.items()}
    return session.write(subject=CHAIN[-1], chain=CHAIN)


def results(tasks: Any, **more: Any) -> dict[str, Any]:
    kl = dict(zip(CHAIN, (0.20, 0.26, 0.25), strict=True))
    models = {
        name: {
            "kl": {"value": kl.get(name, 1.0), "stderr": 0.012},
            "perplexity": {"value": 7.0, "stderr": 0.11},
            "choices": {"next_line": {"value": 0.742 if name == "distilled" else 0.7, "stderr": 0.021, "items": 360}},
        }
        for name in VALUES["ifeval (0)"]
    }
    steps = {
        "aligned-sft": step("distilled", kl=(0.06, 0.004), line=(-0.042, 0.011)),
        "aligned-2-rpo": step("aligned-sft", kl=(-0.01, 0.006), line=(0, 0.012)),
    }
    return {"reference": "teacher", "models": models, "steps": steps, "tasks": tasks} | more


def step(before: str, **values: tuple[float, float]) -> dict[str, Any]:
    kl, line = ({"value": value, "stderr": stderr} for value, stderr in (values["kl"], values["line"]))
    return {"before": before, "kl": kl, "choices": {"next_line": line}}


def manifests() -> dict[str, Any]:
    counts = {"examples": 54, "steps": 7, "tokens": 4096}
    return {name: {"metrics": counts} for name in ("distill", "align-sft", "align-2-rpo", "evaluate")}


def section(found: dict[str, Any] | None) -> PageSection:
    made = aligned.alignment(manifests(), found, {})
    assert made is not None
    return made


def row(table: Table | None, name: str) -> list[tuple[str, str]]:
    """The cells of a row as text, each with what stands below it; `!` where that is clear."""
    assert table is not None
    (cells,) = (row.cells for row in table.rows if row.label == name)
    return [(text(cell), "" if cell.under is None else text(cell.under)) for cell in cells]


def text(cell: Cell) -> str:
    return f"{cell.value} ± {cell.error}{' !' if cell.clear else ''}"


def test_tasks_stand_before_and_after_each_step_with_differences_of_the_same_items(tasks: Any) -> None:
    made = section(results(tasks))
    assert made.second is not None
    assert made.second.head == ("benchmark (shots)", "Distilled student", "Aligned, SFT", "Aligned 2, RPO")
    assert [row.label for row in made.second.rows] == ["Next line", "arc_easy (0)", "IFEval (0)"]
    # the pairs of arc_easy differ by 0 1 0 1 and then by -1 0 0 -1, those of ifeval by 0 1/2 1/4 1/4 and 0 0 -1/2 -1/2
    assert row(made.second, "arc_easy (0)") == [
        ("25 ± 22", ""),
        ("75 ± 22", "+50 ± 29"),
        ("25 ± 22", f"{MINUS}50 ± 29"),
    ]
    assert row(made.second, "IFEval (0)") == [
        ("50 ± 18", ""),
        ("75 ± 14", "+25 ± 10 !"),
        ("50 ± 25", f"{MINUS}25 ± 14"),
    ]
    assert row(made.second, "Next line") == [
        ("74.2 ± 2.1", ""),
        ("70.0 ± 2.1", f"{MINUS}4.2 ± 1.1 !"),
        ("70.0 ± 2.1", "0.0 ± 1.2"),
    ]


def test_the_tests_of_right_and_wrong_items_are_kept(tasks: Any) -> None:
    first, second = (tasks["steps"][name]["arc_easy (0)"]["mcnemar"] for name in CHAIN[1:])
    assert first == {"only_ours": 2, "only_theirs": 0, "p": 0.5}
    assert second == {"only_ours": 0, "only_theirs": 2, "p": 0.5}
    assert list(tasks["steps"]) == list(CHAIN[1:])


def test_kl_stands_before_and_after_each_step_with_its_difference(tasks: Any) -> None:
    table = section(results(tasks)).table
    assert table is not None
    assert [row.label for row in table.rows] == ["Distilled student", "Aligned, SFT", "Aligned 2, RPO"]
    place = table.head.index("KL to teacher") - 1
    assert [row(table, name.label)[place] for name in table.rows] == [
        ("0.200 ± 0.012", ""),
        ("0.260 ± 0.012", "+0.0600 ± 0.0040 !"),
        ("0.250 ± 0.012", f"{MINUS}0.0100 ± 0.0060"),
    ]


def test_tasks_of_both_suites_with_one_name_are_told_apart(tasks: Any) -> None:
    listed = [{**entry, "title": "MBPP"} if entry["status"] == "asked" else entry for entry in tasks["listed"]]
    second = section(results({**tasks, "listed": listed})).second
    assert second is not None
    assert [row.label for row in second.rows] == ["Next line", "arc_easy (0)", "ifeval (0)"]


def test_results_without_differences_and_without_tasks_are_shown_as_they_are(tasks: Any) -> None:
    older = {key: value for key, value in results(tasks).items() if key != "steps"}
    older["tasks"] = {key: value for key, value in tasks.items() if key != "steps"}
    made = section(older)
    assert row(made.second, "IFEval (0)") == [("50 ± 18", ""), ("75 ± 14", ""), ("50 ± 25", "")]
    del older["tasks"]
    assert [row.label for row in section(older).second.rows] == ["Next line"]  # type: ignore[union-attr]
    for model in older["models"].values():
        model["choices"] = {}
    assert section(older).second is None


def test_a_run_that_was_not_evaluated_has_its_steps_alone() -> None:
    made = section(None)
    assert made.table is not None
    assert [row.label for row in made.table.rows] == ["Aligned, SFT", "Aligned 2, RPO"]
    assert made.second is None
