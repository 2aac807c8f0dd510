"""Baselines for the demo's teacher: a 5-gram model and a general-purpose compressor.

Both see the same training text as the teacher and are measured in bits on the same held-out text.
"""

from __future__ import annotations

import lzma
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Keys = NDArray[np.uint64]


@dataclass(frozen=True)
class NGramOrder:
    """The n-grams of one order, sorted by key, their counts, and the sums that their contexts need."""

    grams: Keys
    counts: NDArray[np.int64]
    contexts: Keys
    totals: NDArray[np.int64]  # of the counts of a context's n-grams
    kinds: NDArray[np.int64]  # how many n-grams a context has
    discount: float


@dataclass(frozen=True)
class NGram:
    """An interpolated Kneser-Ney model of ids below `vocab`."""

    vocab: int
    levels: tuple[NGramOrder, ...]

    def bits(self, ids: Sequence[int] | NDArray[Any]) -> NDArray[np.float64]:
        """-log2 p of every id but the first `order - 1`, given those before it.

        With c the counts of an order, D its discount and N the number of distinct continuations,

            p_n(w | h) = max(c(hw) - D, 0) / c(h.) + D N(h.) / c(h.) * p_{n-1}(w | h')

        down to p_0 = 1 / vocab; h' is h without its oldest id. For an unseen h, p_n = p_{n-1}.
        """
        stream = np.asarray(ids, dtype=np.int64)
        order = len(self.levels)
        num = len(stream) - order + 1
        p = np.full(num, 1.0 / self.vocab)
        for n, level in enumerate(self.levels, 1):
            keys = _keys(stream, n, self.vocab)[-num:]
            contexts = keys // np.uint64(self.vocab)
            total = _look_up(level.contexts, level.totals, contexts)
            kinds = _look_up(level.contexts, level.kinds, contexts)
            count = _look_up(level.grams, level.counts, keys)
            seen = np.maximum(total, 1)
            mixed = np.maximum(count - level.discount, 0) / seen + level.discount * kinds / seen * p
            p = np.where(total > 0, mixed, p)
        bits: NDArray[np.float64] = -np.log2(p)
        return bits


def fit(ids: Sequence[int] | NDArray[Any], *, vocab: int, order: int = 5) -> NGram:
    """Fit interpolated Kneser-Ney (Kneser and Ney 1995; Chen and Goodman 1999, Sec. 2.7) to a stream of ids.

    The highest order counts occurrences. Each lower order counts the distinct ids that precede an n-gram. Each order
    has one discount, D = n1 / (n1 + 2 n2), from the numbers of n-grams that are counted once and twice. It is 1/2 if n1
    = 0.
    """
    assert vocab**order < 2**64, "n-grams are numbered in 64 bits"
    stream = np.asarray(ids, dtype=np.int64)
    levels: list[NGramOrder] = []
    grams, counts = np.unique(_keys(stream, order, vocab), return_counts=True)
    for n in range(order, 0, -1):
        contexts, start, kinds = np.unique(grams // np.uint64(vocab), return_index=True, return_counts=True)
        once, twice = int((counts == 1).sum()), int((counts == 2).sum())
        levels.append(
            NGramOrder(
                grams=grams,
                counts=counts.astype(np.int64),
                contexts=contexts,
                totals=np.add.reduceat(counts, start).astype(np.int64),
                kinds=kinds.astype(np.int64),
                discount=once / (once + 2 * twice) if once else 0.5,  # 0 would leave nothing for the unseen
            )
        )
        if n > 1:
            grams, counts = np.unique(grams % np.uint64(vocab ** (n - 1)), return_counts=True)
    return NGram(vocab=vocab, levels=tuple(reversed(levels)))


def xz_bits(text: bytes, *, after: bytes = b"") -> int:
    """Bits that `xz -9e` needs for `text` after `after`, whose matches it may use."""
    alone = 8 * len(_xz(after)) if after else 0
    return 8 * len(_xz(after + text)) - alone


def _xz(data: bytes) -> bytes:
    return lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)


def _keys(stream: Ids, n: int, vocab: int) -> Keys:
    """Every sequence of n ids as one number, with the oldest id first."""
    num = len(stream) - n + 1
    keys = np.zeros(num, dtype=np.uint64)
    for place in range(n):
        keys = keys * np.uint64(vocab) + stream[place : place + num].astype(np.uint64)
    return keys


def _look_up(known: Keys, values: NDArray[np.int64], keys: Keys) -> NDArray[np.int64]:
    at = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return np.where(known[at] == keys, values[at], 0)
