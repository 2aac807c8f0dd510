"""Runs recipes and kills them: the program that test_resume starts.

    python resume_driver.py RECIPE < jobs > results

Imports everything once, then forks one process for each job, a line of JSON such as

    {"out": "/tmp/run", "point": "rename", "at": 3}     SIGKILL at the third rename, before it happens
    {"out": "/tmp/run", "after_s": 0.7}                 SIGKILL after 0.7 seconds
    {"out": "/tmp/run"}                                 no kill; counts how often each point is passed

and answers each with a line: the exit status (-9 for a kill), the seconds it took, and the points passed.
Nothing in halve knows of this: the points are functions that the child replaces.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # by the first optimizer of a process: seconds for each run
import transformers.modeling_utils

import halve.report.page
import halve.stages.correct
import halve.stages.distill
import halve.stages.evaluate
import halve.stages.prune
import halve.stages.score
import halve.train.loop.checkpoints
from halve.disk import rundir
from halve.model.checkpoint import Checkpoint
from halve.pipeline.run import run
from halve.recipe import read as reading

passed: Counter[str] = Counter()
"""How often each point was passed in this process."""


def main() -> None:
    recipe_file = sys.argv[1]
    spare_what_starts_processes()
    for line in sys.stdin:
        job = json.loads(line)
        notes = Path(job["out"]).with_name(Path(job["out"]).name + ".notes")
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            code = 1
            with contextlib.suppress(BaseException):
                code = act(recipe_file, job, notes)
            os._exit(code)
        status = wait(child, job.get("after_s"))
        seconds = time.monotonic() - began
        points = json.loads(notes.read_text()) if notes.exists() else {}
        notes.unlink(missing_ok=True)
        print(json.dumps({"status": status, "seconds": seconds, "points": points}), flush=True)


def act(recipe_file: str, job: dict[str, Any], notes: Path) -> int:
    """Do one job in a forked process."""
    random.seed(os.urandom(8))
    torch.manual_seed(int.from_bytes(os.urandom(6), "big"))  # what a stage draws must not come from here
    arm(job.get("point"), job.get("at"), notes)
    run(reading.load_recipe(recipe_file), job["out"])
    notes.write_text(json.dumps(passed))
    return 0


def wait(child: int, after_s: float | None) -> int:
    """The exit status of a child, which is killed after so many seconds."""
    deadline = None if after_s is None else time.monotonic() + after_s
    while True:
        done, status = os.waitpid(child, 0 if deadline is None else os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if deadline is not None and time.monotonic() >= deadline:
            os.kill(child, signal.SIGKILL)
            deadline = None
        time.sleep(0.002)


def spare_what_starts_processes() -> None:
    """The proof and the check in a fresh process take seconds and leave nothing behind: once is enough."""
    prune: Any = halve.stages.prune
    assert callable(prune._check_reopens)
    prune._check_reopens = lambda *args: None
    proof = prune.prove(Checkpoint.open(reading.load_recipe(sys.argv[1]).model).anatomy)
    prune.prove = lambda anatomy: proof


def arm(point: str | None, at: int | None, notes: Path) -> None:
    """Put a point at every write, rename, commit and optimizer step, and the kill at one of them."""

    def die_here(name: str) -> bool:
        passed[name] += 1
        return name == point and passed[name] == at

    def die() -> None:
        notes.write_text(json.dumps(passed))
        os.kill(os.getpid(), signal.SIGKILL)

    def around(owner: Any, name: str, before: str, after: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            if die_here(before):
                die()
            result = original(*args, **kwargs)
            if die_here(after):
                die()
            return result

        setattr(owner, name, call)

    def torn(owner: Any, name: str, path_of: Callable[..., Path]) -> None:
        """Kill when a file has been written by half."""
        original: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            path = path_of(*args)
            if path != notes and die_here("write"):
                os.truncate(path, path.stat().st_size // 2)
                die()
            return result

        setattr(owner, name, call)

    torn(Path, "write_text", lambda path, text: path)
    torn(halve.train.loop.checkpoints, "write", lambda tensors, draft, ranks: next(draft.glob("*.safetensors")))
    torn(transformers.modeling_utils, "safe_save_file", lambda tensors, path: Path(path))
    around(os, "replace", "rename", "renamed")
    around(rundir.RunDir, "commit", "commit", "committed")
    around(torch.optim.AdamW, "step", "step", "stepped")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
