"""The course of a training run on disk: one JSON line a step, and nothing twice after a kill."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from halve.rundir import atomic_file, disk_guard


@dataclass(frozen=True)
class Journal:
    """An open file of JSON lines, each with its `step`."""

    file: IO[str]

    def write(self, line: Mapping[str, Any]) -> None:
        """Add a line; it is in the file when this returns, on the disk after `sync`."""
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

    def sync(self) -> None:
        """Put what was written on the disk."""
        os.fsync(self.file.fileno())


class Mute:
    """The journal of a rank that does not write."""

    def write(self, line: Mapping[str, Any]) -> None:
        """Nothing."""

    def sync(self) -> None:
        """Nothing."""


@contextmanager
def open_journal(path: Path, *, step: int) -> Iterator[Journal]:
    """Open the journal of a run that goes on from `step`: what a killed run wrote after it is left out.

    Raises `DiskError` when a line finds no room.
    """
    _truncate(path, step)
    with disk_guard(path), path.open("a", encoding="utf-8") as file:
        yield Journal(file)


def _truncate(path: Path, step: int) -> None:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() and step else []
    with atomic_file(path) as draft:
        draft.write_text("".join(line for line in lines if _step_of(line) <= step), encoding="utf-8")


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):  # the kill cut it short
        return math.inf
