"""The journal of a training: one JSON line per step on disk, none of them twice after a kill, and loggers."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from halve.disk.files import atomic_file, disk_guard
from halve.errors import TrainError

Log = Callable[[int, Mapping[str, float]], None]
"""Receives a step and its metrics."""


@dataclass(frozen=True)
class Journal:
    """An open file of JSON lines, each with its `step`, and loggers that receive the same numbers."""

    file: IO[str]
    loggers: tuple[Log, ...] = ()

    def write(self, line: Mapping[str, Any]) -> None:
        """Add a line. It is in the file on return, and on disk after `sync`."""
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        for log in self.loggers:
            log(line["step"], flat(line))

    def sync(self) -> None:
        """Flush the file to disk."""
        os.fsync(self.file.fileno())


class Mute:
    """The journal of a rank that does not write."""

    def write(self, line: Mapping[str, Any]) -> None:
        """Nothing."""

    def sync(self) -> None:
        """Nothing."""


@contextmanager
def open_journal(path: Path, *, step: int, loggers: Sequence[str] = (), name: str = "train") -> Iterator[Journal]:
    """Open the journal of a run that resumes from `step`. Lines that a killed run wrote after it are removed.

    `loggers` are names in `LOGGERS`. They show the run as `name` and write next to `path`. Raises `DiskError` if a line
    finds no room, and the errors of `require_loggers`.
    """
    require_loggers(loggers)
    _truncate(path, step)
    with ExitStack() as open_ones, disk_guard(path), path.open("a", encoding="utf-8") as file:
        logs = tuple(open_ones.enter_context(_opened(logger, path.parent, name)) for logger in loggers)
        yield Journal(file, logs)


def flat(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line without `step`. Nested numbers are named `outer/inner`."""
    numbers: dict[str, float] = {}
    for key, value in line.items():
        if isinstance(value, Mapping):
            numbers |= {f"{key}/{inner}": number for inner, number in flat(value).items()}
        elif isinstance(value, int | float) and key != "step":
            numbers[key] = float(value)
    return numbers


def require_loggers(loggers: Sequence[str]) -> None:
    """Raise `TrainError` if a logger's package, an extra with the same name, is not installed or needs a login."""
    for name in loggers:
        if importlib.util.find_spec(name) is None:
            raise TrainError(
                f"loggers: {name} needs the package {name}",
                why="it is not installed; it is an extra of halve",
                fix=f"pip install 'halve[{name}]', or leave {name} out of loggers",
            )
    if "wandb" in loggers and not _logged_in():
        raise TrainError(
            "the logger wandb does not start",
            why="it has no API key",
            fix="wandb login, set WANDB_MODE=offline, or leave wandb out of loggers",
        )


def _logged_in() -> bool:
    """Whether wandb has an API key or needs none. A version that would prompt for a key counts as logged in."""
    import wandb

    if os.environ.get("WANDB_MODE", "online") != "online" or wandb.setup().settings.mode != "online":
        return True
    try:
        return bool(wandb.login(prompt=False, verify=False))
    except TypeError:
        return True


@contextmanager
def _opened(logger: str, folder: Path, name: str) -> Iterator[Log]:
    """Open a logger. If it cannot start, for example without a login, this is an error that the user can fix."""
    with ExitStack() as stack:
        try:
            log = stack.enter_context(LOGGERS[logger](folder, name))
        except Exception as error:  # any error of a service's own package
            raise TrainError(
                f"the logger {logger} does not start",
                why=str(error) or type(error).__name__,
                fix=f"log in to it or set it up, or leave {logger} out of loggers",
            ) from error
        yield log


@contextmanager
def _tensorboard(folder: Path, name: str) -> Iterator[Log]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard" / name))

    def log(step: int, figures: Mapping[str, float]) -> None:
        for key, value in figures.items():
            writer.add_scalar(key, value, step)

    try:
        yield log
    finally:
        writer.close()


@contextmanager
def _wandb(folder: Path, name: str) -> Iterator[Log]:
    import wandb

    with wandb.init(project="halve", name=name, dir=str(folder)) as run:
        yield lambda step, figures: run.log(dict(figures), step=step)


@contextmanager
def _trackio(folder: Path, name: str) -> Iterator[Log]:
    import trackio

    trackio.init(project="halve", name=name, resume="allow")
    try:
        yield lambda step, figures: trackio.log(dict(figures), step=step)
    finally:
        trackio.finish()


LOGGERS = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}


def _truncate(path: Path, step: int) -> None:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() and step else []
    with atomic_file(path) as draft:
        draft.write_text("".join(line for line in lines if _step_of(line) <= step), encoding="utf-8")


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):  # truncated by a kill
        return math.inf
