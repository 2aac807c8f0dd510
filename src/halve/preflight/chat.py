"""Whether the tokenizer's chat template can write the recipe's conversations, as far as their beginnings tell."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from halve.preflight.samples import read_as
from halve.recipe.schema import Recipe
from halve.text import sources

if TYPE_CHECKING:
    from halve.model.checkpoint import Checkpoint

RENDERED = 64
"""Conversations of each source that are written."""


def check_conversations(recipe: Recipe, teacher: Checkpoint) -> None:
    """Raise the `HalveError` of a run whose tokenizer has no template, or one that does not suit the first rows."""
    from halve.text.rendering import Chat, encode_conversations, template_of

    chat = Chat.of(recipe.data)
    if chat is None:
        return
    template_of(teacher.tokenizer, chat.key)
    for source, wanted in read_as(recipe):
        if wanted.make is not None and not source.startswith(sources.HUB):
            first = list(islice(sources.beginnings(source, wanted), RENDERED))
            encode_conversations(first, tokenizer=teacher.tokenizer, chat=chat)
