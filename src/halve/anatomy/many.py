"""The counts of many shapes at once: the polynomials of `Ledger.count` on arrays of sizes.

A shape of a grid is a number of layers and a width. What one layer of each kind costs is worked out once for all
widths. A number of layers only adds them up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt

from halve.anatomy.arch import Ledger, Polynomial, TokenCache

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ManyCounts:
    """`Counts` of one number of layers for every width; the arrays have the widths' shape."""

    params: Integers
    non_embedding: Integers
    active_params: Integers
    flops_per_token: Integers


@dataclass(frozen=True, eq=False)
class Tabulated:
    """What one layer of each kind costs at every width, and what is outside of layers."""

    ledger: Ledger
    sizes: Mapping[str, Integers]
    of_kinds: Mapping[int, tuple[Integers, Integers, Integers]]
    """Of each kind of layer all weights, matrices and routed experts."""
    of_others: tuple[Integers, Integers, Integers]
    """What is outside of layers: norms and the like, embeddings, the head."""

    @classmethod
    def of(cls, ledger: Ledger, sizes: Mapping[str, Integers]) -> Tabulated:
        """Sizes of all axes but layers, as arrays that broadcast to the shape of the widths."""
        kinds = {
            number: (_values(parts[0], sizes), _values(parts[1], sizes), _values(parts[2], sizes))
            for number, parts in ledger.of_kinds.items()
        }
        outside, embeddings, head = (_values(part, sizes) for part in ledger.of_others)
        return cls(ledger, sizes, kinds, (outside, embeddings, head))

    def counts(self, layers: int, *, context: int = 4096) -> ManyCounts:
        """Of models with the first `layers` layers, what `Ledger.count` gives for each.

        >>> from halve.anatomy import discover
        >>> from transformers import LlamaConfig
        >>> ledger = discover(LlamaConfig()).ledger
        >>> one = {"heads": 32, "kv_heads": 32, "head_dim": 128, "vocab": 32000, "hidden": 4096}
        >>> sizes = {**{axis: np.array([size]) for axis, size in one.items()}, "ffn": np.array([11008, 128])}
        >>> Tabulated.of(ledger, sizes).counts(32).params.tolist()
        [6738415616, 2460225536]
        """
        numbers = Counter(self.ledger.kinds[:layers])
        in_layers, matrices, expert = (
            sum((times * self.of_kinds[number][part] for number, times in numbers.items()), start=np.int64(0))
            for part in range(3)
        )
        outside, embeddings, head = self.of_others
        caches = [(self.ledger.layers[number].cache, times) for number, times in numbers.items()]
        attending = sum(times for cache, times in caches if cache is None or np.any(self._entries(cache) != 0))
        attention = 2 * attending * context * self.sizes["heads"] * self.sizes["head_dim"]
        params = in_layers + outside + embeddings
        idle = np.rint((1 - self.ledger.routed_share) * expert).astype(np.int64)
        return ManyCounts(
            params=params,
            non_embedding=in_layers + outside,
            active_params=params - idle,
            flops_per_token=2 * (matrices + expert - idle + head) + attention,
        )

    def cached_numbers(self, layers: int, *, context: int) -> Integers | None:
        """How many numbers the first `layers` layers cache while the last token of one context is computed.

        A layer with a sliding window caches the tokens of its window alone. States of a fixed size are left out. None
        if the code does not show what it caches.
        """
        total = np.zeros((), dtype=np.int64)
        for number, times in Counter(self.ledger.kinds[:layers]).items():
            cache = self.ledger.layers[number].cache
            if cache is None:
                return None
            total = total + times * cache.tokens(context) * self._entries(cache)
        return total

    def _entries(self, cache: TokenCache) -> Integers:
        return _values(tuple((_number(term), _axes(term)) for term in cache.entries.terms), self.sizes)


def _number(term: tuple[str | int, ...]) -> int:
    return prod(factor for factor in term if isinstance(factor, int))


def _axes(term: tuple[str | int, ...]) -> tuple[str, ...]:
    return tuple(factor for factor in term if isinstance(factor, str))


def _values(polynomial: Polynomial, sizes: Mapping[str, Integers]) -> Integers:
    total = np.zeros((), dtype=np.int64)
    for count, axes in polynomial:
        total = total + count * prod((sizes[axis] for axis in axes), start=np.int64(1))
    return np.asarray(total, dtype=np.int64)
