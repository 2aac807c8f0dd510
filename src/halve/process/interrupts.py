"""Ctrl-C and SIGTERM end a program at any time, with one line that says how to resume."""

from __future__ import annotations

import os
import shlex
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
_RESUMED = {"demo", "run", "study", "correct", "score", "prune", "cache", "distill", "align", "evaluate", "report"}
_AGAIN_S = 0.05
_closed: list[None] = []  # one entry for each `uninterrupted` block that the main thread is in


class Terminated(BaseException):
    """SIGTERM was received. Like `KeyboardInterrupt`, this is not an error, so only the program itself catches it."""


@contextmanager
def heeded() -> Iterator[None]:
    """In this context, Ctrl-C raises `KeyboardInterrupt` and SIGTERM raises `Terminated`, as soon as it is safe.

    Half-written files are removed on the way out. A training handles SIGTERM itself and ends with a checkpoint
    (`train.ranks.group.sigterm`). A signal that is ignored, as in a shell's background, stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():  # where handlers cannot be set
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    answered = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    for number in answered:
        signal.signal(number, _answer)
    try:
        yield
    finally:
        for number in answered:
            signal.signal(number, before[number])


@contextmanager
def uninterrupted() -> Iterator[None]:
    """In this context, signals wait. For work in the main thread that must not be left half done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _closed.append(None)
    try:
        yield
    finally:
        _closed.pop()


def farewell(code: int, words: Sequence[str]) -> str:
    """The last line of a program, with the command that resumes. `words` are the arguments of `halve`.

    >>> farewell(INTERRUPTED, ["run", "my recipe.yaml"])
    "interrupted; the same command resumes where it stopped: halve run 'my recipe.yaml'"
    >>> farewell(TERMINATED, ["plan", "model"])
    'ended by SIGTERM'
    """
    what = "interrupted" if code == INTERRUPTED else "ended by SIGTERM"
    if not _RESUMED & set(words[:1]):
        return what
    return f"{what}; the same command resumes where it stopped: {shlex.join(['halve', *words])}"


def _answer(number: int, frame: FrameType | None) -> None:
    if _closed or _is_importing(frame):  # a library that is being loaded has C++ code that cannot be unwound
        again = threading.Timer(_AGAIN_S, os.kill, (os.getpid(), number))
        again.daemon = True
        again.start()
        return
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
