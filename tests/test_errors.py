"""Errors: three lines, whatever stands in them."""

from __future__ import annotations

import pytest
import torch

from halve.errors import HalveError, of_the_system


def test_each_part_is_one_short_line_that_steers_no_terminal() -> None:
    error = HalveError("a\nb", why="x\x1b[31m\u202e\0\ud800y", fix="word " * 10_000)
    what, why, fix = str(error).split("\n")
    assert what == "a b"
    assert why == "  why: x\\x1b[31m\\u202e\\x00\\ud800y"
    assert fix.startswith("  fix: word word")
    assert fix.endswith(" ...")
    assert len(fix) < 1010


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(13, "Permission denied", "a/b"), "cannot read or write a/b\n  why: Permission denied"),
        (OSError("odd"), "cannot read or write a file\n  why: odd"),
        (MemoryError(), "the memory does not suffice\n  why: the system gives no more memory"),
        (
            torch.OutOfMemoryError("CUDA out of memory.\nTried"),
            "the memory does not suffice\n  why: CUDA out of memory.",
        ),
        (RuntimeError("[...] DefaultCPUAllocator: can't allocate memory: you tried"), "the memory does not suffice"),
    ],
)
def test_what_the_system_refuses_is_said_in_three_lines(error: Exception, message: str) -> None:
    assert str(of_the_system(error)).startswith(message)
    assert str(of_the_system(error)).count("\n") == 2


def test_mistakes_of_ours_are_not_the_systems() -> None:
    assert of_the_system(RuntimeError("shapes do not match")) is None
