"""Results of tasks: scores with standard errors, and differences of models on the same items."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from scipy.special import bdtr

from halve.evaluation.asking import Answered, Exam
from halve.evaluation.harness import main_metric, require_harness
from halve.evaluation.suites import SUITES, Ask, asked
from halve.model import measure


def mean_score(values: Sequence[float]) -> measure.Estimate:
    """The mean of items with its standard error: binomial for right or wrong, else from the spread of the items.

    >>> mean_score([1.0, 0.0, 1.0, 1.0]).value
    0.75
    """
    if _is_verdict(values):
        return measure.proportion(torch.tensor(values) == 1.0)
    return measure.average(torch.tensor(values, dtype=torch.float64))


def _is_verdict(values: Sequence[float]) -> bool:
    return all(value in (0.0, 1.0) for value in values)


def paired(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Ours minus theirs on the same items, with the standard error of the pairs.

    For items that are right or wrong also McNemar's test (Psychometrika 12, 1947) in its exact form: under no
    difference, each of the items that only one of both solves is either's with probability 1/2.

        p = min(1, 2 P(Binomial(b + c, 1/2) <= min(b, c)))      b: only ours is right, c: only theirs

    >>> paired([1.0, 1.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0])["mcnemar"]
    {'only_ours': 2, 'only_theirs': 0, 'p': 0.5}
    """
    first, second = (torch.tensor(values, dtype=torch.float64) for values in (ours, theirs))
    result: dict[str, Any] = measure.difference(first, second).as_dict()
    if math.isnan(result["stderr"]):
        result["stderr"] = None
    if _is_verdict(ours) and _is_verdict(theirs):
        b, c = int((first > second).sum()), int((first < second).sum())
        p = min(1.0, 2.0 * float(bdtr(min(b, c), b + c, 0.5))) if b + c else 1.0
        result["mcnemar"] = {"only_ours": b, "only_theirs": c, "p": p}
    return result


def summary(
    exam: Exam,
    answered: Mapping[str, Mapping[str, Answered]],
    *,
    subject: str | None,
    chain: Sequence[str] = (),
    bos: str,
) -> dict[str, Any] | None:
    """The part `tasks` of the evaluation's results; None where no task was asked for.

    `answered` has the answers of each model by task. `bos` says in words how sequences begin. Format:

        harness       version of lm-evaluation-harness
        settings      add_bos_token, chat_template, fewshot_as_turns, limit, batch, max_new_tokens
        suites        names
        listed        task, key, shots, title, suites, status ("asked", "no data", "not run"), why, metric, items,
                      answers (drawn for each item), examples, cut (items whose prompt lost its beginning)
        scores        model -> key -> metric -> estimate
        changed_by_batch   key -> items that the reference answers differently in batches of one; null: not asked
        differences   model -> key -> value, stderr, mcnemar: subject minus that model by the main metric
        steps         model of `chain` -> the same: that model minus the one before it; left out without a chain
    """
    section = exam.section
    if not section.asks_tasks:
        return None
    listed = [*_asked(exam, answered)]
    main = {entry["key"]: entry["metric"] for entry in listed}
    listed += [{**_about(exam, left.ask), "status": left.status, "why": left.why} for left in exam.left]
    order = [ask.key for ask in asked(section)]
    listed.sort(key=lambda entry: order.index(entry["key"]))
    keys = {"add_bos_token": bos, "chat_template": section.chat_template, "fewshot_as_turns": section.fewshot_as_turns}
    keys |= {"limit": section.limit, "batch": section.task_batch, "max_new_tokens": section.max_new_tokens}
    if exam.sandbox is not None:
        keys["sandbox"] = exam.sandbox.kind
    return {
        "harness": require_harness(),
        "settings": keys,
        "suites": list(section.suites),
        "listed": listed,
        "scores": {name: _scores(tasks) for name, tasks in answered.items()},
        **_compared(answered, subject, chain, main),
    }


def _asked(exam: Exam, answered: Mapping[str, Mapping[str, Answered]]) -> Iterator[dict[str, Any]]:
    first = next(iter(answered.values()), {})
    for built in exam.built:
        ask = built.ask
        of_task = first.get(ask.key, Answered())
        yield {
            **_about(exam, ask),
            "status": "asked",
            "metric": main_metric(ask, list(of_task.values)),
            "items": len(of_task.items),
            "answers": ask.answers,
            "examples": built.examples,
            "cut": of_task.cut,
        }


def _about(exam: Exam, ask: Ask) -> dict[str, Any]:
    suites = [name for name in exam.section.suites if ask.key in (member.key for member in SUITES[name])]
    return {"task": ask.task, "key": ask.key, "shots": ask.shots, "title": ask.title, "suites": suites}


def _scores(tasks: Mapping[str, Answered]) -> dict[str, Any]:
    return {
        key: {metric: _finite(mean_score(values)) for metric, values in of_task.values.items()}
        for key, of_task in tasks.items()
    }


def _finite(estimate: measure.Estimate) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in estimate.as_dict().items()}


def _compared(
    answered: Mapping[str, Mapping[str, Answered]], subject: str | None, chain: Sequence[str], main: Mapping[str, str]
) -> dict[str, Any]:
    def minus(ours: str, theirs: str) -> dict[str, Any]:
        first, second = answered[ours], answered[theirs]
        return {key: paired(first[key].values[main[key]], second[key].values[main[key]]) for key in first}

    others = [name for name in answered if name != subject]
    facts: dict[str, Any] = {
        "differences": None if subject is None else {name: minus(subject, name) for name in others}
    }
    if len(chain) > 1:
        facts["steps"] = {after: minus(after, before) for before, after in pairwise(chain)}
    return facts


def item_lines(answered: Mapping[str, Mapping[str, Answered]]) -> Iterator[dict[str, Any]]:
    """One line for each item: task, part, number, hash of its request, and values and answer of every model."""
    for key, of_task in next(iter(answered.values()), {}).items():
        for i, item in enumerate(of_task.items):
            yield {
                "task": key,
                **item,
                "values": {
                    name: {metric: values[i] for metric, values in tasks[key].values.items()}
                    for name, tasks in answered.items()
                },
                "answers": {name: tasks[key].answers[i] for name, tasks in answered.items()},
            }
