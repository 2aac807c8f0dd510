"""The three files of MT-Bench. They are read and checked as a whole before the first request, because requests cost."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from halve.disk import plain_json
from halve.disk.textfiles import DAMAGED, ending, half_pair, open_packed, reason, require_file, shown
from halve.errors import CorpusError

WITH_REFERENCE = ("math", "reasoning", "coding", "arena-hard-200")
"""Categories in which the judge needs a reference answer."""
_ANEW = "take that file anew from FastChat's repository"

_Row = Mapping[str, Any]
_Turns = tuple[str, str]
_Value = TypeVar("_Value")


class JudgePrompt(NamedTuple):
    """What the judge is told."""

    system: str
    template: str


@dataclass(frozen=True)
class Question:
    """Two turns that are asked, and the reference answers if the judge needs them."""

    number: str
    category: str
    turns: _Turns
    reference: _Turns | None

    @property
    def prompts(self) -> _Turns:
        """The names of the judge's prompts, one for each turn."""
        name = "single-v1" if self.reference is None else "single-math-v1"
        return name, f"{name}-multi-turn"


def read_bench(folder: Path) -> tuple[tuple[Question, ...], dict[str, JudgePrompt]]:
    """The questions, and the judge's prompts by name.

    Raises `CorpusError` for files that are not MT-Bench's: a line that is wrong or repeated, or a question without its
    prompts or its reference answer.
    """
    files = bench_files(folder)
    references = _by_name(files["reference_answer"], _reference)
    prompts = _by_name(files["judge_prompts"], _prompt)
    questions = tuple(_by_name(files["question"], partial(_question, references)).values())
    if not questions:
        raise CorpusError(f"{shown(files['question'])} has no question", why="it is empty", fix=_ANEW)
    for question in questions:
        if missing := [name for name in question.prompts if name not in prompts]:
            raise CorpusError(
                f"{shown(files['judge_prompts'])} has no prompt {missing[0]}",
                why=f"the judge needs it to grade question {question.number}",
                fix=_ANEW,
            )
    return questions, prompts


def bench_files(folder: Path) -> dict[str, Path]:
    """The three files by their kind. Raises `CorpusError` for one that is missing or there twice."""
    return {name: _file(folder, name) for name in ("question", "judge_prompts", "reference_answer")}


def _question(references: Mapping[str, _Turns], row: _Row) -> tuple[str, Question]:
    number, category = _number(row), _text(row, "category")
    needs = category in WITH_REFERENCE
    if needs and number not in references:
        raise ValueError(f"question {number} has no reference answer, and the judge needs one in category {category}")
    return number, Question(number, category, _turns(row), references[number] if needs else None)


def _reference(row: _Row) -> tuple[str, _Turns]:
    choices = row.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(first, dict):
        raise ValueError(f"choices: {_held(row, 'choices')} is no list with an answer")
    return _number(row), _turns(first)


def _prompt(row: _Row) -> tuple[str, JudgePrompt]:
    return _text(row, "name"), JudgePrompt(_text(row, "system_prompt"), _text(row, "prompt_template"))


def _number(row: _Row) -> str:
    """A question's number, which may also be a text."""
    given = row.get("question_id")
    if isinstance(given, bool) or not (isinstance(given, int) or _is_text(given)):
        raise ValueError(f"question_id: {_held(row, 'question_id')} is no whole number")
    return str(given)


def _text(row: _Row, field: str) -> str:
    given = row.get(field)
    if not _is_text(given):
        raise ValueError(f"{field}: {_held(row, field)} is no text")
    assert isinstance(given, str)
    return given


def _turns(row: _Row) -> _Turns:
    given = row.get("turns")
    if not isinstance(given, list) or len(given) != 2 or not all(_is_text(turn) and turn.strip() for turn in given):
        raise ValueError(f"turns: {_held(row, 'turns')} is no list of two texts")
    return given[0], given[1]


def _is_text(given: Any) -> bool:
    return isinstance(given, str) and half_pair(given) is None


def _held(row: _Row, field: str) -> str:
    """What a field holds, for a message.

    >>> _held({"turns": "hello"}, "turns"), _held({}, "turns")
    ('"hello"', 'nothing')
    """
    return json.dumps(row[field])[:60] if field in row else "nothing"


def _by_name(path: Path, parse: Callable[[_Row], tuple[str, _Value]]) -> dict[str, _Value]:
    """The parsed lines of a file by name. `parse` raises `ValueError` that says what is wrong."""
    found: dict[str, _Value] = {}
    for place, line in _lines(path):
        try:
            row = plain_json.parse_json(line)
            if not isinstance(row, dict):
                raise ValueError("it is no JSON object")
            name, value = parse(row)
            if name in found:
                raise ValueError(f"an earlier line has {name} too")
        except ValueError as error:
            raise CorpusError(f"{place} is no line of MT-Bench", why=str(error), fix=_ANEW) from None
        found[name] = value
    return found


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """The place and the text of every line. Only a line feed ends one: JSON may hold other line breaks as they are."""
    try:
        require_file(path)
        with open_packed(path) as file:
            text = file.read().decode("utf-8-sig")
    except (*DAMAGED, UnicodeDecodeError) as error:
        raise CorpusError(f"cannot read {shown(path)}", why=reason(error), fix=_ANEW) from error
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{shown(path)} line {number}", line


def _file(folder: Path, name: str) -> Path:
    files = sorted(path for path in folder.glob(f"{name}*.jsonl*") if ending(path) == ".jsonl")
    if not files:
        raise CorpusError(
            f"{shown(folder)} has no {name}.jsonl",
            why="MT-Bench is question.jsonl, judge_prompts.jsonl and reference answers",
            fix="take the three files from its repository",
        )
    if len(files) > 1:
        raise CorpusError(
            f"{shown(files[0])} and {shown(files[1].name)} may both be the {name} file",
            why="one file of each of MT-Bench's three kinds is read",
            fix="move the one that is not meant out of that folder",
        )
    return files[0]
