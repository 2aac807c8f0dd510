"""JSON: no depth and no number ends in anything but a ValueError."""

from __future__ import annotations

import pytest

from halve.disk import plain_json


@pytest.mark.parametrize("depth", [101, 900, 5_000, 200_000])
@pytest.mark.parametrize("pair", ["[]", "{}"])
def test_what_is_nested_too_deep_is_refused(depth: int, pair: str) -> None:
    text = '{"a":' * depth + "1" + "}" * depth if pair == "{}" else "[" * depth + "]" * depth
    with pytest.raises(ValueError, match="it is nested deeper than 100 levels"):
        plain_json.parse_json(text)


@pytest.mark.parametrize("text", ["[" * 200_000, "", "{", "9" * 5000, b"\xff", "[1,]"])
def test_what_is_no_json_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        plain_json.parse_json(text)


def test_depth_within_bounds_is_kept() -> None:
    value = plain_json.parse_json("[" * 100 + "]" * 100)
    for _ in range(99):
        (value,) = value
    assert value == []
