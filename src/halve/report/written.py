"""Sections of what models write after prompts, side by side."""

from __future__ import annotations

import re
from collections.abc import Sequence

from halve.report.sections import SHOWN, Completion, Facts, PageSection, color, label


def completions(results: Facts | None) -> PageSection | None:
    """What the teacher, the pruned and the distilled model write after the recipe's prompts."""
    if not results or not results["completions"]:
        return None
    return PageSection(
        "What they write",
        "Greedy continuations of the recipe's prompts (gray). Several blank lines are shown as one.",
        completions=_written(results["completions"]),
    )


def chat_answers(results: Facts | None) -> PageSection | None:
    """What they answer to the chat prompts."""
    if not results or not results.get("answers"):
        return None
    return PageSection(
        "What they answer",
        "Greedy answers to chat prompts (gray), given through the chat template. Several blank lines are shown as one.",
        completions=_written(results["answers"], between="\n\n"),
    )


def _written(entries: Sequence[Facts], *, between: str = "") -> tuple[Completion, ...]:
    """Prompts, and what each model that the page shows made of them."""
    continuations = []
    for entry in entries:
        texts = [
            {"label": label(name), "color": color(name), "text": _folded(text)}
            for name, text in entry["texts"].items()
            if color(name) in SHOWN
        ]
        continuations.append(Completion(entry["prompt"] + between, tuple(texts)))
    return tuple(continuations)


def _folded(text: str) -> str:
    """Text without runs of blank lines: weak models write many, which would push everything else off the screen."""
    return re.sub(r"\n(?:[ \t]*\n){2,}", "\n\n", text).rstrip()
