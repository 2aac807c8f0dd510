"""Matrix products whose results are never rounded to half precision, from the fastest library that is exact.

A CPU may round the factors of a product only if they are bfloat16 anyway.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

_EXACT = 1e-5  # of a result's norm: float32 leaves 1e-7, bfloat16 factors 3e-3


def product(
    a: Float[Tensor, "rows inner"],
    b: Float[Tensor, "inner columns"],
    *,
    out: Float[Tensor, "rows columns"] | None = None,
) -> Float[Tensor, "rows columns"]:
    """Multiply two matrices into float32 (`out`, if given) without ever rounding the result to half precision.

    Two bfloat16 operands on CUDA use its half-precision units with a float32 result; everywhere else the
    operands are raised to float32 first. float64 stays float64.
    """
    with torch.autocast(a.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
        if a.is_cuda and a.dtype == b.dtype and a.dtype != dtype and not torch.is_grad_enabled():
            # torch has no gradient for this product; losses make their own.
            return torch.mm(a, b, out_dtype=dtype, out=out)
        return torch.mm(a.to(dtype), b.to(dtype), out=out)


def rounded_product(a: Float[Tensor, "rows inner"], b: Float[Tensor, "inner columns"]) -> Float[Tensor, "rows columns"]:
    """Multiply two matrices of the same precision. On a CPU the result has this precision too, as under autocast."""
    if a.is_cuda:
        return product(a, b)
    with torch.autocast(a.device.type, enabled=False):
        return torch.mm(a, b)


def add_product(
    total: Float[Tensor, "rows columns"], a: Float[Tensor, "rows inner"], b: Float[Tensor, "inner columns"]
) -> None:
    """Add a product to a float32 sum in place; half-precision operands (CUDA) are not rounded on the way."""
    with torch.autocast(a.device.type, enabled=False):
        if a.dtype == total.dtype:
            total.addmm_(a, b)
        else:
            torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


@contextmanager
def fast_products(operand: torch.dtype = torch.float32) -> Iterator[None]:
    """In this context, a CPU takes its float32 products from oneDNN if the precision of the operands allows it.

    torch calls oneDNN only if it may round operands to bfloat16. The default, MKL, is slower on many processors (half
    as fast for logits on one from AMD). oneDNN does round on processors with units for bfloat16 (AMX). There, only
    operands that are bfloat16 anyway are multiplied this way. On all other processors its results are those of float32.
    """
    backends: Any = torch.backends.mkldnn
    setting = backends.matmul
    before = setting.fp32_precision
    if operand == torch.bfloat16 or rounds_nothing():
        setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


@functools.cache
def rounds_nothing() -> bool:
    """Whether this CPU multiplies in float32 even if it may round to bfloat16. One small product shows it."""
    with _disable_current_modes():  # a rehearsal's tensors have no values
        random = torch.Generator().manual_seed(0)
        a, b = torch.randn(192, 256, generator=random), torch.randn(256, 1024, generator=random)
        with fast_products(torch.bfloat16), torch.autocast("cpu", enabled=False):
            rounded = torch.mm(a, b)
        exact = a.double() @ b.double()
        return bool((rounded - exact).norm() < _EXACT * exact.norm())
