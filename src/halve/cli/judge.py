"""The verb `halve judge`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from halve.cli import flags
from halve.cli.flags import AsJson


def judge(
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA", help="MT-Bench's folder: questions, judge prompts, references.", callback=flags.place
        ),
    ],
    student: Annotated[str, typer.Option(help="Endpoint of the student, such as http://localhost:8000/v1.")],
    student_model: Annotated[str, typer.Option(help="The student's name at its endpoint.")],
    judge_url: Annotated[str, typer.Option("--judge", help="Endpoint of the judge.")],
    judge_model: Annotated[str, typer.Option(help="The judge's name at its endpoint.")],
    out: Annotated[Path, typer.Option(help="Folder of answers, grades and results.", callback=flags.place)],
    student_key: Annotated[str, typer.Option(help="Environment variable of the student's key.")] = "STUDENT_API_KEY",
    judge_key: Annotated[str, typer.Option(help="Environment variable of the judge's key.")] = "OPENAI_API_KEY",
    json_: AsJson = False,
) -> None:
    """Let a judge grade the answers of a served model to MT-Bench.

    Finished items are kept in --out, and the same command goes on. Other models, addresses or questions need another
    --out.
    """
    from halve.evaluation import mt_bench as bench
    from halve.evaluation.endpoint import Endpoint
    from halve.report.tables import as_json, table

    asked, grading = Endpoint(student, student_model, student_key), Endpoint(judge_url, judge_model, judge_key)
    grades = bench.mt_bench(asked, grading, data, out)
    if grades["kept_answers"] or grades["kept_grades"]:
        kept = f"{grades['kept_answers']} answers and {grades['kept_grades']} grades are from an earlier call"
        print(f"{kept}; if another model is served now, give another --out", file=sys.stderr)
    if json_:
        as_json(grades)
        return
    error = "" if grades["stderr"] is None else f" ± {grades['stderr']:.2f}"
    rows = [(name, f"{grade:.2f}") for name, grade in grades["categories"].items()]
    table(f"MT-Bench of {student_model}, graded by {judge_model}", ("category", "grade"), rows)
    print(f"score {grades['score']:.2f}{error} of 10; without a grade: {grades['without_grade']} turns")
