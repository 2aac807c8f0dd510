"""Tasks on a teacher and its students: accuracy on the same items, and what share of the teacher's average is kept.

    python benchmarks/real_tasks.py --models teacher=FOLDER default=FOLDER ... --data DATA --work FOLDER --results FILE

The first model is the teacher. DATA has a folder of rows for each task, `lambada_openai/`, `piqa/` and so on. Every
task is asked by lm-evaluation-harness without examples, of its first `--limit` rows, with logits in float32. The
average is that of accuracy above chance, over tasks; its share of the teacher's has an interval by a bootstrap that
draws items within each task, the same for both models. What a model has answered is kept in the work folder, and a
model with a line in FILE is not asked again.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from real_model import Lines, where

from halve.evaluation.asking import Answered, read_exam
from halve.evaluation.results import mean_score, paired
from halve.evaluation.session import TaskSession
from halve.model.checkpoint import Checkpoint
from halve.recipe.evaluations import Evaluate

CHANCE = {"lambada_openai": 0.0, "piqa": 0.5, "arc_easy": 0.25, "hellaswag": 0.25, "winogrande": 0.5}
"""arc_easy has a few items of three or five choices."""
METRIC = {"hellaswag": "acc_norm"}
DRAWS, INTERVAL = 10_000, 95.0


def main() -> None:
    """Ask what was not asked yet."""
    parser = argparse.ArgumentParser(description="Tasks on a teacher and its students.")
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=list(CHANCE), choices=list(CHANCE))
    parser.add_argument("--limit", type=int, default=500)
    parser.add_argument("--dtype", default="bfloat16", help="of all models' weights")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folders = dict(model.split("=", 1) for model in args.models)
    asked = Evaluate(
        tasks=dict.fromkeys(args.tasks, 0),
        data={task: str(args.data / task) for task in args.tasks},
        limit=args.limit,
    )
    args.work.mkdir(parents=True, exist_ok=True)
    book, teacher = Lines(args.results), next(iter(folders))
    session = None
    for name, folder in folders.items():
        checkpoint = Checkpoint.open(folder, home=args.work)
        session = session or TaskSession(read_exam(asked, context=None), checkpoint.tokenizer, args.work)
        session.ask(name, checkpoint.load(dtype=args.dtype), is_reference=name == teacher)
        key = {"tasks": name, "limit": args.limit}
        if book.find(**key) is None:
            values = {task: _values(task, session.answers[name]) for task in args.tasks}
            its = {task: _values(task, session.answers[teacher]) for task in args.tasks}
            book.add({**key, "against": teacher, **scores(values, its), **where()})


def _values(task: str, answers: Mapping[str, Answered]) -> list[float]:
    key = f"{task} (0)"
    metric = METRIC.get(task, "acc")
    return answers[key].values[metric]


def scores(ours: Mapping[str, list[float]], its: Mapping[str, list[float]]) -> dict[str, Any]:
    """Accuracy by task, the paired difference from the teacher's, and the share of the average above chance."""
    draws = np.random.default_rng(0)
    above = {"ours": np.zeros(DRAWS), "its": np.zeros(DRAWS)}
    for task, values in ours.items():
        both = np.stack([values, its[task]])
        found = both[:, draws.integers(len(values), size=(DRAWS, len(values)))].mean(axis=2) - CHANCE[task]
        above = {"ours": above["ours"] + found[0], "its": above["its"] + found[1]}
    average = {
        name: float(np.mean([np.mean(values) - CHANCE[task] for task, values in of.items()]))
        for name, of in (("ours", ours), ("its", its))
    }
    low, high = np.percentile(above["ours"] / above["its"], [50 - INTERVAL / 2, 50 + INTERVAL / 2])
    return {
        "accuracy": {task: mean_score(values).as_dict() for task, values in ours.items()},
        "minus_teacher": {task: paired(values, its[task]) for task, values in ours.items()},
        "above_chance": average["ours"],
        "share": average["ours"] / average["its"],
        "share_interval": [float(low), float(high)],
    }


if __name__ == "__main__":
    main()
