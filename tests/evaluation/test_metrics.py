"""Metrics that belong to no item are left out, and a task that has no others is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from task_rows import Row, rows_of, small_model, write_rows
from transformers import PreTrainedTokenizerFast

from halve.evaluation import asking, metrics
from halve.model.checkpoint import Checkpoint
from halve.preflight.check import check
from halve.recipe.evaluations import Evaluate
from halve.recipe.schema import Recipe

SENTENCE = "The cat sees the dog."
ROWS: dict[str, list[Row]] = {
    "cola": [{"sentence": SENTENCE, "label": i % 2, "idx": i} for i in range(6)],
    "mrpc": [{"sentence1": SENTENCE, "sentence2": "The cat", "label": i % 2, "idx": i} for i in range(6)],
    "lambada_openai": [{"text": SENTENCE.removesuffix(".")} for _ in range(3)],
    "wikitext": [{"page": SENTENCE} for _ in range(3)],
    "cruxeval_output": [{"code": "def f(x):\n    return x", "input": "1", "output": "1", "id": "a"} for _ in range(3)],
}


def section(task: str, folder: Path) -> dict[str, Any]:
    rows = write_rows(folder / f"{task}.jsonl", ROWS.get(task) or rows_of(task, 3))
    return {"tasks": {task: 0}, "data": {task: str(rows)}, "max_new_tokens": 2}


@pytest.mark.parametrize(
    ("task", "kept"),
    [
        ("mrpc", {"acc"}),
        ("lambada_openai", {"acc"}),
        ("arc_easy", {"acc", "acc_norm"}),
        ("ifeval", {*asking._AVERAGED, "average"}),
    ],
)
def test_only_metrics_of_items_are_kept(
    task: str, kept: set[str], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """F1 is of all answers at once, and a perplexity is no mean of log-likelihoods."""
    exam = asking.read_exam(Evaluate(**section(task, tmp_path)), context=4096)
    teacher = Checkpoint.open(small_model(tmp_path / "model", tokenizer))
    (answered,) = asking.answer(exam, teacher.load(), teacher.tokenizer, seed=0).values()
    assert set(answered.values) == kept
    assert all(0 <= value <= 2 for values in answered.values.values() for value in values)


@pytest.mark.parametrize(
    ("task", "what", "why"),
    [
        ("cola", "cola, whose items have no scores", "made of all answers at once: mcc"),
        ("wikitext", "wikitext, whose items have no scores", "it measures the perplexity of whole texts"),
        ("cruxeval_output", "cruxeval_output, which runs programs outside of halve's sandbox", "in this process"),
    ],
)
def test_a_task_without_them_is_known_before_a_run(
    task: str, what: str, why: str, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    (error,) = check(make_recipe(evaluate=section(task, tmp_path)))
    assert error.what == f"evaluate.tasks names {what}"
    assert why in error.why


def test_a_metric_that_some_items_do_not_have_is_left_out() -> None:
    answered = asking.Answered([{}, {}], {"acc": [1.0, 0.0], "other": [1.0]})
    asking._pool(answered)
    assert answered.values == {"acc": [1.0, 0.0]}


def test_the_harness_s_own_figures_are_not_made() -> None:
    class Part:
        def aggregation(self) -> dict[str, Any]:
            raise AssertionError("it would fetch a model")

    part = Part()
    with metrics.figures_unread({"a": part}):
        assert part.aggregation()["mbert"]([0.5, 0.5]) == 2
