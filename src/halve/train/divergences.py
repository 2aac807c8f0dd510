"""How far the student's distribution over the next token is from what it should be, with the gradient in closed form.

Pure functions of rows of logits: each returns the loss of every token and its gradient by the student's
logits. They change neither argument, and keep a few arrays of the rows' size at a time: who calls them
gives few rows (see `chunked`).

Shapes: R tokens, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

Other = TypeVar("Other")

Rows = Callable[[Tensor, Other], tuple[Tensor, Tensor]]
"""(student logits [R, V], what they are compared with) -> (losses of tokens [R], gradient [R, V])."""

TeacherRows = Rows[Tensor]
"""The same against the teacher's logits [R, V]."""


def weighted(terms: Sequence[tuple[float, Rows[Other]]]) -> Rows[Other]:
    """Return the sum of losses of the same rows, each times its weight."""
    assert terms

    def rows(student: Tensor, other: Other) -> tuple[Tensor, Tensor]:
        (first, one), *more = terms
        loss_R, grad_RV = one(student, other)
        if first != 1.0:
            loss_R, grad_RV = loss_R * first, grad_RV.mul_(first)
        for weight, term in more:
            more_R, more_RV = term(student, other)
            loss_R, grad_RV = loss_R + weight * more_R, grad_RV.add_(more_RV, alpha=weight)
        return loss_R, grad_RV

    return rows


def kl_rows(
    student: Float[Tensor, "tokens vocab"],
    teacher: Float[Tensor, "tokens vocab"],
    *,
    temperature: float = 1.0,
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, "tokens vocab"]]:
    """Return KL(teacher || student) * temperature^2 of each token, and its gradient by the student's logits.

    The sum is taken over `p (log p - log q) + q - p`, whose first-order rounding errors cancel: equal
    distributions give exactly zero, and a small divergence is not lost in the rounding of large logits.
    """
    log_q_RV = torch.log_softmax(student / temperature if temperature != 1.0 else student, -1)
    log_p_RV = torch.log_softmax(teacher / temperature if temperature != 1.0 else teacher, -1)
    p_RV = log_p_RV.exp()
    log_p_RV.sub_(log_q_RV).mul_(p_RV)
    grad_RV = log_q_RV.exp_().sub_(p_RV)
    kl_R = log_p_RV.add_(grad_RV).sum(-1)
    if temperature != 1.0:
        return kl_R * temperature**2, grad_RV.mul_(temperature)
    return kl_R, grad_RV


def ce_rows(
    student: Float[Tensor, "tokens vocab"], labels: Int[Tensor, " tokens"]
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, "tokens vocab"]]:
    """Return -log softmax(student)[label] of each token, and its gradient by the student's logits."""
    log_q_RV = torch.log_softmax(student, -1)
    ce_R = log_q_RV.gather(-1, labels[:, None]).squeeze(-1).neg()
    grad_RV = log_q_RV.exp_()
    return ce_R, grad_RV.scatter_add_(-1, labels[:, None], -torch.ones_like(ce_R)[:, None])
