"""The least time of a distillation step: its matrix products alone, each at the rate that is measured for its shape.

The work is DESIGN's: per token `(2 N_T + a_T) + 3 (2 N_S + a_S) + V (6 H_S + 2 H_T)`, N the parameters of the
layers' matrices and `a` attention, of which the causal half counts. Elementwise work, the optimizer and memory
count nothing. A product is taken in bfloat16 where its result may be rounded; all others, in float32 or with sums
that are kept in float32, by the faster of the libraries that give float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from halve.model.products import fast_products

_ROWS = 512  # tokens of one product of the head; more bring no higher rate
_REPEATS = 3


@dataclass(frozen=True)
class Product:
    """`count` products of [m, k] and [k, n] in `batch` at once, of which the share `part` is needed."""

    m: int
    k: int
    n: int
    count: float
    exact: bool = False
    batch: int = 1
    part: float = 1.0

    @property
    def flops(self) -> float:
        """Of all of them."""
        return 2.0 * self.m * self.k * self.n * self.batch * self.count * self.part


def products(teacher: Any, student: Any, *, samples: int, seq: int) -> list[Product]:
    """All products of one step, by the configs of two Llamas."""
    found: list[Product] = []
    for config, train in ((teacher, False), (student, True)):
        hidden, ffn, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
        times = layers * samples
        heads = config.num_attention_heads
        shared = hidden * config.num_key_value_heads // heads
        for k, n, each in ((hidden, hidden, 2), (hidden, shared, 2), (hidden, ffn, 2), (ffn, hidden, 1)):
            found.append(Product(seq, k, n, each * times))
            if train:
                found += [Product(seq, n, k, each * times), Product(n, seq, k, each * times)]
        attention = {"batch": heads, "part": 0.5}
        for m, k, n in ((seq, hidden // heads, seq), (seq, seq, hidden // heads)):
            found.append(Product(m, k, n, (3 if train else 1) * times, **attention))
        vocab, rounds = config.vocab_size, samples * (seq - 1) / _ROWS
        found.append(Product(_ROWS, hidden, vocab, rounds, exact=True))
        if train:
            found += [Product(_ROWS, vocab, hidden, rounds), Product(vocab, _ROWS, hidden, rounds, exact=True)]
    return found


def seconds(work: list[Product], *, half: bool) -> float:
    """Measure each shape once more and add up; `half` says that bfloat16 may be used."""
    return sum(one.count * one.part * _time(one, half) for one in work)


def _time(one: Product, half: bool) -> float:
    if half and not one.exact:
        return _fastest(one, torch.bfloat16)
    with fast_products(torch.bfloat16 if half else torch.float32):
        other = _fastest(one, torch.float32)
    return min(other, _fastest(one, torch.float32))


def _fastest(one: Product, dtype: torch.dtype) -> float:
    """The best of a few, into memory that is there."""
    lead = (one.batch,) if one.batch > 1 else ()
    a, b = torch.randn(*lead, one.m, one.k).to(dtype), torch.randn(*lead, one.n, one.k).to(dtype).mT
    out = torch.empty(*lead, one.m, one.n, dtype=dtype)
    return min(_clock(lambda: torch.matmul(a, b, out=out)) for _ in range(_REPEATS))


def _clock(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
