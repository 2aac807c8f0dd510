"""Ctrl-C and SIGTERM end a program with one line that says how to go on, whatever it is doing."""

from __future__ import annotations

import os
import shlex
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
_RESUMED = {"demo", "run", "study", "correct", "score", "prune", "cache", "distill", "evaluate", "report"}
_AGAIN_S = 0.05
_closed: list[None] = []  # one entry for each block of `uninterrupted` that the main thread is in


class Terminated(BaseException):
    """SIGTERM has come. Like `KeyboardInterrupt` it is no error, so nothing but the program catches it."""


@contextmanager
def heeded() -> Iterator[None]:
    """Within, Ctrl-C raises `KeyboardInterrupt` and SIGTERM `Terminated`, once what is done can be left off.

    What was half written is cleared away on the way out. A training takes SIGTERM over while it lasts: it ends with a
    checkpoint (`train.ranks.group.sigterm`). A signal that is ignored, as in a shell's background, stays so.
    """
    if threading.current_thread() is not threading.main_thread():  # where handlers cannot be set
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    own = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    for number in own:
        signal.signal(number, _answer)
    try:
        yield
    finally:
        for number in own:
            signal.signal(number, before[number])


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Within, a signal waits: for what must not be left half done in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _closed.append(None)
    try:
        yield
    finally:
        _closed.pop()


def farewell(code: int, words: Sequence[str]) -> str:
    """The line that a program ends with, and how to go on with what `halve` was told by `words`.

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
    if _closed or _is_importing(frame):  # C++ code of a library that is being loaded cannot be unwound
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
