"""What `cut_quality.py` found, and the page of it: tables, verdicts on the targets, costs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cut_methods import INNER, METHODS, OURS, PLAIN

from halve.studies.statistics import verdict

RATIOS = (0.7, 0.5, 0.3)
TARGETS = {0.7: 0.5, 0.5: 0.55, 0.3: 0.7}
SWEPT = 0.5


class Book:
    """Results on disk, one JSON line each; what is there is not measured again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def find(self, **key: Any) -> dict[str, Any] | None:
        """The line with these values."""
        return next((line for line in self.lines if all(line.get(k) == v for k, v in key.items())), None)

    def add(self, line: dict[str, Any]) -> None:
        """Append and say it."""
        self.lines.append(line)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print({name: value for name, value in line.items() if name != "curve"}, flush=True)


def spell(values: Sequence[float]) -> str:
    """Mean and standard error."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) / len(values) ** 0.5:.3f}"


def starts(book: Book, name: str, ratio: float) -> list[float]:
    """KL straight after the cut, by seed."""
    return [line["kl"] for line in book.lines if _is(line, "start", name, ratio)]


def finals(book: Book, name: str, ratio: float) -> dict[int, dict[str, Any]]:
    """The retrained line of every seed at the rate that other samples than the reported ones chose."""
    lines = [line for line in book.lines if _is(line, "retrained", name, ratio)]
    result: dict[int, dict[str, Any]] = {}
    for line in sorted(lines, key=lambda line: -line["choice_kl"]):
        result[line["seed"]] = line
    return result


def _is(line: dict[str, Any], kind: str, name: str, ratio: float) -> bool:
    return line["kind"] == kind and line.get("method") == name and line.get("ratio") == ratio


def tokens_to(curve: Sequence[Sequence[float]], goal: float) -> float:
    """Tokens of retraining after which KL is at most the goal; infinite where it never is."""
    return next((tokens for tokens, value in curve if value <= goal), float("inf"))


def _shapes(book: Book, name: str, ratio: float, whole: int) -> list[str]:
    """What the seeds came to, each once; `whole` is the teacher's number of non-embedding parameters."""
    found = {
        f"{line['layers']} x {line['hidden']} x {line['ffn']} ({line['non_embedding'] / whole:.1%})": None
        for line in book.lines
        if _is(line, "start", name, ratio)
    }
    return list(found)


def plain(book: Book, ratio: float) -> str:
    """Plain Minitron in the shape in which it starts closer."""
    return min((PLAIN, PLAIN + INNER), key=lambda name: statistics.mean(starts(book, name, ratio)))


def plain_retrained(book: Book, ratio: float) -> str:
    """Plain Minitron in the shape that ends closer, on the samples that are not reported."""

    def chosen(name: str) -> float:
        return statistics.mean(float(line["choice_kl"]) for line in finals(book, name, ratio).values())

    return min((PLAIN, PLAIN + INNER), key=chosen)


def beside(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Ours less theirs, seed by seed, and what Student's t at 5 % makes of it."""
    if len(ours) != len(theirs) or len(ours) < 2:
        return "one seed, no verdict"
    told = {"held": "lower", "reversed": "higher", "inconclusive": "the seeds cannot tell"}
    return told[verdict([b - a for a, b in zip(ours, theirs, strict=True)])]


def report(book: Book, about: str, tokens: int, whole: int) -> str:
    """The tables and the verdicts on the targets, as markdown."""
    forward = book.find(kind="forward")
    assert forward is not None
    trained = book.find(kind="retrained") is not None
    columns = " | ".join(f"{ratio:.0%}" for ratio in RATIOS) + " |"
    rule = "|---|---|" + "---|" * len(RATIOS)
    lines = [
        about,
        "",
        "## Straight after the cut",
        "",
        "KL to the teacher, and its share of plain Minitron's in its better shape.",
        "",
    ]
    lines += [f"| method | at 50 %: layers x hidden x ffn, all parameters | {columns}", rule]
    for name in METHODS:
        cells = []
        for ratio in RATIOS:
            found, plain_kl = starts(book, name, ratio), starts(book, plain(book, ratio), ratio)
            share = statistics.mean(a / b for a, b in zip(found, plain_kl, strict=False))  # by seed
            cells.append(f"{spell(found)} ({share:.2f})")
        line = next(line for line in book.lines if _is(line, "start", name, SWEPT))
        shape = f"{line['layers']} x {line['hidden']} x {line['ffn']}, {line['params']:,}"
        lines.append(f"| {name} | {shape} | " + " | ".join(cells) + " |")
    lines += ["", "Shapes that a method chose for itself, layers x hidden x ffn and the share that they keep:", ""]
    for name in (OURS, "osscar-inner"):
        lines += [f"- {name}, {ratio:.0%}: {', '.join(_shapes(book, name, ratio, whole))}" for ratio in RATIOS]
    if trained:
        lines += ["", f"## After {tokens:,} tokens of distillation, and the best rate", ""]
        lines += [f"| method | rate | {columns}", rule]
    retrained = [name for name in METHODS if finals(book, name, SWEPT)]
    for name in retrained:
        rate = next(iter(finals(book, name, SWEPT).values()))["lr"]
        cells = [spell([line["kl"] for line in finals(book, name, ratio).values()]) for ratio in RATIOS]
        lines.append(f"| {name} | {rate:g} | " + " | ".join(cells) + " |")
    if trained and len(retrained) < len(METHODS):
        lines += ["", "Retrained are the four that start closest at 50 % on the first seed, and the controls."]
    lines += ["", "## Targets", ""]
    others = [name for name, method in METHODS.items() if not method.ours]
    for ratio in RATIOS:
        share = statistics.mean(
            a / b for a, b in zip(starts(book, OURS, ratio), starts(book, plain(book, ratio), ratio), strict=True)
        )
        nearest = min(others, key=lambda name: statistics.mean(starts(book, name, ratio)))
        lines.append(
            f"- {ratio:.0%}, start: {share:.2f} of plain Minitron, target {TARGETS[ratio]}:"
            f" {'reached' if share <= TARGETS[ratio] else 'missed'};"
            f" best baseline {nearest} {spell(starts(book, nearest, ratio))}, ours {spell(starts(book, OURS, ratio))}"
            f" ({beside(starts(book, OURS, ratio), starts(book, nearest, ratio))})"
        )
        if not trained:
            continue
        theirs, mine = finals(book, plain_retrained(book, ratio), ratio), finals(book, OURS, ratio)
        needed = [tokens_to(mine[seed]["curve"], theirs[seed]["kl"]) for seed in mine.keys() & theirs.keys()]
        ends = {name: [line["kl"] for line in finals(book, name, ratio).values()] for name in retrained}
        beaten = min(ends.keys() & set(others), key=lambda name: statistics.mean(ends[name]))
        lines.append(
            f"- {ratio:.0%}, retrained: plain Minitron's final KL after {max(needed):,.0f} of {tokens:,} tokens"
            f" ({'reached' if max(needed) <= tokens / 2 else 'missed'}, target half); best baseline {beaten}"
            f" {spell(ends[beaten])}, ours {spell(ends[OURS])} ({beside(ends[OURS], ends[beaten])})"
        )
    lines += ["", "## Cost of scoring plus cutting at 50 %, in forward passes over the calibration set", ""]
    lines += ["Processor time, which other programs disturb less than the clock.", ""]
    lines += ["| method | without solves | solves, s |", "|---|---|---|"]
    for name in METHODS:
        timed = [line for line in book.lines if _is(line, "start", name, SWEPT)]
        passes = statistics.median((line["seconds"] - line["solves"]) / forward["seconds"] for line in timed)
        lines.append(f"| {name} | {passes:.2f} | {statistics.median(line['solves'] for line in timed):.2f} |")
    return "\n".join(lines) + "\n"
