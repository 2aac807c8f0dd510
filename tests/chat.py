"""What tests of conversations share: a ChatML template, files of rows, and a tokenizer that has a template."""

from __future__ import annotations

import json
import random
from copy import deepcopy
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['tool_calls'] %}{{ message['tool_calls'] | tojson }}{% endif %}"
    "{{ message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' + '\n' }}"
    "{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
Message = dict[str, Any]


def turns(*texts: str, system: str | None = None) -> list[Message]:
    """Messages of user and assistant in turns."""
    first = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return [*first, *({"role": roles[i % 2], "content": text} for i, text in enumerate(texts))]


def write_rows(path: Path, *conversations: list[Message], field: str = "messages", **more: Any) -> Path:
    """A file of JSON lines with a conversation a row."""
    rows = [json.dumps({"id": i, field: messages, **more}) for i, messages in enumerate(conversations)]
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    return path


def with_template(tokenizer: PreTrainedTokenizerFast, template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A copy of a tokenizer with another chat template."""
    made = deepcopy(tokenizer)
    made.chat_template = template
    return made


def small_talk(num: int, *, seed: int = 0) -> list[list[Message]]:
    """Conversations of one to three short questions with answers."""
    draw = random.Random(seed)
    words = ("cat", "dog", "tree", "river", "house", "stone", "bird", "cloud")

    def asked() -> tuple[str, str]:
        one = draw.choice(words)
        return f"Who sees the {one}?", f"The {draw.choice(words)} sees the {one}."

    return [turns(*(text for _ in range(draw.randint(1, 3)) for text in asked())) for _ in range(num)]
