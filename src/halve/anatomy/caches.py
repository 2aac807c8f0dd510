"""What a token adds to the cache of each layer, found by running the family's own code.

The model runs once on the meta device, where tensors have shapes but nothing is computed. What grows with the text is
counted: keys and values of any number of heads, latent vectors, or nothing in a layer with a recurrent state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from halve.anatomy.arch import Arch, Shape, TokenCache
from halve.anatomy.axes import Expr
from halve.anatomy.configs import build, quiet, resized
from halve.anatomy.solve import expression, small, system

_SEQ = 3  # shorter than every window and state of a twin
Seen = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Cached:
    """What one token adds in one layer: how many numbers in total, and the heads and the width of its keys."""

    entries: int
    heads: int
    width: int
    names: frozenset[str]
    """The tensors of the layer's cache that grow with the text."""
    window: int | None = None
    """How many of the latest tokens it attends to, if not all."""

    @classmethod
    def of(cls, short: Seen, long: Seen, window: int | None) -> Cached:
        """From the shapes of a layer's cache after one token less, and after one more."""
        names = frozenset(name for name in long if name in short and long[name] != short[name])
        keys = long["keys"] if "keys" in names and len(long["keys"]) == 4 else (0, 0, 0, 0)
        return cls(_entries(long, names), keys[1], keys[3], names, window)


def cached(config: PretrainedConfig, layers: Sequence[int]) -> tuple[Cached, ...] | None:
    """What each of these layers caches for a token; None if the code has no cache that can be read.

    A sliding window is not full after these few tokens; its length is noted. States that do not grow with the text are
    not counted.
    """
    try:
        model = build(resized(config, {}, kept_layers=layers), device="meta")
        short, long = (_after(model, len(layers), seq) for seq in (_SEQ - 1, _SEQ))
    except Exception:  # the family's own code may raise anything on tensors without values
        return None
    return tuple(
        Cached.of(_tensors(before), _tensors(after), _window(after)) for before, after in zip(short, long, strict=True)
    )


def cache_exprs(
    config: PretrainedConfig, layers: Sequence[int], found: Sequence[Cached], sizes: Arch, *, coupled: bool
) -> list[TokenCache]:
    """The same as sums of products of axes, one for each layer. A number that no sum explains stays a number."""
    points, monomials, matrix = system(config, coupled=coupled)
    try:
        twins = [build(small(config, point, tuple(layers)), device="meta") for point in points]
        shapes = [[_tensors(layer) for layer in _after(twin, len(layers), _SEQ)] for twin in twins]
    except Exception:
        shapes = []
    exprs = []
    for index, cache in enumerate(found):
        lengths = tuple(_entries(twin[index], cache.names) for twin in shapes)
        solved = expression(lengths, matrix, monomials) if shapes else None
        same = solved is not None and solved.size(sizes.sizes) == cache.entries
        entries = solved if solved is not None and same else Expr(((cache.entries,),))
        exprs.append(TokenCache(entries, cache.window))
    return exprs


def heads_as_cached(sizes: Arch, exprs: Mapping[str, Shape | None], cached: Sequence[Cached]) -> Arch:
    """The sizes with as many key-value heads as the code caches, if no weight is made of the config's groups."""
    if not exprs or any("kv_heads" in expr.axes for shape in exprs.values() for expr in shape or ()):
        return sizes
    widths = {(cache.heads, cache.width) for cache in cached if cache.entries}
    return sizes.at(kv_heads=1 if widths == {(1, sizes.head_dim)} else sizes.heads)


def _entries(shapes: Seen, names: frozenset[str]) -> int:
    return sum(prod(shapes.get(name, (0,))) for name in names) // _SEQ


def _after(model: PreTrainedModel, layers: int, seq: int) -> list[Mapping[str, object]]:
    """What each layer's cache holds after so many tokens; layers without a cache hold nothing."""
    ids = torch.zeros(1, seq, dtype=torch.int64, device="meta")
    model.config._attn_implementation = "eager"
    model.config._experts_implementation = "batched_mm"  # the one that needs no values
    with torch.no_grad(), quiet():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    caches = [vars(layer) for layer in cache.layers] + [{}] * (layers - len(cache.layers))
    assert len(caches) == layers, "one entry a layer"
    return caches


def _tensors(layer: Mapping[str, object]) -> Seen:
    return {name: tuple(value.shape) for name, value in layer.items() if isinstance(value, Tensor)}


def _window(layer: Mapping[str, object]) -> int | None:
    window = layer.get("sliding_window")
    return window if isinstance(window, int) else None
