"""Rows of preferences: a prompt, a chosen and a rejected answer, and how good they are.

A row has `prompt`, `chosen` and `rejected`. The prompt is a text, or messages as in `conversations`; it may also stand
in `question`, `messages` or `conversations`. An answer is a text, a message, or messages that may repeat the prompt.
Without a prompt, it is what both answers begin with. Rewards are numbers in `chosen_reward` and `rejected_reward`, or
in `score_chosen` and `score_rejected`. `answer` is the reference that a verifier compares with. `system` and `tools`
are those of `conversations`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from halve.disk.textfiles import half_pair
from halve.errors import CorpusError
from halve.recipe.alignments import Alignment
from halve.text.conversations import BESIDE, TOOLS, message_of, require_turns, says_nothing, tools_of, with_system
from halve.text.numbers import last_number
from halve.text.rows import Piece, Wanted, no_field

_PROMPTS = ("prompt", "question", "messages", "conversations")
_ANSWERS = ("chosen", "rejected")
_REWARDS = (("chosen_reward", "rejected_reward"), ("score_chosen", "score_rejected"))
_REFERENCE: Final = "answer"

LARGEST_REWARD: Final = 1e15
"""Losses take squares of rewards' differences in single precision, whose largest number is 3e38."""


@dataclass(frozen=True)
class Needs:
    """What a row must have beside its prompt."""

    answers: bool
    rewards: bool
    reference: bool
    words: bool = False
    """In each answer, since a reward function reads nothing else."""

    @classmethod
    def of(cls, step: Alignment) -> Needs:
        """Those of a step on preferences."""
        has_answers, judged = step.answers is None, step.rewards != "data"
        rewarded = step.kind == "rpo" and not judged
        return cls(has_answers, rewarded, step.rewards == "gsm8k", words=has_answers and judged)

    @property
    def wanted(self) -> Wanted:
        """What rows are read for."""
        first = _ANSWERS[0] if self.answers else _PROMPTS[0]
        also = (*_PROMPTS, *_ANSWERS, *(field for pair in _REWARDS for field in pair), _REFERENCE, *BESIDE)
        return Wanted(first, "", tuple(field for field in also if field != first), partial(preference, needs=self))


def preference(row: Any, *, place: str, text_field: str, needs: Needs) -> Iterator[Piece]:
    """One row as JSON: `prompt`, its `tools` if there are some, and what is needed of answers, rewards and reference.

    `place` names the row. Raises `CorpusError` for a row that lacks something, for an answer without the words that a
    reward function would read, for a reward that is no number of a moderate size, for a reference without a number, and
    for messages that do not alternate.
    """
    if not isinstance(row, dict):
        raise CorpusError(
            f"{place} is not an object",
            why=f"each row has a prompt and answers; this is {type(row).__name__}",
            fix='write lines such as {"prompt": "...", "chosen": "...", "rejected": "..."}',
        )
    for name in _ANSWERS if needs.answers else ():
        _require_given(row, name, place)
    asked = _prompt(row, place, needs)
    _require_open(asked, place)
    prompt = with_system(asked, row, place)
    fields: dict[str, Any] = {"prompt": prompt}
    if tools := tools_of(row, place):
        fields[TOOLS] = tools
    if needs.answers:
        fields |= {name: _answer(row, name, (prompt, asked), place) for name in _ANSWERS}
        for name in _ANSWERS if needs.words else ():
            _require_words(fields[name], name, place)
    if needs.rewards:
        fields["rewards"] = _rewards(row, place)
    if needs.reference:
        fields["reference"] = _reference(row, place)
    yield Piece(json.dumps(fields, ensure_ascii=False), last=True, place=place)


def _prompt(row: Mapping[str, Any], place: str, needs: Needs) -> list[dict[str, Any]]:
    name = next((field for field in _PROMPTS if row.get(field)), None)
    if name is not None:
        given = row[name]
        if isinstance(given, str):
            return [{"role": "user", "content": _whole(given, place)}]
        return _messages(given, place, name)
    both = [row.get(answer) for answer in _ANSWERS]
    if needs.answers and all(isinstance(given, list) and len(given) > 1 for given in both):
        chosen, rejected = (_messages(given, place, name) for given, name in zip(both, _ANSWERS, strict=True))
        shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), len(chosen) - 1)
        return chosen[: min(shared, len(chosen) - 1)]
    raise no_field(place, _PROMPTS[0], row, key="")


def _messages(given: Any, place: str, field: str) -> list[dict[str, Any]]:
    listed = [given] if isinstance(given, dict) else given
    if not isinstance(listed, list) or not listed:
        raise CorpusError(
            f"{place}: field {field!r} holds neither text nor messages",
            why=f"it holds {type(given).__name__}",
            fix="write a text, or a list of messages with role and content",
        )
    return [message_of(message, number, f"{place}, {field}") for number, message in enumerate(listed, 1)]


def _require_open(prompt: list[dict[str, Any]], place: str) -> None:
    """Raise `CorpusError` unless the prompt's turns alternate and it ends where the assistant answers."""
    roles = [message["role"] for message in prompt]
    require_turns(roles, place)
    if roles[-1:] == ["assistant"]:
        raise CorpusError(
            f"{place}: the prompt ends with an answer",
            why=f"its message {len(roles)} is of assistant, and a prompt is what the assistant answers",
            fix="leave the last answer out of the prompt, or drop the row",
        )
    require_turns([*roles, "assistant"], place)


def _require_given(row: Mapping[str, Any], name: str, place: str) -> None:
    given = row.get(name)
    if not given or (isinstance(given, str) and not given.strip()):
        held = "is empty" if name in row and given is not None else "is null" if name in row else "is missing"
        raise _no_answer(place, name, why=f"its field {name!r} {held}")


def _no_answer(place: str, name: str, *, why: str) -> CorpusError:
    return CorpusError(f"{place} has no {name} answer", why=why, fix=f"write the answer into {name}, or drop the row")


def _answer(row: Mapping[str, Any], name: str, prompts: Sequence[list[dict[str, Any]]], place: str) -> dict[str, Any]:
    """The assistant's message, which may stand behind one of the prompts."""
    given = row[name]
    if isinstance(given, str):
        return {"role": "assistant", "content": _whole(given, place)}
    messages = _messages(given, place, name)
    repeated = next((len(prompt) for prompt in prompts if messages[: len(prompt)] == prompt), 0)
    messages = messages[repeated:]
    if [message["role"] for message in messages] != ["assistant"]:
        roles = ", ".join(message["role"] for message in messages) or "nobody"
        raise CorpusError(
            f"{place} has no {name} answer",
            why=f"field {name!r} holds messages of {roles} after the prompt, and an answer is one of the assistant",
            fix="put what comes before the last answer into the prompt, or drop the row",
        )
    if says_nothing(messages[0]):
        raise _no_answer(place, name, why=f"the message in its field {name!r} says nothing")
    return messages[0]


def _require_words(answer: Mapping[str, Any], name: str, place: str) -> None:
    if not answer["content"].strip():
        raise CorpusError(
            f"{place} has no words to judge in its {name} answer",
            why="its message has no content, such as a call of a tool alone, and rewards: gsm8k and rewards: model"
            " read content",
            fix="drop the row, or take the rewards from the data",
        )


def _rewards(row: Mapping[str, Any], place: str) -> list[float]:
    """The rewards of the chosen and the rejected answer."""
    fields = next((pair for pair in _REWARDS if any(field in row for field in pair)), _REWARDS[0])
    rewards = []
    for field, name in zip(fields, _ANSWERS, strict=True):
        given = row.get(field)
        if isinstance(given, bool) or not isinstance(given, int | float) or not abs(given) <= LARGEST_REWARD:
            held = "is missing" if field not in row else f"holds {'null' if given is None else repr(given)[:40]}"
            raise CorpusError(
                f"{place} has no reward for its {name} answer",
                why=f"its field {field!r} {held}; a reward is a number of at most {LARGEST_REWARD:.0e}",
                fix=f"write such numbers into {fields[0]} and {fields[1]}, set rewards: model, or use kind: dpo",
            )
        rewards.append(float(given))
    return rewards


def _reference(row: Mapping[str, Any], place: str) -> str:
    given = row.get(_REFERENCE)
    if isinstance(given, int | float) and not isinstance(given, bool):
        given = str(given)
    if not isinstance(given, str) or not given.strip():
        raise CorpusError(
            f"{place} has no answer to compare with",
            why=f"rewards: gsm8k reads it from field {_REFERENCE!r}",
            fix=f"write the right answer into {_REFERENCE}, or drop the row",
        )
    if last_number(given) is None:
        raise CorpusError(
            f"{place} has no number to compare with",
            why=f"rewards: gsm8k compares numbers, and field {_REFERENCE!r} holds {given[:40]!r}",
            fix=f"write the right number into {_REFERENCE}, or drop the row",
        )
    return given


def _whole(text: str, place: str) -> str:
    if (at := half_pair(text)) is not None:
        raise CorpusError(
            f"{place} holds half a character",
            why=f"{ascii(text[at])[1:-1]} is half of a surrogate pair, which no text can hold",
            fix="correct or drop that line; it was most often cut in the middle of an emoji",
        )
    return text
