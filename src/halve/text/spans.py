"""Which part of a rendered conversation is the assistant's, where the chat template marks nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Final

from halve.errors import CorpusError

TextSpan = tuple[int, int]
"""The first character of a turn in the rendered text, and the one behind it."""

Render = Callable[..., str]
"""(messages, prompted=False) -> their text, with the invitation to answer behind it if `prompted`."""

_MOST_MESSAGES: Final = 1000
"""A turn takes a rendering of all before it: seconds at this length."""

_ALL: Final = "set data.count: all, or mark the assistant's part in the template with {% generation %}"

_PRIVATE: Final = range(0xE000, 0xF900)
"""Characters that mean nothing to anybody."""


def assistant_spans(render: Render, messages: Sequence[Any], text: str, place: str) -> list[TextSpan]:
    """Where in the rendered text the assistant's turns are.

    A turn is what it adds to the rendering of those before it, less what invites the assistant to answer. A template
    may write a turn otherwise where more follow: Qwen 3 drops the reasoning of earlier answers. Then the turn is what
    changes with its message. Raises `CorpusError` where neither tells, and for more messages than can be told apart in
    seconds.
    """
    if len(messages) > _MOST_MESSAGES:
        raise CorpusError(
            f"{place}: a conversation of {len(messages):,} messages is too long to tell the assistant's part",
            why="the template marks no part as the assistant's, so that a turn takes a rendering of all before it; at"
            f" most {_MOST_MESSAGES:,} messages are told apart",
            fix=f"split the conversation, or {_ALL}",
        )
    spans: list[TextSpan] = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        span = _added(render, messages, number, text) or _changed(render, messages, number, text)
        if span is None or (spans and span[0] < spans[-1][1]):
            raise CorpusError(
                f"{place}: the assistant's tokens cannot be told from the others",
                why=f"the template writes message {number + 1} or those before it otherwise where more follow, and"
                " marks no part as the assistant's",
                fix=_ALL,
            )
        spans.append(span)
    return spans


def _added(render: Render, messages: Sequence[Any], number: int, text: str) -> TextSpan | None:
    """What a message adds to the rendering of those before it, if the whole text begins so."""
    before, after = render(messages[:number]), render(messages[: number + 1])
    if not (after.startswith(before) and text.startswith(after)):
        return None
    invited = _common(after, render(messages[:number], prompted=True))
    return max(len(before), invited), len(after)


def _changed(render: Render, messages: Sequence[Any], number: int, text: str) -> TextSpan | None:
    """What changes in the whole text if the assistant says one strange character there, and how such a turn ends.

    The end is that of the same turn where nothing follows, so the whole text must go on with it.
    """
    mark = next((chr(code) for code in _PRIVATE if chr(code) not in text), None)
    if mark is None:
        return None
    strange = [*messages[:number], {"role": "assistant", "content": mark}]
    whole, alone = render([*strange, *messages[number + 1 :]]), render(strange)
    if whole.count(mark) != 1 or alone.count(mark) != 1:
        return None
    before, after = whole.split(mark)
    ending = alone.split(mark)[1]
    if not (text.startswith(before) and text.endswith(after) and after.startswith(ending)):
        return None
    end = len(text) - len(after)
    return (len(before), end + len(ending)) if len(before) <= end else None


def _common(one: str, other: str) -> int:
    """With how many characters two texts begin alike; where they part inside a word, that word is not alike."""
    if one.startswith(other):
        return len(other)
    pairs = enumerate(zip(one, other, strict=False))
    common = one[: next((place for place, (a, b) in pairs if a != b), len(one))]
    return len(re.sub(r"\w*\Z", "", common))
