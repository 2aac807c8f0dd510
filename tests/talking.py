"""What tests of alignment share: a tiny chat model, and rows of conversations and preferences."""

from __future__ import annotations

import json
import random
import shutil
from copy import deepcopy
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from chat import small_talk, write_rows
from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase

SHORT_CHAT = (
    "{% for message in messages %}{{ message['role'][0] + ':' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)
"""A template of few tokens: the tiny tokenizer spells every other word in letters."""

ENDED_CHAT = SHORT_CHAT.replace("'\n' }}{% endfor", "'~\n' }}{% endfor")
"""The same, and a turn ends with ~."""


def with_turn_end(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy of a tokenizer whose template ends turns with ~, a special token that the tiny vocabulary has."""
    made = deepcopy(tokenizer)
    made.add_tokens([AddedToken("~", special=True)], special_tokens=True)
    made.chat_template = ENDED_CHAT
    assert len(made) == len(tokenizer)
    return made


def saying(model: PreTrainedModel, ids: list[int]) -> PreTrainedModel:
    """A model that generates these tokens again and again, whatever it has read."""
    generate = model.generate

    def written(*args: Any, **how: Any) -> Any:
        coming = cycle(ids)

        def said(_module: Any, _args: Any, output: Any) -> Any:
            output.logits = torch.full_like(output.logits, -1e4)
            output.logits[..., next(coming)] = 0.0
            return output

        with model.register_forward_hook(said):
            return generate(*args, **how)

    model.generate = written
    return model


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
