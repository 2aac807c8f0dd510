"""JSON from outside. Data that is nested too deeply is refused like invalid JSON."""

from __future__ import annotations

import json
from typing import Any

MAX_JSON_DEPTH = 100


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    >>> parse_json('{"a": [1, 2.5, null]}')
    {'a': [1, 2.5, None]}

    Raises `ValueError`.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise _too_deep() from None
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [inner for outer in level for inner in _inside(outer) if isinstance(inner, dict | list)]
        if not level:
            return value
    raise _too_deep()


def _inside(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _too_deep() -> ValueError:
    return ValueError(f"it is nested deeper than {MAX_JSON_DEPTH} levels")
