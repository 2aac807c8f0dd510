"""JSON lines that a kill cannot spoil: results that are added one by one and read again when a run resumes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from halve.disk.files import atomic_file, disk_guard

Line = TypeVar("Line")


class JsonLines(Generic[Line]):
    """The lines of a file, in memory and on disk. `parse` makes a line's value from its data.

    A kill may leave a last line that is not whole. From the first such line on, the file is cut off, and what was there
    is measured again.
    """

    def __init__(self, path: Path, parse: Callable[[Any], Line]) -> None:
        self.path = path
        self.kept: list[Line] = []
        whole = ""
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else ():
            try:
                value = parse(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError):
                break
            if not line.endswith("\n"):
                break
            self.kept.append(value)
            whole += line
        with atomic_file(path) as draft:
            draft.write_text(whole, encoding="utf-8")

    def add(self, value: Line, data: Mapping[str, Any]) -> None:
        """Keep one more. It is on disk on return. Raises `DiskError` when the device is full."""
        self.kept.append(value)
        with disk_guard(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(data) + "\n")
            file.flush()
            os.fsync(file.fileno())
