"""How good an answer is: by a verifier of its last number, or by a reward model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from halve.anatomy.configs import context_length, quiet
from halve.disk import soundness
from halve.errors import CheckpointError, CorpusError, HalveError
from halve.model.checkpoint import Checkpoint
from halve.recipe.schema import Alignment
from halve.text.conversations import TOOLS
from halve.text.day import fixed_day
from halve.text.numbers import last_number

Reward = Callable[[Mapping[str, Any], str], float | None]
"""The reward of an answer to the prompt of a row (see `text.preferences`); None if it is too long to be read whole."""

_KEY = "align.reward_model"


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
    right, given = (last_number(text) for text in (str(row["reference"]), answer))
    return float(right is not None and right == given)


def require_classifier(source: str, *, context: int, where: str) -> None:
    """Raise `CheckpointError` unless a model can judge samples of `context` tokens, without reading its weights.

    It is a sequence classifier that gives one score, or one for each of two classes. Its folder has a tokenizer that
    fits it and every tensor. `where` names the step.
    """
    checkpoint, config = _opened(source)
    limit = _reads(checkpoint, config)
    with _named():
        headers = checkpoint.headers
    empty = {name: torch.empty(header.shape, device="meta") for name, header in headers.items()}
    _loaded(source, None, config, state_dict=empty, device_map={"": "meta"})
    if limit is not None and limit < context:
        raise CheckpointError(
            f"{_KEY} {source} reads {limit} tokens, and {where} has context {context}",
            why="it would judge answers that it cannot read whole",
            fix=f"set context in that step to {limit} or less, or give a reward model that reads more",
        )


def _opened(source: str) -> tuple[Checkpoint, PretrainedConfig]:
    """The folder of a classifier with its config and its tokenizer. Raises `CheckpointError`."""
    with _named():
        checkpoint = Checkpoint(source, soundness.locate(source))
        soundness.read_config(checkpoint.folder, hub=checkpoint.hub)
    try:
        with quiet():
            config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises many types here
        raise _no_classifier(source, why=str(error)) from error
    names = config.architectures or []
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING or not any(
        name.endswith("ForSequenceClassification") for name in names
    ):
        raise _no_classifier(source, why=f"its architecture is {', '.join(names) or 'not named'}")
    if config.num_labels > 2:
        raise _no_classifier(source, why=f"it has {config.num_labels} classes, and a reward is one number")
    with _named(fix="copy the tokenizer files of the reward model into its folder"):
        tokenizer = checkpoint.tokenizer
    vocab, added = config.get_text_config().vocab_size, tokenizer.added_tokens_decoder
    largest = max((token for token in tokenizer.get_vocab().values() if token not in added), default=-1)
    if not 0 <= largest < vocab:
        raise CheckpointError(
            f"the tokenizer of {_KEY} {source} is not the model's",
            why=f"its largest id is {largest}, the model's vocabulary has {vocab} entries",
            fix="use the tokenizer that the reward model was trained with",
        )
    return checkpoint, config


def _reads(checkpoint: Checkpoint, config: PretrainedConfig) -> int | None:
    """How many tokens the classifier takes; the tokenizer's limit leaves out positions that are never used."""
    limit = context_length(config)
    return None if limit is None else int(min(limit, checkpoint.tokenizer.model_max_length))


def _loaded(source: str, folder: Path | None, config: PretrainedConfig, **how: Any) -> PreTrainedModel:
    """The classifier of a folder, or of `state_dict`. Raises `CheckpointError` if it would have random numbers."""
    kind: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
    shared = {"local_files_only": True, "use_safetensors": True, "ignore_mismatched_sizes": True}
    try:
        with quiet():
            model, info = kind.from_pretrained(folder, config=config, output_loading_info=True, **shared, **how)
    except Exception as error:  # transformers raises many types here
        raise _no_classifier(source, why=str(error)) from error
    wrong: list[str] = sorted([*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])])
    if wrong:
        raise _no_classifier(source, why=f"it has no {wrong[0]} of the right shape, which would be random numbers")
    classifier: PreTrainedModel = model.eval()
    return classifier


def _no_classifier(source: str, *, why: str) -> CheckpointError:
    return CheckpointError(
        f"{_KEY} {source} is no reward model", why=why, fix="give a sequence classifier with one or two classes"
    )


@contextmanager
def _named(*, fix: str | None = None) -> Iterator[None]:
    """Errors name the recipe's key."""
    try:
        yield
    except HalveError as error:
        raise CheckpointError(f"{_KEY}: {error.what}", why=error.why, fix=fix or error.fix) from error


def _classifier(source: str, device: str) -> Reward:
    """The score of a model with one class; of two classes the log-odds of the second.

    Answers are scored one at a time, so that padding plays no part.
    """
    checkpoint, config = _opened(source)
    limit, vocab = _reads(checkpoint, config), config.get_text_config().vocab_size
    model: Any = _loaded(source, checkpoint.folder, config)
    model.to(device)

    @torch.no_grad()
    def reward(row: Mapping[str, Any], answer: str) -> float | None:
        ids = _read(checkpoint.tokenizer, row, answer)
        if limit is not None and len(ids) > limit:
            return None
        if max(ids, default=0) >= vocab:
            raise CorpusError(
                f"an answer holds {checkpoint.tokenizer.convert_ids_to_tokens(max(ids))}, which {_KEY} cannot read",
                why=f"it is token {max(ids)} of its tokenizer, the model's vocabulary has {vocab} entries",
                fix="remove it from the data, or give a reward model whose embedding has a row for it",
            )
        logits = model(input_ids=torch.tensor([ids], device=device)).logits[0]
        return float(logits[0] if len(logits) == 1 else logits[1] - logits[0])

    return reward


def _read(tokenizer: Any, row: Mapping[str, Any], answer: str) -> list[int]:
    """The conversation by the classifier's own template; without one, the last message and the answer as a pair."""
    if tokenizer.chat_template:
        messages = [*row["prompt"], {"role": "assistant", "content": answer}]
        try:
            with fixed_day():
                text = tokenizer.apply_chat_template(messages, tools=row.get(TOOLS), tokenize=False)
        except Exception as error:  # a template may raise whatever Jinja and Python raise
            raise CorpusError(
                f"the chat template of {_KEY} cannot be rendered for {json.dumps(row['prompt'])[:80]}",
                why=f"{type(error).__name__}: {error}",
                fix="drop such rows, or give a reward model whose template writes them (some write no system text)",
            ) from error
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids
    pair: list[int] = tokenizer(str(row["prompt"][-1]["content"]), answer)["input_ids"]
    return pair
