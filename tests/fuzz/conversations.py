"""Conversations and chat templates in which something is wrong, beside sound ones."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from chat import CHATML, MARKED, small_talk
from fuzz import mutations

from halve.recipe import strict_yaml

Row = dict[str, Any]
FIELD = "messages"
HALVES = ("\ud83d", "the \udc00 cat", "\ud83d\ud83d")
SHAREGPT = ("human", "gpt", "system", "function_call", "observation", "tool", "moderator")
TEMPLATES = (
    *("", " ", "{{", "{% for message in messages %}", "{{ messages }}", "nothing of it", "{% generation %}"),
    *("{{ raise_exception('roles must alternate') }}", "{{ messages[99].content }}", "{{ 1 / 0 }}", "{{ nobody() }}"),
    *("{% include 'other' %}", "{{ ''.__class__.__mro__ }}", "{{ messages.clear() }}", "{{ messages[0].update(a=1) }}"),
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for i in range(10000000000) %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% set x = range(99999) | sum %}{% endfor %}",
    "{{ 'cat ' * 10000000000000 }}",
    "{{ strftime_now('%Y') }}{{ messages[0].content }}",
    "{% for message in messages %}{{ message.content[::-1] }}{% endfor %}{{ messages | length }}",
    "{{ (" + "(" * 400 + "1" + ")" * 400 + ") }}",
)


def sound(folder: Path, draw: Random) -> list[Row]:
    """Make a world one of conversations: the recipe, the template, and the rows, which are returned."""
    recipe = strict_yaml.parse_yaml((folder / "recipe.yaml").read_bytes())
    recipe["data"] |= {"train": ["chat.jsonl"], "valid": ["talk.jsonl"], "messages_field": FIELD}
    recipe["data"]["count"] = draw.choice(["assistant", "all"])
    (folder / "recipe.yaml").write_text(strict_yaml.dump(recipe), encoding="utf-8")
    (folder / "model" / "chat_template.jinja").write_text(draw.choice([CHATML, MARKED]), encoding="utf-8")
    rows: list[Row] = [{FIELD: messages} for messages in small_talk(40)]
    write(folder / "talk.jsonl", rows[:10])
    for row in rows[::5]:
        names = {"user": "human", "assistant": "gpt"}
        row[FIELD] = [{"from": names[m["role"]], "value": m["content"]} for m in row[FIELD]]
    write(folder / "chat.jsonl", rows)
    return rows


def write(path: Path, rows: list[Any]) -> None:
    """JSON lines, which hold half a surrogate pair as an escape."""
    path.write_text("".join(f"{mutations.as_json(row)}\n" for row in rows), encoding="utf-8")


def spoil_rows(folder: Path, draw: Random) -> None:
    """A few rows changed, each in one way."""
    rows = sound(folder, draw)
    for _ in range(draw.choice([1, 2, 5])):
        at = draw.randrange(len(rows))
        draw.choice(_WAYS)(rows[at], draw)
    write(folder / "chat.jsonl", rows)


def spoil_data(folder: Path, draw: Random) -> None:
    """Rows changed anywhere."""
    rows: list[Any] = [*sound(folder, draw)]
    chosen = [draw.randrange(len(rows)) for _ in range(draw.choice([1, 2, 5]))]
    for at in dict.fromkeys(chosen):  # once each: what was changed may be too deep to be changed again
        rows[at] = mutations.data(rows[at], draw)
    write(folder / "chat.jsonl", rows)


def spoil_template(folder: Path, draw: Random) -> None:
    """Another template, or the same with something changed in it."""
    sound(folder, draw)
    path = folder / "model" / "chat_template.jinja"
    own = draw.choice([CHATML, MARKED]).replace("%}{%", "%}\n{%").encode()
    made = draw.choice(
        [
            lambda: draw.choice(TEMPLATES).encode(),
            lambda: draw.choice(TEMPLATES).encode() + own,
            lambda: mutations.text(own.decode(), draw).encode(),
            lambda: mutations.raw(own, draw),
        ]
    )
    path.write_bytes(made())


# ---- what can be wrong with a row


def _without(row: Row, draw: Random) -> None:
    """No messages."""
    given = draw.choice([None, [], "", "hello", {}, 0, [None], [[]], {"0": row[FIELD]}])
    row[FIELD] = given
    if draw.random() < 0.3:
        del row[FIELD]


def _turns(row: Row, draw: Random) -> None:
    """Turns that do not alternate, or too many of them."""
    messages = row[FIELD]
    row[FIELD] = draw.choice(
        [messages[1:], messages * 2 + messages[:1], messages[::-1], messages[:1] * 3, messages[:1], messages * 400]
    )


def _types(row: Row, draw: Random) -> None:
    """Something else where text or an object stands."""
    message = row[FIELD][draw.randrange(len(row[FIELD]))]
    message[draw.choice([*message])] = mutations.odd(draw)


def _halves(row: Row, draw: Random) -> None:
    """Half a surrogate pair in a text, a name or a call."""
    message, half = row[FIELD][-1], draw.choice(HALVES)
    way = draw.randrange(5)
    if way == 0:
        message[draw.choice([*message])] = half
    elif way == 1:
        message["tool_calls"] = [_call(half)]
    elif way == 2:
        row["tools"] = [{"type": "function", "function": {"name": half}}]
    elif way == 3:
        message[half] = half
    else:
        message["content"] = [{"type": "text", "text": half}]


def _huge(row: Row, draw: Random) -> None:
    """Much text, many turns, or many levels."""
    message = row[FIELD][-1]
    way = draw.randrange(4)
    if way == 0:
        message[[*message][-1]] = draw.choice(["the cat ", "x", "\n", "\N{GRINNING FACE}"]) * 200_000
    elif way == 1:
        row[FIELD] = row[FIELD] * (2000 // len(row[FIELD]))
    elif way == 2:
        message["tool_calls"] = [_call(mutations.buried("x", draw.choice([40, 900])))]
    else:
        row["tools"] = [mutations.buried({"name": "x"}, draw.choice([40, 900]))]


def _calls(row: Row, draw: Random) -> None:
    """Calls of tools, and tools, sound or not."""
    odd = mutations.odd(draw)
    calls = draw.choice([[_call({"a": 1})], [_call(odd)], odd, [odd], [{}], [{"function": odd}]])
    row[FIELD] = [
        {"role": "user", "content": "What does the cat see?"},
        {"role": "assistant", "content": draw.choice(["", None, "I look."]), "tool_calls": calls},
        {"role": "tool", "content": draw.choice(["a dog", "", None, odd]), "name": draw.choice(["look", odd])},
        {"role": "assistant", "content": "A dog."},
    ]
    row["tools"] = draw.choice([None, "", "[]", "{", [_call({})], odd, [odd], json.dumps([_call({})])])


def _sharegpt(row: Row, draw: Random) -> None:
    """ShareGPT's keys and names."""
    calls = ["{}", '{"name": "look", "arguments": {}}', "[]", '[{"name": 1}]', "look()"]
    row[FIELD] = [{"from": draw.choice(SHAREGPT), "value": "the cat"} for _ in range(draw.randrange(1, 4))]
    row[FIELD].append({"from": draw.choice(SHAREGPT), "value": draw.choice([*calls, mutations.odd(draw)])})
    if draw.random() < 0.3:
        row[FIELD][0]["role"] = "user"


def _parts(row: Row, draw: Random) -> None:
    """Content in parts."""
    parts: list[Any] = [{"type": "text", "text": "the cat"}, "the dog", {"text": "a tree"}]
    parts += [{"type": "image", "url": "x"}, None, {"type": "text"}]
    parts += [{"type": "text", "text": mutations.odd(draw)}, mutations.odd(draw)]
    chosen = [copy.deepcopy(draw.choice(parts)) for _ in range(draw.randrange(4))]
    message = row[FIELD][0]
    message["content" if "role" in message else "value"] = chosen


def _call(arguments: Any) -> Row:
    return {"type": "function", "function": {"name": "look", "arguments": arguments}}


_WAYS: tuple[Callable[[Row, Random], None], ...] = (
    *(_without, _turns, _types, _halves, _huge, _calls, _sharegpt, _parts),
)
