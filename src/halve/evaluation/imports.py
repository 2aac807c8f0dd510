"""Results of other tools: BFCL and ChatRAG, which run against an endpoint by themselves, and halve's own MT-Bench.

mt_bench   `results.json` of `halve judge`; grades from 1 to 10
bfcl       `data_overall.csv` or `data_live.csv` of the Berkeley leaderboard's own evaluator; the row of the model
chatrag    the scores that ChatRAG-Bench prints, saved as JSON {data set: score} or lines "data set: score"
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from halve.disk import plain_json
from halve.disk.files import file_sha256
from halve.disk.textfiles import DAMAGED, open_packed, reason, shown
from halve.errors import CorpusError
from halve.recipe.evaluations import Imported

_BFCL_COLUMNS = ("Live Acc", "Live Overall Acc", "Overall Acc")
"""The papers report the live accuracy (2408.11796, Table 2)."""


def imported(entries: Sequence[Imported]) -> list[dict[str, Any]]:
    """The scores of a recipe's result files: tool, model, value, stderr, version, and the file's SHA-256.

    Raises `CorpusError` for a file that is not one of the tool's.
    """
    return [
        {
            "tool": entry.tool,
            "model": entry.model,
            "version": entry.version,
            "sha256": file_sha256(Path(entry.file)),
            **_READERS[entry.tool](_text(Path(entry.file)), entry),
        }
        for entry in entries
    ]


def _text(path: Path) -> str:
    try:
        with open_packed(path) as file:
            return file.read().decode("utf-8-sig")
    except (*DAMAGED, UnicodeDecodeError) as error:
        raise CorpusError(
            f"cannot read {shown(path)}", why=reason(error), fix="correct the path in evaluate.imported"
        ) from error


def _mt_bench(text: str, entry: Imported) -> dict[str, Any]:
    grade = _object(text, entry)
    if not isinstance(grade.get("score"), int | float):
        raise _foreign(entry, "it has no score")
    return {"value": float(grade["score"]), "stderr": grade.get("stderr"), "judge": grade.get("judge")}


def _bfcl(text: str, entry: Imported) -> dict[str, Any]:
    rows = list(csv.DictReader(io.StringIO(text)))
    named = [row for row in rows if entry.row is None or (row.get("Model") or "").startswith(entry.row)]
    if len(named) != 1:
        raise _foreign(entry, f"{len(named)} of its {len(rows)} rows are of {entry.row or 'a single model'}")
    column = next((name for name in _BFCL_COLUMNS if named[0].get(name)), None)
    if column is None:
        raise _foreign(entry, f"it has no column {' or '.join(_BFCL_COLUMNS)}")
    try:
        value = float(named[0][column].rstrip("%"))
    except ValueError:
        raise _foreign(entry, f"{column} is {named[0][column]!r}") from None
    return {"value": value, "stderr": None, "column": column}


def _chatrag(text: str, entry: Imported) -> dict[str, Any]:
    scores: Mapping[str, Any]
    if text.lstrip().startswith("{"):
        scores = _object(text, entry)
    else:
        scores = dict(re.findall(r"^\s*([\w. -]+?)\s*[:=]\s*(\d+(?:\.\d+)?)\s*$", text, flags=re.MULTILINE))
    try:
        numbers = {name: float(score) for name, score in scores.items()}
    except (TypeError, ValueError) as error:
        raise _foreign(entry, str(error)) from None
    if not numbers:
        raise _foreign(entry, "it has no score of a data set")
    return {"value": sum(numbers.values()) / len(numbers), "stderr": None, "data_sets": numbers}


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
        f"{shown(entry.file)} is no result of {entry.tool}",
        why=why,
        fix="give the file that the tool wrote (docs/guides/evaluate.md), and with bfcl the row of the model",
    )


_READERS = {"mt_bench": _mt_bench, "bfcl": _bfcl, "chatrag": _chatrag}
