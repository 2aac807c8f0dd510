"""Which line comes next? A multiple-choice task made from the held-out modules' code.

The answer is the line that follows the context. The distractors are lines from other places of the held-out modules.
They have the same indentation, so that layout alone does not reveal the answer.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from halve.demo.corpus import Module

TaskItem = Mapping[str, str | int | list[str]]

_CONTEXT_CHARS = 360  # about 140 tokens of the demo's tokenizer: with any choice it fits 256
_FEWEST_CONTEXT_LINES = 3
_SHORTEST, _LONGEST = 10, 80  # characters of a choice without its indentation


def build_items(
    modules: Iterable[Module], *, num_items: int = 400, num_choices: int = 4, seed: int = 0
) -> list[TaskItem]:
    """Items `{"context", "choices", "answer"}` at places drawn from the modules' code by `seed`.

    The context ends with a line break. Every choice is one line with its indentation, without a line break. No two
    choices are equal, and no distractor occurs within 40 lines of the place in question.
    """
    rng = random.Random(seed)
    sources = [(module.name, module.code.split("\n")) for module in modules]
    by_indent: dict[int, set[str]] = defaultdict(set)
    places: list[tuple[int, int]] = []
    for source, (_, lines) in enumerate(sources):
        for number, line in enumerate(lines):
            if _is_choice(line):
                by_indent[_indent(line)].add(line)
                if number >= _FEWEST_CONTEXT_LINES:
                    places.append((source, number))
    pools = {indent: sorted(lines) for indent, lines in by_indent.items()}
    rng.shuffle(places)
    items: list[TaskItem] = []
    for source, number in places:
        if len(items) == num_items:
            break
        lines = sources[source][1]
        answer = lines[number]
        near = set(lines[max(0, number - 40) : number + 40])
        pool = pools[_indent(answer)]
        others = [line for line in rng.sample(pool, min(len(pool), 8 * num_choices)) if line not in near]
        context = _context(lines[:number])
        if len(others) < num_choices - 1 or not context:
            continue
        choices = [*others[: num_choices - 1], answer]
        rng.shuffle(choices)
        items.append({"context": context, "choices": choices, "answer": choices.index(answer)})
    return items


def write_items(path: Path, items: Iterable[TaskItem]) -> Path:
    """Write items as JSON lines, the form that `halve evaluate` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(item, ensure_ascii=False, sort_keys=True) for item in items)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8", newline="\n")
    return path


def _context(lines: list[str]) -> str:
    """The last whole lines that fit, or nothing if there are too few."""
    kept: list[str] = []
    room = _CONTEXT_CHARS
    for line in reversed(lines):
        room -= len(line) + 1
        if room < 0:
            break
        kept.append(line)
    text = "\n".join(reversed(kept)).lstrip("\n")
    return text + "\n" if len(kept) >= _FEWEST_CONTEXT_LINES and text.strip() else ""


def _is_choice(line: str) -> bool:
    """Whether a line can be a choice: code of medium length in plain letters, not a comment."""
    text = line.strip()
    return (
        _SHORTEST <= len(text) <= _LONGEST
        and not text.startswith("#")
        and line.isascii()
        and "\t" not in line
        and any(char.isalpha() for char in text)
    )


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" "))
