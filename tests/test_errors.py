"""Errors: three lines, whatever stands in them."""

from __future__ import annotations

from halve.errors import HalveError


def test_each_part_is_one_short_line_that_steers_no_terminal() -> None:
    error = HalveError("a\nb", why="x\x1b[31m\u202e\0\ud800y", fix="word " * 10_000)
    what, why, fix = str(error).split("\n")
    assert what == "a b"
    assert why == "  why: x\\x1b[31m\\u202e\\x00\\ud800y"
    assert fix.startswith("  fix: word word")
    assert fix.endswith(" ...")
    assert len(fix) < 1010
