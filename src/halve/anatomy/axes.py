"""The closed vocabulary of axes, expressions over it, and their index arithmetic.

An expression says what one dimension of a weight is made of, outermost factor first:

    hidden                                   one entry per channel
    heads head_dim                           a head's channels are neighbors
    heads 3 head_dim                         q, k, v interleaved per head (GPT-NeoX)
    heads head_dim + kv_heads head_dim       blocks one after another

>>> expr = Expr.parse("heads head_dim + 2")
>>> expr.size({"heads": 3, "head_dim": 2})
8
>>> expr.indices({"heads": 3, "head_dim": 2}, {"heads": [0, 2]}).tolist()
[0, 1, 4, 5, 6, 7]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, get_args

import torch
from torch import Tensor

Axis = Literal["layers", "hidden", "ffn", "heads", "kv_heads", "head_dim", "vocab", "experts", "expert_ffn"]
AXES: tuple[Axis, ...] = get_args(Axis)
CUT_AXES: tuple[Axis, ...] = ("layers", "hidden", "ffn", "heads", "kv_heads")

Factor = str | int
Term = tuple[Factor, ...]


@dataclass(frozen=True)
class Expr:
    """A sum of products of axes and integers; the order is the memory layout."""

    terms: tuple[Term, ...]

    @classmethod
    def parse(cls, text: str) -> Expr:
        """Read `"heads head_dim + 2 ffn"`; an unknown word is a `ValueError`."""
        terms = tuple(tuple(_factor(word) for word in term.split()) for term in text.split("+"))
        if not all(terms):
            raise ValueError(f"an empty term in {text!r}")
        return cls(terms)

    def __str__(self) -> str:
        return " + ".join(" ".join(str(factor) for factor in term) for term in self.terms)

    @property
    def axes(self) -> frozenset[str]:
        """The axes that this dimension is made of."""
        return frozenset(factor for term in self.terms for factor in term if isinstance(factor, str))

    def size(self, sizes: Mapping[str, int]) -> int:
        """The length of the dimension at the given sizes."""
        return sum(prod(f if isinstance(f, int) else sizes[f] for f in term) for term in self.terms)

    def indices(self, sizes: Mapping[str, int], kept: Mapping[str, Sequence[int] | Tensor]) -> Tensor:
        """The entries of this dimension that survive when only `kept` entries of some axes do.

        Order follows `kept`, so a permutation of an axis gives the permutation of the dimension. int64, 1-D.
        """
        parts, offset = [], 0
        for term in self.terms:
            index = torch.zeros(1, dtype=torch.int64)
            for factor in term:
                length = _length(factor, sizes)
                entries = kept.get(factor) if isinstance(factor, str) else None
                chosen = torch.arange(length) if entries is None else torch.as_tensor(entries, dtype=torch.int64)
                index = (index[:, None] * length + chosen[None, :]).flatten()
            parts.append(index + offset)
            offset += prod(_length(factor, sizes) for factor in term)
        return torch.cat(parts)


def _factor(word: str) -> Factor:
    if word.isdigit():
        return int(word)
    if word not in AXES:
        raise ValueError(f"unknown axis {word!r}; known: {', '.join(AXES)}")
    return word


def _length(factor: Factor, sizes: Mapping[str, int]) -> int:
    return factor if isinstance(factor, int) else sizes[factor]
