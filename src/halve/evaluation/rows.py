"""The rows of a task, read from local files in the form that lm-evaluation-harness expects.

A file is JSON lines, a JSON list, CSV or parquet (all but parquet also .gz, .xz, .bz2 or .zst). A folder has a file for
each split, whose name begins with the split's: `train.jsonl`, `validation_1k.jsonl.gz`. A split may also be in shards,
`test-00000-of-00002.parquet` and so on, which are read in their order.
Some data sets are published in several forms. `FORMS` lists those that are understood.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halve.disk import plain_json
from halve.disk.textfiles import DAMAGED, ending, extra, half_pair, open_packed, reason, require_file, shown
from halve.errors import CorpusError

Row = dict[str, Any]


class PlacedRow(Row):
    """A row of a task. `place` says where it stands, for errors."""

    place = ""


LONGEST_FILE_BYTES = 1 << 31
_SPLITS = {"valid": "validation", "val": "validation", "dev": "dev"}
_ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".ndjson")
_SHARD = re.compile(r"-([0-9]{5})-of-([0-9]{5})(?:-[0-9a-f]{16})?(?=\.)")
"""What tells the shards of a split apart, in the names that the hub gives. Older ones end in a hash of the shard."""
_NUMBERS = {"mbpp": (11, 510)}
"""The `task_id`s of the rows to ask, in data published as one file (2108.07732, Sec. 2.1)."""
_LETTERS = "ABCDEFGHIJ"
_QUOTES = "put text with separators, quotes or line ends in quotes, and double the quotes in it"


@dataclass(frozen=True)
class Form:
    """One form of a task's rows: the fields that it needs, and how it becomes the harness's form."""

    needs: tuple[str, ...]
    make: Callable[[Row], Row] = dict


def _arc(row: Row) -> Row:
    labels = list(_LETTERS[: len(row["choices"])])
    question = row["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    return {
        "question": question,
        "choices": {"text": list(row["choices"]), "label": labels},
        "answerKey": labels[row["gold"]],
    }


def _hellaswag(row: Row) -> Row:
    """Rows that are prepared already. The harness joins activity, ": " and context, and strips the end."""
    activity, _, context = row["query"].partition(": ")
    endings, label = list(row["choices"]), str(row["gold"])
    return {"activity_label": activity, "ctx_a": context, "ctx_b": "", "endings": endings, "label": label}


def _truthfulqa(row: Row) -> Row:
    """Table rows of the original: the best answer first, then the other correct ones, then the incorrect ones."""
    right = dict.fromkeys([row["Best Answer"].strip(), *_listed(row["Correct Answers"])])
    wrong = [answer for answer in dict.fromkeys(_listed(row["Incorrect Answers"])) if answer not in right]
    best = next(iter(right))
    return {
        "question": row["Question"],
        "mc1_targets": {"choices": [best, *wrong], "labels": [1, *[0] * len(wrong)]},
        "mc2_targets": {"choices": [*right, *wrong], "labels": [*[1] * len(right), *[0] * len(wrong)]},
    }


def _listed(answers: str) -> list[str]:
    return [answer.strip() for answer in answers.split(";") if answer.strip()]


def _ifeval(row: Row) -> Row:
    """The instructions' settings, all with the same keys, as the harness has them: absent ones are None."""
    names = sorted({name for settings in row["kwargs"] for name in settings})
    return {**row, "kwargs": [{name: settings.get(name) for name in names} for settings in row["kwargs"]]}


_ARC = (Form(("question", "choices", "answerKey")), Form(("query", "choices", "gold"), _arc))
_CODE = (Form(("task_id", "prompt", "entry_point", "test")),)
_MBPP = (Form(("task_id", "text", "code", "test_list")),)
FORMS: Mapping[str, tuple[Form, ...]] = {
    "arc_easy": _ARC,
    "arc_challenge": _ARC,
    "winogrande": (Form(("sentence", "option1", "option2", "answer")),),
    "hellaswag": (
        Form(("activity_label", "ctx_a", "ctx_b", "endings", "label")),
        Form(("query", "choices", "gold"), _hellaswag),
    ),
    "mmlu": (Form(("subject", "question", "choices", "answer")),),
    "gsm8k": (Form(("question", "answer")),),
    "truthfulqa_mc2": (
        Form(("question", "mc2_targets")),
        Form(("Question", "Best Answer", "Correct Answers", "Incorrect Answers"), _truthfulqa),
    ),
    "xlsum_en": (Form(("text", "summary")),),
    "mbpp": _MBPP,
    "humaneval": _CODE,
    "gpqa": (Form(("Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")),),
    "ifeval": (Form(("key", "prompt", "instruction_id_list", "kwargs"), _ifeval),),
    "piqa": (Form(("goal", "sol1", "sol2", "label")),),
    "lambada_openai": (Form(("text",)),),
}


def wanted(task: str) -> str:
    """The file that a task wants, in words."""
    forms = FORMS.get(task)
    fields = "" if forms is None else f", rows with {'; or with '.join(', '.join(form.needs) for form in forms)}"
    return f"evaluate.data: {{{task}: FILE}}{fields}"


def split_files(path: Path) -> dict[str, tuple[Path, ...]]:
    """The files of a task by split, shards in their order. A single file has the split "".

    Raises `CorpusError`, also for shards that are not all there and for a split with two files that are no shards.
    """
    try:
        if not path.is_dir():
            return {"": (path,)}
        listed = sorted(entry for entry in path.iterdir() if entry.is_file() and ending(entry) in _ENDINGS)
    except OSError as error:
        raise _unreadable(path, error) from error
    found: dict[str, list[Path]] = {}
    for file in listed:
        if split := split_of(file):
            found.setdefault(split, []).append(file)
    if found:
        return {split: _in_order(files, split) for split, files in found.items()}
    if len(listed) == 1:
        return {"": (listed[0],)}
    raise CorpusError(
        f"{shown(path)} has no rows of a task",
        why=f"none of its {len(listed)} data files is called train, validation, dev or test",
        fix="name the file itself in evaluate.data",
    )


def _in_order(files: Sequence[Path], split: str) -> tuple[Path, ...]:
    """The files of a split: one, or all shards of a whole."""
    first = files[0]
    found = _SHARD.search(first.name)
    whole = _without_number(first)
    shards: dict[int, Path] = {}
    for file in files:
        shard = _SHARD.search(file.name)
        number = 0 if shard is None else int(shard[1])
        if _without_number(file) != whole or number in shards:
            raise CorpusError(
                f"{shown(first)} and {shown(file.name)} both hold the {split} rows",
                why="a split is one file, or shards whose names differ in their number alone (-00000-of-00002)",
                fix="move the file that is not meant out of that folder",
            )
        shards[number] = file
    count = 1 if found is None else int(found[2])
    if missing := [number for number in range(count) if number not in shards]:
        raise CorpusError(
            f"the {split} rows in {shown(first.parent)} are not complete",
            why=f"shard {missing[0]:05d}-of-{count:05d} is not there ({len(shards)} of {count} files are)",
            fix=f"put it beside {shown(first.name)}",
        )
    return tuple(shards[number] for number in sorted(shards))


def _without_number(path: Path) -> str:
    return _SHARD.sub(lambda shard: f"-of-{shard[2]}", path.name)


def split_of(path: Path) -> str:
    """The split that a file's name begins with, or ""."""
    stem = path.name.partition(".")[0].partition("-")[0].partition("_")[0].lower()
    split = _SPLITS.get(stem, stem)
    return split if split in ("train", "validation", "test", "dev") else ""


def read_rows(path: Path, task: str) -> list[PlacedRow]:
    """The rows of one file in the harness's form. Raises `CorpusError` naming the row that is none of the task's."""
    rows = [_as_task(row, task, place) for place, row in _raw(path)]
    if task in _NUMBERS and not split_of(path):
        first, last = _NUMBERS[task]
        rows = [row for row in rows if isinstance(row["task_id"], int) and first <= row["task_id"] <= last] or rows
    if not rows:
        raise CorpusError(f"{shown(path)} has no rows", why=f"evaluate.data names it for {task}", fix=wanted(task))
    return rows


def _as_task(row: Any, task: str, place: str) -> PlacedRow:
    made = PlacedRow(_in_form(row, task, place))
    made.place = place
    return made


def _in_form(row: Any, task: str, place: str) -> Row:
    if not isinstance(row, dict):
        raise _no_row(place, task, f"it is a {type(row).__name__}, not an object")
    _check_characters(row, place)
    forms = FORMS.get(task)
    if forms is None:
        return row
    form = next((form for form in forms if all(row.get(name) is not None for name in form.needs)), None)
    if form is None:
        missing = [name for name in forms[0].needs if row.get(name) is None]
        raise _no_row(place, task, f"it lacks {' and '.join(missing)}")
    try:
        return form.make(row)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise _no_row(place, task, f"{type(error).__name__}: {error}") from None


def _check_characters(row: Row, place: str) -> None:
    text = json.dumps(row, ensure_ascii=False, default=str)
    if (at := half_pair(text)) is not None:
        raise CorpusError(
            f"{place} holds half a character",
            why=f"{ascii(text[at])[1:-1]} is half of a surrogate pair, which no text can hold",
            fix="correct or drop that row; it was most often cut in the middle of an emoji",
        )


def _no_row(place: str, task: str, why: str) -> CorpusError:
    return CorpusError(f"{place} is no row of {task}", why=why, fix=wanted(task))


def _raw(path: Path) -> Iterator[tuple[str, Any]]:
    """Every row of a file, with its place for errors."""
    try:
        require_file(path)
        if ending(path) == ".parquet":
            parquet = extra("pyarrow.parquet", path)
            yield from ((f"{path} row {i}", row) for i, row in enumerate(parquet.read_table(path).to_pylist(), 1))
            return
        with open_packed(path) as file:
            data = file.read(LONGEST_FILE_BYTES + 1)
        if len(data) > LONGEST_FILE_BYTES:
            raise CorpusError(
                f"{shown(path)} is too long",
                why=f"rows are read whole, and this file holds more than {LONGEST_FILE_BYTES >> 20} MiB",
                fix="split it into shards in a folder, such as test-00000-of-00002.jsonl and test-00001-of-00002.jsonl",
            )
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{shown(path)} is not UTF-8", why=f"{error.reason} at byte {error.start}", fix="save it as UTF-8"
        ) from error
    except (*DAMAGED, ValueError) as error:  # those of parquet are values
        raise _unreadable(path, error) from error
    yield from _table(path, text) if ending(path) in (".csv", ".tsv") else _json(path, text)


def _unreadable(path: Path, error: Exception) -> CorpusError:
    return CorpusError(f"cannot read {shown(path)}", why=reason(error), fix="correct the path in evaluate.data")


def _table(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(1 << 24)
    between = "\t" if ending(path) == ".tsv" else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=between, strict=True)
    rows = filter(None, reader)
    try:
        names = next(rows, [])
        for number, row in enumerate(rows, 1):
            if len(row) != len(names):
                why = f"it has {len(row)} columns and the first line {len(names)}"
                raise CorpusError(f"{path} row {number} is no row of a table", why=why, fix=_QUOTES)
            yield f"{path} row {number}", dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise CorpusError(f"{path} is not CSV after line {reader.line_num}", why=str(error), fix=_QUOTES) from error


def _json(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    lines: Sequence[str] = text.split("\n")
    try:
        if text.lstrip().startswith("["):
            yield from ((f"{path} row {i}", row) for i, row in enumerate(plain_json.parse_json(text), 1))
            return
        for number, line in enumerate(lines, 1):
            place = f"{path} line {number}"
            if line.strip():
                yield place, plain_json.parse_json(line)
    except ValueError as error:
        where = path if text.lstrip().startswith("[") else place
        raise CorpusError(f"{where} is not JSON", why=str(error), fix="give JSON lines, one row a line") from error
