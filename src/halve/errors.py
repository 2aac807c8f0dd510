"""The errors for users' mistakes. Each prints three lines.

    HalveError
    ├── RecipeError      an unknown key, a value out of range
    ├── CheckpointError  a folder that is not a sound safetensors checkpoint
    │   └── TokenizerError   a tokenizer that is missing or is not the teacher's
    ├── AnatomyError     a model, or an axis of it, whose anatomy cannot be proved
    ├── PlanError        sizes that are illegal, a budget that cannot be met
    ├── CorpusError      text that is missing, empty, binary, badly encoded or too long
    ├── RunError         a folder that is not this recipe's run, a stage without its input
    ├── TrainError       a teacher that cannot teach, a loss that is not finite
    ├── Stopped          not a mistake: a training was asked to end, and wrote a checkpoint
    └── DiskError        no room left

Programming errors are `assert`s and are not caught.
"""

from __future__ import annotations

from functools import partial
from typing import Any

_LONGEST = 1000


class HalveError(Exception):
    """What went wrong, why, and what the user can do about it, one line each.

    >>> print(PlanError("cannot keep 10 query heads in 8 groups", why="10 % 8 != 0", fix="--heads 8 or 16"))
    cannot keep 10 query heads in 8 groups
      why: 10 % 8 != 0
      fix: --heads 8 or 16
    """

    told = False
    """Whether another process of the same run reports it."""

    def __init__(self, what: str, *, why: str, fix: str) -> None:
        super().__init__(what)
        self.what, self.why, self.fix = (_one_line(text) for text in (what, why, fix))

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process may raise it, and pickles it for this one."""
        return partial(type(self), why=self.why, fix=self.fix), (self.what,), self.__dict__

    def __str__(self) -> str:
        return f"{self.what}\n  why: {self.why}\n  fix: {self.fix}"


def _one_line(text: str) -> str:
    """Remove line breaks and control characters, and limit the length to about a screen."""
    words = text[: 4 * _LONGEST].split()
    line = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in " ".join(words))
    return line if len(line) <= _LONGEST else line[: _LONGEST - 4] + " ..."


class RecipeError(HalveError):
    """An unknown key in a recipe or a value that is out of range."""


class CheckpointError(HalveError):
    """A folder that is not a sound safetensors checkpoint."""


class TokenizerError(CheckpointError):
    """A tokenizer that is missing or does not belong to the teacher."""


class AnatomyError(HalveError):
    """A model, or an axis of it, whose anatomy cannot be proved."""


class PlanError(HalveError):
    """Sizes that are illegal or a budget that cannot be met."""


class CorpusError(HalveError):
    """Text that is missing, empty, binary, badly encoded or too long."""


class RunError(HalveError):
    """A folder that is not this recipe's run, or a stage without its input."""


class TrainError(HalveError):
    """A teacher that cannot teach, or a loss that is not finite."""


class Stopped(HalveError):
    """A training was asked to end by SIGTERM. The same command resumes it."""


class DiskError(HalveError):
    """No room left on the device that was written to."""


def of_the_system(error: Exception) -> HalveError | None:
    """An error of the operating system without a better explanation, in three lines; None for a programming error.

    >>> print(of_the_system(NotADirectoryError(20, "Not a directory", "notes.txt/run")))
    cannot read or write notes.txt/run
      why: Not a directory
      fix: correct that, or give another path; the same command resumes where it stopped
    """
    if isinstance(error, OSError):
        return HalveError(
            f"cannot read or write {error.filename or 'a file'}",
            why=error.strerror or str(error) or type(error).__name__,
            fix="correct that, or give another path; the same command resumes where it stopped",
        )
    # torch has an error type for GPU memory, but only a message for CPU memory
    allocator = any(word in str(error) for word in ("DefaultCPUAllocator", "not enough memory"))
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or allocator:
        return HalveError(
            "the memory does not suffice",
            why=str(error).partition("\n")[0] or "the system gives no more memory",
            fix="smaller micro_batch or data.context, or activation_checkpointing: full; --dry-run plans memory",
        )
    return None
