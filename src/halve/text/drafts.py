"""The draft of a token file. One process writes it. After a kill, the next call resumes at the last mark."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from halve.disk.files import disk_guard, locked, read_sealed
from halve.errors import CorpusError, RunError
from halve.text import tokenize


@dataclass(frozen=True)
class Mark:
    """How much of a draft is certainly on disk."""

    batches: int = 0
    count: int = 0
    text_bytes: int = 0
    largest: int = 0


@dataclass(frozen=True)
class Draft:
    """An unfinished token file that only this process may write."""

    path: Path
    file: IO[bytes]

    @property
    def mark(self) -> Path:
        return _mark_of(self.path)

    def resume(self, itemsize: int) -> Mark:
        """Where an earlier call stopped. What it wrote after its last mark is dropped."""
        mark = Mark()
        with suppress(RunError):  # an unreadable mark counts as none
            mark = Mark(**read_sealed(self.mark)) if self.mark.exists() else mark
        if os.fstat(self.file.fileno()).st_size < mark.count * itemsize:
            mark = Mark()
        self.file.truncate(mark.count * itemsize)
        return mark

    def sync(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())


@contextmanager
def draft_of(path: Path) -> Iterator[Draft]:
    """The draft of `path`. If a kill or a full disk ends this call after a mark, the draft is kept for the next one."""
    draft = path.with_name(f".{path.name}.draft")
    with disk_guard(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = locked(draft)
        try:
            yield Draft(draft, file)
            _mark_of(draft).unlink(missing_ok=True)
        except CorpusError as error:
            if not isinstance(error, tokenize.DeadWorkerError):  # the text has to change, so this draft is of no use
                _mark_of(draft).unlink(missing_ok=True)
            raise
        finally:
            if not _mark_of(draft).exists():
                draft.unlink(missing_ok=True)
            file.close()


def _mark_of(draft: Path) -> Path:
    return draft.with_suffix(".mark.json")
