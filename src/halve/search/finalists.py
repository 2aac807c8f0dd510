"""From many candidates to a few finalists, of several depths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from halve.cut.trial import Tried
from halve.search.space import is_part

DEPTHS: Final = 3
"""Finalists are of so many numbers of layers at least, where the candidates are."""


def choose_finalists(tried: Sequence[Tried], count: int, *, depths: int = DEPTHS) -> list[Tried]:
    """The candidates with the lowest KL, the best first, of at least so many numbers of layers where there are as many.

    First come the best of each of the best `depths` numbers of layers, then the best of all others. A part of a better
    shape, which has no larger axis, comes after all that are none: it is there for its depth, or where nothing else is.

    >>> from halve.anatomy import Arch
    >>> sizes = dict(hidden=8, ffn=8, heads=2, kv_heads=2, head_dim=4, vocab=9)
    >>> def made(layers, ffn, kl):
    ...     return Tried(Arch.of({**sizes, "layers": layers, "ffn": ffn}), tuple(range(layers)), kl)
    >>> tried = [made(4, 8, 1.0), made(4, 7, 1.1), made(4, 6, 1.2), made(3, 8, 1.5), made(2, 8, 2.0), made(1, 8, 9.0)]
    >>> [(shape.arch.layers, shape.kl) for shape in choose_finalists(tried, 4)]
    [(4, 1.0), (4, 1.1), (3, 1.5), (2, 2.0)]
    >>> tried += [made(3, 9, 1.6), made(2, 10, 2.5)]
    >>> [(shape.arch.layers, shape.kl) for shape in choose_finalists(tried, 3)]
    [(4, 1.0), (3, 1.6), (2, 2.5)]
    """
    order = _parts_last(sorted(tried, key=lambda shape: shape.kl))
    best_of: dict[int, Tried] = {}
    for shape in order:
        best_of.setdefault(shape.arch.layers, shape)
    first = list(best_of.values())[: min(depths, count)]
    others = [shape for shape in order if shape not in first]
    return sorted([*first, *others[: count - len(first)]], key=lambda shape: shape.kl)


def _parts_last(order: Sequence[Tried]) -> list[Tried]:
    """The same shapes, the best first, and behind all others those that are parts of better ones."""
    different: list[Tried] = []
    for shape in order:
        if not any(is_part(shape.arch, better.arch) for better in different):
            different.append(shape)
    return [*different, *(shape for shape in order if shape not in different)]
