"""What `check` says of tasks, their data, gates and imported scores: every error names the key that was written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from task_rows import write_data, write_rows

from halve.pipeline import order
from halve.preflight.check import check
from halve.recipe.rounds import evaluated_models
from halve.recipe.schema import Recipe

MakeRecipe = Callable[..., Recipe]

GATED = {"tokens": 512, "batch": 4, "gates": {"every": 256, "tasks": {"gsm8k": 0}}}
SFT = {"kind": "sft", "data": ["talks.jsonl"]}


@pytest.fixture
def rows(tmp_path: Path) -> Callable[[str], str]:
    """`rows(task)`: a folder with a few rows of the task."""
    return lambda task: str(write_data(tmp_path, task, 3))


# ---- data of tasks that nothing asks


def test_data_of_a_task_that_is_not_asked_are_refused(make_recipe: MakeRecipe, rows: Callable[[str], str]) -> None:
    (error,) = check(make_recipe(evaluate={"tasks": {"arc_easy": 0}, "data": {"arc_esy": rows("arc_easy")}}))
    assert str(error).splitlines() == [
        "evaluate.data names arc_esy, which is not asked",
        "  why: the recipe asks for arc_easy",
        "  fix: did you mean arc_easy?",
    ]


def test_a_task_that_has_its_data_is_not_what_was_meant(make_recipe: MakeRecipe, rows: Callable[[str], str]) -> None:
    place = rows("arc_easy")
    (error,) = check(make_recipe(evaluate={"tasks": {"arc_easy": 0}, "data": {"arc_easy": place, "arc_esy": place}}))
    assert error.fix == "add arc_esy to evaluate.tasks, or leave it out of evaluate.data"


def test_data_without_any_task_are_refused(make_recipe: MakeRecipe, rows: Callable[[str], str]) -> None:
    (error,) = check(make_recipe(evaluate={"data": {"arc_easy": rows("arc_easy")}}))
    assert error.why == "the recipe asks for no task"


@pytest.mark.parametrize(
    ("evaluate", "more"),
    [
        ({"suites": ["minitron-base"]}, {}),
        ({"suites": ["minitron-instruct"]}, {}),
        ({}, {"distill": GATED}),
        ({}, {"distill": {"tokens": 512, "batch": 4}, "then": [{"prune": {"layers": 2}, "distill": GATED}]}),
    ],
)
def test_suites_and_gates_of_any_round_ask_too(
    make_recipe: MakeRecipe, rows: Callable[[str], str], evaluate: dict[str, Any], more: dict[str, Any]
) -> None:
    assert check(make_recipe(evaluate={**evaluate, "data": {"gsm8k": rows("gsm8k")}}, **more)) == ()


def test_an_unknown_task_is_not_proposed_for_its_data(make_recipe: MakeRecipe, rows: Callable[[str], str]) -> None:
    data = {"arc_easy": rows("arc_easy")}
    unknown, unread = check(make_recipe(evaluate={"tasks": {"arc_esy": 0}, "data": data}))
    assert unknown.fix == "did you mean arc_easy?"
    assert unread.fix == "add arc_easy to evaluate.tasks, or leave it out of evaluate.data"


# ---- names of tasks and suites


def test_an_unknown_task_of_a_gate_is_the_gates(make_recipe: MakeRecipe, rows: Callable[[str], str]) -> None:
    gates = {"every": 256, "tasks": {"gsm8kk": 0}}
    recipe = make_recipe(distill={**GATED, "gates": gates}, evaluate={"data": {"gsm8kk": rows("gsm8k")}})
    (error,) = check(recipe)
    assert error.what.startswith("distill.gates names gsm8kk, which lm-evaluation-harness ")
    assert error.fix == "did you mean gsm8k?"


# ---- tasks of gates


@pytest.mark.parametrize(
    ("task", "why"),
    [
        ("arc_easy", "this task has no written answers"),
        ("winogrande", "this task has no written answers"),
        ("humaneval", "programs are not run during a training"),
        ("mbpp_instruct", "programs are not run during a training"),
    ],
)
def test_a_gate_needs_written_answers(task: str, why: str, make_recipe: MakeRecipe, rows: Callable[[str], str]) -> None:
    gates = {"every": 256, "tasks": {"gsm8k": 0, task: 0}}
    data = {"gsm8k": rows("gsm8k"), task: rows(task.removesuffix("_instruct"))}
    (error,) = check(make_recipe(distill={**GATED, "gates": gates}, evaluate={"data": data}))
    assert error.what == f"distill.gates.tasks names {task}, which is no gate"
    assert why in error.why


def test_a_gate_of_whole_texts_is_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    data = {"wikitext": str(write_rows(tmp_path / "rows.jsonl", [{"page": "The cat sees the dog."}]))}
    gates = {"every": 256, "tasks": {"wikitext": 0}}
    found = check(make_recipe(distill={**GATED, "gates": gates}, evaluate={"data": data}))
    assert {error.what.partition(" names ")[2] for error in found} == {
        "wikitext, which is no gate",
        "wikitext, whose items have no scores",
    }


# ---- scores of other tools


def test_an_imported_score_of_an_unknown_model_is_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "mt.json", [{"score": 6.5}])

    def found(model: str) -> list[str]:
        entry = {"tool": "mt_bench", "file": str(file), "model": model, "version": "1"}
        recipe = make_recipe(distill={"tokens": 512, "batch": 4}, evaluate={"imported": [entry]})
        return [line for error in check(recipe) for line in str(error).splitlines()]

    assert found("distilled") == []
    assert found("distiled") == [
        f"evaluate.imported gives {file.name} to the model distiled, which the run does not have",
        "  why: its models are teacher, pruned, distilled",
        "  fix: did you mean distilled?",
    ]
    assert found("studnt")[-1] == "  fix: write the name of one of these models"


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"correct": {"tokens": 512, "batch": 4}, "distill": {"tokens": 512, "baselines": ["ce", "random_prune"]}},
        {"correct": {"tokens": 512, "when": "beside"}, "distill": {"tokens": 512}},
        {
            "distill": {"tokens": 512},
            "then": [{"prune": {"layers": 2}, "distill": {"tokens": 512, "baselines": ["random_init"]}}],
            "align": [SFT, {"kind": "dpo", "data": ["pairs.jsonl"]}],
        },
        {"align": [SFT]},
        {"distill": {"tokens": 512}, "nest": {"sizes": [{"ffn": 24}, {"ffn": 16}]}},
    ],
)
def test_these_are_the_models_that_are_evaluated(
    make_recipe: MakeRecipe, sections: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names come from the recipe alone, and the order of stages makes these and no others."""
    made: list[tuple[str, ...]] = []

    def evaluate(models: Any, beside: Any, inside: Any, **_: Any) -> Any:
        made.append(("teacher", *beside, *models, *inside))

    monkeypatch.setattr(order, "_evaluate", evaluate)
    recipe = make_recipe(**sections)
    order.stages(recipe)
    assert made == [evaluated_models(recipe)]


# ---- templates


def test_a_missing_template_is_missed_by_the_key_that_needs_it(
    make_recipe: MakeRecipe, tiny_llama: Path, rows: Callable[[str], str], tmp_path: Path
) -> None:
    from talking import with_chat

    plain = with_chat(tiny_llama, tmp_path / "plain", template=None)
    section = {"tasks": {"arc_easy": 0}, "data": {"arc_easy": rows("arc_easy")}}
    (tasks,) = check(make_recipe(model=str(plain), evaluate={**section, "chat_template": True}))
    assert tasks.why.startswith("evaluate.chat_template needs one:")
    (prompts,) = check(make_recipe(model=str(plain), evaluate={"chat_prompts": ["Hi?"]}))
    assert prompts.why.startswith("evaluate.chat_prompts needs one:")
