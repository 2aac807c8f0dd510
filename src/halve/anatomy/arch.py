"""The sizes of a model, and everything that can be counted from them without weights.

Counts come from the anatomy: a parameter's size is the product of its expressions. A count takes microseconds,
so that a search can look at thousands of candidates a second.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from itertools import product
from math import prod

from halve.anatomy.axes import Expr


@dataclass(frozen=True)
class Arch:
    """The sizes of a model: one number for each axis."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @classmethod
    def of(cls, sizes: Mapping[str, int]) -> Arch:
        """From a mapping with at least the seven axes."""
        return cls(**{field.name: sizes[field.name] for field in fields(cls)})

    @property
    def sizes(self) -> dict[str, int]:
        """As a mapping from axis to size."""
        return asdict(self)

    def at(self, **sizes: int) -> Arch:
        """The same with some sizes replaced."""
        return replace(self, **sizes)

    def __str__(self) -> str:
        return (
            f"layers {self.layers}, hidden {self.hidden}, ffn {self.ffn}, "
            f"heads {self.heads}/{self.kv_heads} x {self.head_dim}, vocab {self.vocab}"
        )


@dataclass(frozen=True)
class Counts:
    """What a model with these sizes costs.

    `active_params` counts only the experts that a token goes through. `flops_per_token` is for one forward pass at the
    given context: twice the active entries of every matrix, including the head, plus the two products of causal
    attention over half of the context on average, in layers that have a cache. The cache is what the family's own code
    stores for a token, in 16-bit numbers: keys and values, or what takes their place. A layer with a sliding window
    counts as if its window were not full yet. States of a fixed size are left out. The cache is None if the code does
    not show it.
    """

    params: int
    non_embedding: int
    active_params: int
    flops_per_token: int
    kv_cache_bytes_per_token: int | None
    weight_bytes: int


Shape = tuple[Expr, ...]

Polynomial = tuple[tuple[int, tuple[str, ...]], ...]
"""A sum of products of axes, each with how often it occurs."""


@dataclass(frozen=True)
class TokenCache:
    """What a layer caches for a token, and for how many tokens at most."""

    entries: Expr
    """How many numbers."""
    window: int | None = None
    """How many of the latest tokens a layer with a sliding window attends to; None if it attends to all."""

    def tokens(self, context: int) -> int:
        """To how many tokens the last one of a context attends."""
        return context if self.window is None else min(context, self.window)


@dataclass(frozen=True)
class Layer:
    """The weights of one layer: each distinct shape and how often it occurs, also for matrices and routed experts."""

    shapes: tuple[tuple[Shape, int], ...]
    matrices: tuple[tuple[Shape, int], ...]
    experts: tuple[tuple[Shape, int], ...] = ()
    cache: TokenCache | None = None
    """What it caches for a token; None if the code does not show it."""

    @classmethod
    def of(
        cls, shapes: Sequence[Shape], *, matrices: Sequence[Shape], experts: Sequence[Shape], cache: TokenCache | None
    ) -> Layer:
        """Count equal shapes once."""
        all_of, products, routed = (tuple(Counter(part).items()) for part in (shapes, matrices, experts))
        return cls(all_of, products, routed, cache)


@dataclass(frozen=True)
class Ledger:
    """Everything that counting needs of an anatomy."""

    layers: tuple[Layer, ...]
    outside: tuple[Shape, ...]
    """Weights outside the layers that are not embeddings, such as the final norm."""
    embeddings: tuple[Shape, ...]
    """Input, position and output embeddings. A tied table is listed once."""
    head: Shape
    routed_share: float = 1.0
    """The share of the experts' weights that a token goes through."""

    @cached_property
    def kinds(self) -> tuple[int, ...]:
        """For every layer the first that counts alike: to compare layers takes longer than to count them."""
        firsts: dict[Layer, int] = {}
        return tuple(firsts.setdefault(layer, number) for number, layer in enumerate(self.layers))

    @cached_property
    def of_kinds(self) -> dict[int, tuple[Polynomial, Polynomial, Polynomial]]:
        """Of each kind of layer all weights, matrices and routed experts."""
        kinds = {number: self.layers[number] for number in self.kinds}
        return {n: (_expanded(k.shapes), _expanded(k.matrices), _expanded(k.experts)) for n, k in kinds.items()}

    @cached_property
    def of_others(self) -> tuple[Polynomial, Polynomial, Polynomial]:
        """What is outside of layers: norms and the like, embeddings, the head."""
        outside, embeddings = (_expanded([(shape, 1) for shape in part]) for part in (self.outside, self.embeddings))
        return outside, embeddings, _expanded([(self.head, 1)])

    def count(
        self,
        arch: Arch,
        *,
        kept_layers: Sequence[int] | None = None,
        context: int = 4096,
        weight_bits: int = 16,
    ) -> Counts:
        """Count a model of these sizes whose layers are the given ones (default: the first ones).

        >>> from halve.anatomy import discover
        >>> from transformers import LlamaConfig
        >>> ledger = discover(LlamaConfig()).ledger
        >>> ledger.count(Arch(32, 4096, 11008, 32, 32, 128, 32000)).params
        6738415616
        """
        sizes = arch.sizes
        numbers = self.kinds[: arch.layers] if kept_layers is None else [self.kinds[i] for i in kept_layers]
        kinds = list(Counter(numbers).items())
        expanded = [(self.of_kinds[number], times) for number, times in kinds]
        in_layers, matrices, expert = (
            sum(times * _value(of_layer[part], sizes) for of_layer, times in expanded) for part in range(3)
        )
        outside, embedding, head = (_value(part, sizes) for part in self.of_others)
        caches = [
            (cache.entries.size(sizes) if (cache := self.layers[number].cache) else None, times)
            for number, times in kinds
        ]
        attending = sum(times for entries, times in caches if entries != 0)
        attention = 2 * attending * context * arch.heads * arch.head_dim
        params = in_layers + outside + embedding
        idle = round((1 - self.routed_share) * expert)
        return Counts(
            params=params,
            non_embedding=in_layers + outside,
            active_params=params - idle,
            flops_per_token=2 * (matrices + expert - idle + head) + attention,
            kv_cache_bytes_per_token=_cache_bytes(caches),
            weight_bytes=params * weight_bits // 8,
        )


def _expanded(shapes: Sequence[tuple[Shape, int]]) -> Polynomial:
    """The entries of all these weights together; a search works them out at thousands of sizes.

    >>> _expanded([((Expr.parse("heads head_dim + 2"), Expr.parse("hidden")), 3)])
    ((3, ('head_dim', 'heads', 'hidden')), (6, ('hidden',)))
    """
    counts: Counter[tuple[str, ...]] = Counter()
    for shape, times in shapes:
        for terms in product(*(expr.terms for expr in shape)):
            factors = [factor for term in terms for factor in term]
            axes = tuple(sorted(factor for factor in factors if isinstance(factor, str)))
            counts[axes] += times * prod(factor for factor in factors if isinstance(factor, int))
    return tuple((count, axes) for axes, count in counts.items())


def _value(polynomial: Polynomial, sizes: Mapping[str, int]) -> int:
    return sum(count * prod(sizes[axis] for axis in axes) for count, axes in polynomial)


def _cache_bytes(caches: Sequence[tuple[int | None, int]]) -> int | None:
    known = [entries * times for entries, times in caches if entries is not None]
    return 2 * sum(known) if len(known) == len(caches) else None
