"""What a step of alignment learns from, as token ids: conversations, and pairs of answers."""

from __future__ import annotations

import json
import random
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from halve.errors import CorpusError
from halve.recipe.schema import Alignment, Data
from halve.text import sources
from halve.text.conversations import MESSAGES_KEY, TOOLS, answered
from halve.text.preferences import Needs
from halve.text.rendering import CODES, COUNTED, FIRST, IDS, Chat, encode_answers, encode_conversations
from halve.text.rows import Piece, Wanted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MESSAGES = "messages"
_LISTED = "align.data"
_AT_ONCE = 64
_UNANSWERED = "have no answer of the assistant and are left out"
UNREAD = "have answers that are too long for the reward model and are left out"
_FIXES = {
    _UNANSWERED: "give conversations in which the assistant answers",
    UNREAD: "give a reward model that reads more tokens, or shorter answers",
}


class Dialogue(NamedTuple):
    """A conversation: its ids, and which of them the assistant learns to say."""

    ids: NDArray[np.int32]
    counts: NDArray[np.bool_]

    @property
    def group(self) -> Hashable:
        """Equal for equal conversations."""
        return self.ids.tobytes()


class Preference(NamedTuple):
    """Two answers to a prompt as ids, and by how much the reward of the chosen one is higher, from 0.

    `asked` is the prompt as text: its last token may be another one beside another answer, and then it is not in the
    ids of the prompt.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    gap: float = 1.0
    asked: str = ""

    @property
    def group(self) -> Hashable:
        """Equal for pairs of one prompt."""
        return self.asked


_Example = TypeVar("_Example", Dialogue, Preference)


@dataclass
class LeftOut:
    """How many rows are cut, or left out and why."""

    counts: dict[str, int] = field(default_factory=dict)

    def add(self, why: str, number: int = 1) -> None:
        """Count rows."""
        self.counts[why] = self.counts.get(why, 0) + number

    @property
    def fix(self) -> str:
        """What helps if nothing else is left."""
        reasons = [why for why, number in self.counts.items() if number]
        usual = "set a larger context in that step, or give more data"
        return _FIXES.get(reasons[0], usual) if len(reasons) == 1 else usual

    @property
    def told(self) -> str:
        """In words; empty if there are none."""
        return ", ".join(f"{number:,} {why}" for why, number in self.counts.items() if number)


def messages_field(step: Alignment, data: Data) -> str:
    """The field that holds conversations."""
    return step.messages_field or data.messages_field or _MESSAGES


def _chat(step: Alignment, data: Data) -> Chat:
    """How the conversations of a step are read."""
    of_data = step.messages_field is None and data.messages_field is not None
    return Chat(messages_field(step, data), "assistant", MESSAGES_KEY if of_data else "align.messages_field")


def wanted_of(step: Alignment, data: Data) -> Wanted:
    """What the rows of a step are read for."""
    if step.kind != "sft":
        return Needs.of(step).wanted._replace(listed=_LISTED)
    chat = _chat(step, data)
    return chat.wanted._replace(listed=_LISTED, make=partial(answered, key=chat.key))


def dialogues(
    step: Alignment, data: Data, tokenizer: PreTrainedTokenizerBase, *, context: int, left_out: LeftOut
) -> Iterator[Dialogue]:
    """The conversations of a step. One that is longer than `context` tokens is cut.

    One that has nothing to learn within them is left out. Raises `CorpusError` and `TokenizerError`.
    """
    wanted = wanted_of(step, data)
    for pieces in _chunks(piece for source in step.data for piece in sources.read_documents(source, wanted)):
        yield from dialogues_of(pieces, step, data, tokenizer, context, left_out)


def dialogues_of(
    pieces: Sequence[Piece],
    step: Alignment,
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    left_out: LeftOut,
) -> Iterator[Dialogue]:
    """The same for some rows."""
    chat = _chat(step, data)
    for dialogue in _decoded(encode_conversations(pieces, tokenizer=tokenizer, chat=chat).ids):
        if not dialogue.counts[1:].any():
            left_out.add(_UNANSWERED)
            continue
        if len(dialogue.ids) > context:
            left_out.add(f"are longer than {context} tokens and are cut")
        cut = Dialogue(dialogue.ids[:context], dialogue.counts[:context])
        if cut.counts[1:].any():
            yield cut
        else:
            left_out.add(f"say nothing to learn from within {context} tokens and are left out")


def preference_rows(step: Alignment) -> Iterator[tuple[dict[str, Any], str]]:
    """The rows of a step on preferences, and the place of each in its file. Raises `CorpusError`."""
    wanted = Needs.of(step).wanted._replace(listed=_LISTED)
    for source in step.data:
        for piece in sources.read_documents(source, wanted):
            yield json.loads(piece.text), piece.place


def encoded_pair(
    row: dict[str, Any], place: str, tokenizer: PreTrainedTokenizerBase, *, context: int, left_out: LeftOut
) -> Preference | None:
    """A row with `chosen`, `rejected` and perhaps `rewards` as ids; an answer ends at `context` tokens.

    The answer with the higher reward is the chosen one. None for a row that teaches nothing, which is counted in
    `left_out`. Raises `CorpusError` and `TokenizerError`.
    """
    better, worse = row.get("rewards", (1.0, 0.0))
    answers = [row["chosen"], row["rejected"]]
    if better < worse:
        better, worse, answers = worse, better, answers[::-1]
    prompt, (chosen, rejected) = encode_answers(tokenizer, row["prompt"], answers, tools=row.get(TOOLS), place=place)
    room = context - len(prompt)
    if room <= 0:
        left_out.add(f"have a prompt of over {context} tokens and are left out")
        return None
    if chosen[:room] == rejected[:room]:
        left_out.add(f"have the same answer twice within {context} tokens and are left out")
        return None
    if max(len(chosen), len(rejected)) > room:
        left_out.add(f"are longer than {context} tokens and are cut")
    asked = json.dumps(row["prompt"], sort_keys=True)
    return Preference(prompt, chosen[:room], rejected[:room], better - worse, asked)


def largest_id(examples: Iterable[Dialogue | Preference]) -> int:
    """The largest id in these examples."""
    most = -1
    for example in examples:
        parts = [example.ids] if isinstance(example, Dialogue) else example[:3]
        most = max([most, *(int(max(part)) for part in parts if len(part))])
    return most


def parted(
    examples: Sequence[_Example], heldout: int, *, seed: int
) -> tuple[list[_Example], list[_Example], list[_Example]]:
    """Examples to train on, held-out ones, and those that are neither, in their order.

    `heldout` groups are drawn, at most a tenth of them. One example of each is held out. The others of its group would
    be no independent ones, and the training must not see them. A group with over a tenth of all examples is not drawn:
    the training would lose too much.
    """
    groups: dict[Hashable, list[int]] = {}
    for i, example in enumerate(examples):
        groups.setdefault(example.group, []).append(i)
    small = [group for group in groups.values() if 10 * len(group) <= len(examples)]
    draw = random.Random(seed)
    drawn = draw.sample(small, min(heldout, len(groups) // 10, len(small)))
    kept = {draw.choice(group) for group in drawn}
    beside = {i for group in drawn for i in group} - kept
    train = [example for i, example in enumerate(examples) if i not in kept and i not in beside]
    return train, [examples[i] for i in sorted(kept)], [examples[i] for i in sorted(beside)]


def require_examples(count: int, left_out: LeftOut, what: str) -> None:
    """Raise `CorpusError` if nothing is left to learn from."""
    if not count:
        raise CorpusError(
            f"no {what} is left to learn from",
            why=left_out.told or "the data have none",
            fix=left_out.fix,
        )


def _chunks(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    while chunk := list(islice(pieces, _AT_ONCE)):
        yield chunk


def _decoded(data: bytes) -> Iterator[Dialogue]:
    """The conversations of a part of a token file (see `text.rendering`)."""
    codes = np.frombuffer(data, dtype=CODES)
    for part in np.split(codes, np.flatnonzero(codes & FIRST)[1:]):
        yield Dialogue((part & IDS).astype(np.int32), (part & COUNTED) > 0)
