"""Messages of the command other than its results."""

from __future__ import annotations

import sys

from halve.process.rank import leads


def say_next(hint: str) -> None:
    """Name the next command, on stderr and once for all ranks."""
    if leads():
        print(f"next: {hint}", file=sys.stderr)


def say_note(note: str) -> None:
    """Say what the user may not expect, on stderr and once for all ranks."""
    if leads():
        print(f"note: {note}", file=sys.stderr)
