"""The client of endpoints, MT-Bench's protocol and imported results, with a local server that answers in its place."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from halve.cli.app import main
from halve.errors import CorpusError, RunError
from halve.evaluation import endpoint as client
from halve.evaluation.endpoint import Endpoint, KeptItems
from halve.evaluation.imports import imported
from halve.recipe.evaluations import Imported


class Server:
    """Answers chat completions. `answer` makes the text; `failures` are codes that come first."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.failures: list[int] = []
        self.answer: Callable[[dict[str, Any]], str] = lambda request: "Hello."
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.keys.append(self.headers.get("Authorization"))
                if server.failures:
                    self.send_error(server.failures.pop(0))
                    return
                server.asked.append({**request, "path": self.path})
                said = {"choices": [{"message": {"content": server.answer(request)}}]}
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps(said).encode())

            def log_message(self, *_: Any) -> None:
                """Nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    thread = threading.Thread(target=made.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield made
    made.server.shutdown()
    made.server.server_close()


def test_a_failure_that_may_pass_is_tried_again_and_later_each_time(server: Server) -> None:
    waits: list[float] = []
    server.failures = [503, 429]
    asked = Endpoint(server.url, "small", pause=waits.append)
    assert asked.chat([{"role": "user", "content": "Hi"}], temperature=0.5, max_tokens=7) == "Hello."
    assert waits == [1.0, 4.0]
    assert server.asked == [
        {
            "model": "small",
            "messages": [{"role": "user", "content": "Hi"}],
            "temperature": 0.5,
            "max_tokens": 7,
            "path": "/v1/chat/completions",
        }
    ]


def test_an_endpoint_that_stays_down_is_an_error_after_three_more_tries(server: Server) -> None:
    waits: list[float] = []
    server.failures = [500] * 9
    with pytest.raises(RunError) as caught:
        Endpoint(server.url, "small", pause=waits.append).chat([], temperature=0.0, max_tokens=1)
    assert caught.value.what == f"the endpoint {server.url} does not answer for small"
    assert (len(server.failures), waits) == (5, [1.0, 4.0, 16.0])
    server.failures = [401]
    with pytest.raises(RunError, match="401"):
        Endpoint(server.url, "small", pause=waits.append).chat([], temperature=0.0, max_tokens=1)
    assert len(waits) == 3, "a refusal is final"


def test_a_slow_endpoint_is_an_error(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    assert client.TIMEOUT_S == 60.0
    monkeypatch.setattr(client, "TIMEOUT_S", 0.05)
    gate = threading.Event()
    server.answer = lambda request: str(gate.wait(5))
    with pytest.raises(RunError, match="timed out"):
        Endpoint(server.url, "slow", pause=lambda _: None).chat([], temperature=0.0, max_tokens=1)
    gate.set()
    server.server.shutdown()


def test_what_is_no_chat_completion_is_said(server: Server) -> None:
    server.answer = lambda request: None  # type: ignore[assignment, return-value]
    assert Endpoint(server.url, "m").chat([], temperature=0.0, max_tokens=1) == ""
    bad = Endpoint(f"{server.url}/../none", "m", pause=lambda _: None)
    assert bad.chat([], temperature=0.0, max_tokens=1) == ""
    with pytest.raises(RunError, match="no chat completion"):
        bad._answer(b"<html>")


def test_half_a_character_of_an_answer_becomes_the_mark_of_a_lost_one(server: Server) -> None:
    server.answer = lambda request: "cut \ud83d"
    assert Endpoint(server.url, "m").chat([], temperature=0.0, max_tokens=1) == "cut \N{REPLACEMENT CHARACTER}"
    server.answer = lambda request: "whole \N{GRINNING FACE}"
    assert Endpoint(server.url, "m").chat([], temperature=0.0, max_tokens=1) == "whole \N{GRINNING FACE}"


def test_finished_items_are_kept_and_a_torn_line_is_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    kept = KeptItems(path)
    assert [kept.get(name, lambda n=name: n.upper()) for name in "ab"] == ["A", "B"]
    path.write_text(path.read_text(encoding="utf-8")[:-8], encoding="utf-8")
    again, asked = KeptItems(path), []
    assert [again.get(name, lambda n=name: asked.append(n) or n.upper()) for name in "abc"] == ["A", "B", "C"]
    assert asked == ["b", "c"]
    assert KeptItems(path).get("c", lambda: "?") == "C"


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
    server: Server,
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
    command = ["judge", str(bench), "--student", server.url, "--student-model", "small", "--judge", server.url]
    command += ["--judge-model", "big", "--out", str(tmp_path / "out")]
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
    found = json.loads(capsys.readouterr().out)
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


def test_results_of_other_tools_are_imported_with_their_versions(tmp_path: Path) -> None:
    files = {
        "bfcl": "Rank,Model,Live Acc,Overall Acc\n1,small (FC),59.6%,50%\n2,large (FC),67.6%,60%\n",
        "chatrag": "doc2dial: 37.5\nquac: 42.5\n",
        "mt_bench": '{"score": 6.5, "stderr": 0.25, "judge": "big"}',
    }
    entries = []
    for tool, text in files.items():
        (tmp_path / tool).write_text(text, encoding="utf-8")
        row = "small" if tool == "bfcl" else None
        entries.append(Imported(tool=tool, file=str(tmp_path / tool), model="distilled", version="v4", row=row))
    found = {entry["tool"]: entry for entry in imported(entries)}
    assert {tool: entry["value"] for tool, entry in found.items()} == {"bfcl": 59.6, "chatrag": 40.0, "mt_bench": 6.5}
    assert all(entry["version"] == "v4" and len(entry["sha256"]) == 64 for entry in found.values())


@pytest.mark.parametrize(
    ("tool", "text", "why"),
    [
        ("bfcl", "Model,Live Acc\na,1\nb,2\n", "2 of its 2 rows are of a single model"),
        ("bfcl", "Model,Other\na,1\n", "it has no column Live Acc"),
        ("chatrag", "nothing here", "it has no score"),
        ("mt_bench", "[]", "it is no object"),
    ],
)
def test_a_file_that_is_not_the_tool_s_is_refused(tool: Any, text: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text(text, encoding="utf-8")
    with pytest.raises(CorpusError, match=why):
        imported([Imported(tool=tool, file=str(tmp_path / "file"), model="teacher", version="1")])
