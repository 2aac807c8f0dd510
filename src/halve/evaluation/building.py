"""The harness's task of given rows: which rows are asked, which are examples, and how answers are generated."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from halve.errors import CorpusError, HalveError, RecipeError
from halve.evaluation.harness import (
    GROUPS,
    LONGEST_ANSWER,
    SCORERS,
    Built,
    PartRows,
    Splits,
    is_code,
    part_names,
    task_manager,
)
from halve.evaluation.rows import PlacedRow
from halve.evaluation.suites import SAMPLING, Ask

_EXAMPLES = "halve_examples"
"""The split of the examples, where the task file has none but the one that is asked."""


@dataclass(frozen=True)
class _Part:
    """A part of a task before the harness makes it. `shown_in` is the split of the examples."""

    name: str
    config: Mapping[str, Any]
    rows: PartRows
    asked_in: str
    shown_in: str
    examples: str
    """Where the examples come from, in words."""


def build_task(ask: Ask, rows: Mapping[str, Sequence[PlacedRow]], *, limit: int | None, context: int | None) -> Built:
    """Make the harness's task of these rows by split ("" for rows of no named split). Call it in `quiet_harness`.

    `context` is the longest sequence of the models, None for no limit.
    Where the rows of the examples are missing, the last of the evaluated rows are used for them and are not asked.
    Raises `CorpusError` if there are too few rows or the harness cannot read them, naming the row, and `RecipeError`
    for a task that cannot be asked of local rows or has no items to compare.
    """
    group = GROUPS.get(ask.name)
    manager = task_manager(ask)
    names = part_names(ask, manager)
    parts = []
    per_part = _limits(limit, names, rows, group)
    for name in names:
        mine = rows if group is None else _of_subject(rows, name.removeprefix(group))
        if not any(mine.values()) or per_part[name] == 0:
            continue
        config = manager.task_index[name].cfg
        _require_items(ask, config)
        parts.append(_split(ask, name, config, mine, limit=per_part[name]))
    if not parts:
        raise CorpusError(
            f"no row of {ask.task} belongs to one of its parts",
            why=f"their names are {', '.join(name.removeprefix(group or '') for name in names[:4])}, ...",
            fix="correct the field subject of its rows",
        )

    def load(parts: Sequence[_Part]) -> dict[str, Any]:
        members = [_member(ask, part, context) for part in parts]
        made: dict[str, Any] = manager.load([{"group": "halve", "task": members}])["tasks"]
        return made

    try:
        made = load(parts)
    except HalveError:
        raise
    except Exception as error:  # any error of a task file's templates and functions, and pyarrow's of unlike rows
        row = _first_unreadable(parts, load)
        raise unusable(ask, row, error) from error
    return Built(ask, made, {part.name: part.rows for part in parts}, parts[-1].examples)


def unusable(ask: Ask, row: PlacedRow | None, error: Exception) -> CorpusError:
    """What to say of a row with which the harness's own code fails; None: it is not known which."""
    where = f"the rows of {ask.task}" if row is None else f"{row.place}, a row of {ask.task}"
    return CorpusError(
        f"lm-evaluation-harness cannot use {where}",
        why=f"{type(error).__name__}: {error}",
        fix="compare it with the rows of the task's own data set: the same fields, of the same types in all rows",
    )


def _first_unreadable(parts: Sequence[_Part], load: Callable[[Sequence[_Part]], Any]) -> PlacedRow | None:
    """The last of the shortest beginning of a part's rows that cannot be loaded."""
    for part in parts:
        for rows in (part.rows.asked, part.rows.examples):

            def fails(count: int, part: _Part = part, rows: Sequence[PlacedRow] = rows) -> bool:
                try:
                    load([replace(part, rows=PartRows(rows[:count]))])
                except Exception:  # the caller has it already, and looks for its cause
                    return True
                return False

            if rows and fails(len(rows)):
                return rows[bisect_left(range(1, len(rows) + 1), True, key=fails)]
    return None


def _of_subject(rows: Mapping[str, Sequence[PlacedRow]], subject: str) -> dict[str, list[PlacedRow]]:
    return {split: [row for row in listed if row.get("subject") == subject] for split, listed in rows.items()}


def _limits(
    limit: int | None, names: Sequence[str], rows: Mapping[str, Sequence[PlacedRow]], group: str | None
) -> dict[str, int | None]:
    """The limit of each part. The items of a task of several parts are spread evenly over them."""
    if group is None or limit is None:
        return dict.fromkeys(names, limit)
    subjects = {row.get("subject") for split in ("test", "validation", "") for row in rows.get(split, ())}
    there = [name for name in names if name.removeprefix(group) in subjects]
    each, more = divmod(limit, max(1, len(there)))
    return {name: each + (there.index(name) < more) if name in there else 0 for name in names}


def _require_items(ask: Ask, config: Mapping[str, Any]) -> None:
    """Raise `RecipeError` for a task that local rows do not make, or that has no items with scores of their own."""
    if "class" in config:
        raise RecipeError(
            f"{ask.asked_in} names {ask.task}, which fetches its own data",
            why="it is a program of the harness and not a task file",
            fix="choose another task",
        )
    if config.get("output_type") == "loglikelihood_rolling":
        raise RecipeError(
            f"{ask.asked_in} names {ask.task}, whose items have no scores",
            why="it measures the perplexity of whole texts, and models are compared item by item",
            fix=f"leave {ask.task} out; perplexity is measured on data.valid",
        )
    if config.get("unsafe_code") and not is_code(ask):
        raise RecipeError(
            f"{ask.asked_in} names {ask.task}, which runs programs outside of halve's sandbox",
            why="its task file runs what the model wrote in this process",
            fix=f"leave {ask.task} out; programs of humaneval and mbpp run in the sandbox",
        )


def _split(
    ask: Ask, name: str, config: Mapping[str, Any], rows: Mapping[str, Sequence[PlacedRow]], *, limit: int | None
) -> _Part:
    """The rows that are asked and those of the examples, with the harness's names of their splits."""
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
    shown_in = _EXAMPLES if shown_in in (None, asked_in) else shown_in
    return _Part(name, config, PartRows(listed[:limit], examples), asked_in, shown_in, words)


def _member(ask: Ask, part: _Part, context: int | None) -> dict[str, Any]:
    """The changes to a task file: rows, shots, and how answers are generated."""
    import datasets

    evaluated = datasets.Dataset.from_list(part.rows.asked)
    splits = {part.asked_in: evaluated}
    if part.rows.examples:
        splits[part.shown_in] = datasets.Dataset.from_list(part.rows.examples)
    local = Splits(splits, evaluated)
    member: dict[str, Any] = {
        "task": part.name,
        "custom_dataset": lambda **_: local,
        "num_fewshot": ask.shots,
        "dataset_kwargs": None,
    }
    if part.rows.examples and part.shown_in == _EXAMPLES:
        member["fewshot_split"] = _EXAMPLES
    generation = dict(part.config.get("generation_kwargs") or {})
    if context is not None and context // 2 < generation.get("max_gen_toks", LONGEST_ANSWER):
        generation["max_gen_toks"] = context // 2  # the rest is left to the prompt
    if ask.name in SCORERS:
        member["process_results"] = SCORERS[ask.name]
    if ask.answers > 1:
        member["repeats"] = ask.answers
        generation |= SAMPLING
    if generation:
        member["generation_kwargs"] = generation
    return member
