"""Bad inputs made from good ones: a draw picks a place and what becomes of it. Everything follows from the draw's seed.

plain data     a key or an entry replaced, dropped, repeated, renamed or buried under many levels
text           lines dropped, repeated, moved, indented anew, cut; words that mean something to a parser put in
bytes          bits flipped, ranges dropped, repeated, overwritten, the end cut off
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

NUMBERS = (0, 1, -1, 2, 3, 7, 0.5, -0.5, 1e-300, 1e300, math.nan, math.inf, 2**31, 2**63, 10**18, -(10**18), 10**400)
WORDS = (
    *("", " ", "x", "a\0b", "a\nb", "\N{SUPERSCRIPT TWO}", "0-999999999", "1-\N{SUPERSCRIPT TWO}", "nan", "1e999", "-"),
    *("/", "..", "/dev/null", "/dev/zero", "~no-such-user/x", "hub:", "hub:a/b/c/d", "a" * 300, "a" * 5000),
    *(
        "<script>",
        "\N{RIGHT-TO-LEFT OVERRIDE}\x1b[31m",
        "\N{GRINNING FACE}",
        "true",
        "none",
        "auto",
        "cuda:99",
        "{{ 7 }}",
    ),
)
SHAPES: tuple[Any, ...] = (None, True, False, [], {}, [[]], [1], {"a": 1}, {"a": {"a": []}})
MARKS = (
    "[",
    "{",
    "}",
    "&a ",
    "*a",
    "<<: *a",
    "!!binary x",
    "!!python/name:os",
    "? ",
    "- ",
    "---",
    "\t",
    ": ",
    "#",
    "%YAML 9",
    "'",
)
BYTES = (
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"[" * 2000,
    b"9" * 5000,
    b"\xed\xa0\x80",
    b"\r",
    b"{",
    b'"',
    b"\\ud800",
    b"PK\x03\x04",
)

Path = tuple[Any, ...]


def odd(draw: Random) -> Any:
    """A value that some key does not take."""
    kind = draw.randrange(8)
    if kind < 3:
        return draw.choice(NUMBERS)
    if kind < 6:
        return draw.choice(WORDS)
    if kind < 7:
        return copy.deepcopy(draw.choice(SHAPES))
    return buried(draw.choice([0, "x"]), draw.choice([5, 40, 900]))


def buried(value: Any, depth: int) -> Any:
    """A value under so many levels."""
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


def places(value: Any, below: Path = ()) -> Iterator[Path]:
    """The way to every value inside of a value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        yield (*below, key)
        yield from places(inner, (*below, key))


def data(value: Any, draw: Random) -> Any:
    """Plain data with one to three places changed."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        ways = list(places(value))
        if not ways:
            return odd(draw)
        *way, last = draw.choice(ways)
        inside = value
        for key in way:
            inside = inside[key]
        _DATA[draw.randrange(len(_DATA))](inside, last, draw)
    return value


def _replace(inside: Any, key: Any, draw: Random) -> None:
    inside[key] = odd(draw)


def _drop(inside: Any, key: Any, draw: Random) -> None:
    del inside[key]


def _rename(inside: Any, key: Any, draw: Random) -> None:
    if isinstance(inside, dict):
        inside[draw.choice([f"{key}s", str(key)[:-1], str(key).upper(), draw.choice(WORDS)])] = inside.pop(key)


def _nudge(inside: Any, key: Any, draw: Random) -> None:
    """A number near the right one is the hardest to tell from it."""
    number = inside[key]
    if isinstance(number, int | float) and not isinstance(number, bool):
        inside[key] = draw.choice([number + 1, number - 1, number * 2, -number, number + 0.5, number / 3, str(number)])
    elif isinstance(number, str):
        inside[key] = draw.choice([number + "x", number[:-1], number.upper(), number * 3])
    elif isinstance(number, list):
        inside[key] = draw.choice([number * 2, number[:-1], [*number, None], {"0": number}])
    else:
        inside[key] = odd(draw)


def _swap(inside: Any, key: Any, draw: Random) -> None:
    other = draw.choice(list(inside) if isinstance(inside, dict) else range(len(inside)))
    inside[key], inside[other] = inside[other], inside[key]


_DATA: tuple[Callable[[Any, Any, Random], None], ...] = (
    _replace,
    _replace,
    _replace,
    _drop,
    _rename,
    _nudge,
    _nudge,
    _swap,
)


def text(lines: str, draw: Random) -> str:
    """A text with one to three of its lines changed."""
    found = lines.splitlines()
    for _ in range(draw.choice([1, 1, 2, 3])):
        at, other = draw.randrange(len(found)), draw.randrange(len(found))
        line = found[at]
        cut = draw.randrange(len(line) + 1)
        found[at : at + 1] = draw.choice(
            [
                [line, line],
                [found[other]],
                [line, *found[other : other + 3]],
                [f"  {line}"],
                [line.lstrip()],
                [line[:cut]],
                [line[:cut] + draw.choice(MARKS) + line[cut:]],
                [line.partition(":")[0] + ": " + draw.choice([*MARKS, *map(str, NUMBERS[:-1])])],
                [],
            ]
        )
        found = found or [""]
    return "\n".join(found) + "\n"


def raw(content: bytes, draw: Random) -> bytes:
    """Bytes with one to three places changed."""
    content = bytes(content)
    for _ in range(draw.choice([1, 1, 2, 3])):
        at = draw.randrange(len(content) + 1)
        to = min(len(content), at + draw.choice([1, 8, 100]))
        content = draw.choice(
            [
                content[:at],
                content[:at] + content[to:],
                content[:at] + content[at:to] * 2 + content[to:],
                content[:at] + draw.choice(BYTES) + content[at:],
                content[:at] + draw.choice(BYTES) + content[to:],
                content[:at] + bytes(byte ^ 1 << draw.randrange(8) for byte in content[at:to]) + content[to:],
            ]
        )
    return content


def as_json(value: Any) -> str:
    """JSON with the numbers that are none, and with numbers too long to be printed otherwise."""
    return json.dumps(value, allow_nan=True)
