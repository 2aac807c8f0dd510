"""MT-Bench: two turns of a conversation, each graded from 1 to 10 by a judge (2306.05685).

The protocol of its authors (FastChat): temperatures by category, the judge at temperature 0 with their prompts, and
reference answers for mathematics, reasoning and coding. A folder has `question.jsonl`, `judge_prompts.jsonl` and a file
of reference answers, as published. The score is the mean over both turns of all questions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from halve.disk import plain_json
from halve.disk.files import write_json
from halve.disk.textfiles import DAMAGED, open_packed, reason, shown
from halve.errors import CorpusError
from halve.evaluation.endpoint import Endpoint, KeptItems, Message
from halve.evaluation.results import mean_score

TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
"""Of the answers, by category; 0 for the others (extraction, math, coding, reasoning)."""
WITH_REFERENCE = ("math", "reasoning", "coding", "arena-hard-200")
MAX_TOKENS, MAX_TOKENS_OF_JUDGE = 1024, 2048
_GRADES = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))


def mt_bench(student: Endpoint, judge: Endpoint, data: Path, out: Path) -> dict[str, Any]:
    """Ask, grade, and write `out/results.json`: score, its standard error, and scores by turn and category.

    Answers and grades are kept in `out`. Raises `CorpusError` for files that are not MT-Bench's, and `RunError` if an
    endpoint does not answer; nothing that was finished is lost.
    """
    questions = _rows(data, "question", needs=("question_id", "category", "turns"))
    references = {row["question_id"]: _reference(row) for row in _rows(data, "reference_answer", needs=("choices",))}
    listed = _rows(data, "judge_prompts", needs=("name", "system_prompt", "prompt_template"))
    prompts = {row["name"]: row for row in listed}
    answers, grades = KeptItems(out / "answers.jsonl"), KeptItems(out / "grades.jsonl")
    by_question: dict[int, list[float]] = {}
    for question in questions:
        number = question["question_id"]
        texts = _answers(student, question, answers)
        reference = references.get(number) if question["category"] in WITH_REFERENCE else None
        graded = []
        for turn in (1, 2):
            make = partial(_graded, judge, prompts, question, texts, reference, turn)
            graded.append(grades.get(f"{judge.model} on {student.model}: {number}.{turn}", make))
        by_question[number] = [grade["grade"] for grade in graded if grade["grade"] is not None]
    results = _results(questions, by_question) | {"student": student.model, "judge": judge.model}
    write_json(out / "results.json", results)
    return results


def _results(questions: Sequence[Mapping[str, Any]], by_question: Mapping[int, Sequence[float]]) -> dict[str, Any]:
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
        categories.setdefault(question["category"], []).extend(by_question[question["question_id"]])
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


def _answers(student: Endpoint, question: Mapping[str, Any], kept: KeptItems) -> list[str]:
    """The student's answers: the second turn sees the first."""
    messages: list[Message] = []
    texts: list[str] = []
    temperature = TEMPERATURES.get(question["category"], 0.0)
    for turn, asked in enumerate(question["turns"][:2], 1):
        messages.append({"role": "user", "content": asked})
        ask = partial(student.chat, [*messages], temperature=temperature, max_tokens=MAX_TOKENS)
        text = kept.get(f"{student.model}: {question['question_id']}.{turn}", ask)
        messages.append({"role": "assistant", "content": text})
        texts.append(text)
    return texts


def _graded(
    judge: Endpoint,
    prompts: Mapping[str, Mapping[str, Any]],
    question: Mapping[str, Any],
    texts: Sequence[str],
    reference: Sequence[str] | None,
    turn: int,
) -> dict[str, Any]:
    """The judge's words and the grade in them, None if there is none."""
    name = f"single{'-math' if reference is not None else ''}-v1{'-multi-turn' if turn == 2 else ''}"
    prompt = prompts[name]
    values: dict[str, str] = {"question": question["turns"][0], "answer": texts[0]}
    for number in (1, 2):
        values |= {f"question_{number}": question["turns"][number - 1], f"answer_{number}": texts[number - 1]}
        if reference is not None:
            values[f"ref_answer_{number}"] = reference[number - 1]
    text = re.sub(r"\{(\w+)\}", lambda field: values.get(field[1], field[0]), prompt["prompt_template"])
    messages = [{"role": "system", "content": prompt["system_prompt"]}, {"role": "user", "content": text}]
    words = judge.chat(messages, temperature=0.0, max_tokens=MAX_TOKENS_OF_JUDGE)
    grade = next((match for pattern in _GRADES if (match := pattern.search(words))), None)
    return {"grade": None if grade is None else float(grade[1]), "words": words}


def _reference(row: Mapping[str, Any]) -> list[str]:
    return [*row["choices"][0]["turns"], "", ""]


def _rows(folder: Path, name: str, *, needs: Sequence[str]) -> list[dict[str, Any]]:
    files = sorted(folder.glob(f"{name}*.jsonl*"))
    if not files:
        raise CorpusError(
            f"{shown(folder)} has no {name}.jsonl",
            why="MT-Bench is question.jsonl, judge_prompts.jsonl and reference answers",
            fix="take the three files from its repository",
        )
    return [*_parsed(files[0], needs)]


def _parsed(path: Path, needs: Sequence[str]) -> Iterator[dict[str, Any]]:
    try:
        with open_packed(path) as file:
            lines = file.read().decode("utf-8").splitlines()
    except (*DAMAGED, UnicodeDecodeError) as error:
        raise CorpusError(f"cannot read {shown(path)}", why=reason(error), fix="take that file anew") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = plain_json.parse_json(line)
            missing = [key for key in needs if key not in row]
        except (ValueError, TypeError) as error:
            missing = [str(error)]
        if missing:
            raise CorpusError(
                f"{path} line {number} is no line of MT-Bench",
                why=f"it lacks {' and '.join(missing)}",
                fix="take that file anew",
            )
        yield row
