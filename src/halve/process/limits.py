"""A limit to the time that foreign code may compute, such as a chat template with loops."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def computing(seconds: float) -> Iterator[None]:
    """In this context, `TimeoutError` is raised after so many seconds of computing.

    Only the time of this process counts, so that a busy machine changes nothing. Without effect outside of the main
    thread, where no signal is received, and on systems without such a clock.
    """
    here = threading.current_thread() is threading.main_thread()
    if not here or not hasattr(signal, "ITIMER_VIRTUAL"):
        yield
        return

    def end(_: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"it had not ended after {seconds:g} seconds of computing")

    before = signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
