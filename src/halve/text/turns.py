"""Where answers to chats end: at the token with which the chat template ends a turn, beside those that end a text.

A base model that was given a chat template still names only the end of a text in its generation_config.json. An
alignment teaches it the template's end of a turn, and what is written behind that is no part of the answer.
"""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halve.model import measure
from halve.text.rendering import renderer

_QUESTION, _ANSWER = "Who is there?", "It is me."


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The first special token that the chat template writes behind an answer.

    None without a template, for one that writes no special token there, and for one that cannot be rendered.
    """
    if not tokenizer.chat_template:
        return None
    said = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = renderer(tokenizer, None)(said)
    except Exception:  # whoever needs the template says what is wrong with it
        return None
    _, written, behind = text.rpartition(_ANSWER)
    ids: list[int] = tokenizer(behind if written else "", add_special_tokens=False, verbose=False)["input_ids"]
    added = tokenizer.added_tokens_decoder
    special = {*tokenizer.all_special_ids, *(token for token, entry in added.items() if entry.special)}
    return next((token for token in ids if token in special), None)


def answer_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """The tokens that end an answer to a chat: those that end a text, and that with which the template ends a turn."""
    ends, turn = measure.end_tokens(model, tokenizer) or [], turn_end(tokenizer)
    return [*ends, *([] if turn is None or turn in ends else [turn])] or None
