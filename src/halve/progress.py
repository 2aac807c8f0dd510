"""Progress of long work: tokens per second, loss and time left, on stderr.

Every long function takes `progress: Progress` and reports its work in tokens:

    with progress.task("distill", total) as task:
        for step in ...:
            task.advance(tokens, loss=loss)

`SILENT` shows nothing; tests and library callers pass it. `RichProgress` draws a bar on a terminal. Without a terminal
it writes a plain line now and then.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.progress import Task as BarTask
from rich.text import Text


@runtime_checkable
class Task(Protocol):
    """One piece of work in progress."""

    def advance(self, tokens: int, **metrics: float) -> None:
        """Report `tokens` more as done, with the metrics of the moment, such as `loss=2.1`."""


@runtime_checkable
class Progress(Protocol):
    """Something that long work can report to."""

    def task(self, name: str, total_tokens: int | None, *, done: int = 0) -> AbstractContextManager[Task]:
        """Begin work called `name` on `total_tokens` (None: unknown), `done` of them in an earlier run."""

    def say(self, line: str) -> None:
        """Report a result in one line."""


class _SilentTask:
    def advance(self, tokens: int, **metrics: float) -> None:
        return None


class Silent:
    """Reports nothing."""

    @contextmanager
    def task(self, name: str, total_tokens: int | None, *, done: int = 0) -> Iterator[Task]:
        yield _SilentTask()

    def say(self, line: str) -> None:
        return None


SILENT: Progress = Silent()


class RichProgress:
    """A bar on a terminal; elsewhere one line every `every_s` seconds and one at the end."""

    def __init__(self, console: Console | None = None, *, every_s: float = 15.0) -> None:
        self.console = console or Console(stderr=True)
        self.every_s = every_s

    @contextmanager
    def task(self, name: str, total_tokens: int | None, *, done: int = 0) -> Iterator[Task]:
        if not self.console.is_terminal:
            lines = _LineTask(self.console, name, total_tokens, done, self.every_s)
            yield lines
            lines.show()
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            _RateColumn(),
            TextColumn("{task.fields[metrics]}"),
            TimeRemainingColumn(),
        )
        with Bar(*columns, console=self.console) as bar:
            task_id = bar.add_task(name, total=total_tokens, completed=done, metrics="", done=done)
            yield _BarTask(bar, task_id)

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


class _BarTask:
    def __init__(self, bar: Bar, task_id: TaskID) -> None:
        self.bar, self.task_id = bar, task_id

    def advance(self, tokens: int, **metrics: float) -> None:
        self.bar.update(self.task_id, advance=tokens, metrics=_spell(metrics))


class _RateColumn(ProgressColumn):
    """Tokens per second over the whole task, without those of an earlier run."""

    def render(self, task: BarTask) -> Text:
        here = task.completed - task.fields["done"]
        return Text(f"{_rate(here, task.elapsed or 0.0)} tok/s")


class _LineTask:
    def __init__(self, console: Console, name: str, total: int | None, done: int, every_s: float) -> None:
        self.console, self.name, self.total, self.every_s = console, name, total, every_s
        self.completed, self.earlier = done, done
        self.metrics: dict[str, float] = {}
        self.began = self.shown = time.monotonic()

    def advance(self, tokens: int, **metrics: float) -> None:
        self.completed += tokens
        self.metrics = metrics or self.metrics
        if time.monotonic() - self.shown >= self.every_s:
            self.show()

    def show(self) -> None:
        self.shown = time.monotonic()
        elapsed, here = self.shown - self.began, self.completed - self.earlier
        share, left = "", ""
        if self.total:
            share = f" {100 * self.completed / self.total:3.0f} %"
            seconds = (self.total - self.completed) * elapsed / here if here else 0.0
            left = f"  {int(seconds) // 60}:{int(seconds) % 60:02d} left" if seconds >= 1 else ""
        line = f"{self.name}{share}  {_rate(here, elapsed)} tok/s  {_spell(self.metrics)}{left}"
        self.console.print(line.rstrip(), highlight=False, markup=False, soft_wrap=True)


def _rate(tokens: int | float, seconds: float) -> str:
    return f"{tokens / seconds:,.0f}" if seconds > 0 else "-"


def _spell(metrics: dict[str, float]) -> str:
    told = {name: f"{value:.0f}" if float(value).is_integer() else f"{value:.4g}" for name, value in metrics.items()}
    return "  ".join(f"{name} {value}" for name, value in told.items())
