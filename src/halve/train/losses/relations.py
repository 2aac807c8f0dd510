"""Compare how attention vectors relate to each other across positions, in teacher and student.

As for losses of logits (see `chunked`), the gradient has a closed form and is computed in the forward pass, one
relation head of one sample at a time. So only a few arrays [seq, seq] are in memory.

Shapes: B batch, S seq, H heads, E head_dim, A relation heads, C channels of a relation head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from halve.train.losses.divergences import kl_rows

_NEVER = -1e30  # so low that it gets no probability; minus infinity on both sides would give a NaN


def relation_divergence(
    student: Float[Tensor, "batch seq heads head_dim"],
    teacher: Float[Tensor, "batch seq teacher_heads teacher_head_dim"],
    *,
    documents: Int[Tensor, "batch seq"],
    counted: Bool[Tensor, "batch seq"],
) -> Float[Tensor, ""]:
    """Return KL(teacher || student) of relations among vectors of one kind, summed over the counted positions.

    MiniLMv2, 2012.15828, Sec. 3.1: queries with queries, keys with keys, values with values, over relation heads of
    which both models have the same number, here the greatest that divides both numbers of heads:

        R = softmax(x x^T / sqrt(channels)),  mean over relation heads of sum_keys R_t (log R_t - log R_s)

    Unlike in the paper, a position relates only to those that it may attend to: itself and earlier ones with the same
    number in `documents`. In float32 (float64 where a vector is). Differentiable by `student`.
    """
    num = math.gcd(student.shape[2], teacher.shape[2])
    loss: Tensor = _Relations.apply(  # type: ignore[no-untyped-call]
        _grouped(student, num), _grouped(teacher, num), documents, counted
    )
    return loss


class _Relations(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student_BASC: Tensor, teacher_BASC: Tensor, documents_BS: Tensor, counted_BS: Tensor
    ) -> Tensor:
        dtype = torch.promote_types(student_BASC.dtype, torch.float32)
        grad_BASC = torch.empty_like(student_BASC, dtype=dtype)
        total = torch.zeros((), dtype=dtype, device=student_BASC.device)
        num = student_BASC.shape[1]
        with torch.autocast(student_BASC.device.type, enabled=False):
            for sample, (documents_S, counted_S) in enumerate(zip(documents_BS, counted_BS, strict=True)):
                forbidden_SS = (documents_S[:, None] != documents_S).logical_or_(_later(documents_S))
                for head in range(num):
                    x_SC, t_SC = (part[sample, head].to(dtype) for part in (student_BASC, teacher_BASC))
                    loss_S, grad_SS = kl_rows(_scores(x_SC, forbidden_SS), _scores(t_SC, forbidden_SS))
                    total += loss_S[counted_S].sum() / num
                    grad_SS.mul_(counted_S[:, None]).div_(num * math.sqrt(x_SC.shape[-1]))
                    # each vector is on both sides of the product
                    torch.mm(grad_SS, x_SC, out=grad_BASC[sample, head]).addmm_(grad_SS.t(), x_SC)
        ctx.save_for_backward(grad_BASC.to(student_BASC.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (grad_BASC,) = ctx.saved_tensors
        return grad_BASC * upstream.to(grad_BASC.dtype), None, None, None


def _grouped(x_BSHE: Tensor, num: int) -> Tensor:
    """[batch, relation heads, seq, channels]: neighboring heads side by side."""
    return torch.unflatten(x_BSHE, 2, (num, -1)).flatten(3).transpose(1, 2)


def _later(documents_S: Tensor) -> Tensor:
    seq = len(documents_S)
    return torch.ones(seq, seq, dtype=torch.bool, device=documents_S.device).triu_(1)


def _scores(x_SC: Tensor, forbidden_SS: Tensor) -> Tensor:
    return (x_SC @ x_SC.t()).div_(math.sqrt(x_SC.shape[-1])).masked_fill_(forbidden_SS, _NEVER)
