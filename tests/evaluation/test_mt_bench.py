"""MT-Bench's protocol, with a local server that answers in the place of student and judge."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stub_server import StubServer

from halve.cli.app import main
from halve.evaluation import endpoint as client

QUESTIONS = [
    {"question_id": 1, "category": "writing", "turns": ["Write.", "Again."]},
    {"question_id": 2, "category": "math", "turns": ["1 + 1?", "Plus 1?"]},
]
PROMPTS = [
    {"name": "single-v1", "system_prompt": "Judge.", "prompt_template": "Q {question} A {answer}"},
    {
        "name": "single-math-v1",
        "system_prompt": "Judge.",
        "prompt_template": "Q {question} R {ref_answer_1} A {answer}",
    },
    {"name": "single-v1-multi-turn", "system_prompt": "Two.", "prompt_template": "{question_2} A {answer_2}"},
    {
        "name": "single-math-v1-multi-turn",
        "system_prompt": "Two.",
        "prompt_template": "{question_2} R {ref_answer_2} A {answer_2}",
    },
]


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    folder = tmp_path / "mt_bench"
    folder.mkdir()
    reference = [{"question_id": 2, "choices": [{"turns": ["2", "3"]}]}]
    for name, rows in (("question", QUESTIONS), ("judge_prompts", PROMPTS), ("reference_answer_gpt4", reference)):
        text = "".join(f"{json.dumps(row)}\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


def test_mt_bench_asks_two_turns_and_keeps_what_is_finished(
    server: StubServer,
    bench: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(client, "WAITS_S", ())
    monkeypatch.setenv("OPENAI_API_KEY", "a-key-that-is-secret")
    grades = {"Q Write. A small 1": "[[8]]", "Again. A small 3": "[[6.5]]", "Plus 1? R 3 A small 3": "Rating: [4]"}

    def answer(request: dict[str, Any]) -> str:
        if request["model"] == "small":
            return f"small {len(request['messages'])}"
        return grades.get(request["messages"][1]["content"], "no grade")

    server.answer = answer
    command = words(server, bench, tmp_path / "out")
    judged = [0]

    def failing(request: dict[str, Any]) -> str:
        judged[0] += request["model"] == "big"
        if judged[0] == 3:
            server.failures = [500]
        return answer(request)

    server.answer = failing
    assert main(command) == 2
    assert "finished items are kept" in capsys.readouterr().err
    server.failures, server.answer = [], answer
    before = len(server.asked)
    assert main([*command, "--json"]) == 0
    said = capsys.readouterr()
    assert "4 answers and 3 grades are from an earlier call" in said.err
    found = json.loads(said.out)
    assert (found.pop("kept_answers"), found.pop("kept_grades")) == (4, 3)
    assert json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8")) == found
    assert (found["score"], found["without_grade"]) == (pytest.approx((8 + 6.5 + 4) / 3), 1)
    assert found["categories"] == {"writing": 7.25, "math": 4.0}
    names = [request["model"] for request in server.asked]
    assert (names.count("small"), names.count("big")) == (4, 4), "nothing is asked twice"
    assert len(names) - before == 1
    assert {request["temperature"] for request in server.asked if request["model"] == "small"} == {0.7, 0.0}
    assert [len(request["messages"]) for request in server.asked if request["model"] == "small"] == [1, 3, 1, 3]
    assert "Bearer a-key-that-is-secret" in server.keys
    assert None in server.keys, "the student gets no key of the judge"
    for file in (tmp_path / "out").iterdir():
        assert "a-key-that-is-secret" not in file.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (("--student", "http://localhost:1/v1"), "student"),
        (("--student-model", "smaller"), "student model"),
        (("--judge", "http://localhost:1/v1"), "judge"),
        (("--judge-model", "bigger"), "judge model"),
        ((), "question"),
    ],
)
def test_kept_answers_are_of_the_same_models_and_questions(
    flags: tuple[str, ...],
    what: str,
    server: StubServer,
    bench: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.answer = lambda request: "good [[7]]"
    command = words(server, bench, tmp_path / "out")
    assert main(command) == 0
    before = len(server.asked), (tmp_path / "out" / "results.json").read_bytes()
    assert main([*command[:3], f"{server.url}/", *command[4:]]) == 0  # the same address
    assert "4 answers and 4 grades are from an earlier call" in capsys.readouterr().err
    if not flags:
        (bench / "question.jsonl").write_text(question(turns=["Other.", "Again."]), encoding="utf-8")
    assert main([*command, *flags]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert f"cannot go on from {tmp_path / 'out'}\n  why: its answers are of another {what}: " in said.err
    assert (len(server.asked), (tmp_path / "out" / "results.json").read_bytes()) == before


def test_kept_answers_of_which_nothing_is_known_are_refused(
    server: StubServer, bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answer = lambda request: "good [[7]]"
    command = words(server, bench, tmp_path / "out")
    assert main(command) == 0
    (tmp_path / "out" / "asked.json").unlink()
    capsys.readouterr()
    assert main(command) == 2
    assert "it holds answers but no asked.json" in capsys.readouterr().err


def words(server: StubServer, bench: Path, out: Path) -> list[str]:
    asked = ["--student", server.url, "--student-model", "small", "--judge", server.url, "--judge-model", "big"]
    return ["judge", str(bench), *asked, "--out", str(out)]


@pytest.fixture
def refusal(
    server: StubServer, bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., list[str]]:
    """`refusal(...)`: the three lines of `judge`, which ends with 2 and asks nothing."""

    def of(*more: str) -> list[str]:
        assert main([*words(server, bench, tmp_path / "out"), *more]) == 2
        assert server.asked == server.keys == []
        said = capsys.readouterr()
        assert said.out == ""
        lines = said.err.splitlines()
        assert [line[:6] for line in lines] == ["error:", "  why:", "  fix:"]
        return lines

    return of


def question(**changes: Any) -> str:
    return json.dumps({**QUESTIONS[0], **changes})


def reference(**changes: Any) -> str:
    row = {"question_id": 2, "choices": [{"turns": ["2", "3"]}], **changes}
    return json.dumps({key: value for key, value in row.items() if value is not None})


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("question", question(turns=["x"]), 'turns: ["x"] is no list of two texts'),
        ("question", question(turns=["a", "b", "c"]), 'turns: ["a", "b", "c"] is no list of two texts'),
        ("question", question(turns=[1, 2]), "turns: [1, 2] is no list of two texts"),
        ("question", question(turns=["a", " "]), 'turns: ["a", " "] is no list of two texts'),
        ("question", question(turns=None), "turns: null is no list of two texts"),
        ("question", question(turns="hello"), 'turns: "hello" is no list of two texts'),
        ("question", question(turns=["a", "\ud83d"]), 'turns: ["a", "\\ud83d"] is no list of two texts'),
        ("question", question(question_id=[1]), "question_id: [1] is no whole number"),
        ("question", question(question_id=True), "question_id: true is no whole number"),
        ("question", question(category=["x"]), 'category: ["x"] is no text'),
        ("question", '{"question_id": 1, "category": "writing"}', "turns: nothing is no list of two texts"),
        ("question", f"{question()}\n{question()}", "an earlier line has 1 too"),
        ("question", f"{question()}\n{question(question_id='1')}", "an earlier line has 1 too"),
        (
            "question",
            question(category="math"),
            "question 1 has no reference answer, and the judge needs one in category math",
        ),
        ("question", "5", "it is no JSON object"),
        (
            "question",
            f"{question()}\n{{",
            "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
        ),
        ("reference_answer", reference(question_id=None), "question_id: nothing is no whole number"),
        ("reference_answer", reference(choices=[]), "choices: [] is no list with an answer"),
        ("reference_answer", reference(choices=["x"]), 'choices: ["x"] is no list with an answer'),
        ("reference_answer", reference(choices=[{"turns": ["2"]}]), 'turns: ["2"] is no list of two texts'),
        ("judge_prompts", json.dumps({**PROMPTS[0], "prompt_template": 5}), "prompt_template: 5 is no text"),
        ("judge_prompts", json.dumps({**PROMPTS[0], "system_prompt": None}), "system_prompt: null is no text"),
        ("judge_prompts", json.dumps({**PROMPTS[0], "name": {}}), "name: {} is no text"),
    ],
)
def test_a_line_that_is_not_mt_bench_s_is_known_before_a_request(
    name: str, text: str, why: str, bench: Path, refusal: Callable[..., list[str]]
) -> None:
    (file,) = bench.glob(f"{name}*")
    file.write_text(text, encoding="utf-8")
    assert refusal() == [
        f"error: {file} line {len(text.splitlines())} is no line of MT-Bench",
        f"  why: {why}",
        "  fix: take that file anew from FastChat's repository",
    ]


@pytest.mark.parametrize("missing", [prompt["name"] for prompt in PROMPTS])
def test_a_prompt_that_a_question_needs_is_known_before_a_request(
    missing: str, bench: Path, refusal: Callable[..., list[str]]
) -> None:
    file = bench / "judge_prompts.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in PROMPTS if row["name"] != missing), encoding="utf-8")
    assert refusal()[:2] == [
        f"error: {file} has no prompt {missing}",
        f"  why: the judge needs it to grade question {2 if 'math' in missing else 1}",
    ]


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_a_file_without_questions_is_said(content: bytes, bench: Path, refusal: Callable[..., list[str]]) -> None:
    (bench / "question.jsonl").write_bytes(content)
    assert refusal()[0] == f"error: {bench}/question.jsonl has no question"


@pytest.mark.parametrize("name", ["question", "reference_answer", "judge_prompts"])
def test_a_file_that_is_missing_or_cannot_be_read_is_said(
    name: str, bench: Path, refusal: Callable[..., list[str]]
) -> None:
    (file,) = bench.glob(f"{name}*")
    file.write_bytes(b"\xff")
    assert refusal()[0] == f"error: cannot read {file}"
    file.unlink()
    assert refusal()[0] == f"error: {bench} has no {name}.jsonl"
    file.mkdir()
    assert refusal()[:2] == [f"error: cannot read {file}", "  why: Is a directory"]


def test_two_files_that_may_be_the_questions_are_named(
    server: StubServer, bench: Path, tmp_path: Path, refusal: Callable[..., list[str]]
) -> None:
    (bench / "question.jsonl.bak").touch()
    (bench / "question_old.jsonl.gz").touch()
    assert refusal()[0] == f"error: {bench}/question.jsonl and question_old.jsonl.gz may both be the question file"
    (bench / "question_old.jsonl.gz").unlink()
    server.answer = lambda request: "good [[7]]"
    assert main(words(server, bench, tmp_path / "out")) == 0


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("answers", b"\xff\xfe\n", "invalid start byte"),
        ("answers", b'{"item": "small: 1.1", "value": {"grade": 5.0}}\n', "its line 1 is no item"),
        ("grades", b'{"item": "big on small: 1.1", "value": 5}\n', "its line 1 is no item"),
        ("grades", b'{"item": "big on small: 1.1", "value": {"grade": "7", "words": ""}}\n', "its line 1 is no item"),
        ("grades", b'{"item": "big on small: 1.1", "value": {"grade": NaN, "words": ""}}\n', "its line 1 is no item"),
        ("grades", b'{"item": "big on small: 1.1", "value": {"grade": 7.0}}\n', "its line 1 is no item"),
    ],
)
def test_a_result_file_that_this_did_not_write_is_to_be_moved_away(
    name: str, content: bytes, why: str, tmp_path: Path, refusal: Callable[..., list[str]]
) -> None:
    file = tmp_path / "out" / f"{name}.jsonl"
    file.parent.mkdir()
    file.write_bytes(content)
    lines = refusal()
    assert lines[0] == f"error: cannot go on from {file}"
    assert why in lines[1]
    assert lines[2].startswith("  fix: move that file away")


def test_an_out_that_is_a_file_is_known_before_a_request(tmp_path: Path, refusal: Callable[..., list[str]]) -> None:
    (tmp_path / "out").touch()
    assert str(tmp_path / "out") in refusal()[0]


@pytest.mark.parametrize("flag", ["--student", "--judge"])
@pytest.mark.parametrize("url", ["", "banana", "localhost:8000/v1", "file:///etc", "http://localhost:notaport/v1"])
def test_a_wrong_address_is_known_before_a_request(url: str, flag: str, refusal: Callable[..., list[str]]) -> None:
    model = "small" if flag == "--student" else "big"
    assert refusal(flag, url)[0] == f"error: cannot ask {model} at the address {url!r}"


@pytest.mark.parametrize("variable", ["STUDENT_API_KEY", "OPENAI_API_KEY"])
def test_a_key_that_cannot_be_sent_is_known_before_a_request(
    variable: str, refusal: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "sk\nsecret")
    lines = refusal()
    assert lines[0] == f"error: the key in the environment variable {variable} cannot be sent"
    assert "secret" not in "".join(lines)


def test_a_line_separator_inside_a_text_ends_no_line(server: StubServer, bench: Path, tmp_path: Path) -> None:
    row = json.dumps({**QUESTIONS[0], "turns": ["a\u2028b", "c\x85d"]}, ensure_ascii=False)
    (bench / "question.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{row}\r\n".encode())
    server.answer = lambda request: "good [[7]]"
    assert main(words(server, bench, tmp_path / "out")) == 0
    first = [request["messages"][-1]["content"] for request in server.asked if request["model"] == "small"]
    assert first == ["a\u2028b", "c\x85d"]


def test_a_grade_above_the_scale_is_none(
    server: StubServer, bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answer = lambda request: "[[10]]" if "Write." in str(request["messages"]) else "[[700]]"
    assert main([*words(server, bench, tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["score"], found["without_grade"]) == (10.0, 3)
