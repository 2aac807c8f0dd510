"""Results of other tools: BFCL and ChatRAG, which run against an endpoint by themselves, and halve's own MT-Bench.

mt_bench   `results.json` of `halve judge`; grades from 1 to 10
bfcl       `data_overall.csv` or `data_live.csv` of the Berkeley leaderboard's own evaluator; the row of the model, in
           percent
chatrag    the scores in percent that ChatRAG-Bench prints, saved as JSON {data set: score} or lines "data set: score"
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from halve.disk import plain_json
from halve.disk.files import file_sha256
from halve.disk.textfiles import DAMAGED, open_packed, reason, require_file, shown
from halve.errors import CorpusError, RecipeError
from halve.recipe.evaluations import Imported

_BFCL_COLUMNS = ("Live Acc", "Live Overall Acc", "Overall Acc")
"""The papers report the live accuracy (2408.11796, Table 2)."""
_BEST = {"mt_bench": 10, "bfcl": 100, "chatrag": 100}
"""The upper end of each tool's scale. All begin at 0."""
_MOST_CHARS = 1 << 17
"""In a field of a CSV file."""
_NUMBER = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?"
_WRITTEN = re.compile(rf"({_NUMBER})\s*%?", flags=re.IGNORECASE)
_LINE = re.compile(rf"([\w. -]+)[:=]\s*((?:{_NUMBER}|[+-]?(?:nan|inf|infinity))\s*%?)", flags=re.IGNORECASE)
"""A data set and its score. Other lines say something else, but a number that is not finite is a wrong score."""


def imported(entries: Sequence[Imported]) -> list[dict[str, Any]]:
    """The scores of a recipe's result files: tool, model, value, stderr, version, and the file's SHA-256.

    Raises `CorpusError` for a file that is not one of the tool's, and `RecipeError` for two results of a tool for one
    model.
    """
    _require_distinct(entries)
    return [
        {
            "tool": entry.tool,
            "model": entry.model,
            "version": entry.version,
            **_READERS[entry.tool](_text(Path(entry.file)), entry),
            "sha256": file_sha256(Path(entry.file)),
        }
        for entry in entries
    ]


def _require_distinct(entries: Sequence[Imported]) -> None:
    for (tool, model), count in Counter((entry.tool, entry.model) for entry in entries).items():
        if count > 1:
            files = [shown(entry.file) for entry in entries if (entry.tool, entry.model) == (tool, model)]
            raise RecipeError(
                f"evaluate.imported gives {count} results of {tool} to the model {model}",
                why=f"they are in {' and '.join(files)}, and a table shows one",
                fix="leave one of them, or correct the model of the others",
            )


def _text(path: Path) -> str:
    try:
        require_file(path)
        with open_packed(path) as file:
            return file.read().decode("utf-8-sig")
    except (*DAMAGED, UnicodeDecodeError) as error:
        raise CorpusError(
            f"cannot read {shown(path)} of evaluate.imported",
            why=reason(error),
            fix="correct the path in evaluate.imported, or write that file anew",
        ) from error


def _mt_bench(text: str, entry: Imported) -> dict[str, Any]:
    grade = _object(text, entry)
    value = _on_scale(grade.get("score"), "its score", entry)
    stderr, judge = grade.get("stderr"), grade.get("judge")
    if stderr is not None:
        stderr = _on_scale(stderr, "its stderr", entry)
    if not isinstance(judge, str | None):
        raise _foreign(entry, f"its judge is {_short(judge)}, not a name")
    return {"value": value, "stderr": stderr, "judge": judge}


def _bfcl(text: str, entry: Imported) -> dict[str, Any]:
    csv.field_size_limit(_MOST_CHARS)  # of the process, which a reader of tasks may have raised
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        rows = list(reader)
    except csv.Error as error:
        raise _foreign(entry, f"it is not CSV after line {reader.line_num}: {error}") from None
    named = [row for row in rows if entry.row is None or (row.get("Model") or "").startswith(entry.row)]
    if len(named) != 1:
        raise _foreign(entry, f"{len(named)} of its {len(rows)} rows are of {entry.row or 'a single model'}")
    (row,) = named
    # the evaluator joins values with commas and quotes none, so that one more in the row moves its scores
    if None in row or None in row.values():
        raise _foreign(entry, "that row has more columns than the first line, or fewer")
    column = next((name for name in _BFCL_COLUMNS if name in row), None)
    if column is None:
        raise _foreign(entry, f"it has no column {' or '.join(_BFCL_COLUMNS)}")
    return {"value": _on_scale(_written(row[column]), column, entry), "stderr": None, "column": column}


def _chatrag(text: str, entry: Imported) -> dict[str, Any]:
    scores: Iterable[tuple[str, Any]]
    if text.lstrip().startswith("{"):
        scores = _object(text, entry).items()
    else:
        lines = (_LINE.fullmatch(line.strip()) for line in text.splitlines())
        scores = [(line[1].strip(), line[2]) for line in lines if line]
    numbers: dict[str, float] = {}
    for name, score in scores:
        if name in numbers:
            raise _foreign(entry, f"it has two scores of {name}")
        numbers[name] = _on_scale(_written(score), f"the score of {name}", entry)
    if not numbers:
        raise _foreign(entry, "it has no score of a data set")
    return {"value": sum(numbers.values()) / len(numbers), "stderr": None, "data_sets": numbers}


def _on_scale(given: Any, what: str, entry: Imported) -> float:
    """A number on the scale of the tool.

    Comparing comes before converting: NaN is on no scale, and a whole number may be too large to convert.
    """
    best = _BEST[entry.tool]
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given <= best:
        raise _foreign(entry, f"{what} is {_short(given)}, not a number from 0 to {best}")
    return float(given)


def _written(given: Any) -> Any:
    """The number that a text writes out, with or without a sign of percent; anything else as it is.

    >>> _written("59.6%"), _written("nan"), _written(7)
    (59.6, 'nan', 7)
    """
    number = _WRITTEN.fullmatch(given.strip()) if isinstance(given, str) else None
    return float(number[1]) if number else given


def _short(given: Any) -> str:
    text = json.dumps(given)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _object(text: str, entry: Imported) -> dict[str, Any]:
    try:
        parsed = plain_json.parse_json(text)
    except ValueError as error:
        raise _foreign(entry, f"it is not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise _foreign(entry, "it is no object")
    return parsed


def _foreign(entry: Imported, why: str) -> CorpusError:
    return CorpusError(
        f"{shown(entry.file)} of evaluate.imported is no result of {entry.tool}",
        why=why,
        fix="give the file that the tool wrote (docs/guides/evaluate.md), and with bfcl the row of the model",
    )


_READERS = {"mt_bench": _mt_bench, "bfcl": _bfcl, "chatrag": _chatrag}
