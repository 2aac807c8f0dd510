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

from halve.errors import CorpusError, HalveError, RecipeError
from halve.evaluation import programs, sentences
from halve.evaluation.rows import Row
from halve.evaluation.suites import SAMPLING, TASKS_KEY, Ask
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
_SCORERS = {"xlsum_en": rouge_of_summary, "ifeval": ifeval_verdicts}
_NAME = re.compile(r"""^["']?task["']?:\s*["']?([\w.+:-]+)["']?\s*(?:#.*)?$""", re.MULTILINE)
GROUPS = {"mmlu": "mmlu_"}
"""Tasks of several parts, and how the names of their parts begin; what follows is the row's `subject`."""
CODE = ("humaneval", "mbpp")
"""Data whose answers are programs."""


@dataclass(frozen=True)
class Built:
    """A task that can be asked: its parts by name (one, or one for each subject), with their rows."""

    ask: Ask
    parts: Mapping[str, Any]
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

        for module in (lm_eval.api.task, lm_eval.api.model, lm_eval.models.huggingface):
            stack.enter_context(mock.patch.object(module, "tqdm", _NoBar))
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


class _Splits(dict[str, Any]):
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


def build_task(ask: Ask, rows: Mapping[str, Sequence[Row]], *, limit: int | None, context: int | None) -> Built:
    """Make the harness's task of these rows by split ("" for rows of no named split). Call it in `quiet_harness`.

    `context` is the longest sequence of the models, None for no limit.
    Where the rows of the examples are missing, the last of the evaluated rows are used for them and are not asked.
    Raises `CorpusError` if there are too few rows or the harness cannot read them.
    """
    from lm_eval.tasks import TaskManager

    group = GROUPS.get(ask.name)
    manager = TaskManager(include_defaults=False, include_path=[str(_folder(ask.name))])
    names = [ask.name] if group is None else [name for name in manager.all_subtasks if name.startswith(group)]
    members, examples = [], ""
    per_part = _limits(limit, names, rows, group)
    for name in names:
        mine = rows if group is None else _of_subject(rows, name.removeprefix(group))
        if not any(mine.values()) or per_part[name] == 0:
            continue
        config = manager.task_index[name].cfg
        splits, examples = _split(ask, config, mine, limit=per_part[name])
        members.append(_member(ask, name, config, splits, context))
    if not members:
        raise CorpusError(
            f"no row of {ask.task} belongs to one of its parts",
            why=f"their names are {', '.join(name.removeprefix(group or '') for name in names[:4])}, ...",
            fix="correct the field subject of its rows",
        )
    try:
        parts = manager.load([{"group": "halve", "task": members}])["tasks"]
    except HalveError:
        raise
    except Exception as error:  # any error of a task file's templates and functions
        raise CorpusError(
            f"lm-evaluation-harness cannot read the rows of {ask.task}",
            why=f"{type(error).__name__}: {error}",
            fix="compare the rows with those of the task's own data set",
        ) from error
    return Built(ask, parts, examples)


def _of_subject(rows: Mapping[str, Sequence[Row]], subject: str) -> dict[str, list[Row]]:
    return {split: [row for row in listed if row.get("subject") == subject] for split, listed in rows.items()}


def _limits(
    limit: int | None, names: Sequence[str], rows: Mapping[str, Sequence[Row]], group: str | None
) -> dict[str, int | None]:
    """The limit of each part. The items of a task of several parts are spread evenly over them."""
    if group is None or limit is None:
        return dict.fromkeys(names, limit)
    subjects = {row.get("subject") for split in ("test", "validation", "") for row in rows.get(split, ())}
    there = [name for name in names if name.removeprefix(group) in subjects]
    each, more = divmod(limit, max(1, len(there)))
    return {name: each + (there.index(name) < more) if name in there else 0 for name in names}


def _split(
    ask: Ask, config: Mapping[str, Any], rows: Mapping[str, Sequence[Row]], *, limit: int | None
) -> tuple[_Splits, str]:
    """The rows by the harness's names of splits, and where the examples come from."""
    import datasets

    fewshot = config.get("fewshot_config") or {}
    asked_in = config.get("test_split") or config.get("validation_split") or "test"
    shown_in = config.get("fewshot_split") or fewshot.get("split") or config.get("training_split")
    named = {**rows}
    split = next((name for name in (asked_in, "test", "") if named.get(name)), None)
    if split is None and len(named) == 1:  # the only split that there is
        (split,) = named
    listed = [] if split is None else list(named.pop(split))
    if not listed:
        raise CorpusError(
            f"{ask.task} has no rows to ask",
            why=f"its items are the split {asked_in}, and evaluate.data has {', '.join(rows) or 'none'}",
            fix=f"add a file {asked_in}.jsonl to the folder",
        )
    listed = listed[:: round(1 / ask.share)]
    examples = list(named.get(shown_in or "", ()))
    words = f"{len(examples)} rows of {shown_in}"
    if not ask.shots or fewshot.get("samples"):
        examples, words = [], "of the task file" if ask.shots else ""
    elif not examples:
        kept = max(ask.shots, min(4 * ask.shots, len(listed) // 4))
        if len(listed) <= kept:
            raise CorpusError(
                f"{ask.task} has too few rows for {ask.shots} shots",
                why=f"it has {len(listed)} rows, and no split {shown_in or 'train'} for the examples",
                fix=f"add a file {shown_in or 'train'}.jsonl to the folder, or ask for fewer shots",
            )
        examples, listed = listed[-kept:], listed[:-kept]
        words = f"the last {kept} of the evaluated rows, which are not asked"
    listed = listed[:limit]
    try:
        evaluated = datasets.Dataset.from_list(listed)
        splits = {asked_in: evaluated} | ({shown_in: datasets.Dataset.from_list(examples)} if examples else {})
    except Exception as error:  # errors of pyarrow, which has its own types
        raise CorpusError(
            f"the rows of {ask.task} are not alike",
            why=f"{type(error).__name__}: {error}",
            fix="give every field the same type in all rows",
        ) from error
    return _Splits(splits, evaluated), words


def _member(ask: Ask, name: str, config: Mapping[str, Any], splits: _Splits, context: int | None) -> dict[str, Any]:
    """The changes to a task file: rows, shots, and how answers are generated."""
    if "class" in config:
        raise RecipeError(
            f"{ask.asked_in} names {ask.task}, which fetches its own data",
            why="it is a program of the harness and not a task file",
            fix="choose another task",
        )
    member: dict[str, Any] = {
        "task": name,
        "custom_dataset": lambda **_: splits,
        "num_fewshot": ask.shots,
        "dataset_kwargs": None,
    }
    generation = dict(config.get("generation_kwargs") or {})
    if context is not None and context // 2 < generation.get("max_gen_toks", LONGEST_ANSWER):
        generation["max_gen_toks"] = context // 2  # the rest is left to the prompt
    if ask.name in _SCORERS:
        member["process_results"] = _SCORERS[ask.name]
    if ask.answers > 1:
        member["repeats"] = ask.answers
        generation |= SAMPLING
    if generation:
        member["generation_kwargs"] = generation
    return member


def main_metric(ask: Ask, metrics: Sequence[str]) -> str:
    """The metric that is shown of those that the task gives, as `metric` or `metric,filter`."""
    if ask.metric:
        return ask.metric
    preferred = ("acc_norm", "acc", "exact_match", "exact_match,flexible-extract", "average")
    return next((name for name in preferred if name in metrics), metrics[0])
