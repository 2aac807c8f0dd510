"""Fresh processes that find the same code as this one, and never code in folders with recipes or models.

With `python -c` and in multiprocessing, Python looks for code in the working folder first. A `torch.py` there would be
run. So all fresh processes are started here. They search where this process searches, but not in the working folder and
not in folders that were `distrust`ed: those of recipes and models. PYTHONPATH and the user's own site packages stay in
use, because they are the user's choice.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import current_process
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from typing import Any

from halve.errors import RunError
from halve.process.interrupts import uninterrupted

GUARD = 'put the call of halve under if __name__ == "__main__":'
_distrusted: set[str] = set()


def distrust(folder: str | Path) -> None:
    """From now on, no fresh process looks for code in this folder."""
    _distrusted.add(os.path.realpath(folder))


def search_path(*, keep: frozenset[str] = frozenset()) -> list[str]:
    """Where this process looks for code, without the working folder and distrusted folders, except for `keep`."""
    shut = {os.path.realpath(os.curdir), *_distrusted} - keep
    return [entry for entry in sys.path if os.path.realpath(entry) not in shut]


def python(code: str, *words: str) -> str:
    """Run code in a separate process. Returns the last line of its error, or "" if there was none."""
    environment = _environment(search_path())
    if _source is not None and (said := _source.python(code, words, environment)) is not None:
        return said
    command = [sys.executable, "-P", "-c", code, *words]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )
    return _complaint(done.returncode, done.stderr)


def _complaint(status: int, said: str) -> str:
    if not status:
        return ""
    return (said.strip().splitlines() or [f"the process ended with {status} and no message"])[-1]


@contextmanager
def kept() -> Iterator[None]:
    """Within, processes of `python` are forks of one that has loaded plain transformers and knows nothing else.

    Loading takes seconds, and is done once. A fork begins where the loading ended, so that none knows of another.
    """
    global _source
    if _source is not None or sys.platform != "linux":  # an outer block has one; elsewhere libraries do not bear forks
        yield
        return
    _source = source = _Source()
    try:
        yield
    finally:
        _source = None
        source.close()


_LOADED = "import torch; from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel"
_FORKS = """
import json, os, sys
for line in sys.stdin:
    code, words, complaint = json.loads(line)
    if not os.fork():
        break
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
else:
    sys.exit()
for number, path in enumerate((os.devnull, os.devnull, complaint)):
    os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
sys.argv = ["-c", *words]
exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
"""


class _Source:
    """The process that is forked; it starts when it is first asked."""

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._process: subprocess.Popen[str] | None = None
        self._environment: dict[str, str] = {}

    def python(self, code: str, words: Sequence[str], environment: dict[str, str]) -> str | None:
        """What `fresh.python` gives; None where it cannot serve: it has ended, or was started to search elsewhere."""
        if self._owner != os.getpid():
            return None
        if self._process is None:
            self._process, self._environment = self._started(environment), environment
        if self._environment != environment:
            return None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with tempfile.TemporaryDirectory() as scratch:
            complaint = Path(scratch) / "complaint"
            try:
                print(json.dumps([code, words, str(complaint)]), file=self._process.stdin, flush=True)
                status = self._process.stdout.readline()
            except BrokenPipeError:
                return None
            except BaseException:  # its answer would be taken for the next one's
                self.close()
                raise
            return _complaint(int(status), complaint.read_text(errors="replace")) if status else None

    def close(self) -> None:
        """End the process and what it has started."""
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()

    def _started(self, environment: dict[str, str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-P", "-c", _LOADED + _FORKS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **environment},
            cwd=os.sep,
            start_new_session=True,
        )


_source: _Source | None = None


def require_guard() -> None:
    """Raise `RunError` in a child process that runs the user's script again before it begins to work.

    It would repeat the work of its parent there, and wait for the locks of its parent.
    """
    if getattr(current_process(), "_inheriting", False):  # multiprocessing's own mark, for its own refusal
        raise RunError(
            "this script starts itself again",
            why="a fresh process runs the script once more before it begins to work, and the script calls halve",
            fix=GUARD,
        )


def pool(workers: int, begin: Callable[..., object], *arguments: Any) -> Pool:
    """Processes that wait for work, each prepared by `begin(*arguments)`. Only this process handles Ctrl-C.

    They are spawned, because a forked copy of a process whose libraries have threads may hang.
    """
    with _shut():  # the locks of a pool have a process of their own
        return Pool(workers, mp_context=_Context(), initializer=begin, initargs=arguments)


def shut_program() -> None:
    """Keep the working folder out of this process and all that it starts. For programs, not for libraries."""
    sys.path[:] = search_path()
    os.environ["PYTHONSAFEPATH"] = "1"
    if "PYTHONPATH" in os.environ:
        listed = os.environ["PYTHONPATH"].split(os.pathsep)
        os.environ["PYTHONPATH"] = os.pathsep.join(e for e in listed if os.path.realpath(e) != os.getcwd())


class Pool(ProcessPoolExecutor):
    """Processes that wait for work; see `pool`."""

    def submit(self, *work: Any, **options: Any) -> Future[Any]:
        with uninterrupted():  # it may start a process, which fails if it receives half of its instructions
            return super().submit(*work, **options)

    def failed(self) -> bool:
        """End the pool. Returns whether one of its processes ended with an error of its own, without being killed."""
        mine = list((self._processes or {}).values())
        self.shutdown(wait=True, cancel_futures=True)
        return any((process.exitcode or 0) > 0 for process in mine)


class _Process(SpawnProcess):
    def start(self) -> None:
        with _shut(), _deaf():
            super().start()


class _Context(SpawnContext):
    Process = _Process


@contextmanager
def _shut() -> Iterator[None]:
    """In this context, multiprocessing starts processes with the right search path."""
    path, before = sys.path, {key: os.environ.get(key) for key in ("PYTHONPATH", "PYTHONSAFEPATH")}
    sys.path = _program_path()
    os.environ.update(_environment(sys.path))
    try:
        yield
    finally:
        sys.path = path
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


@contextmanager
def _deaf() -> Iterator[None]:
    """In this context, started processes ignore Ctrl-C from the beginning."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _program_path() -> list[str]:
    """The search path of child processes: they must find the main module of this program, and halve."""
    main, home = sys.modules["__main__"], os.path.realpath(Path(__file__).parents[2])
    keep = {home}
    if (file := getattr(main, "__file__", None)) is not None:
        name = "" if main.__spec__ is None else main.__spec__.name
        keep.add(os.path.realpath(Path(file).absolute().parents[name.count(".")]))
    entries = search_path(keep=frozenset(keep))
    return entries if home in map(os.path.realpath, entries) else [*entries, home]


def _environment(path: list[str]) -> dict[str, str]:
    return {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(path)}
