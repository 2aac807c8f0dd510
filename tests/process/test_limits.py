from __future__ import annotations

import threading
import time

import pytest

from halve.process.limits import computing


def _never_ends() -> None:
    while True:  # in Python, as templates are: a loop in C would not hear of the signal
        pass


def test_what_never_ends_is_stopped_and_the_clock_with_it() -> None:
    with pytest.raises(TimeoutError, match=r"had not ended after 0.05 seconds of computing"), computing(0.05):
        _never_ends()
    until = time.process_time() + 0.2
    while time.process_time() < until:
        pass


def test_waiting_does_not_count_and_other_threads_have_no_limit() -> None:
    with computing(0.1):
        time.sleep(0.2)
    worker = threading.Thread(target=lambda: computing(0.1).__enter__())
    worker.start()
    worker.join()
    assert not worker.is_alive()
