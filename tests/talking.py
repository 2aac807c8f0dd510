"""What tests of alignment share: a tiny chat model, and rows of conversations and preferences."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

from chat import small_talk, write_rows

SHORT_CHAT = (
    "{% for message in messages %}{{ message['role'][0] + ':' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)
"""A template of few tokens: the tiny tokenizer spells every other word in letters."""


def with_chat(model: Path, folder: Path, template: str | None = SHORT_CHAT) -> Path:
    """A copy of a model folder with this template, or without any."""
    shutil.copytree(model, folder)
    (folder / "chat_template.jinja").unlink()
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


def conversations(path: Path, num: int = 60, *, seed: int = 0) -> Path:
    return write_rows(path, *small_talk(num, seed=seed))


def preferences(num: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Pairs of as many prompts. The better answer is of the same kind, better by a different amount each time."""
    draw = random.Random(seed)
    words = ("cat", "dog", "tree", "river", "house", "stone", "bird", "cloud")
    return [
        {
            "prompt": f"Who sees the {draw.choice(words)} {i}?",
            "chosen": f"The {draw.choice(words)} sees it.",
            "rejected": f"A {draw.choice(words)} was lost.",
            "chosen_reward": 1.0 + 3 * draw.random(),
            "rejected_reward": draw.random(),
            "answer": str(draw.randint(0, 9)),
        }
        for i in range(num)
    ]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path
