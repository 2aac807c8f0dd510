"""The command in a fork of this process: everything is imported already, so that a call takes as long as its work."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import torch

from halve.cli import app as cli
from halve.process import fresh


@dataclass(frozen=True)
class Outcome:
    """How a call ended; a `code` of None is one that had not ended when its time was over."""

    code: int | None
    out: str
    err: str
    seconds: float


def halve(words: list[str], *, folder: Path, limit: float) -> Outcome:
    """Run the command in `folder`, for `limit` seconds at most."""
    return in_fork(lambda: cli.main(words), folder=folder, limit=limit)


def in_ranks(words: list[str], size: int, *, folder: Path, limit: float) -> list[Outcome]:
    """Run the command in `size` processes that find each other as those of torchrun do; their outcomes by rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def rank(number: int) -> int:
        here = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": size, "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in here.items()}, MASTER_ADDR="127.0.0.1")
        return cli.main(words)

    forks = [Fork(partial(rank, number), folder=folder) for number in range(size)]
    return [fork.wait(limit) for fork in forks]


def in_fork(work: Callable[[], int], *, folder: Path, limit: float) -> Outcome:
    """What a piece of work says and ends with, done by a fork that nothing outlives."""
    return Fork(work, folder=folder).wait(limit)


class Fork:
    """A fork at work in a folder."""

    def __init__(self, work: Callable[[], int], *, folder: Path) -> None:
        self.began = time.monotonic()
        name = f".said-{os.getpid()}-{next(_numbers)}"
        self.paths = [folder / f"{name}.{end}" for end in ("out", "err")]
        sys.stdout.flush()
        sys.stderr.flush()
        self.child = os.fork()
        if self.child == 0:
            _in_the_child(work, folder, self.paths)

    def wait(self, limit: float) -> Outcome:
        """How it ends; after `limit` seconds it is ended."""
        code: int | None = None
        while time.monotonic() - self.began < limit:
            done, status = os.waitpid(self.child, os.WNOHANG)
            if done:
                code = os.waitstatus_to_exitcode(status)
                break
            time.sleep(0.005)
        else:
            os.killpg(self.child, signal.SIGKILL)
            os.waitpid(self.child, 0)
        out, err = (path.read_text(encoding="utf-8", errors="replace") for path in self.paths)
        for path in self.paths:
            path.unlink()
        return Outcome(code, out, err, time.monotonic() - self.began)


_numbers = itertools.count()


def _in_the_child(work: Callable[[], int], folder: Path, paths: list[Path]) -> None:
    code = 1
    try:
        os.setsid()
        os.chdir(folder)
        for number, path in zip((1, 2), paths, strict=True):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
        warnings.resetwarnings()  # as for users: the suite makes errors of them
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        torch.set_num_threads(1)  # after a fork PyTorch makes its pool anew, where the first two threads may collide
        fresh.python = _python
        fresh.pool = _pool
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _python(code: str, *words: str) -> str:
    """`fresh.python` as a fork of a fork."""

    def work() -> int:
        sys.argv = ["-c", *words]
        exec(compile(code, "<fresh>", "exec"), {"__name__": "__main__"})
        return 0

    folder = Path(os.getcwd()) / f".fork-{os.getpid()}"
    folder.mkdir()
    done = in_fork(work, folder=folder, limit=600)
    folder.rmdir()
    return "" if done.code == 0 else (done.err.strip().splitlines() or ["no message"])[-1]


def _pool(workers: int, begin: Callable[..., object], *arguments: Any) -> Executor:
    """`fresh.pool` as one thread: the result does not depend on the workers."""
    return ThreadPoolExecutor(1, initializer=begin, initargs=arguments)
