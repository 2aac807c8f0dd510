"""The plain formulas of all losses of rows, for autograd in float64: what the closed forms are held against.

Shapes: N tokens, V vocab, K likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from halve.train.losses import divergences as d

K = 6

Plain = Callable[[Tensor, Tensor], Tensor]
"""(student logits, teacher logits) -> losses of tokens, by autograd."""


def soft(z_NV: Tensor, temperature: float) -> Tensor:
    return torch.softmax(z_NV / temperature, -1)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum(-1)


def plain_kl(z: Tensor, t: Tensor, *, temperature: float = 1.0) -> Tensor:
    return kl(soft(t, temperature), soft(z, temperature)) * temperature**2


def plain_reverse(z: Tensor, t: Tensor, *, temperature: float = 1.0) -> Tensor:
    return kl(soft(z, temperature), soft(t, temperature)) * temperature**2


def plain_jsd(z: Tensor, t: Tensor, *, beta: float, temperature: float = 1.0) -> Tensor:
    p, q = soft(t, temperature), soft(z, temperature)
    m = beta * p + (1 - beta) * q
    return (beta * kl(p, m) + (1 - beta) * kl(q, m)) * temperature**2


def plain_top_k(z: Tensor, t: Tensor, *, k: int, temperature: float = 1.0) -> Tensor:
    p, q = soft(t, temperature), soft(z, temperature)
    top, ids = p.topk(k, dim=-1)
    return kl(top / top.sum(-1, keepdim=True), q.gather(-1, ids)) * temperature**2


def plain_tail(z: Tensor, t: Tensor, *, k: int, temperature: float = 1.0) -> Tensor:
    p, q = soft(t, temperature), soft(z, temperature)
    top, ids = p.topk(k, dim=-1)
    same = q.gather(-1, ids)
    events = [torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (top, same)]
    return kl(*events) * temperature**2


def plain_mse(z: Tensor, t: Tensor) -> Tensor:
    return (z - t).square().mean(-1)


def plain_cosine(z: Tensor, t: Tensor) -> Tensor:
    return 1 - torch.nn.functional.cosine_similarity(z, t, dim=-1)


TERMS: dict[str, tuple[d.TeacherRows, Plain]] = {
    "kl": (d.kl_rows, plain_kl),
    "reverse_kl": (d.reverse_kl_rows, plain_reverse),
    **{f"jsd {beta}": (partial(d.jsd_rows, beta=beta), partial(plain_jsd, beta=beta)) for beta in (0.1, 0.5, 0.9)},
    "top_k": (partial(d.top_k_kl_rows, k=K), partial(plain_top_k, k=K)),
    "top_k_tail": (partial(d.top_k_tail_kl_rows, k=K), partial(plain_tail, k=K)),
    "mse": (d.mse_rows, plain_mse),
    "cosine": (d.cosine_rows, plain_cosine),
}
