"""Rows of conversations: who says what, in the words that chat templates know.

A message is `{"role": ..., "content": ...}`, or `{"from": ..., "value": ...}` as in ShareGPT's data. What else a
message with a role has, such as `tool_calls`, goes to the template as it is. A row's field `tools` holds the tools that
the assistant may call, and its field `system` the text of a system message.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from halve.disk import plain_json
from halve.disk.textfiles import half_pair
from halve.errors import CorpusError
from halve.text.rows import Piece, no_field

TOOLS: Final = "tools"
SYSTEM: Final = "system"
BESIDE: Final = (TOOLS, SYSTEM)
"""What a row may have beside its messages."""
ROLES: Final = ("system", "developer", "user", "assistant", "tool")
MESSAGES_KEY: Final = "data.messages_field"

_SHAREGPT = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
_SPOKEN = ("content", "tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""What of a message templates write."""
_CALLS = "function_call"  # of ShareGPT: an assistant's turn whose value is a call
_FIRST = ("system", "developer")
_AFTER: Mapping[str, tuple[str, ...]] = {
    "user": (*_FIRST, "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
"""What a turn may follow; a user's may also be the first."""
_TURNS = "let user and assistant take turns, the user first; tools answer an assistant, a system message comes first"


def conversation(row: Any, *, place: str, text_field: str, key: str = MESSAGES_KEY) -> Iterator[Piece]:
    """The conversation of one row as JSON with `messages` and, where there are some, `tools`.

    `text_field` names the field with the messages, `key` the recipe's key for it, `place` the row. Raises
    `CorpusError` for a row without messages, for a message that is none, for turns that do not alternate, and for two
    system texts.
    """
    if not isinstance(row, dict):
        raise CorpusError(
            f"{place} is not an object",
            why=f"each row has a field {text_field!r} with messages; this is {type(row).__name__}",
            fix="write lines such as {" + json.dumps(text_field) + ': [{"role": "user", "content": "..."}, ...]}',
        )
    if text_field not in row:
        raise no_field(place, text_field, row, key=key)
    given = row[text_field]
    if not isinstance(given, list) or not given:
        held = "an empty list" if given == [] else "null" if given is None else type(given).__name__
        raise CorpusError(
            f"{place} has no messages",
            why=f"field {text_field!r} holds {held}, and a conversation is a list of messages",
            fix=f"drop that row, or set {key} to the field that holds the messages",
        )
    messages = [message_of(message, number, place) for number, message in enumerate(given, 1)]
    require_turns([message["role"] for message in messages], place)
    fields: dict[str, Any] = {"messages": with_system(messages, row, place)}
    if tools := tools_of(row, place):
        fields[TOOLS] = tools
    yield Piece(json.dumps(fields, ensure_ascii=False), last=True, place=place)


def answered(row: Any, *, place: str, text_field: str, key: str = MESSAGES_KEY) -> Iterator[Piece]:
    """The same for rows whose answers are learned. Raises `CorpusError` also for an answer that says nothing."""
    for piece in conversation(row, place=place, text_field=text_field, key=key):
        messages = json.loads(piece.text)["messages"]
        for number, message in enumerate(messages, 1 + len(row[text_field]) - len(messages)):  # a system text has none
            if message["role"] == "assistant" and says_nothing(message):
                raise CorpusError(
                    f"{place} has no answer in message {number}",
                    why="without content and calls of tools it would teach the student to say nothing",
                    fix="write the answer, or drop the row",
                )
        yield piece


def says_nothing(message: Mapping[str, Any]) -> bool:
    """Whether a message has neither words nor calls of tools.

    >>> says_nothing({"role": "assistant", "content": ""})
    True
    """
    spoken = (message.get(key) for key in _SPOKEN)
    return not any(said.strip() if isinstance(said, str) else said for said in spoken)


def message_of(given: Any, number: int, place: str) -> dict[str, Any]:
    """A message in the words of chat templates: role, content and what else it has. Raises `CorpusError`."""
    who = f"{place}, message {number}"
    if not isinstance(given, dict) or not ("role" in given or "from" in given):
        held = f"its keys are {', '.join(map(str, given))}" if isinstance(given, dict) else type(given).__name__
        raise CorpusError(
            f"{who} names no role",
            why=f"a message has role and content, or from and value; this is {held}",
            fix="write messages with role and content",
        )
    plain = "role" in given
    name = given["role"] if plain else given["from"]
    role = name if plain else _SHAREGPT.get(str(name), name)
    if role not in ROLES:
        raise CorpusError(
            f"{who} is of an unknown role",
            why=f"it is {name!r}, known are {', '.join(ROLES if plain else (*ROLES, *_SHAREGPT))}",
            fix="rename that role, or drop the row",
        )
    holds = "content" if plain else "value"
    more = {key: value for key, value in given.items() if key not in ("role", "content") and value is not None}
    if given.get(holds) is None and (not plain or says_nothing(more)):
        raise CorpusError(
            f"{who} has no {holds}",
            why=f"it is null; its other keys are {', '.join(key for key in given if key != holds)}"
            if holds in given
            else f"its keys are {', '.join(given)}",
            fix=f"write what was said as {holds} (an empty text if nothing was), or drop the row",
        )
    content = _content(given.get(holds), who)
    if not plain and name == _CALLS:
        return {"role": role, "content": "", "tool_calls": _calls(content, who)}
    return {"role": role, "content": content, **(more if plain else {})}


def _content(given: Any, who: str) -> str:
    """Text, or the texts of a list of parts; null is an empty text, as beside a call of tools."""
    parts = given if isinstance(given, list) else [given]
    text = ""
    for part in parts:
        said = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
        if said is not None and not isinstance(said, str):
            raise CorpusError(
                f"{who} is not text",
                why=f"it holds {type(said).__name__}",
                fix="drop rows with images, sounds and other content that is no text",
            )
        text += said or ""
    if (at := half_pair(text)) is not None:
        raise CorpusError(
            f"{who} holds half a character",
            why=f"character {at} is {ascii(text[at])[1:-1]}, half of a surrogate pair, which no text can hold",
            fix="correct or drop that line; it was most often cut in the middle of an emoji",
        )
    return text


def _calls(text: str, who: str) -> list[dict[str, Any]]:
    """ShareGPT's call of a tool, or several, as chat templates know them."""
    try:
        parsed = plain_json.parse_json(text)
    except ValueError:
        parsed = None
    calls = parsed if isinstance(parsed, list) else [parsed]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise CorpusError(
            f"{who} calls no tool",
            why='the value of a function_call is JSON such as {"name": "...", "arguments": {...}}',
            fix="correct or drop that row",
        )
    return [{"type": "function", "function": {"arguments": {}, **call}} for call in calls]


def with_system(messages: list[dict[str, Any]], row: Mapping[str, Any], place: str) -> list[dict[str, Any]]:
    """The messages, behind the system text that a row has beside them. Raises `CorpusError` if both have one.

    >>> with_system([{"role": "user", "content": "Hi?"}], {"system": "Be short."}, "line 1")[0]
    {'role': 'system', 'content': 'Be short.'}
    """
    text = _content(row.get(SYSTEM), f"{place}, field {SYSTEM!r}")
    first = messages[0] if messages and messages[0]["role"] in _FIRST else None
    if not text.strip() or (first is not None and first["content"].strip() == text.strip()):
        return messages
    if first is not None:
        raise CorpusError(
            f"{place} has two system texts",
            why=f"its field {SYSTEM!r} holds {text[:40]!r}, and message 1 is of {first['role']} with another text",
            fix=f"keep one of them, rename the field {SYSTEM!r}, or drop the row",
        )
    return [{"role": SYSTEM, "content": text}, *messages]


def tools_of(row: Mapping[str, Any], place: str) -> list[Any]:
    """The tools of a row: a list, or its JSON. Empty if it has none. Raises `CorpusError` for anything else."""
    tools = given = row.get(TOOLS)
    if isinstance(given, str) and given.strip():
        try:
            tools = plain_json.parse_json(given)
        except ValueError:
            tools = given
    if not tools or (isinstance(tools, str) and not tools.strip()):
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise CorpusError(
            f"{place}: field {TOOLS!r} holds no list of tools",
            why=f"it holds {type(given).__name__}",
            fix="write a list of objects that describe tools, or its JSON, or leave the field out",
        )
    return tools


def require_turns(roles: Sequence[str], place: str) -> None:
    """Raise `CorpusError` unless turns alternate.

    System messages come first, then user and assistant in turns; tools answer between turns of the assistant.
    """
    for number, role in enumerate(roles, 1):
        before = roles[number - 2] if number > 1 else None
        if role in _FIRST:
            fits = before is None or before in _FIRST
        else:
            fits = before in _AFTER[role] or (before is None and role == "user")
        if not fits:
            follows = "is the first" if before is None else f"follows one of {before}"
            raise CorpusError(
                f"{place}: the conversation does not alternate",
                why=f"message {number} is of {role} and {follows}",
                fix=f"{_TURNS}; correct or drop that row",
            )
