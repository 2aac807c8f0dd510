"""When a signal may end what is being done, and when it has to wait."""

from __future__ import annotations

import os
import signal
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

from halve.process.interrupts import Terminated, heeded, uninterrupted

ENDS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}


@pytest.mark.parametrize("number", ENDS)
def test_a_signal_waits_for_the_end_of_what_must_be_whole(number: signal.Signals) -> None:
    done = []

    def work() -> None:
        with uninterrupted():
            os.kill(os.getpid(), number)
            time.sleep(0.2)
            done.append("whole")
        time.sleep(5)
        done.append("never")

    with pytest.raises(ENDS[number]), heeded():
        work()
    assert done == ["whole"]


@pytest.mark.parametrize("number", ENDS)
def test_a_signal_waits_for_the_end_of_an_import(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "loads_long.py").write_text(
        f"import os, time\nos.kill(os.getpid(), {int(number)})\ntime.sleep(0.2)\nLOADED = True\n"
    )

    def work() -> None:
        import_module("loads_long")
        time.sleep(5)

    with pytest.raises(ENDS[number]), heeded():
        work()
    assert sys.modules.pop("loads_long").LOADED


def test_a_signal_that_was_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with heeded():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
