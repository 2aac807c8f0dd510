"""Rows with which the harness's code would fail during a run are found before it, and named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from task_rows import rows_of, write_data, write_rows

from halve.cli.app import main
from halve.evaluation import asking
from halve.preflight.check import check
from halve.recipe.evaluations import Evaluate
from halve.recipe.schema import Recipe

MakeRecipe = Callable[..., Recipe]

TWO = ["punctuation:no_comma", "length_constraints:number_words"]
UNUSABLE: list[tuple[str, dict[str, Any], str]] = [
    ("arc_easy", {"answerKey": "Z"}, "ValueError: 'Z' is not in list"),
    ("arc_easy", {"choices": {"text": [], "label": []}}, "ValueError: '"),
    ("arc_easy", {"answerKey": 3}, "ArrowTypeError: "),
    ("arc_easy", {"choices": ["a", "b"]}, "ArrowInvalid: "),
    ("winogrande", {"answer": "3"}, "KeyError: '3'"),
    ("winogrande", {"sentence": "no blank"}, "ValueError: "),
    ("hellaswag", {"label": ""}, "ValueError: "),
    ("ifeval", {"instruction_id_list": ["no:such"]}, "KeyError: 'no:such'"),
    ("ifeval", {"instruction_id_list": TWO, "kwargs": []}, "IndexError: "),
    ("ifeval", {"instruction_id_list": TWO, "kwargs": [{"bogus": 1}]}, "TypeError: "),
    ("truthfulqa_mc2", {"mc2_targets": {"choices": ["a"], "labels": [0, 1]}}, "IndexError: "),
]


def spoilt(folder: Path, task: str, change: dict[str, Any], *, num: int = 6) -> Path:
    """Rows of a task of which the fourth is changed."""
    rows = rows_of(task, num)
    rows[3] |= change
    return write_rows(folder / f"{task}.jsonl", rows)


def errors(make_recipe: MakeRecipe, path: Path, task: str, *, shots: int = 0, **more: Any) -> list[str]:
    section = {"tasks": {task: shots}, "data": {task: str(path)}, **more}
    return [str(error) for error in check(make_recipe(evaluate=section))]


@pytest.mark.parametrize(("task", "change", "why"), UNUSABLE)
def test_a_row_that_would_end_a_run_is_named(
    task: str, change: dict[str, Any], why: str, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    path = spoilt(tmp_path, task, change)
    (error,) = errors(make_recipe, path, task)
    lines = error.splitlines()
    assert lines[0] == f"lm-evaluation-harness cannot use {path} line 4, a row of {task}"
    assert lines[1].startswith(f"  why: {why}")
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("task", "change", "answer"),
    [("hellaswag", {"label": "9"}, 9), ("mmlu", {"answer": 7}, 7), ("mmlu", {"answer": -1}, -1)],
)
def test_an_answer_that_is_no_choice_is_named(
    task: str, change: dict[str, Any], answer: int, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """The harness would count every answer to it as wrong."""
    path = spoilt(tmp_path, task, change)
    (error,) = errors(make_recipe, path, task)
    assert error.startswith(f"{path} line 4 of {task} has a right answer that is none of its choices\n")
    assert f"the answer is {answer}, and the choices are 4" in error


def test_half_a_character_is_named(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = spoilt(tmp_path, "arc_easy", {"question": "\ud83d"})
    (error,) = errors(make_recipe, path, "arc_easy")
    assert error.splitlines()[:2] == [
        f"{path} line 4 holds half a character",
        r"  why: \ud83d is half of a surrogate pair, which no text can hold",
    ]


def test_rows_beyond_the_limit_are_not_asked(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = spoilt(tmp_path, "winogrande", {"answer": "3"})
    assert errors(make_recipe, path, "winogrande", limit=3) == []
    assert len(errors(make_recipe, path, "winogrande", limit=4)) == 1


@pytest.mark.parametrize("change", [{"answerKey": "Z"}, {"answerKey": 3}])
def test_an_example_that_would_end_a_run_is_named(
    change: dict[str, Any], make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    folder = write_data(tmp_path, "arc_easy", 3, shots=4)
    path = spoilt(tmp_path, "arc_easy", change).rename(folder / "train.jsonl")
    (error,) = errors(make_recipe, folder, "arc_easy", shots=6)
    assert error.startswith(f"lm-evaluation-harness cannot use {path} line 4, a row of arc_easy\n")


@pytest.mark.parametrize(("task", "shots"), [("arc_easy", 9), ("gsm8k", 30), ("mmlu", 5)])
def test_too_few_examples_are_known_before_a_run(
    task: str, shots: int, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    path = write_data(tmp_path, task, 4, shots=8)  # of which mmlu has four for each of two subjects
    (error,) = errors(make_recipe, path, task, shots=shots)
    assert error.startswith(f"{task} has too few rows for {shots} shots\n  why: its examples are ")


def test_examples_are_not_among_the_rows_that_are_asked(tmp_path: Path) -> None:
    """Also where the task file has no split for them but the one that is asked."""
    path = write_rows(tmp_path / "humaneval.jsonl", rows_of("humaneval", 6))
    section = Evaluate(tasks={"humaneval": 2}, data={"humaneval": str(path)})
    with asking.harness.quiet_harness():
        (ask,) = asking.asked(section)
        (part,) = asking._built(ask, section, context=None).parts.values()
        asked, shown = ({row["task_id"] for row in rows} for rows in (part.task_docs, part.fewshot_docs()))
    assert (asked, shown) == ({f"Made/{i}" for i in range(4)}, {"Made/4", "Made/5"})


def test_rows_of_programs_are_made_and_not_run(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", rows_of("humaneval", 2))
    assert errors(make_recipe, path, "humaneval") == []
    assert errors(make_recipe, path, "humaneval_instruct") == []


def test_neither_verb_begins(make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    section = {"tasks": {"arc_easy": 0}, "data": {"arc_easy": str(spoilt(tmp_path, "arc_easy", {"answerKey": "Z"}))}}
    recipe = make_recipe(evaluate=section).model_dump(mode="json", exclude_unset=True)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    for verb in ("check", "run"):
        assert main([verb, str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "out")]) == 2
        assert "cannot use" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*/manifest.json"))
