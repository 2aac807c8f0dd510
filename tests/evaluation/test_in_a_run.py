"""Tasks in a whole run: the evaluate stage writes them, and the page and the card show them as the papers do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from task_rows import write_data, write_rows

from halve.pipeline.order import stages
from halve.pipeline.run import run
from halve.recipe.schema import Recipe
from halve.report import task_tables
from halve.report.paper_numbers import PAPER_MODELS, paper_models
from halve.report.tables import results as results_table


@pytest.fixture(scope="module")
def folder(make_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with a suite of which two tasks have data, and a single task."""
    place = tmp_path_factory.mktemp("tasks")
    data = {task: str(write_data(place, task, 6)) for task in ("winogrande", "truthfulqa_mc2", "arc_easy", "mbpp")}
    score = write_rows(place / "mt.json", [{"score": 6.5, "stderr": 0.25}])
    section = {
        "samples": 2,
        "speed": False,
        "suites": ["minitron-base"],
        "tasks": {"arc_easy": 0},
        "data": data,
        "limit": 4,
        "check_batch": True,
        "imported": [{"tool": "mt_bench", "file": str(score), "model": "pruned", "version": "1.0"}],
    }
    recipe = make_recipe(evaluate=section)
    return run(recipe, place / "run")


def test_the_stage_writes_scores_pairs_and_items(folder: Path) -> None:
    results = json.loads((folder / "evaluate" / "results.json").read_text(encoding="utf-8"))
    tasks = results["tasks"]
    asked = [entry["key"] for entry in tasks["listed"] if entry["status"] == "asked"]
    assert asked == ["winogrande (5)", "truthfulqa_mc2 (0)", "arc_easy (0)"]
    assert {entry["task"]: entry["status"] for entry in tasks["listed"]} | {} == {
        **dict.fromkeys(("winogrande", "truthfulqa_mc2", "arc_easy"), "asked"),
        **dict.fromkeys(("arc_challenge", "mmlu", "hellaswag", "gsm8k", "xlsum_en", "humaneval"), "no data"),
        "mbpp": "not run",
    }
    assert set(tasks["scores"]) == {"teacher", "pruned"}
    assert tasks["differences"] is None, "nothing is distilled"
    assert tasks["changed_by_batch"] == {key: [] for key in asked}
    items = (folder / "evaluate" / "task-items.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(items) == 12
    assert set(json.loads(items[0])["values"]) == {"teacher", "pruned"}


def test_the_page_and_the_card_show_them(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, card = ((folder / "report" / name).read_text(encoding="utf-8") for name in ("report.html", "README.md"))
    for text in (page, card):
        assert "Base tasks, as in Table 1" in text
        assert "gsm8k (5): no data, it wants evaluate.data: {gsm8k: FILE}" in text.replace("&#39;", "'")
        assert "add_bos_token is the tokenizer's own: sequences begin without a BOS token" in text.replace("&#39;", "'")
        assert "Batches of 1 and of 8 give the same answers." in text
        assert "MT-Bench: 1.0" in text
    assert "| Winogrande (5) |" in card
    assert "| Total params |" in card
    assert str(folder.parent) not in card + page
    results_table(json.loads((folder / "evaluate" / "results.json").read_text(encoding="utf-8")))
    printed = capsys.readouterr().out
    assert "winogrande (5)" in printed
    assert "mbpp (0): not run" in printed


def test_keys_depend_on_tasks_only_where_there_are_tasks(make_recipe: Callable[..., Recipe]) -> None:
    def fields(**section: object) -> tuple[str, ...]:
        return next(s for s in stages(make_recipe(evaluate=section)) if s.name == "evaluate").reads

    assert {"-evaluate.tasks", "-evaluate.suites", "-evaluate.imported"} <= set(fields())
    assert "-evaluate.tasks" not in fields(tasks={"arc_easy": 0})


def test_the_papers_numbers_stand_beside_their_models_alone() -> None:
    def plan(layers: int, hidden: int, ffn: int) -> dict[str, dict[str, int]]:
        before = {"layers": 32, "hidden": 4096, "ffn": 14336, "heads": 32, "kv_heads": 8}
        return {"before": before, "after": {**before, "layers": layers, "hidden": hidden, "ffn": ffn}}

    width, other = plan(32, 3072, 9216), plan(32, 3072, 9000)
    assert [paper.label for paper in paper_models("meta-llama/Llama-3.1-8B", (width,))] == ["Llama 3.1 8B", "4B-Width"]
    assert [paper.label for paper in paper_models("meta-llama/Llama-3.1-8B", (other,))] == ["Llama 3.1 8B"]
    assert paper_models("someone/another-8B", (width,)) == []
    assert {paper.label: paper.base.get("gsm8k") for paper in PAPER_MODELS}["4B-Width"] == 41.2


def test_items_that_change_with_the_batch_are_named() -> None:
    asked = [{"key": "arc_easy (0)"}]
    tasks = {"settings": {"batch": 8}, "changed_by_batch": {"arc_easy (0)": [{"part": "arc_easy", "item": 3}]}}
    words = "In batches of 1 another answer is given to 1 items of arc_easy (0): arc_easy 3."
    assert list(task_tables._changed(tasks, asked)) == [words]


def test_prompts_that_were_cut_are_told_in_the_line_of_their_task() -> None:
    entry = {"key": "arc_easy (25)", "items": 40, "metric": "acc_norm"}
    words = "arc_easy (25): 40 items by acc_norm"
    assert task_tables._counts(entry) == task_tables._counts({**entry, "cut": 0}) == words
    told = f"{words} (12 prompts did not fit into the context and lost their beginning)"
    assert task_tables._counts({**entry, "cut": 12}) == told


def test_a_table_has_the_papers_columns() -> None:
    (paper,) = (paper for paper in PAPER_MODELS if paper.label == "4B-Width")
    entry = {"task": "gsm8k", "key": "gsm8k (5)", "shots": 5, "title": "GSM8k", "suites": ["minitron-base"]}
    entry |= {"status": "asked", "metric": "m", "items": 4, "examples": ""}
    tasks = {
        "harness": "1",
        "settings": {"add_bos_token": "x", "limit": None, "chat_template": False, "batch": 8},
        "listed": [entry],
        "scores": {"distilled": {"gsm8k (5)": {"m": {"value": 0.25, "stderr": 0.1}}}},
        "differences": {"teacher": {"gsm8k (5)": {"value": -0.5, "stderr": 0.1, "mcnemar": {"p": 0.03}}}},
    }
    models = {"distilled": {"params": 10**9, "non_embedding_params": 10**8}}
    (section,) = task_tables.task_sections({"models": models, "tasks": tasks}, [paper])
    assert section.table is not None
    assert section.table.head == ("benchmark (shots)", "Distilled student", "4B-Width, in the paper")
    assert [(cell.value, cell.error) for cell in section.table.rows[-1].cells] == [("25", "10"), ("41.2", "")]
    assert section.second is not None
    assert section.second.rows[0].cells[0].error == "10, p 0.03"
