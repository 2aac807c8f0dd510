"""How good an answer is: by a verifier of its last number, or by a reward model."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from halve.anatomy.configs import quiet
from halve.disk import soundness
from halve.errors import CheckpointError
from halve.recipe.schema import Alignment

Reward = Callable[[Mapping[str, Any], str], float]
"""The reward of an answer to the prompt of a row (see `text.preferences`)."""

_MARK = "####"
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def open_reward(step: Alignment, *, device: str) -> Reward:
    """The reward of a step that does not take them from its data. Raises `CheckpointError`."""
    if step.rewards == "gsm8k":
        return by_last_number
    assert step.reward_model is not None
    return _classifier(step.reward_model, device)


def by_last_number(row: Mapping[str, Any], answer: str) -> float:
    """1 if the last number of an answer is that of the row's reference, otherwise 0 (GSM8K, 2110.14168).

    The reference's number is the one behind ####, if it has this mark. The same holds for the answer.

    >>> by_last_number({"reference": "6 * 7 = 42\\n#### 42"}, "It is 6 times 7, so 42.0 apples.")
    1.0
    """
    right, given = (_last_number(text) for text in (str(row["reference"]), answer))
    return float(right is not None and right == given)


def _last_number(text: str) -> Decimal | None:
    _, marked, behind = text.rpartition(_MARK)
    numbers = _NUMBER.findall(behind if marked else text)
    try:
        return Decimal(numbers[0 if marked else -1].replace(",", "")) if numbers else None
    except InvalidOperation:
        return None


def require_classifier(source: str) -> Path:
    """The folder of a sequence classifier that gives one score, or one for each of two classes.

    Raises `CheckpointError` for what is none.
    """
    folder = soundness.locate(source)
    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises many types here
        raise _no_classifier(source, why=str(error)) from error
    names = config.architectures or []
    if not any(name.endswith("ForSequenceClassification") for name in names):
        raise _no_classifier(source, why=f"its architecture is {', '.join(names) or 'not named'}")
    if config.num_labels > 2:
        raise _no_classifier(source, why=f"it has {config.num_labels} classes, and a reward is one number")
    return folder


def _no_classifier(source: str, *, why: str) -> CheckpointError:
    return CheckpointError(
        f"{source} is no reward model", why=why, fix="give a sequence classifier with one or two classes"
    )


def _classifier(source: str, device: str) -> Reward:
    """The score of a model with one class; of two classes the log-odds of the second.

    Answers are scored one at a time, so that padding plays no part.
    """
    folder = require_classifier(source)
    with quiet():
        model = AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True).eval().to(device)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    @torch.no_grad()
    def reward(row: Mapping[str, Any], answer: str) -> float:
        logits = model(input_ids=torch.tensor([_read(tokenizer, row["prompt"], answer)], device=device)).logits[0]
        return float(logits[0] if len(logits) == 1 else logits[1] - logits[0])

    return reward


def _read(tokenizer: Any, prompt: Sequence[Mapping[str, Any]], answer: str) -> list[int]:
    """The conversation by the classifier's own template; without one, the last message and the answer as a pair."""
    if tokenizer.chat_template:
        messages = [*prompt, {"role": "assistant", "content": answer}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids
    pair: list[int] = tokenizer(str(prompt[-1]["content"]), answer)["input_ids"]
    return pair
