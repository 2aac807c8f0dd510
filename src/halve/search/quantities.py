"""What shapes cost, exactly and without weights: every quantity that a budget can bound, for all widths of a space.

Arrays are [W, F]: choices of hidden and heads, choices of ffn (see `space`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from halve.anatomy import Anatomy, Arch
from halve.anatomy.many import Integers
from halve.cut.plan.sizes import format_count
from halve.errors import PlanError
from halve.process.waits import bytes_in_words
from halve.recipe.searching import ByteLimits, FlopsLimits, Limits, MemoryLimits, Quantity, StoredAs, TimeLimits
from halve.search.space import Space

Reals = npt.NDArray[np.float64]
TIMED: tuple[Quantity, ...] = ("prefill_latency", "decode_latency", "throughput")
"""Quantities that are measured on the machine at hand."""
BYTES: dict[StoredAs, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


@runtime_checkable
class Clock(Protocol):
    """Times of shapes on a machine (`latency.TimeTable`)."""

    def prefill_seconds(self, space: Space, layers: int, *, batch: int, context: int) -> Reals:
        """Seconds of one forward pass over prompts of `context` tokens, for every width."""

    def decode_seconds(self, space: Space, layers: int, *, batch: int, context: int) -> Reals:
        """Seconds of one more token of every sequence after `context` tokens, for every width."""


@dataclass(frozen=True, eq=False)
class Prices:
    """The costs of all shapes of a space. `clock` is needed only for times."""

    space: Space
    clock: Clock | None = None

    def values(self, quantity: Quantity, limits: Limits, layers: int) -> Reals:
        """What a quantity is for every width with the first `layers` layers in the order of the space, [W, F].

        Counts below 2^53 are exact. Raises `PlanError` for memory if the code does not show what it caches.
        """
        if isinstance(limits, TimeLimits):
            return self._timed(quantity, limits, layers)
        table = self.space.tabulated
        context = limits.context if isinstance(limits, FlopsLimits) else 1
        counts = table.counts(layers, context=context)
        counted: dict[str, Integers] = {
            "total": counts.params,
            "non_embedding": counts.non_embedding,
            "active": counts.active_params,
            "flops": counts.flops_per_token,
        }
        if isinstance(limits, MemoryLimits):
            cached = table.cached_numbers(layers, context=limits.context)
            if cached is None:
                raise _unseen_cache(self.space.anatomy)
            numbers = counts.params + np.asarray(cached, dtype=np.float64) * limits.batch
            return self._full(numbers * BYTES[limits.dtype])
        if isinstance(limits, ByteLimits):
            return self._full(counts.params * BYTES[limits.dtype])
        return self._full(counted[quantity])

    def _full(self, values: npt.NDArray[np.number]) -> Reals:
        shape = (len(self.space.widths), len(self.space.ffns))
        return np.broadcast_to(np.asarray(values, dtype=np.float64), shape)

    def _timed(self, quantity: Quantity, limits: TimeLimits, layers: int) -> Reals:
        assert self.clock is not None, "times are measured before they are asked for"
        asked = {"batch": limits.batch, "context": limits.context}
        if quantity == "prefill_latency":
            return self._full(self.clock.prefill_seconds(self.space, layers, **asked))
        seconds = self.clock.decode_seconds(self.space, layers, **asked)
        return self._full(limits.batch / seconds if quantity == "throughput" else seconds)


def price(
    anatomy: Anatomy,
    arch: Arch,
    quantity: Quantity,
    limits: Limits,
    clock: Clock | None = None,
    *,
    kept_layers: Sequence[int] = (),
) -> float:
    """What a quantity is for one shape with these layers of a model, filled up with the first others.

    >>> from halve.anatomy import discover
    >>> from transformers import LlamaConfig
    >>> anatomy = discover(LlamaConfig())
    >>> price(anatomy, anatomy.sizes, "memory", MemoryLimits(max="9GB", context=8192)) - 2 * 6738415616
    4294967296.0
    """
    alone = Space.alone(anatomy, arch, kept_layers)
    return float(Prices(alone, clock).values(quantity, limits, arch.layers)[0, 0])


def in_words(quantity: Quantity, value: float) -> str:
    """A cost with its unit.

    >>> in_words("memory", 8.2e9), in_words("flops", 2.5e9), in_words("decode_latency", 0.0215)
    ('8.2 GB', '2.5B FLOPs', '21.5 ms')
    """
    if quantity in ("weight_bytes", "memory"):
        return bytes_in_words(value)
    if quantity == "throughput":
        return f"{value:.3g} tokens/s"
    if quantity in TIMED:
        return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"
    return format_count(round(value)) + (" FLOPs" if quantity == "flops" else "")


def _unseen_cache(anatomy: Anatomy) -> PlanError:
    return PlanError(
        f"cannot count the memory of {anatomy.family}",
        why="its code does not show what it caches for a token",
        fix="bound weight_bytes instead of memory",
    )
