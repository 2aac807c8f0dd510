"""What must hold of a call, whatever was put in: each broken promise is a sentence."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from forked import Outcome

ERROR = re.compile(r"error: [^\n]+\n  why: [^\n]+\n  fix: [^\n]+\n")
LONGEST = 3200
"""Characters of one error: three lines of at most a thousand."""

ONLY_A_RUN_KNOWS = re.compile(
    r"""(?xm) ^error:\ (
      \S+\ of\ \S+\ is\ not\ finite
    | the\ weights\ of\ \S+\ are\ all\ zero
    | the\ logits\ of\ .*\ are\ not\ finite
    | the\ model's\ (logits|hidden\ states)\ are\ not\ finite
    | without\ layers\ .*\ the\ logits\ are\ not\ finite
    | activations\ are\ not\ finite
    | the\ teacher\ (teaches\ nothing|disagrees\ with\ itself)
    | the\ (teacher's\ )?loss\ (spikes\ at|is\ not\ finite)
    | the\ student's\ perplexity\ is\ not\ finite
    | the\ student\ generates\ other\ text\ with\ the\ key-value\ cache
    | 1\ rank\ does\ not\ make
    )"""
)
"""What weights and activations say, which `check` does not read, and how many ranks the run is given."""


def of_any(outcome: Outcome) -> Iterator[str]:
    """What holds of every call."""
    if outcome.code is None:
        yield f"had not ended after {outcome.seconds:.0f} s"
    elif outcome.code not in (0, 2):
        yield f"ended with exit code {outcome.code}"
    if "Traceback (most recent call last)" in outcome.err:
        yield "ended in a traceback"
    if outcome.code == 2:
        errors = ERROR.findall(outcome.err)
        if not errors or not outcome.err.endswith(errors[-1]):
            yield "refused without three lines"
        if any(len(error) > LONGEST for error in errors):
            yield "refused at great length"
        if re.search(r"[\x00-\x09\x0b-\x1f\x7f]", "".join(errors)):
            yield "wrote characters that steer a terminal"


def of_a_check(outcome: Outcome, run: Path, before: list[str]) -> Iterator[str]:
    """What holds of `halve check`: it is quick and makes nothing."""
    yield from of_any(outcome)
    if listing(run) != before:
        yield "left files behind"


def of_a_run(outcome: Outcome, run: Path) -> Iterator[str]:
    """What holds of `halve run` where `check` found nothing."""
    yield from of_any(outcome)
    drafts = [name for name in listing(run) if name.endswith((".tmp", ".draft"))]
    if drafts:
        yield f"left {drafts[0]} half-written"
    if outcome.code == 2 and not ONLY_A_RUN_KNOWS.search(outcome.err):
        yield "refused what check had accepted"
    if outcome.code == 0:
        if any(".work" in name for name in listing(run)):
            yield "left the work of a stage behind"
        yield from _of_the_results(run)


def _of_the_results(run: Path) -> Iterator[str]:
    try:
        results = json.loads((run / "evaluate" / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        yield f"ended well without results: {error}"
        return
    for name, figures in headline(results).items():
        if not all(isinstance(figure, int | float) and math.isfinite(figure) for figure in figures):
            yield f"measured {name} to be {figures}"


def headline(results: dict[str, Any]) -> dict[str, list[Any]]:
    """By model, the figures that must be numbers and that the same inputs give again."""
    return {
        name: [one["perplexity"]["value"], one["bits_per_byte"]["value"], one["params"]]
        for name, one in results["models"].items()
    }


def listing(folder: Path) -> list[str]:
    """Every name below a folder."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")) if folder.exists() else []
