"""The client of endpoints: what it sends and where, what it tries again, and the items that it keeps."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from stub_server import StubServer, serving

from halve.errors import RunError
from halve.evaluation import endpoint as client
from halve.evaluation.endpoint import Endpoint, KeptItems


def test_a_failure_that_may_pass_is_tried_again_and_later_each_time(server: StubServer) -> None:
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


def test_an_endpoint_that_stays_down_is_an_error_after_three_more_tries(server: StubServer) -> None:
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


def test_a_slow_endpoint_is_an_error(server: StubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert client.TIMEOUT_S == 60.0
    monkeypatch.setattr(client, "TIMEOUT_S", 0.05)
    gate = threading.Event()
    server.answer = lambda request: str(gate.wait(5))
    with pytest.raises(RunError, match="timed out"):
        Endpoint(server.url, "slow", pause=lambda _: None).chat([], temperature=0.0, max_tokens=1)
    gate.set()
    server.server.shutdown()


def test_what_is_no_chat_completion_is_said(server: StubServer) -> None:
    server.answer = lambda request: None  # type: ignore[assignment, return-value]
    assert Endpoint(server.url, "m").chat([], temperature=0.0, max_tokens=1) == ""
    bad = Endpoint(f"{server.url}/../none", "m", pause=lambda _: None)
    assert bad.chat([], temperature=0.0, max_tokens=1) == ""
    with pytest.raises(RunError, match="no chat completion"):
        bad._answer(b"<html>")


def test_half_a_character_of_an_answer_becomes_the_mark_of_a_lost_one(server: StubServer) -> None:
    server.answer = lambda request: "cut \ud83d"
    assert Endpoint(server.url, "m").chat([], temperature=0.0, max_tokens=1) == "cut \N{REPLACEMENT CHARACTER}"
    server.answer = lambda request: "whole \N{GRINNING FACE}"
    assert Endpoint(server.url, "m").chat([], temperature=0.0, max_tokens=1) == "whole \N{GRINNING FACE}"


def test_finished_items_are_kept_and_a_torn_line_is_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    kept = kept_texts(path)
    assert [kept.get(name, lambda n=name: n.upper()) for name in "ab"] == ["A", "B"]
    path.write_text(path.read_text(encoding="utf-8")[:-8], encoding="utf-8")
    again, asked = kept_texts(path), []
    assert [again.get(name, lambda n=name: asked.append(n) or n.upper()) for name in "abc"] == ["A", "B", "C"]
    assert asked == ["b", "c"]
    assert kept_texts(path).get("c", lambda: "?") == "C"


def kept_texts(path: Path) -> KeptItems:
    return KeptItems(path, lambda kept: isinstance(kept, str))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\xff\xfe\n", "invalid start byte"),
        (b'{"item": "a", "value": 5}\n', "its line 1 is no item that this command wrote"),
        (b'{"item": "a", "value": "A"}\n{"item": ["a"], "value": "A"}\n', "its line 2 is no item"),
        (b"[1]\n", "its line 1 is no item"),
    ],
)
def test_a_file_of_something_else_is_not_gone_on_from(content: bytes, why: str, tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_bytes(content)
    with pytest.raises(RunError, match=why) as caught:
        kept_texts(path)
    assert caught.value.what == f"cannot go on from {path}"
    assert caught.value.fix.startswith("move that file away")
    assert path.read_bytes() == content


def test_a_folder_in_the_place_of_kept_items_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="Is a directory"):
        kept_texts(tmp_path)


# ---- where requests go, and with which key


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed_and_the_key_stays(
    code: int, server: StubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUDENT_API_KEY", "sk-secret")
    waits: list[float] = []
    with serving() as other:
        server.code, server.location = code, f"{other.url}/chat/completions"
        asked = Endpoint(server.url, "small", "STUDENT_API_KEY", pause=waits.append)
        with pytest.raises(RunError) as caught:
            asked.chat([], temperature=0.0, max_tokens=1)
        assert other.keys == []
    assert str(caught.value).splitlines() == [
        f"the endpoint {server.url} points to another address for small",
        f"  why: it answers {code} and points to {server.location}; no redirect is followed, or the key would go there"
        " too",
        f"  fix: if you trust that address, give it instead of {server.url}: {other.url}",
    ]
    assert (server.keys, waits) == (["Bearer sk-secret"], []), "it is asked once"


def test_a_redirect_without_a_host_is_named_in_full(server: StubServer) -> None:
    server.location = "/v2/chat/completions"
    with pytest.raises(RunError) as caught:
        Endpoint(server.url, "small").chat([], temperature=0.0, max_tokens=1)
    assert caught.value.fix.endswith(f": {server.url.removesuffix('1')}2")
    server.location = "http://["
    with pytest.raises(RunError, match="points to another address"):
        Endpoint(server.url, "small").chat([], temperature=0.0, max_tokens=1)


@pytest.mark.parametrize("key", ["sk-secret\r", "sk-secret\r\n", "\tsk-secret "])
def test_white_space_around_a_key_is_not_sent(key: str, server: StubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUDENT_API_KEY", key)
    Endpoint(server.url, "small", "STUDENT_API_KEY").chat([], temperature=0.0, max_tokens=1)
    assert server.keys == ["Bearer sk-secret"]
    monkeypatch.setenv("STUDENT_API_KEY", " \n")
    Endpoint(server.url, "small", "STUDENT_API_KEY").chat([], temperature=0.0, max_tokens=1)
    assert server.keys[1:] == [None]


@pytest.mark.parametrize(
    "key", ["sk\N{EURO SIGN}secret", "sk\nsecret", "sk\x07secret", "sk\u00fcsecret", "sk\udcffsecret"]
)
def test_a_key_that_no_header_holds_is_an_error_that_does_not_show_it(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUDENT_API_KEY", key)
    with pytest.raises(RunError) as caught:
        Endpoint("http://localhost:8000/v1", "small", "STUDENT_API_KEY")
    assert str(caught.value).splitlines() == [
        "the key in the environment variable STUDENT_API_KEY cannot be sent",
        "  why: its character 3 of 9 is no printable ASCII, which is all that a header holds",
        "  fix: set STUDENT_API_KEY to the key alone",
    ]


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("", "it does not begin with http:// or https://"),
        ("banana", "it does not begin with http:// or https://"),
        ("localhost:8000/v1", "it does not begin with http:// or https://"),
        ("file:///etc", "it does not begin with http:// or https://"),
        ("http:///v1", "it names no host"),
        ("http://:8000/v1", "it names no host"),
        ("http://a..b/v1", "label empty or too long"),
        ("http://[::1/v1", "Invalid IPv6 URL"),
        ("http://localhost:notaport/v1", "notaport"),
        ("http://localhost:65536/v1", "Port out of range"),
        ("http://localhost:0/v1", "0 is no port"),
        ("http://local host/v1", "it holds a space"),
        ("http://localhost/v1\n", "no printable ASCII"),
        ("http://localhost/v\u00fc", "no printable ASCII"),
        ("http://localhost/v1?version=1", "it cannot hold ? or #"),
    ],
)
def test_a_wrong_address_is_refused_before_anything_is_asked(url: str, why: str) -> None:
    with pytest.raises(RunError) as caught:
        Endpoint(url, "small")
    assert caught.value.what == f"cannot ask small at the address {url!r}"
    assert why in caught.value.why


@pytest.mark.parametrize("url", ["http://localhost", "HTTPS://api.example.com/v1/", "http://[::1]:8000/v1"])
def test_an_address_may_have_a_port_and_a_path(url: str) -> None:
    assert Endpoint(url, "small").url == url


def test_a_password_in_an_address_is_not_shown() -> None:
    with pytest.raises(RunError, match="it holds a user name or a password") as caught:
        Endpoint("https://me:secret@example.com/v1", "small")
    assert "secret" not in str(caught.value)


def test_a_model_whose_name_no_page_can_show_is_refused() -> None:
    with pytest.raises(RunError, match="its name is not UTF-8"):
        Endpoint("http://localhost:8000/v1", "small\udcff")
