"""What a run asks its models, as tokens: multiple-choice items and prompts. Nothing is downloaded for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from halve.anatomy.configs import context_length
from halve.errors import HalveError
from halve.model.checkpoint import Checkpoint
from halve.model.choices import PaddedBatch, batch_up, encode, load_items
from halve.recipe.schema import Recipe
from halve.text.questions import encoded_chat, encoded_choices, encoded_prompts


@dataclass(frozen=True, eq=False)
class Asked:
    """Items in the batches that go through a model, and the lengths of prompts. What cannot be read yet is left out."""

    depth: tuple[PaddedBatch, ...] = ()
    """The items of `score.depth_task`, where layers are compared by them."""
    choices: tuple[PaddedBatch, ...] = ()
    prompts: tuple[int, ...] = ()
    unknown: Mapping[str, str] = field(default_factory=dict)
    """By row of the table of work, why something is left out."""

    @classmethod
    def of(cls, recipe: Recipe, teacher: Checkpoint) -> Asked:
        """What a recipe asks, with the tokenizer in the teacher's folder."""
        parts: dict[str, Any] = {}
        unknown = {}
        for row, read in (("layers", _depth), ("evaluate", _evaluation)):
            try:
                parts |= read(recipe, teacher)
            except HalveError as error:
                unknown[row] = f"{error.what}: {error.why}"
        if not (recipe.evaluate.choices or recipe.evaluate.prompts):
            unknown.pop("evaluate", None)  # halve's own chat prompts are a few tokens, or none
        if recipe.evaluate.asks_tasks:
            unknown["evaluate"] = "the questions of its tasks are read in the stage itself"
        return cls(**parts, unknown=unknown)


def _depth(recipe: Recipe, teacher: Checkpoint) -> dict[str, Any]:
    task = recipe.score.depth_task
    if recipe.score.depth != "task" or task is None:
        return {}
    limit = context_length(teacher.config)
    return {"depth": batch_up(encode(_tokenizer(teacher), load_items(task), max_tokens=limit))}


def _evaluation(recipe: Recipe, teacher: Checkpoint) -> dict[str, Any]:
    tokenizer, limit = _tokenizer(teacher), context_length(teacher.config)
    vocab = teacher.config.get_text_config().vocab_size
    files = encoded_choices(recipe, tokenizer, limit).values()
    chat = encoded_chat(recipe, tokenizer, limit, num_tokens=vocab).values()
    prompts = (*encoded_prompts(recipe, tokenizer, limit), *chat)
    return {
        "choices": tuple(batch for items in files for batch in batch_up(items)),
        "prompts": tuple(map(len, prompts)),
    }


def _tokenizer(teacher: Checkpoint) -> PreTrainedTokenizerBase:
    """That of the folder; `teacher.tokenizer` would download one."""
    return Checkpoint.open(teacher.folder).tokenizer
