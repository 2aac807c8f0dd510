"""Programs that models write: what passes, what fails, and what must not get out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from halve.errors import RunError
from halve.evaluation import programs, sandbox
from halve.evaluation.sandbox import Sandbox, SandboxLimits

OUTSIDE = "/tmp/halve-escape-test"

HOSTILE = {
    "a fork bomb": "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
    "an endless loop": "while True:\n    pass",
    "a sleep": "import time\ntime.sleep(1000)",
    "a sleep that ignores signals": (
        "import signal, time\nfor s in set(signal.Signals) - {9, 19}:\n    signal.signal(s, signal.SIG_IGN)\n"
        "time.sleep(99)"
    ),
    "memory": "held = [bytearray(1 << 26) for _ in range(1000)]",
    "memory of several processes": (
        "import os, time\nfor _ in range(8):\n    if os.fork() == 0:\n        b = bytearray(200 << 20)\n"
        "        b[::4096] = b'x' * len(b[::4096])\n        time.sleep(99)\ntime.sleep(99)"
    ),
    "shared memory": "import ctypes\nassert ctypes.CDLL(None).shmget(0, 1 << 20, 0o1666) >= 0",
    "memory files": "import os\nos.memfd_create('held')",
    "a file outside": f"open({OUTSIDE!r}, 'w').write('out')\nraise SystemExit(0)",
    "a file in the root": "open('/escaped', 'w')",
    "files of the system": "import os\nos.remove(os.__file__)",
    "the users of the machine": "open('/etc/passwd').read()",
    "a home": "import os\nassert os.listdir(os.path.expanduser('~'))",
    "a link outside": "import os\nos.symlink('/', 'way')\nopen('way/old/etc/passwd').read()",
    "a huge file": "with open('big', 'wb') as file:\n    while True:\n        file.write(bytes(1 << 20))",
    "huge output": "while True:\n    print('x' * 100000, flush=True)",
    "output to every descriptor": (
        "import os\nfor fd in range(3, 64):\n    try:\n        os.write(fd, b'0' * 32)\n"
        "    except OSError:\n        pass\n"
        "while True:\n    for fd in range(64):\n        try:\n            os.write(fd, b'x' * 4096)\n"
        "        except OSError:\n            pass"
    ),
    "a network": "import socket\nsocket.create_connection(('127.0.0.1', 80), timeout=1)",
    "signals to its parents": (
        "import os, signal\nfor pid in [os.getppid(), *map(int, filter(str.isdigit, os.listdir('/proc')))]:\n"
        "    if pid != os.getpid():\n        os.kill(pid, signal.SIGKILL)\n"
        "assert not any(pid.isdigit() and int(pid) not in (1, os.getpid()) for pid in os.listdir('/proc'))\nos._exit(0)"
    ),
    "new namespaces": (
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\nassert libc.unshare(0x10000000) == 0"
    ),
    "mounts": "import ctypes\nassert ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0",
    "a trace of its parent": "import ctypes, os\nassert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0",
    "an exit as if it had passed": "import os\nos._exit(0)",
    "a child that goes on": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(99)\nos._exit(0)",
}


@pytest.fixture(scope="module")
def box() -> Sandbox:
    """A real sandbox; without one, the error that says so is tested below."""
    try:
        return Sandbox.open(SandboxLimits(seconds=1, memory_bytes=1 << 29))
    except RunError as error:
        pytest.skip(f"no sandbox can be had here: {error.why}")


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_hostile_does_not_get_out(kind: str, box: Sandbox) -> None:
    before = {process.pid for process in psutil.process_iter()}
    began = time.monotonic()
    outcome = box.run(HOSTILE[kind])
    assert not outcome.passed, outcome
    assert time.monotonic() - began < 25
    assert not Path(OUTSIDE).exists()
    own = psutil.Process().children(recursive=True)
    assert not [process for process in own if process.pid not in before], "nothing goes on"


def test_programs_that_pass_their_tests_pass(box: Sandbox) -> None:
    assert box.run("def add(a, b):\n    return a + b\nassert add(2, 3) == 5").passed
    assert box.run(
        "import math, re, collections, typing\nopen('a', 'w').write('b')\nassert open('a').read() == 'b'"
    ).passed
    assert box.run("print('chatty')\nimport sys\nassert sys.stdin.read() == ''").passed
    failed = box.run("def add(a, b):\n    return a * b\nassert add(2, 3) == 5, 'no sum'")
    assert (failed.passed, failed.why) == (False, "AssertionError: no sum")
    assert "SyntaxError" in box.run("def add(a, b:").why


def test_it_sees_nothing_of_this_machine(box: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET_OF_THIS_PROCESS", "x")
    seen = box.run("import os\nraise Exception(sorted(os.environ), os.getuid() in (0,), sorted(os.listdir('/tmp')))")
    assert seen.why == "Exception: ([], False, [])"
    names = box.run("import os, socket\nraise Exception(socket.gethostname(), os.path.exists('/home'))")
    assert names.why == "Exception: ('sandbox', False)"


def test_without_a_sandbox_there_is_an_error_and_nothing_runs(
    monkeypatch: pytest.MonkeyPatch, make_recipe: Callable[..., Any]
) -> None:
    monkeypatch.setattr(sandbox, "_COMMANDS", {"bubblewrap": lambda: None, "namespaces": lambda: ["/bin/false"]})
    with pytest.raises(RunError) as caught:
        Sandbox.open()
    assert str(caught.value).splitlines()[0] == "this machine has no sandbox for programs that models wrote"
    assert "leave evaluate.run_untrusted_code off" in caught.value.fix

    from halve.preflight.check import check

    recipe = make_recipe(evaluate={"tasks": {"humaneval": 0}, "run_untrusted_code": True})
    assert [error.what for error in check(recipe)] == [caught.value.what]


def test_the_metric_of_code_is_the_share_of_programs_that_pass(box: Sandbox) -> None:
    tests = ["assert twice(3) == 6", "assert twice(2) == 4"]
    right, wrong = "def twice(x):\n    return 2 * x", "def twice(x):\n    return x"
    with programs.as_metric():
        import evaluate

        metric = evaluate.load("code_eval")
        with programs.running_in(box):
            found, each = metric.compute(references=tests, predictions=[[right, wrong], [wrong, wrong]], k=[1, 2])
    assert found == {"pass@1": 0.25, "pass@2": 0.5}
    assert each == {0: [True, False], 1: [False, False]}
    assert os.environ.get("HF_ALLOW_CODE_EVAL") is None


@pytest.mark.parametrize("name", ["bleu", "exact_match"])
def test_no_other_metric_is_fetched(name: str) -> None:
    with programs.as_metric():
        import evaluate

        with pytest.raises(Exception, match=f"needs the metric {name}"):
            evaluate.load(name)
