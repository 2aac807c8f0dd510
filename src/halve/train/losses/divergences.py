"""Divergences between the student's and the teacher's distributions of the next token, with closed-form gradients.

Pure functions of rows of logits. Each returns the loss of every token and its gradient with respect to the student's
logits. They do not change their arguments. They need several arrays of the rows' size, so callers pass few rows at a
time (see `chunked`).

Divergences of distributions are sums over events; those of logits are made comparable in size: `mse_rows` is a mean
over the vocabulary, `cosine_rows` lies between 0 and 2. Where a temperature tau is given, the distributions are

    p = softmax(teacher / tau),  q = softmax(student / tau)

and the loss is multiplied by tau^2, which keeps the gradient's size (Hinton et al., 1503.02531, Sec. 2).

Shapes: R tokens, V vocab, K likeliest tokens or draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

Other = TypeVar("Other")

Rows = Callable[[Tensor, Other], tuple[Tensor, Tensor]]
"""(student logits [R, V], what they are compared with) -> (losses of tokens [R], gradient [R, V])."""

TeacherRows = Rows[Tensor]
"""The same against the teacher's logits [R, V]."""

Logits = Float[Tensor, "tokens vocab"]
LossAndGradient = tuple[Float[Tensor, " tokens"], Float[Tensor, "tokens vocab"]]

_EXP_LIMIT = 80.0  # exp of this is still finite in float32
_LOG2_E = math.log2(math.e)  # exp2 of x * log2(e): on a CPU, torch's exp takes three times as long


def weighted(terms: Sequence[tuple[float, Rows[Other]]]) -> Rows[Other]:
    """Return the weighted sum of losses of the same rows."""
    assert terms

    def rows(student: Tensor, other: Other) -> tuple[Tensor, Tensor]:
        (first, first_term), *more = terms
        loss_R, grad_RV = first_term(student, other)
        if first != 1.0:
            loss_R, grad_RV = loss_R * first, grad_RV.mul_(first)
        for weight, term in more:
            more_R, more_RV = term(student, other)
            loss_R, grad_RV = loss_R + weight * more_R, grad_RV.add_(more_RV, alpha=weight)
        return loss_R, grad_RV

    return rows


def kl_rows(student: Logits, teacher: Logits, *, temperature: float = 1.0) -> LossAndGradient:
    """Return forward KL, `KL(p || q) = sum_v p (log p - log q)`: the papers' choice (2407.14679, Table 15).

    Its gradient is `q - p`. The sum is taken over `p (log p - log q) + q - p`, whose first-order rounding errors
    cancel: equal distributions give exactly zero, and a small divergence is not lost in the rounding of large logits.
    """
    log_q_RV, log_p_RV = _log_softmax(student, temperature), _log_softmax(teacher, temperature)
    p_RV = (log_p_RV * _LOG2_E).exp2_()
    log_p_RV.sub_(log_q_RV).mul_(p_RV)
    grad_RV = log_q_RV.mul_(_LOG2_E).exp2_().sub_(p_RV)
    return _at(temperature, log_p_RV.add_(grad_RV).sum(-1), grad_RV)


def reverse_kl_rows(student: Logits, teacher: Logits, *, temperature: float = 1.0) -> LossAndGradient:
    """Return reverse KL, `KL(q || p) = sum_v q (log q - log p)`: it seeks modes (MiniLLM, 2306.08543, Sec. 2).

    With `r = log q - log p` its gradient is `q (r - KL)`. Rounding cancels as in `kl_rows`.
    """
    log_q_RV, log_p_RV = _log_softmax(student, temperature), _log_softmax(teacher, temperature)
    q_RV = log_q_RV.exp()
    ratio_RV = log_q_RV.sub_(log_p_RV)
    kl_R = (q_RV * ratio_RV).add_(log_p_RV.exp_()).sub_(q_RV).sum(-1)
    return _at(temperature, kl_R, ratio_RV.sub_(kl_R[:, None]).mul_(q_RV))


def jsd_rows(student: Logits, teacher: Logits, *, beta: float, temperature: float = 1.0) -> LossAndGradient:
    """Return the generalized Jensen-Shannon divergence; `beta` is the teacher's share of the mixture m.

    GKD, 2306.13649, Eq. 1:

        JSD = beta KL(p || m) + (1 - beta) KL(q || m),  m = beta p + (1 - beta) q,  0 < beta < 1

    TRL's GKD computes the same for these beta, without the factor tau^2; its beta of 0 and 1 are the forward and the
    reverse KL, while this sum goes to 0 there. With `r = log m - log q` the gradient is
    `(1 - beta) q (sum_v q r - r)`. r is taken from the distributions' ratio, so that equal ones give exactly zero.
    """
    assert 0 < beta < 1
    log_q_RV, log_p_RV = _log_softmax(student, temperature), _log_softmax(teacher, temperature)
    ratio_RV = log_p_RV - log_q_RV
    p_RV, q_RV = log_p_RV.exp_(), log_q_RV.exp_()
    r_RV = _log_mixed(ratio_RV, beta)
    of_student_RV = q_RV * r_RV
    mean_R1 = of_student_RV.sum(-1, keepdim=True)
    of_teacher_RV = p_RV.mul_(_log_mixed(ratio_RV.neg_(), 1 - beta))
    # no event's share is below 0, except by rounding
    loss_R = of_teacher_RV.mul_(-beta).sub_(of_student_RV, alpha=1 - beta).clamp_(min=0).sum(-1)
    return _at(temperature, loss_R, r_RV.neg_().add_(mean_R1).mul_(q_RV).mul_(1 - beta))


def top_k_kl_rows(student: Logits, teacher: Logits, *, k: int, temperature: float = 1.0) -> LossAndGradient:
    """Return forward KL to the teacher's `k` likeliest tokens alone, renormalized (2407.14679, Appendix A.3).

    The student's distribution is not truncated: probability on other tokens increases the loss, even if the teacher
    has probability there. So the optimum is the truncated teacher and not the teacher. The gradient is `q - p`.
    """
    if k >= teacher.shape[-1]:
        return kl_rows(student, teacher, temperature=temperature)
    log_q_RV = _log_softmax(student, temperature)
    top_RK, ids_RK = teacher.topk(k, dim=-1)
    log_p_RK = _log_softmax(top_RK, temperature)
    p_RK = log_p_RK.exp()
    kl_R = (log_p_RK.sub_(log_q_RV.gather(-1, ids_RK)).mul_(p_RK)).sum(-1)
    grad_RV = log_q_RV.exp_().scatter_add_(-1, ids_RK, -p_RK)
    return _at(temperature, kl_R.add_(grad_RV.sum(-1)), grad_RV)


def top_k_tail_kl_rows(student: Logits, teacher: Logits, *, k: int, temperature: float = 1.0) -> LossAndGradient:
    """Return forward KL over `k + 1` events: the teacher's `k` likeliest tokens, and any other token.

    It is zero if the student has the same top tokens and the same remaining mass. Unlike `top_k_kl_rows`, it never
    pulls away from the teacher. The gradient is `q - p` on the top tokens, and `q (1 - p_rest / q_rest)` on the others.
    """
    if k >= teacher.shape[-1]:
        return kl_rows(student, teacher, temperature=temperature)
    log_q_RV, log_p_RV = _log_softmax(student, temperature), _log_softmax(teacher, temperature)
    log_p_RK, ids_RK = log_p_RV.topk(k, dim=-1)
    log_q_RK = log_q_RV.gather(-1, ids_RK)
    # summed over the rest itself, because 1 - (sum of the top) would be mostly rounding if the top is nearly 1
    rest_p_R, rest_q_R = (log_RV.scatter(-1, ids_RK, -math.inf).logsumexp(-1) for log_RV in (log_p_RV, log_q_RV))
    del log_p_RV
    log_p_RJ = torch.cat([log_p_RK, rest_p_R[:, None]], -1)
    log_q_RJ = torch.cat([log_q_RK, rest_q_R[:, None]], -1)
    p_RJ, q_RJ = log_p_RJ.exp(), log_q_RJ.exp()
    kl_R = log_p_RJ.sub_(log_q_RJ).mul_(p_RJ).add_(q_RJ).sub_(p_RJ).sum(-1)
    surplus_R1 = -torch.expm1(rest_p_R - rest_q_R)[:, None]
    grad_RV = log_q_RV.exp_().mul_(surplus_R1)
    return _at(temperature, kl_R, grad_RV.scatter_(-1, ids_RK, (q_RJ - p_RJ)[:, :-1]))


def mse_rows(student: Logits, teacher: Logits) -> LossAndGradient:
    """Return the squared difference of the logits, averaged over the vocabulary: `1/V sum_v (z - t)^2`.

    2407.14679 (Sec. 3) writes its losses with probabilities. But most of these are nearly 0, and so would be their
    squared differences. So logits are compared here. A constant that is added to all logits of a token changes the
    loss.
    """
    grad_RV = student - teacher
    loss_R = grad_RV.square().mean(-1)
    return loss_R, grad_RV.mul_(2 / student.shape[-1])


def cosine_rows(student: Logits, teacher: Logits) -> LossAndGradient:
    """Return `1 - cos(z, t)` of the logits, taken as `1/2 |z/|z| - t/|t||^2`, which does not cancel.

    With `d` for that difference, the gradient is `(d - z/|z| * loss) / |z|`. The loss is between 0 and 2 for any
    vocabulary and does not depend on the length of the logits. A row of zeros has no direction and gets no gradient.
    """
    tiny = torch.finfo(student.dtype).tiny
    length_R1 = student.norm(dim=-1, keepdim=True)
    unit_RV = student / length_R1.clamp_min(tiny)
    diff_RV = unit_RV - teacher / teacher.norm(dim=-1, keepdim=True).clamp_min(tiny)
    loss_R = diff_RV.square().sum(-1).div_(2)
    shrink_R1 = torch.where(length_R1 > 0, 1 / length_R1.clamp_min(tiny), 0)
    return loss_R, diff_RV.sub_(unit_RV.mul_(loss_R[:, None])).mul_(shrink_R1)


def ce_rows(student: Logits, labels: Int[Tensor, " tokens"]) -> LossAndGradient:
    """Return the cross-entropy `-log q[label]` at temperature 1."""
    log_q_RV = torch.log_softmax(student, -1)
    ce_R = log_q_RV.gather(-1, labels[:, None]).squeeze(-1).neg()
    grad_RV = log_q_RV.exp_()
    return ce_R, grad_RV.scatter_add_(-1, labels[:, None], -torch.ones_like(ce_R)[:, None])


class Sampled(NamedTuple):
    """Draws from the teacher's distribution: tokens, their shares of the draws, and its entropy in nats.

    Rows with fewer distinct tokens are padded with a share of 0.
    """

    ids: Int[Tensor, "tokens draws"]
    shares: Float[Tensor, "tokens draws"]
    entropy: Float[Tensor, " tokens"]


def sampled_kl_rows(student: Logits, teacher: Sampled, *, temperature: float = 1.0) -> LossAndGradient:
    """Return an estimate of forward KL from draws of p: value and gradient are right in expectation.

        sum_k share_k (-log q[id_k]) - H(p),  gradient q - share

    Draws must be those of `softmax(teacher / temperature)`. The value of one token can be negative; its mean
    over draws is KL.
    """
    ids_RK, shares_RK, entropy_R = teacher
    log_q_RV = _log_softmax(student, temperature)
    shares_RK = shares_RK.to(log_q_RV.dtype)
    ce_R = log_q_RV.gather(-1, ids_RK).mul_(shares_RK).sum(-1).neg_()
    return _at(temperature, ce_R.sub_(entropy_R), log_q_RV.exp_().scatter_add_(-1, ids_RK, -shares_RK))


def _log_softmax(z_RV: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(z_RV / temperature if temperature != 1.0 else z_RV, -1)


def _log_mixed(ratio_RV: Tensor, share: float) -> Tensor:
    """Return log(1 + share (exp(ratio) - 1)): exactly 0 at 0, and correct even if exp would overflow."""
    mixed_RV = ratio_RV.clamp(max=_EXP_LIMIT).expm1_().mul_(share).log1p_()
    return mixed_RV.add_((ratio_RV - _EXP_LIMIT).relu_())


def _at(temperature: float, loss_R: Tensor, grad_RV: Tensor) -> tuple[Tensor, Tensor]:
    """Multiply a loss by tau^2, and its gradient accordingly, for logits that were divided by tau."""
    return (loss_R, grad_RV) if temperature == 1.0 else (loss_R * temperature**2, grad_RV.mul_(temperature))
