"""Messages about long waits: reading gigabytes, a proof, a process that starts.

These waits are far below the stages and have nothing to count. Code that shows progress gets one line for each:

    with heard(print), wait("loading a model"):
        ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Timer

AFTER_S = 2.0
"""Seconds after which a wait is long."""

_say: ContextVar[Callable[[str], object] | None] = ContextVar("say", default=None)


@contextmanager
def heard(say: Callable[[str], object] | None) -> Iterator[None]:
    """In this context, `say` gets a line for every long wait. With None there are no messages."""
    before = _say.set(say)
    try:
        yield
    finally:
        _say.reset(before)


@contextmanager
def wait(what: str) -> Iterator[None]:
    """In this context, something may take long. If it does, `what` is reported once."""
    if (say := _say.get()) is None:
        yield
        return
    timer = Timer(AFTER_S, say, (what,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def bytes_in_words(count: int | float) -> str:
    """Decimal units, as disks and GPUs are sold.

    >>> bytes_in_words(1.6e10)
    '16.0 GB'
    """
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"
