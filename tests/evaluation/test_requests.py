"""Every task of the suites on made-up rows, without a network: the requests are the harness's own."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat import with_template
from task_rows import SUITE_TASKS, small_model, write_data
from transformers import PreTrainedTokenizerFast

from halve.evaluation import asking
from halve.evaluation.asking import Answered
from halve.evaluation.sandbox import Outcome, Sandbox
from halve.model.checkpoint import Checkpoint
from halve.recipe.evaluations import Evaluate

STORED = json.loads(Path(__file__).with_name("requests.json").read_text(encoding="utf-8"))
HARNESS_NAMES = {"humaneval": "humaneval_64"}  # whose sampling is the papers'


class _Refusing(Sandbox):
    """Runs nothing, and counts what it is asked to run."""

    def __init__(self) -> None:
        self.kind, self.programs = "none", list[str]()

    def run(self, program: str) -> Outcome:
        self.programs.append(program)
        return Outcome(False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    numbers = {"mmlu": 6, "xlsum_en": 15}
    return {task: str(write_data(folder, task, numbers.get(task, 3), shots=30)) for task in SUITE_TASKS}


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("something asked for a network")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refused)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("words", ["plain", "chat"])
def test_requests_are_the_harness_s_own(
    words: str,
    data: dict[str, str],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    box = _Refusing()
    monkeypatch.setattr(Sandbox, "open", lambda: box)
    chat = {"chat_template": words == "chat", "fewshot_as_turns": words == "chat"}
    suites = ("minitron-base", "minitron-instruct")
    section = Evaluate(suites=suites, data=data, max_new_tokens=2, task_batch=64, run_untrusted_code=True, **chat)
    teacher = Checkpoint.open(small_model(tmp_path / "model", with_template(tokenizer)))
    exam = asking.read_exam(section, context=4096)
    assert exam.left == ()
    found = asking.answer(exam, teacher.load(), teacher.tokenizer, seed=0)
    requests = by_part(found)
    assert {HARNESS_NAMES.get(part, part) for part in requests} == {*STORED[words], "xlsum_en"}
    for part, hashes in requests.items():
        assert part == "xlsum_en" or hashes == STORED[words][HARNESS_NAMES.get(part, part)], part
    assert len(requests["xlsum_en"]) == 3, "a fifth of the rows"
    assert len(box.programs) == 3 * 20 + 3 * 3, "humaneval with 20 answers and with one, mbpp twice"


def by_part(found: dict[str, Answered]) -> dict[str, list[str]]:
    """The hashes of the requests of each part of each task."""
    requests: dict[str, list[str]] = {}
    for key, answered in found.items():
        for item in answered.items:
            if key != "gsm8k (0)":  # the harness's file has five shots
                requests.setdefault(item["part"], []).append(item["request"])
    return requests


def test_the_stored_requests_are_of_this_harness() -> None:
    import lm_eval

    assert STORED["harness"] == lm_eval.__version__


def test_what_has_no_data_says_which_file_it_wants(data: dict[str, str]) -> None:
    only = {"arc_challenge": data["arc_challenge"], "humaneval": data["humaneval"]}
    exam = asking.read_exam(Evaluate(suites=("minitron-base",), data=only, limit=1), context=4096)
    assert [built.ask.task for built in exam.built] == ["arc_challenge"]
    why = {left.ask.task: (left.status, left.why) for left in exam.left}
    assert why["gsm8k"] == ("no data", "it wants evaluate.data: {gsm8k: FILE}, rows with question, answer")
    assert why["humaneval"] == ("not run", "its answers are programs, and evaluate.run_untrusted_code is off")
    assert len(why) == 8


@pytest.mark.parametrize(
    ("task", "row", "words"),
    [
        ("arc_easy", {"question": "Why?"}, "line 2 is no row of arc_easy\n  why: it lacks choices and answerKey"),
        ("winogrande", ["a"], "line 2 is no row of winogrande\n  why: it is a list, not an object"),
        ("arc_easy", {"query": "Why?", "choices": ["a"], "gold": 3}, "line 2 is no row of arc_easy\n  why: IndexError"),
    ],
)
def test_a_row_that_is_not_the_task_s_is_named(
    task: str, row: Any, words: str, tmp_path: Path, make_recipe: Callable[..., Any]
) -> None:
    from halve.preflight.check import check

    place = write_data(tmp_path, task, 1)
    for file in place.iterdir():
        file.write_text(f"{file.read_text(encoding='utf-8').splitlines()[0]}\n{json.dumps(row)}\n", encoding="utf-8")
    recipe = make_recipe(evaluate={"tasks": {task: 0}, "data": {task: str(place)}})
    assert any(words in str(error) for error in check(recipe))


def test_unknown_tasks_and_missing_files_are_known_before_a_run(
    tmp_path: Path, make_recipe: Callable[..., Any]
) -> None:
    from halve.preflight.check import check

    recipe = make_recipe(
        evaluate={"tasks": {"arc_esy": 0, "gsm8k": 5}, "data": {"gsm8k": str(tmp_path / "none.jsonl")}}
    )
    unknown, missing = check(recipe)
    assert unknown.fix == "did you mean arc_easy?"
    assert missing.what == f"cannot read {tmp_path / 'none.jsonl'}"
    templated = make_recipe(evaluate={"tasks": {"gsm8k": 5}, "chat_template": True})
    assert check(templated) == ()
