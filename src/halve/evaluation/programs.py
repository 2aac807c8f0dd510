"""Programs that models wrote, and whether they pass their tests: the harness's metric `code_eval`, in the sandbox.

pass@k = mean over items of 1 - C(n - c, k) / C(n, k)     n answers, c of them right (2107.03374, Eq. 1)
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from math import comb
from types import SimpleNamespace
from typing import Any

from halve.errors import RecipeError
from halve.evaluation.sandbox import Sandbox

_HARNESS_TRIES = ["assert add(2, 3)==5"]
"""The test with which the harness's task files try the metric at import. Nobody reads its result."""


class _Metric:
    """What `evaluate.load("code_eval")` would fetch, in the same shape. Runs nothing outside a sandbox."""

    def __init__(self) -> None:
        self.sandbox: Sandbox | None = None

    def compute(
        self, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1,)
    ) -> tuple[dict[str, float], dict[int, Any]]:
        if list(references) == _HARNESS_TRIES:
            return {f"pass@{count}": 0.0 for count in k}, {}
        box = self.sandbox
        assert box is not None, "code tasks are only scored where run_untrusted_code is on"
        tests = [
            f"{answer}\n{test}" for test, answers in zip(references, predictions, strict=True) for answer in answers
        ]
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            passed = iter([verdict.passed for verdict in pool.map(box.run, tests)])
        right = [[next(passed) for _ in answers] for answers in predictions]
        return {f"pass@{count}": _pass_at(count, right) for count in k}, dict(enumerate(right))


_METRIC = _Metric()
"""One for the process: the harness keeps the one that it loaded first."""


@contextmanager
def as_metric() -> Iterator[None]:
    """In this context the harness's task files get the local metric instead of a download.

    They import the package `evaluate` for nothing else, and it takes seconds to load.
    """

    def load(name: str, *_: Any, **__: Any) -> _Metric:
        if name == "code_eval":
            return _METRIC
        raise RecipeError(
            f"a task of evaluate.tasks needs the metric {name}",
            why="lm-evaluation-harness would download it and run it, and halve has no local one",
            fix="leave the task out",
        )

    before = sys.modules.get("evaluate")
    sys.modules["evaluate"] = SimpleNamespace(load=load)  # type: ignore[assignment]
    try:
        yield
    finally:
        if before is None:
            del sys.modules["evaluate"]
        else:
            sys.modules["evaluate"] = before


@contextmanager
def running_in(sandbox: Sandbox | None) -> Iterator[None]:
    """In this context programs run in this sandbox. None: nothing may run."""
    before, _METRIC.sandbox = _METRIC.sandbox, sandbox
    try:
        yield
    finally:
        _METRIC.sandbox = before


def _pass_at(k: int, right: Sequence[Sequence[bool]]) -> float:
    shares = [1.0 - comb(len(answers) - sum(answers), k) / comb(len(answers), k) for answers in right]
    return sum(shares) / len(shares)
