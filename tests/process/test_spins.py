from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from halve.process import spins


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(key, raising=False)


def test_the_program_lets_threads_spin_less_before_it_reads_pytorch() -> None:
    program = """
        import os, sys
        from halve import __main__

        seen = []

        class Watch:
            def find_spec(self, name, path=None, target=None):
                if name in ("torch", "numpy"):
                    seen.append(os.environ.get("GOMP_SPINCOUNT"))

        sys.meta_path.insert(0, Watch())
        sys.argv = ["halve", "inspect", "nothing-here"]
        try:
            __main__.main()
        except SystemExit:
            pass
        print(*seen)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False)
    seen = run.stdout.split()
    assert seen, run.stderr
    assert set(seen) == {str(spins.TURNS)}


@pytest.mark.parametrize(("key", "value"), [("GOMP_SPINCOUNT", "7"), ("OMP_WAIT_POLICY", "ACTIVE")])
def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch, key: str, value: str) -> None:
    monkeypatch.setenv(key, value)
    spins.shorten()
    found = {one: spins.os.environ.get(one) for one in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    assert found == {"GOMP_SPINCOUNT": None, "OMP_WAIT_POLICY": None, key: value}
