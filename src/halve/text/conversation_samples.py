"""Samples of conversations: whole ones that never read one another, and which of their tokens are predicted.

Each conversation is a sample of its own, with padding behind it. Causal attention never looks ahead, so that in every
family the states of the conversation are those that it has alone; nothing is predicted from padding, or of it. Packed,
a sample holds as many whole conversations as fit, and positions begin anew with each (see `documents.require_apart`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from numpy.typing import NDArray
from torch import Tensor

from halve.errors import CorpusError
from halve.progress import Progress
from halve.text.batch import Batch
from halve.text.corpus import Samples, Tokens, spread_by_seed
from halve.text.rendering import CODES, COUNTED, FIRST, IDS
from halve.text.tokenize import Separator

_CHUNK = 1 << 24  # tokens that are looked at together
_FEWEST = 3  # samples that calibration gets where there are as many conversations: a trial takes no fewer


class _Found(NamedTuple):
    """Conversations of a token file: where each begins, how many tokens it has, and after how many the first counts."""

    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    counted: NDArray[np.int64]


@dataclass(frozen=True)
class Conversations(Samples):
    """Conversations as samples of `context` tokens; see `corpus.Samples` for their order.

    One that is longer is cut at `context` tokens. One that has no counted token within them is left out. `packed` puts
    whole conversations together, in the order of the text.

    Raises `CorpusError` where no conversation is left.
    """

    packed: bool = False

    def __post_init__(self) -> None:
        assert self.tokens.chat
        assert self.separator is None
        if not len(self):
            raise CorpusError(
                "no conversation has a token to learn from",
                why=f"within {self.context} tokens none of {len(self._found.starts):,} has one that counts",
                fix="set a larger data.context, or data.count: all, or give conversations with answers",
            )

    def __len__(self) -> int:
        return len(self._begins) - 1

    @property
    def cut(self) -> int:
        """How many of the conversations are cut."""
        return int((self._found.lengths[self._useful] > self.context).sum())

    @property
    def left_out(self) -> int:
        """How many conversations have nothing to learn from."""
        return len(self._found.starts) - len(self._useful)

    @property
    def told(self) -> str:
        """What became of them, in words; empty where all are there whole."""
        parts = []
        if self.cut:
            parts.append(f"{self.cut:,} are longer than {self.context} tokens and are cut")
        if self.left_out:
            parts.append(f"{self.left_out:,} have no token that counts within {self.context} and are left out")
        return f"of {len(self._found.starts):,} conversations {', '.join(parts)}" if parts else ""

    def numbered(self, numbers: Sequence[int]) -> Batch:
        """Samples by their place, as a batch."""
        rows = list(self._rows(numbers))
        ids, predicted, attended, places = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
        return Batch(ids, tuple(numbers), places if self.packed else None, predicted, attended)

    def take(self, indices: Iterable[int]) -> Int64[Tensor, "samples context"]:
        """Samples by their place; padding is token 0."""
        return self.numbered(list(indices)).ids

    @property
    def calibration_length(self) -> int:
        """Of all lengths the one that gives the most tokens if each conversation of at least that length is cut to it.

        One or two long conversations do not set it: the others would be lost, and statistics over samples with them.
        Calibration takes samples of one length without padding: every token of theirs is one of a conversation.
        """
        assert not self.packed
        sorted_N = np.sort(self._kept)[::-1]
        tokens_N = sorted_N * np.arange(1, len(sorted_N) + 1)
        few = min(_FEWEST, len(sorted_N)) - 1
        return int(sorted_N[few + tokens_N[few:].argmax()])

    def calibration(self, num_samples: int, length: int | None = None) -> Int64[Tensor, "samples length"]:
        """The first `length` tokens of conversations that have as many, one of each of as many equal strips."""
        length = self.calibration_length if length is None else length
        long = np.flatnonzero(self._kept >= length)
        return self.take(long[spread_by_seed(len(long), num_samples, self.seed)].tolist())[:, :length]

    # ---- where conversations are

    @cached_property
    def _found(self) -> _Found:
        """Look through the token file once."""
        starts_C: list[NDArray[np.int64]] = []
        counted: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
        known = 0
        for low in range(0, self.tokens.count, _CHUNK):
            codes = np.asarray(self.tokens.ids[low : low + _CHUNK])
            starts_C.append(np.flatnonzero(codes & FIRST) + low)
            known += len(starts_C[-1])
            places = np.flatnonzero(codes & COUNTED) + low
            owners = np.searchsorted(np.concatenate(starts_C), places, side="right") - 1
            conversations, first = np.unique(owners, return_index=True)
            counted.append((conversations, places[first]))
        starts_N = np.concatenate(starts_C) if starts_C else np.empty(0, dtype=np.int64)
        lengths_N = np.diff(starts_N, append=self.tokens.count)
        counted_N = lengths_N.copy()  # where nothing counts: behind the last
        for conversations, places in reversed(counted):  # the earliest stands
            counted_N[conversations] = places - starts_N[conversations]
        return _Found(starts_N, lengths_N, counted_N)

    @cached_property
    def _useful(self) -> NDArray[np.int64]:
        """Which conversations have a prediction that counts."""
        conversations = self._found
        return np.flatnonzero(conversations.counted < np.minimum(conversations.lengths, self.context))

    @cached_property
    def _kept(self) -> NDArray[np.int64]:
        """How many tokens of each useful conversation are kept."""
        return np.minimum(self._found.lengths[self._useful], self.context)

    @cached_property
    def _begins(self) -> NDArray[np.int64]:
        """The first useful conversation of each sample, and behind the last one how many there are."""
        if not self.packed:
            return np.arange(len(self._useful) + 1)
        begins, room = [], 0
        for number, size in enumerate(self._kept.tolist()):
            if size > room:
                begins.append(number)
                room = self.context
            room -= size
        return np.array([*begins, len(self._useful)], dtype=np.int64)

    def _rows(self, numbers: Iterable[int]) -> Iterator[tuple[NDArray[np.generic], ...]]:
        """Of each sample: ids, which tokens but the first are predicted, which are there, and places."""
        with self.tokens.path.open("rb", buffering=0) as file:
            for number in numbers:
                codes = np.zeros(self.context, dtype=CODES)
                attended = np.zeros(self.context, dtype=np.bool_)
                places = np.zeros(self.context, dtype=np.int64)
                at = 0
                for which in range(self._begins[number], self._begins[number + 1]):
                    size = int(self._kept[which])
                    file.seek(int(self._found.starts[self._useful[which]]) * CODES.itemsize)
                    codes[at : at + size] = np.frombuffer(file.read(size * CODES.itemsize), dtype=CODES)
                    places[at : at + size] = np.arange(size)
                    at += size
                attended[:at] = True
                places[at:] = np.arange(self.context - at)
                yield (codes & IDS).astype(np.int64), (codes[1:] & COUNTED) > 0, attended, places


def samples_of(
    tokens: Tokens, context: int, seed: int, *, separator: Separator | None = None, apart: bool = False, stream: int = 0
) -> Samples:
    """The samples of a token file. `apart`: attention ends at documents; conversations are packed then."""
    if tokens.chat:
        return Conversations(tokens, context, seed, None, stream, packed=apart)
    return Samples(tokens, context, seed, separator if apart else None, stream)


def say_cut(progress: Progress, name: str, samples: Samples) -> None:
    """Say how many conversations are cut or left out."""
    if isinstance(samples, Conversations) and samples.told:
        progress.say(f"{name}: {samples.told}")
