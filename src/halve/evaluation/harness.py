"""Tasks of lm-evaluation-harness on local rows, without its downloads.

The task files are the harness's own, from its package. Only the data set is replaced: `custom_dataset` gives the rows
of `evaluate.data`. XL-Sum in English, which the harness does not have, is a task file of halve in the same format.

What the harness would fetch has a local way. The metric `code_eval`, which its code tasks load when they are imported,
is `evaluation.programs`. The sentence splitter of ifeval is `evaluation.sentences`.
"""

from __future__ import annotations

import difflib
import importlib.util
import logging
import random
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from halve.errors import RecipeError
from halve.evaluation import programs, sentences
from halve.evaluation.rows import PlacedRow
from halve.evaluation.suites import TASKS_KEY, Ask
from halve.evaluation.summaries import rouge_of_summary
from halve.evaluation.verdicts import ifeval_verdicts

PACKAGE = "lm_eval"
OWN_TASKS = Path(__file__).parent / "tasks"
FEWSHOT_SEED = 1234
LONGEST_ANSWER = 256
"""The longest answer, where a task names none."""
ROWS_SEED = 0
_FOLDERS = {
    "arc_easy": "arc",
    "arc_challenge": "arc",
    "winogrande": "winogrande",
    "mmlu": "mmlu/default",
    "hellaswag": "hellaswag",
    "gsm8k": "gsm8k",
    "truthfulqa_mc2": "truthfulqa",
    "mbpp": "mbpp",
    "mbpp_instruct": "mbpp",
    "humaneval": "humaneval",
    "humaneval_instruct": "humaneval",
    "gpqa_main_zeroshot": "gpqa/zeroshot",
    "ifeval": "ifeval",
    "piqa": "piqa",
}
"""Where the tasks of the suites are, so that the 14,000 files of the harness need not be read."""
SCORERS = {"xlsum_en": rouge_of_summary, "ifeval": ifeval_verdicts}
_NAME = re.compile(r"""^["']?task["']?:\s*["']?([\w.+:-]+)["']?\s*(?:#.*)?$""", re.MULTILINE)
GROUPS = {"mmlu": "mmlu_"}
"""Tasks of several parts, and how the names of their parts begin; what follows is the row's `subject`."""
CODE = ("humaneval", "mbpp")
"""How the names of tasks begin whose answers are programs that the sandbox runs."""


@dataclass(frozen=True)
class PartRows:
    """The rows of a part: those that are asked, and those from which the examples are drawn."""

    asked: Sequence[PlacedRow] = ()
    examples: Sequence[PlacedRow] = ()


@dataclass(frozen=True)
class Built:
    """A task that can be asked: its parts by name (one, or one for each subject), with their rows."""

    ask: Ask
    parts: Mapping[str, Any]
    rows: Mapping[str, PartRows]
    examples: str
    """Where the examples of the shots come from, in words."""


def is_installed() -> bool:
    """Whether lm-evaluation-harness is there."""
    return importlib.util.find_spec(PACKAGE) is not None


def require_harness(key: str = TASKS_KEY) -> str:
    """The version of lm-evaluation-harness. Raises `RecipeError` if it is not installed; `key` names the tasks."""
    if not is_installed():
        needing = f"evaluate.suites and {key} need" if key == TASKS_KEY else f"{key} needs"
        raise RecipeError(
            f"{needing} lm-evaluation-harness",
            why="the package lm_eval is not installed; it is an extra of halve",
            fix="pip install 'halve[eval]', or leave "
            + ("suites and tasks out of evaluate" if key == TASKS_KEY else f"{key} out"),
        )
    return version(PACKAGE)


def has_task(ask: Ask) -> bool:
    """Whether the harness, which is installed, has a task of this name. Imports nothing."""
    return ask.name in _FOLDERS or ask.name in _own() or ask.name in _scanned()


def require_task(ask: Ask) -> None:
    """Raise `RecipeError` if the harness has no task of this name. Names the nearest one. Imports nothing."""
    if has_task(ask):
        return
    near = difflib.get_close_matches(ask.task, [*_FOLDERS, *_own(), *_scanned()], n=1, cutoff=0.6)
    raise RecipeError(
        f"{ask.asked_in} names {ask.task}, which lm-evaluation-harness {require_harness()} does not have",
        why="it has no task file with that name; groups of tasks are not asked as one, except for mmlu",
        fix=f"did you mean {near[0]}?" if near else "lm-eval ls tasks lists the names",
    )


def is_code(ask: Ask) -> bool:
    """Whether its answers are programs, which run only in the sandbox."""
    return ask.name.startswith(CODE)


def output_type(ask: Ask) -> str:
    """How the harness asks a task that it has: `generate_until`, `multiple_choice`, ... Call it in `quiet_harness`."""
    manager = task_manager(ask)
    return str(manager.task_index[part_names(ask, manager)[0]].cfg.get("output_type", "generate_until"))


def task_manager(ask: Ask) -> Any:
    """What loads the task's files, and no others."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=False, include_path=[str(_folder(ask.name))])


def part_names(ask: Ask, manager: Any) -> list[str]:
    """The harness's names of the task's parts."""
    group = GROUPS.get(ask.name)
    return [ask.name] if group is None else [name for name in manager.all_subtasks if name.startswith(group)]


def _own() -> list[str]:
    return [path.stem for path in OWN_TASKS.glob("*/*.yaml")]


@cache
def _root() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "tasks"


@cache
def _scanned() -> dict[str, Path]:
    """The folder of every task file of the harness, by the task's name."""
    folders: dict[str, Path] = {}
    for path in sorted(_root().rglob("*.yaml")):
        for name in _NAME.findall(path.read_text(encoding="utf-8", errors="replace")):
            folders.setdefault(name, path.parent)
    return folders


def _folder(name: str) -> Path:
    if name in _FOLDERS:
        return _root() / _FOLDERS[name]
    return OWN_TASKS / name if name in _own() else _scanned()[name]


@contextmanager
def quiet_harness() -> Iterator[ModuleType]:
    """The package lm_eval with its local ways, without progress bars, hints in the log, and changed random states."""
    import numpy as np
    import torch

    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        _hush()
        state, numbers = random.getstate(), np.random.get_state()
        stack.callback(random.setstate, state)
        stack.callback(np.random.set_state, numbers)
        stack.enter_context(torch.random.fork_rng())
        stack.enter_context(sentences.splitter_at_hand())
        stack.enter_context(programs.as_metric())
        import lm_eval
        import lm_eval.api.model
        import lm_eval.api.task
        import lm_eval.evaluator
        import lm_eval.models.huggingface
        import lm_eval.utils

        for module in (lm_eval.api.task, lm_eval.api.model, lm_eval.models.huggingface):
            stack.enter_context(mock.patch.object(module, "tqdm", _NoBar))
        # the harness compiles the templates of a task anew for every row
        stack.enter_context(mock.patch.object(lm_eval.utils.env, "from_string", cache(lm_eval.utils.env.from_string)))
        yield lm_eval


def _hush() -> None:
    import datasets

    datasets.disable_progress_bars()
    for talker in (PACKAGE, "absl", "evaluate"):
        logging.getLogger(talker).setLevel(logging.ERROR)


class _NoBar:
    """What the harness takes for a progress bar."""

    def __init__(self, items: Any = (), **_: Any) -> None:
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)

    def update(self, _: int = 1) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Splits(dict[str, Any]):
    """The rows of a task by split. What is not there is the split that is evaluated.

    Some tasks shuffle the choices of a row with Python's random numbers whenever they read a split. The requests and
    the right answers are read at different times, so each time begins with the same seed.
    """

    def __init__(self, splits: Mapping[str, Any], evaluated: Any) -> None:
        super().__init__(splits)
        self._evaluated = evaluated

    def __missing__(self, split: str) -> Any:
        return self._evaluated

    def __getitem__(self, split: str) -> Any:
        random.seed(ROWS_SEED)
        return super().__getitem__(split)


def main_metric(ask: Ask, metrics: Sequence[str]) -> str:
    """The metric that is shown of those that the task gives, as `metric` or `metric,filter`."""
    if ask.metric:
        return ask.metric
    preferred = ("acc_norm", "acc", "exact_match", "exact_match,flexible-extract", "average")
    return next((name for name in preferred if name in metrics), metrics[0])
