"""Rows of conversations: what is read, in which words, and what is refused with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat import Message, turns, write_rows

from halve.errors import CorpusError
from halve.text import sources
from halve.text.rendering import Chat

CHAT = Chat("messages", "assistant")


def read(path: Path, field: str = "messages") -> list[dict[str, Any]]:
    return [json.loads(piece.text) for piece in sources.read_documents(str(path), Chat(field, "all").wanted)]


def row(*messages: Any, **more: Any) -> str:
    return json.dumps({"messages": list(messages), **more}) + "\n"


def test_roles_and_contents_are_read_as_they_are(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", turns("Hi?", "Hello.", system="Be short."), turns("And?", "Yes."))
    found = read(file)
    assert [one["messages"] for one in found] == [turns("Hi?", "Hello.", system="Be short."), turns("And?", "Yes.")]
    (first, second) = sources.read_documents(str(file), CHAT.wanted)
    assert (first.place, second.place) == (f"{file}, line 1", f"{file}, line 2")


def test_sharegpt_is_the_same_in_other_words(tmp_path: Path) -> None:
    said = [
        {"from": "system", "value": "Be short."},
        {"from": "human", "value": "Hi?"},
        {"from": "gpt", "value": "Yes"},
    ]
    (tmp_path / "a.jsonl").write_text(json.dumps({"conversations": said}) + "\n")
    (found,) = read(tmp_path / "a.jsonl", "conversations")
    assert found["messages"] == turns("Hi?", "Yes", system="Be short.")


def test_calls_of_tools_are_the_assistants(tmp_path: Path) -> None:
    call = {"name": "weather", "arguments": {"city": "Rome"}}
    said = [
        {"from": "human", "value": "Weather?"},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "sunny"},
        {"from": "gpt", "value": "It is sunny."},
    ]
    tools = [{"name": "weather", "parameters": {"default": None}}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": said, "tools": json.dumps(tools)}) + "\n")
    (found,) = read(tmp_path / "a.jsonl")
    assert [message["role"] for message in found["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert found["messages"][1]["tool_calls"] == [{"type": "function", "function": call}]
    assert found["tools"] == tools


def test_parts_and_null_are_text_and_other_keys_stay(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    calls = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]
    (tmp_path / "a.jsonl").write_text(
        row({"role": "user", "content": parts}, {"role": "assistant", "content": None, "tool_calls": calls, "x": None})
    )
    (found,) = read(tmp_path / "a.jsonl")
    assert found["messages"][0] == {"role": "user", "content": "one two"}
    assert found["messages"][1] == {"role": "assistant", "content": "", "tool_calls": calls}


def test_null_is_an_argument_of_a_call_and_what_fills_up_a_column(tmp_path: Path) -> None:
    def called(arguments: dict[str, Any]) -> Message:
        return {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}

    user = {"role": "user", "content": "Hi?"}
    (tmp_path / "a.jsonl").write_text(row(user, called({"limit": None, "q": "x"})))
    (found,) = read(tmp_path / "a.jsonl")
    assert found["messages"][1] == called({"limit": None, "q": "x"})
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [[user, called({"q": "x"})], [user, called({"limit": 3})]]  # each column has all keys of all rows
    parquet.write_table(pyarrow.table({"messages": rows}), tmp_path / "a.parquet")
    assert [one["messages"] for one in read(tmp_path / "a.parquet")] == rows


def test_parquet_gives_the_same(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    said = [turns("Hi?", "Hello."), turns("And?", "Yes.", "Then?", "No.")]
    parquet.write_table(pyarrow.table({"messages": said, "id": [1, 2]}), tmp_path / "a.parquet")
    assert [one["messages"] for one in read(tmp_path / "a.parquet")] == said
    with pytest.raises(CorpusError, match=r"no field 'talk'\n.*id.*\n  fix: set data.messages_field to the field that"):
        read(tmp_path / "a.parquet", "talk")


def test_a_system_text_beside_the_messages_is_the_first(tmp_path: Path) -> None:
    said, whole = turns("Hi?", "Hello."), turns("Hi?", "Hello.", system="Be short.")
    rows = [row(*said, system="Be short."), row(*whole, system="Be short."), row(*said, system=None), row(*said)]
    (tmp_path / "a.jsonl").write_text("".join(rows))
    assert [one["messages"] for one in read(tmp_path / "a.jsonl")] == [whole, whole, said, said]
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"messages": [said], "system": ["Be short."]}), tmp_path / "a.parquet")
    assert [one["messages"] for one in read(tmp_path / "a.parquet")] == [whole]


USER, ANSWER = turns("Hi?", "Hello.")


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (
            '{"text": "hi"}\n',
            "line 2 has no field 'messages'\n  why: its fields are text\n  fix: set data.messages_field",
        ),
        ('{"messages": null}\n', "line 2 has no messages\n  why: .* holds null"),
        (row(), "line 2 has no messages\n  why: .* an empty list"),
        ('{"messages": "hi"}\n', "line 2 has no messages\n  why: .* holds str"),
        ('"hi"\n', "line 2 is not an object"),
        (
            row({"role": "developer", "content": "Be long."}, USER, ANSWER, system="Be short."),
            "line 2 has two system texts\n  why: its field 'system' holds 'Be short.', and message 1 is of developer",
        ),
        (row(USER, ANSWER, system=7), "line 2, field 'system' is not text\n  why: it holds int"),
        (row("hi"), "line 2, message 1 names no role\n  why: .* this is str"),
        (row({"content": "hi"}), "line 2, message 1 names no role\n  why: .* its keys are content"),
        (row({"role": "wizard", "content": "hi"}), "line 2, message 1 is of an unknown role\n  why: it is 'wizard'"),
        (row({"from": "wizard", "value": "hi"}), "unknown role\n  why: it is 'wizard', known are .*human"),
        (row(USER, USER), "line 2: the conversation does not alternate\n  why: message 2 is of user and follows one"),
        (
            row(USER, ANSWER, ANSWER),
            "does not alternate\n  why: message 3 is of assistant and follows one of assistant",
        ),
        (row(ANSWER), "does not alternate\n  why: message 1 is of assistant and is the first"),
        (row(USER, {"role": "tool", "content": "x"}), "does not alternate\n  why: message 2 is of tool"),
        (row(USER, {"role": "system", "content": "x"}), "does not alternate\n  why: message 2 is of system"),
        (
            row(USER, {"role": "assistant", "value": "Hello."}),
            "line 2, message 2 has no content\n  why: its keys are role, value\n  fix: write what was said as content",
        ),
        (
            row(USER, {"role": "assistant", "text": "Hello."}),
            "message 2 has no content\n  why: its keys are role, text",
        ),
        (row({"from": "human", "content": "Hi?"}), "message 1 has no value\n  why: its keys are from, content"),
        (
            row(USER, {"role": "assistant", "content": None, "refusal": "I cannot."}),
            "message 2 has no content\n  why: it is null; its other keys are role, refusal",
        ),
        (row({"role": "user", "content": 3}), "line 2, message 1 is not text\n  why: it holds int"),
        (row({"role": "user", "content": [{"type": "image"}]}), "message 1 is not text\n  why: it holds dict"),
        (row({"role": "user", "content": "\ud83d"}), "message 1 holds half a character"),
        (row({"from": "human", "value": "x"}, {"from": "function_call", "value": "{"}), "message 2 calls no tool"),
        (row(USER, tools="[1]"), "field 'tools' holds no list of tools"),
    ],
)
def test_a_row_that_is_no_conversation_is_refused_with_its_line(tmp_path: Path, second: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(row(USER, ANSWER) + second)
    with pytest.raises(CorpusError, match=message):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize(("name", "what"), [("a.txt", "plain text"), ("a.csv", "a table")])
def test_text_and_tables_hold_no_conversations(tmp_path: Path, name: str, what: str) -> None:
    (tmp_path / name).write_text("id,messages\n1,hello\n")
    with pytest.raises(CorpusError, match=f"{name} holds no conversations\n  why: it is {what}"):
        read(tmp_path / name)
