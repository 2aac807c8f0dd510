"""Every task of the suites on made-up rows, without a network: the requests are the harness's own."""

from __future__ import annotations

import importlib.util
import json
import shutil
import socket
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chat import with_template
from task_rows import SUITE_TASKS, rows_of, small_model, write_data, write_rows
from transformers import PreTrainedTokenizerFast

from halve.errors import CorpusError
from halve.evaluation import asking
from halve.evaluation import rows as task_files
from halve.evaluation.asking import Answered
from halve.evaluation.rows import FORMS, read_rows, split_files
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
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sockets are refused, and attempts are counted, because a library may swallow the refusal."""
    importlib.import_module("urllib3.util")  # which binds a socket of this machine at its import, to know about IPv6
    attempts: list[str] = []
    for name in ("socket", "create_connection", "getaddrinfo"):

        def refused(*_: Any, name: str = name, **__: Any) -> Any:
            attempts.append("".join(traceback.format_stack(limit=14)))
            raise AssertionError("something asked for a network")

        monkeypatch.setattr(socket, name, refused)
    yield
    assert not attempts, "\n".join(attempts)


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


@pytest.mark.parametrize(
    ("shots", "rows", "words"),
    [
        (5, 5, "winogrande has too few rows for 5 shots"),
        (0, 0, "lm-evaluation-harness cannot use {path} line 1, a row of winogrande"),
    ],
)
def test_rows_of_which_no_task_can_be_made_are_known_before_a_run(
    shots: int, rows: int, words: str, tmp_path: Path, make_recipe: Callable[..., Any]
) -> None:
    from halve.preflight.check import check

    bad = [] if rows else [{"sentence": "No gap.", "option1": "a", "option2": "b", "answer": "1"}]
    path = write_rows(tmp_path / "rows.jsonl", bad or rows_of("winogrande", rows))
    (error,) = check(make_recipe(evaluate={"tasks": {"winogrande": shots}, "data": {"winogrande": str(path)}}))
    assert error.what == words.format(path=path)


def test_a_chat_template_that_is_missing_is_known_before_a_run(
    tmp_path: Path, tiny_llama: Path, make_recipe: Callable[..., Any]
) -> None:
    from halve.preflight.check import check

    section = {"tasks": {"gsm8k": 5}, "chat_template": True}
    assert check(make_recipe(evaluate=section)) == ()
    bare = tmp_path / "bare"
    shutil.copytree(tiny_llama, bare, ignore=shutil.ignore_patterns("chat_template.jinja"))
    (error,) = check(make_recipe(evaluate=section, model=str(bare)))
    assert "template" in error.what


def test_without_the_harness_an_error_says_how_to_install_it(
    make_recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from halve.preflight.check import check

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    (error,) = check(make_recipe(evaluate={"tasks": {"gsm8k": 5}}))
    assert "pip install 'halve[eval]'" in error.fix


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"question": "a"', "line 1 is not JSON"),
        ("a.jsonl.gz", b"no gzip", "cannot read"),
        ("a.jsonl", b"\xff\xfe", "is not UTF-8"),
        ("a.parquet", b"no parquet", "cannot read"),
        ("a.jsonl", b"\n\n", "has no rows"),
        ("a.csv", b"question\nWhy?\n", "row 1 is no row of gsm8k"),
        ("a.csv", b"question,answer\nWhy?,#### 1\nHow many, then?,#### 5\n", "row 2 is no row of a table"),
        ("a.csv", b"question,answer\nWhy?\n", "row 1 is no row of a table"),
        ("a.csv", b'question,answer\n"Why?,#### 1\nHow?,#### 2\n', "is not CSV after line 3"),
        ("a.tsv", b'question\tanswer\n"Why?" he said\t#### 1\n', "is not CSV after line 2"),
    ],
)
def test_a_file_that_holds_no_rows_is_refused(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=words):
        read_rows(tmp_path / name, "gsm8k")


def test_a_folder_has_a_file_for_each_split(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="has no rows of a task"):
        split_files(tmp_path)
    for name in ("train.jsonl", "validation_1k.jsonl.gz", "test-00000-of-00001.parquet", "notes.md"):
        (tmp_path / name).touch()
    assert sorted(split_files(tmp_path)) == ["test", "train", "validation"]
    assert split_files(tmp_path / "train.jsonl") == {"": (tmp_path / "train.jsonl",)}


def test_a_table_s_quoted_text_is_read_whole(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(b'question,answer\r\n"How ""many"",\nthen?",#### 5\r\n\r\nWhy?,#### 1\r\n')
    wanted = [{"question": 'How "many",\nthen?', "answer": "#### 5"}, {"question": "Why?", "answer": "#### 1"}]
    assert read_rows(file, "gsm8k") == wanted


@pytest.mark.parametrize("end", ["jsonl", "jsonl.gz", "parquet"])
@pytest.mark.parametrize("hashes", [("", "", ""), ("-0123456789abcdef", "-fedcba9876543210", "-00112233445566aa")])
def test_shards_are_one_split_in_order(end: str, hashes: tuple[str, ...], tmp_path: Path) -> None:
    files = tuple(tmp_path / f"test-{i:05d}-of-00003{mark}.{end}" for i, mark in enumerate(hashes))
    for file in (*reversed(files), tmp_path / f"train-00000-of-00001.{end}"):
        file.touch()
    assert split_files(tmp_path) == {"test": files, "train": (tmp_path / f"train-00000-of-00001.{end}",)}


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_shard_that_is_missing_is_named(missing: int, tmp_path: Path) -> None:
    for i in {0, 1, 2} - {missing}:
        (tmp_path / f"test-{i:05d}-of-00003.jsonl").touch()
    with pytest.raises(CorpusError) as caught:
        split_files(tmp_path)
    assert caught.value.why == f"shard {missing:05d}-of-00003 is not there (2 of 3 files are)"


@pytest.mark.parametrize(
    "names",
    [
        ("test.csv", "test.jsonl"),
        ("test.jsonl", "test.jsonl.gz"),
        ("val.jsonl", "validation.jsonl"),
        ("test-00000-of-00001.jsonl", "test.jsonl"),
        ("test-00000-of-00001.jsonl", "test-00000-of-00002.jsonl"),
        ("test-00000-of-00002.jsonl", "test_b-00001-of-00002.jsonl"),
        ("test-00000-of-00001-0123456789abcdef.parquet", "test-00000-of-00001-fedcba9876543210.parquet"),
    ],
)
def test_two_files_of_a_split_that_are_no_shards_are_named(names: tuple[str, str], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(CorpusError) as caught:
        split_files(tmp_path)
    first, second = names
    assert caught.value.what.startswith(f"{tmp_path / first} and {second} both hold the ")


def test_the_rows_of_all_shards_are_asked(tmp_path: Path) -> None:
    for i in range(3):
        row = {"question": f"{i}?", "answer": f"#### {i}"}
        (tmp_path / f"test-{i:05d}-of-00003.jsonl").write_text(json.dumps(row), encoding="utf-8")
    section = Evaluate(tasks={"gsm8k": 0}, data={"gsm8k": str(tmp_path)})
    (built,) = asking.read_exam(section, context=None).built
    (asked,) = built.rows.values()
    assert [row["question"] for row in asked.asked] == ["0?", "1?", "2?"]


def test_a_file_that_is_not_read_to_its_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_files, "LONGEST_FILE_BYTES", 35)
    text = "question,answer\nWhy?,#### 1\n"
    (tmp_path / "a.csv").write_text(text, encoding="utf-8")
    assert len(read_rows(tmp_path / "a.csv", "gsm8k")) == 1
    (tmp_path / "a.csv").write_text(f"{text}How?,#### 2\n", encoding="utf-8")
    with pytest.raises(CorpusError, match="is too long"):
        read_rows(tmp_path / "a.csv", "gsm8k")


def test_published_forms_become_the_harness_s() -> None:
    """Prepared rows give the harness's texts; the table of TruthfulQA gives its choices, right ones first."""
    arc = FORMS["arc_easy"][1].make({"query": "Question: Why?\nAnswer:", "choices": ["a", "b"], "gold": 1})
    assert (arc["question"], arc["answerKey"], arc["choices"]["label"]) == ("Why?", "B", ["A", "B"])
    asked = FORMS["hellaswag"][1].make({"query": "Walking: A man walks. He", "choices": ["a"], "gold": 0})
    assert (
        f"{asked['activity_label']}: {asked['ctx_a']} {asked['ctx_b'].capitalize()}".strip()
        == "Walking: A man walks. He"
    )
    row = {"Question": "Q?", "Best Answer": "x", "Correct Answers": "y; x", "Incorrect Answers": "z; "}
    made = FORMS["truthfulqa_mc2"][1].make(row)
    assert made["mc2_targets"] == {"choices": ["x", "y", "z"], "labels": [1, 1, 0]}
