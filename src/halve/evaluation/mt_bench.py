"""MT-Bench: two turns of a conversation, each graded from 1 to 10 by a judge (2306.05685).

The protocol of its authors (FastChat): temperatures by category, the judge at temperature 0 with their prompts, and
reference answers for mathematics, reasoning and coding. A folder has `question.jsonl`, `judge_prompts.jsonl` and a file
of reference answers, as published. The score is the mean over both turns of all questions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from halve.disk.files import file_sha256, read_object, write_json
from halve.disk.textfiles import shown
from halve.errors import CorpusError, RunError
from halve.evaluation.endpoint import Endpoint, KeptItems, Message
from halve.evaluation.mt_bench_files import JudgePrompt, Question, bench_files, read_bench
from halve.evaluation.results import mean_score

TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
"""Of the answers, by category; 0 for the others (extraction, math, coding, reasoning)."""
MAX_TOKENS, MAX_TOKENS_OF_JUDGE = 1024, 2048
BEST_GRADE = 10.0
_ASKED = "asked.json"
_GRADES = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))


def mt_bench(student: Endpoint, judge: Endpoint, data: Path, out: Path) -> dict[str, Any]:
    """Ask, grade, and write `out/results.json`: score, its standard error, and scores by turn and category.

    Answers and grades are kept in `out`, and `asked.json` says of what. What is returned also has the `kept_answers`
    and `kept_grades` of earlier calls. Before the first request, raises `CorpusError` for files that are not
    MT-Bench's, and `RunError` for kept files that this did not write or that are of other models or questions. Later
    raises `RunError` if an endpoint does not answer; nothing that was finished is lost.
    """
    questions, prompts = read_bench(data)
    answers = KeptItems(out / "answers.jsonl", lambda kept: isinstance(kept, str))
    grades = KeptItems(out / "grades.jsonl", _is_graded)
    _require_same(_asked(student, judge, data), out, num_kept=len(answers) + len(grades))
    by_question: dict[str, list[float]] = {}
    for question in questions:
        texts = _answers(student, question, answers)
        graded = []
        for turn in (1, 2):
            make = partial(_graded, judge, prompts, question, texts, turn)
            graded.append(grades.get(f"{judge.model} on {student.model}: {question.number}.{turn}", make))
        by_question[question.number] = [grade["grade"] for grade in graded if grade["grade"] is not None]
    results = _results(questions, by_question) | {"student": student.model, "judge": judge.model}
    write_json(out / "results.json", results)
    return results | {"kept_answers": answers.num_reused, "kept_grades": grades.num_reused}


def _asked(student: Endpoint, judge: Endpoint, data: Path) -> dict[str, str]:
    """What answers and grades depend on: addresses and models by their flags, and the hashes of the files."""
    return {
        "student": student.url.rstrip("/"),
        "student_model": student.model,
        "judge": judge.url.rstrip("/"),
        "judge_model": judge.model,
        **{name: file_sha256(path) for name, path in bench_files(data).items()},
    }


def _require_same(asked: Mapping[str, str], out: Path, *, num_kept: int) -> None:
    """Raise `RunError` if items kept in `out` are of something else. The first call notes what they are of."""
    note = out / _ASKED
    if not note.exists():
        if num_kept:
            raise RunError(
                f"cannot go on from {shown(out)}",
                why=f"it holds answers but no {_ASKED}, which says which models and questions they are of",
                fix="give another folder with --out, or move answers.jsonl and grades.jsonl away",
            )
        write_json(note, asked)
    before = read_object(note)
    for name, value in asked.items():
        if before.get(name) != value:
            raise RunError(
                f"cannot go on from {shown(out)}",
                why=f"its answers are of another {name.replace('_', ' ')}: {before.get(name)}, not {value}",
                fix=f"give another folder with --out; if only an address has changed, correct it in {shown(note)}",
            )


def _results(questions: Sequence[Question], by_question: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """The mean of all grades; its error from the means of the questions, whose two turns are not independent."""
    means = [sum(grades) / len(grades) for grades in by_question.values() if grades]
    every = [grade for grades in by_question.values() for grade in grades]
    if not every:
        raise CorpusError(
            "no answer of MT-Bench has a grade",
            why="the judge wrote none like [[7]]",
            fix="choose another judge, or read grades.jsonl",
        )
    categories: dict[str, list[float]] = {}
    for question in questions:
        categories.setdefault(question.category, []).extend(by_question[question.number])
    turns = [[grades[turn] for grades in by_question.values() if len(grades) == 2] for turn in (0, 1)]
    spread = mean_score(means).stderr
    return {
        "tool": "mt_bench",
        "score": sum(every) / len(every),
        "stderr": None if math.isnan(spread) else spread,
        "questions": len(questions),
        "without_grade": 2 * len(questions) - len(every),
        "turns": [sum(grades) / len(grades) if grades else None for grades in turns],
        "categories": {name: sum(grades) / len(grades) for name, grades in categories.items() if grades},
    }


def _answers(student: Endpoint, question: Question, kept: KeptItems) -> list[str]:
    """The student's answers: the second turn sees the first."""
    messages: list[Message] = []
    texts: list[str] = []
    temperature = TEMPERATURES.get(question.category, 0.0)
    for turn, asked in enumerate(question.turns, 1):
        messages.append({"role": "user", "content": asked})
        ask = partial(student.chat, [*messages], temperature=temperature, max_tokens=MAX_TOKENS)
        text = kept.get(f"{student.model}: {question.number}.{turn}", ask)
        messages.append({"role": "assistant", "content": text})
        texts.append(text)
    return texts


def _graded(
    judge: Endpoint, prompts: Mapping[str, JudgePrompt], question: Question, texts: Sequence[str], turn: int
) -> dict[str, Any]:
    """The judge's words and the grade in them, None if there is none."""
    prompt = prompts[question.prompts[turn - 1]]
    values: dict[str, str] = {"question": question.turns[0], "answer": texts[0]}
    for number in (1, 2):
        values |= {f"question_{number}": question.turns[number - 1], f"answer_{number}": texts[number - 1]}
        if question.reference is not None:
            values[f"ref_answer_{number}"] = question.reference[number - 1]
    text = re.sub(r"\{(\w+)\}", lambda field: values.get(field[1], field[0]), prompt.template)
    messages = [{"role": "system", "content": prompt.system}, {"role": "user", "content": text}]
    words = judge.chat(messages, temperature=0.0, max_tokens=MAX_TOKENS_OF_JUDGE)
    return {"grade": _grade(words), "words": words}


def _grade(words: str) -> float | None:
    """The grade in the judge's words. A number above the scale is none.

    >>> _grade("Rating: [[7.5]]"), _grade("[[700]]"), _grade("good")
    (7.5, None, None)
    """
    found = next((match for pattern in _GRADES if (match := pattern.search(words))), None)
    grade = None if found is None else float(found[1])
    return None if grade is None or grade > BEST_GRADE else grade


def _is_graded(kept: Any) -> bool:
    """Whether a kept value is what `_graded` gives."""
    if not isinstance(kept, dict) or not isinstance(kept.get("words"), str) or "grade" not in kept:
        return False
    grade = kept["grade"]
    return grade is None or (type(grade) in (int, float) and 0 <= grade <= BEST_GRADE)
