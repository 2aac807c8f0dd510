"""The multiple-choice items and prompts of a recipe's evaluation, as tokens."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from halve.errors import CorpusError, HalveError
from halve.model.choices import Encoded, encode, load_items
from halve.recipe.schema import CHAT_PROMPTS, Recipe
from halve.text.rendering import prompt_ids


def encoded_choices(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, limit: int | None
) -> dict[str, tuple[Encoded, ...]]:
    """The recipe's multiple-choice files as tokens, by file name without its ending.

    Raises `CorpusError` for two files with the same name and for an item that is longer than `limit`.
    """
    questions: dict[str, tuple[Encoded, ...]] = {}
    for path in map(Path, recipe.evaluate.choices):
        name = path.name.split(".")[0]
        if name in questions:
            raise CorpusError(
                f"two multiple-choice files are called {name}",
                why="the report tells them apart by their names",
                fix="rename one of them",
            )
        questions[name] = encode(tokenizer, load_items(path), max_tokens=limit)
    return questions


def encoded_prompts(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> list[list[int]]:
    """The recipe's prompts as tokens. Raises `CorpusError` for one that is empty or leaves its completion no room."""
    prompts = []
    for prompt in recipe.evaluate.prompts:
        ids: list[int] = tokenizer(prompt).input_ids
        if ids and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]
        _require_room(prompt, ids, recipe, limit, key="prompts")
        prompts.append(ids)
    return prompts


def encoded_chat(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, limit: int | None, *, num_tokens: int
) -> dict[str, list[int]]:
    """The recipe's chat prompts as tokens that a chat model answers to; `num_tokens` is how many it has.

    Raises `CorpusError` for one that leaves its answer no room, and `TokenizerError` where the chat template cannot be
    rendered. Where the recipe names none, halve's own prompts are left out instead, as in a model without a template.
    """
    asked = recipe.evaluate.chat_prompts
    usual = asked == CHAT_PROMPTS
    if usual and not tokenizer.chat_template:
        return {}
    prompts: dict[str, list[int]] = {}
    for prompt in asked:
        try:
            ids = prompt_ids(tokenizer, prompt)
            _require_room(prompt, ids, recipe, limit, key="chat_prompts")
        except HalveError:
            if not usual:
                raise
            continue
        if not usual or max(ids) < num_tokens:
            prompts[prompt] = ids
    return prompts


def _require_room(prompt: str, ids: list[int], recipe: Recipe, limit: int | None, *, key: str) -> None:
    if not ids or (limit is not None and len(ids) + recipe.evaluate.completion_tokens > limit):
        room = "no tokens" if not ids else f"{len(ids)} tokens"
        raise CorpusError(
            f"the prompt {prompt[:40]!r} of evaluate.{key} has {room}",
            why=f"with evaluate.completion_tokens {recipe.evaluate.completion_tokens} more it must fit"
            f" the model's context of {limit}, and it must not be empty",
            fix="change that prompt or evaluate.completion_tokens",
        )
