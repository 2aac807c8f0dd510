"""YAML: what scalars are read as, what is refused, and that nothing takes long."""

from __future__ import annotations

import math
import time

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from halve.recipe import strict_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("-2.5E+3", -2500.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("1_000_000", 1_000_000),
        ("1_000.5", 1000.5),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("-7", -7),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("1:30", "1:30"),
        ("2026-01-02", "2026-01-02"),
        ("1__0", "1__0"),
        ("1_", "1_"),
        ("²", "²"),
        ("true", True),
        ("False", False),
        ("on", "on"),
        ("Yes", "Yes"),
        ("no", "no"),
        ("off", "off"),
        ("y", "y"),
        ("~", None),
        ("null", None),
        ("'1'", "1"),
        ("!!str 5", "5"),
        (r'"\ud83d\ude00"', "\N{GRINNING FACE}"),
    ],
)
def test_scalars_are_those_of_the_core_schema(text: str, value: object) -> None:
    found = strict_yaml.parse_yaml(f"key: {text}")["key"]
    assert (type(found), found) == (type(value), value)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("seed: 1\nseed: 2", "the key 'seed' stands there twice"),
        ("{a: {b: 1, b: 1}}", "the key 'b' stands there twice"),
        ("? [a]\n: 1", "neither a word nor a whole number"),
        ("true: 1", "neither a word nor a whole number"),
        ("a: &x {b: *x}", "an alias stands inside of what it repeats"),
        ("a: *x", "undefined alias"),
        ("a: !!int x", "'x' is no int"),
        ("a: !!float x", "'x' is no float"),
        ("a: !!bool yes", "'yes' is no bool"),
        ("a: !!timestamp x", "timestamp' is no kind of value here"),
        ("a: !!binary '***'", "binary' is no kind of value here"),
        ("a: !!set {b}", "set' is no kind of value here"),
        ("a: !!python/object/apply:os.getcwd []", "os.getcwd' is no kind of value here"),
        ("a: !own 1", "'!own' is no kind of value here"),
        ("a: " + "9" * 5000, "is no int"),
        (r'"\ud800"', "half of a surrogate pair"),
        ("a: 1\n---\na: 1", "single document"),
        (b"a: \xff", "utf-8"),
    ],
)
def test_what_has_no_one_meaning_is_refused(text: str | bytes, why: str) -> None:
    with pytest.raises(yaml.YAMLError, match=why):
        strict_yaml.parse_yaml(text)


def _bomb() -> str:
    text = "&a [x,x,x,x,x,x,x,x,x]"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True):
        text = f"&{new} [{text},{','.join(['*' + old] * 8)}]"
    return text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (_bomb(), "aliases repeat more than 20,000 entries"),
        ("[" * 100_000, "nested deeper than 32"),
        ("- " * 100_000, "nested deeper than 32"),
        ("{a: " * 100_000, "nested deeper than 32"),
        ("[" + "1," * 400_000 + "]", "more than 20,000 entries"),
        ("#" * ((1 << 20) + 1), "longer than 1,048,576 bytes"),
    ],
)
def test_bombs_are_refused_at_once(text: str, why: str) -> None:
    began = time.process_time()
    with pytest.raises(yaml.YAMLError, match=why):
        strict_yaml.parse_yaml(f"name: {text}" if text[0] in "&[" else text)
    assert time.process_time() - began < 5


def test_aliases_repeat_what_they_name() -> None:
    assert strict_yaml.parse_yaml("a: &x {b: [1]}\nc: *x") == {"a": {"b": [1]}, "c": {"b": [1]}}


PLAIN = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text()


@pytest.mark.parametrize("char", ["\x85", "\u2028", "\u2029", "\r", "\n", "\t", "\ufeff", "\x00", "\x7f"])
def test_line_breaks_of_every_kind_are_written_and_read_again(char: str) -> None:
    for text in (char, f"a{char}b", f" {char} ", f"a\n{char}\nb"):
        data = {text: None, "list": [text]}
        assert strict_yaml.parse_yaml(strict_yaml.dump(data)) == data


@given(st.recursive(PLAIN, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20))
def test_what_is_written_is_read_again(data: object) -> None:
    assert strict_yaml.parse_yaml(strict_yaml.dump(data)) == data


@pytest.mark.parametrize("text", ["on", "1:30", "1e-4", "1_000", "0o7", "null", "2026-01-02", ""])
def test_text_that_any_reader_could_take_for_something_else_is_quoted(text: str) -> None:
    assert strict_yaml.dump({"a": text}) == f"a: '{text}'\n"
