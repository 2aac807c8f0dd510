"""The papers' suite for base models on a teacher and its students, at a limit, item by item.

    python benchmarks/base_suite.py --models teacher=FOLDER cut=FOLDER distilled=FOLDER --data DATA --work FOLDER

The first model is the teacher. DATA has a folder of rows for each task; a task without one is told as "no data". Shots
and metrics are the suite's (2408.11796, Table 1). `--limit` bounds the items of each task, `--code-limit` those of
HumanEval and MBPP. Answers end after `--max-new-tokens`. So a CPU asks a model of 135M in less than an hour. All
models' weights have `--dtype`; logits are float32.

Programs that the models write for HumanEval and MBPP run in halve's sandbox. What a model has answered is kept in the
work folder. The last output is a table in Markdown: percent with a standard error, and each student minus the teacher
on the same items.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from halve.anatomy.configs import shortest_context
from halve.disk.files import write_json
from halve.evaluation.asking import read_exam
from halve.evaluation.harness import CODE
from halve.evaluation.session import TaskSession
from halve.evaluation.suites import SUITES
from halve.model.checkpoint import Checkpoint
from halve.recipe.evaluations import Evaluate

SUITE = "minitron-base"
Dtype = Literal["float32", "bfloat16"]
FOLDERS = {"truthfulqa_mc2": "truthfulqa"}
"""Where a task's rows lie in a folder of another name."""


def main() -> None:
    """Ask what was not asked yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=60)
    parser.add_argument("--code-limit", type=int, default=6)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16", choices=get_args(Dtype), help="of all models' weights")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    models = {name: Checkpoint.open(path) for name, path in (model.split("=", 1) for model in args.models)}
    others = [ask.task for ask in SUITES[SUITE] if ask.task not in CODE]
    parts = {"others": (others, args.limit), "code": (CODE, args.code_limit)}
    results = [
        _asked(args.work / f"{part}-{limit}", _section(args, limit=limit, tasks=tasks), models, args.dtype)
        for part, (tasks, limit) in parts.items()
    ]
    for line in _table(results, list(models)):
        print(line)


def _section(args: argparse.Namespace, *, limit: int, tasks: Sequence[str]) -> Evaluate:
    places = {task: args.data / FOLDERS.get(task, task) for task in tasks}
    return Evaluate(
        tasks={ask.task: ask.shots for ask in SUITES[SUITE] if ask.task in tasks},
        data={task: str(place) for task, place in places.items() if place.exists()},
        limit=limit,
        max_new_tokens=args.max_new_tokens,
        run_untrusted_code=True,
    )


def _asked(work: Path, section: Evaluate, models: Mapping[str, Checkpoint], dtype: Dtype) -> dict[str, Any]:
    """The results of some tasks, by the model that is compared with the others."""
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = next(iter(models.values())).tokenizer
    context = shortest_context(checkpoint.config for checkpoint in models.values())
    session = TaskSession(read_exam(section, context=context), tokenizer, work)
    for name, checkpoint in models.items():
        session.ask(name, checkpoint.load(dtype=dtype))
    facts = {name: session.write(subject=name) for name in models}
    write_json(work / "results.json", facts)
    return facts


def _table(results: list[dict[str, Any]], models: list[str]) -> Iterator[str]:
    teacher, *students = models
    minus = [f"{student} minus {teacher}" for student in students]
    yield f"| task (shots) | items | {' | '.join([*models, *minus])} |"
    yield "|---" * (2 + len(models) + len(minus)) + "|"
    order = [ask.key for ask in SUITES[SUITE]]
    rows = {entry["key"]: (entry, facts) for facts in results for entry in facts[teacher]["listed"]}
    for key in order:
        entry, facts = rows[key]
        if entry["status"] != "asked":
            yield f"| {entry['title']} ({entry['shots']}) | {entry['status']} |" + " |" * (len(models) + len(minus))
            continue
        scores = [_percent(facts[name]["scores"][name][key][entry["metric"]]) for name in models]
        gaps = [_percent(facts[name]["differences"][teacher][key]) for name in students]
        yield f"| {entry['title']} ({entry['shots']}) | {entry['items']} | {' | '.join([*scores, *gaps])} |"


def _percent(estimate: Mapping[str, Any]) -> str:
    return f"{100 * estimate['value']:.1f} ± {100 * (estimate['stderr'] or 0.0):.1f}"


if __name__ == "__main__":
    main()
