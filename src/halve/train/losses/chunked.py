"""Losses over the whole vocabulary that never hold the logits of more than one chunk of tokens.

The gradient of these losses with respect to the logits has a closed form (for forward KL it is
`softmax_student - softmax_teacher`). So the forward pass computes it chunk by chunk and immediately multiplies it back,
into the gradients of the hidden states and of the head. Only these two are kept, and nothing is computed twice. Logits,
softmax, sums and the gradient of the head are float32 (float64 for float64 hidden states) and never rounded.

    target = follow(teacher_hidden, teacher_head, divergences.kl_rows, vocab=v)
    loss = chunked(hidden, head, target, vocab=v, chunk=c)

All losses are sums over tokens. The caller divides by the number of tokens of the whole step.

Shapes: N tokens, C tokens of a chunk, R tokens of a block, D hidden, V vocab.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from halve.model.head import Head
from halve.model.products import add_product, fast_products, product, rounded_product
from halve.train.losses.divergences import Rows, Sampled, TeacherRows, ce_rows, kl_rows, sampled_kl_rows, weighted

RowLoss = Rows[slice]
"""(student logits [R, V], the block's place in the chunk) -> (losses of tokens [R], gradient [R, V])."""

Target = Callable[[slice], RowLoss]
"""What the student is compared with: the chunk's place in the batch -> the loss of its rows."""

_BLOCKS = (
    16  # elementwise work splits a chunk into at least this many blocks, so that its scratch memory fits into a cache
)
_ENTRIES = (
    2**19
)  # of a block on a CPU: larger arrays are allocated again each time, which costs more than the work itself


def chunk_tokens(vocab: int, *, cuda: bool) -> int:
    """Return the tokens of a chunk: enough to keep the matrix units busy, and few enough to fit into memory."""
    rows = (2**25 if cuda else 2**21) // vocab
    return min(max(rows, 192), 8192)


def chunked(
    hidden: Float[Tensor, "tokens hidden"],
    head: Head,
    target: Target,
    *,
    vocab: int,
    chunk: int,
    operand: torch.dtype | None = None,
    blocks: int | None = None,
) -> Float[Tensor, ""]:
    """Return the loss summed over tokens, differentiable by `hidden`, `head.weight` and `head.bias`.

    `vocab` is the number of columns in use. Rows of the head beyond it are padding and get no gradient and no
    probability. `operand` is the precision of the factors in matrix products (default: unchanged). On CUDA, a half
    precision applies to all products, with float32 results. A CPU has no such product. There it applies only to the
    gradient of `hidden`, which is rounded as under autocast. Working memory is two chunks of logits (student and
    teacher), half a chunk and a few sixteenths of a chunk, and the gradient of the head. A head that `accumulates` adds
    this gradient to its existing sum. A rehearsal computes so many `blocks` of a chunk (default: all).
    """
    assert 0 < vocab <= head.weight.shape[0]
    assert chunk > 0
    pieces = _Pieces(vocab, chunk, operand, blocks)
    loss: Tensor = _Chunked.apply(hidden, head.weight, head.bias, head, target, pieces)  # type: ignore[no-untyped-call]
    return loss


def follow(
    hidden: Float[Tensor, "tokens hidden"],
    head: Head,
    rows: TeacherRows,
    *,
    vocab: int,
    operand: torch.dtype | None = None,
) -> Target:
    """The target of a divergence from the teacher with these hidden states and this head.

    They get no gradient. Combine several divergences from one teacher with `weighted`, so that its logits are computed
    only once.
    """
    factors = _Factors.of(hidden, head, vocab, operand)
    room_CV: Tensor | None = None

    def of_chunk(chunk: slice) -> RowLoss:
        nonlocal room_CV
        room_CV = factors.room(chunk) if room_CV is None else room_CV
        teacher_CV = _cap(_raw_logits(factors, chunk, room_CV), head.softcap)
        return lambda z_RV, block: rows(z_RV, teacher_CV[block])

    return of_chunk


def follow_draws(draws: Sampled, *, temperature: float = 1.0) -> Target:
    """The target of draws from a teacher's distribution at this temperature."""
    return lambda chunk: (
        lambda z_RV, block: sampled_kl_rows(
            z_RV, Sampled(*(part[chunk][block] for part in draws)), temperature=temperature
        )
    )


def cross_entropy_target(labels: Int[Tensor, " tokens"]) -> Target:
    """The target of the next tokens."""
    return lambda chunk: lambda z_RV, block: ce_rows(z_RV, labels[chunk][block])


def sum_of(terms: Sequence[tuple[float, Target]]) -> Target:
    """Return the weighted sum of several targets for the same logits."""
    return lambda chunk: weighted([(weight, target(chunk)) for weight, target in terms])


class DivergenceSums(NamedTuple):
    """Sums over tokens: KL(teacher || student), the student's cross-entropy, and agreement on the best token."""

    kl: Tensor
    ce: Tensor
    agreement: Tensor


@torch.no_grad()
def divergence_sums(
    hidden: Float[Tensor, "tokens hidden"],
    head: Head,
    teacher_hidden: Float[Tensor, "tokens teacher_hidden"],
    teacher_head: Head,
    labels: Int[Tensor, " tokens"],
    *,
    vocab: int,
    chunk: int,
    operand: torch.dtype | None = None,
) -> DivergenceSums:
    """Measure a student against its teacher, forward only, a chunk at a time; sums in float64."""
    student, teacher = (
        _Factors.of(hidden, head, vocab, operand),
        _Factors.of(teacher_hidden, teacher_head, vocab, operand),
    )
    sums = torch.zeros(3, dtype=torch.float64, device=hidden.device)
    for rows in _slices(hidden.shape[0], chunk):
        z_CV = _cap(_raw_logits(student, rows), head.softcap)
        t_CV = _cap(_raw_logits(teacher, rows), teacher_head.softcap)
        for block in _blocks(z_CV, chunk):
            kl_R, _ = kl_rows(z_CV[block], t_CV[block])
            ce_R, _ = ce_rows(z_CV[block], labels[rows][block])
            same_R = z_CV[block].argmax(-1) == t_CV[block].argmax(-1)
            sums += torch.stack([kl_R.sum(dtype=sums.dtype), ce_R.sum(dtype=sums.dtype), same_R.sum(dtype=sums.dtype)])
    return DivergenceSums(*sums)


@torch.no_grad()
def token_losses(
    hidden: Float[Tensor, "tokens hidden"],
    head: Head,
    labels: Int[Tensor, " tokens"],
    *,
    vocab: int,
    chunk: int,
    operand: torch.dtype | None = None,
) -> Float[Tensor, " tokens"]:
    """Return the cross-entropy of each token, forward only, a chunk at a time."""
    factors = _Factors.of(hidden, head, vocab, operand)
    losses = []
    for rows in _slices(hidden.shape[0], chunk):
        z_CV = _cap(_raw_logits(factors, rows), head.softcap)
        losses += [ce_rows(z_CV[block], labels[rows][block])[0] for block in _blocks(z_CV, chunk)]
    return torch.cat(losses)


class _Factors(NamedTuple):
    """The inputs of the logits, and the precision of other products."""

    hidden_ND: Tensor
    weight_DV: Tensor
    bias_V: Tensor | None
    scale: float
    operand: torch.dtype

    @classmethod
    def of(cls, hidden_ND: Tensor, head: Head, vocab: int, operand: torch.dtype | None) -> _Factors:
        weight_VD = head.weight.detach()[:vocab]
        bias_V = None if head.bias is None else head.bias.detach()[:vocab]
        promoted = torch.promote_types(hidden_ND.dtype, weight_VD.dtype)
        whole = promoted if hidden_ND.is_cuda else torch.promote_types(promoted, torch.float32)
        operand = whole if operand is None else operand
        dtype = operand if hidden_ND.is_cuda else whole
        return cls(hidden_ND.detach().to(dtype), weight_VD.to(dtype).t(), bias_V, head.scale, operand)

    def room(self, chunk: slice) -> Tensor:
        """Memory that is reused for the logits of all chunks: new pages would cost a CPU a sixth of the product."""
        dtype = torch.promote_types(self.hidden_ND.dtype, torch.float32)
        return self.hidden_ND.new_empty(chunk.stop - chunk.start, self.weight_DV.shape[1], dtype=dtype)


class _Pieces(NamedTuple):
    """How the logits are computed: the columns, the tokens of a chunk, the precision of the factors, its blocks."""

    vocab: int
    chunk: int
    operand: torch.dtype | None
    blocks: int | None


class _Chunked(torch.autograd.Function):
    """The one autograd node. The forward pass computes the gradients, and the backward pass scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        head: Head,
        target: Target,
        pieces: _Pieces,
    ) -> Tensor:
        vocab, chunk, operand, blocks = pieces
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        factors = _Factors.of(hidden_ND, head, vocab, operand)
        exact = torch.promote_types(factors.hidden_ND.dtype, torch.float32)
        hidden_grad_ND = torch.empty_like(hidden_ND) if want_hidden else None
        in_place = head.accumulates and weight_VD.is_leaf and weight_VD.dtype == exact
        weight_grad_VD = _sum_of_gradients(weight_VD, exact, in_place=in_place) if want_weight else None
        bias_grad_V = torch.zeros_like(bias_V, dtype=exact) if want_bias and bias_V is not None else None
        total = hidden_ND.new_zeros((), dtype=exact)
        back_VD = factors.weight_DV.t().to(factors.operand)
        room_CV = factors.room(slice(0, min(chunk, hidden_ND.shape[0])))
        with fast_products(factors.operand):
            for rows in _slices(hidden_ND.shape[0], chunk):
                z_CV = _raw_logits(factors, rows, room_CV)
                row_loss = target(rows)
                for block in islice(_blocks(z_CV, chunk), blocks):
                    total += _into_gradient(z_CV[block], head, row_loss, block)
                if bias_grad_V is not None:
                    bias_grad_V[:vocab] += z_CV.sum(0)
                half_CV = z_CV.to(factors.operand)
                if hidden_grad_ND is not None:
                    hidden_grad_ND[rows] = rounded_product(half_CV, back_VD).to(hidden_grad_ND.dtype)
                if weight_grad_VD is not None:
                    grad_CV = half_CV if hidden_ND.is_cuda else z_CV
                    add_product(weight_grad_VD[:vocab], grad_CV.t(), factors.hidden_ND[rows])
        ctx.gradients = (hidden_grad_ND, None if in_place else weight_grad_VD, bias_grad_V)
        ctx.dtypes = (hidden_ND.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, ()
        assert gradients, "the gradients of this loss were already handed out"
        # The buffers belong to this node and are scaled in place, because a copy for the head would be large.
        scaled = [
            None if grad is None else grad.mul_(upstream.to(grad.dtype)).to(dtype)
            for grad, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None)


def _sum_of_gradients(weight_VD: Tensor, dtype: torch.dtype, *, in_place: bool) -> Tensor:
    """Zeros, or the existing `grad` of the weight."""
    if not in_place:
        return torch.zeros_like(weight_VD, dtype=dtype)
    if weight_VD.grad is None:
        weight_VD.grad = torch.zeros_like(weight_VD)
    return weight_VD.grad


def _into_gradient(z_RV: Tensor, head: Head, row_loss: RowLoss, block: slice) -> Tensor:
    """Overwrite raw logits with the loss's gradient by the unscaled, uncapped ones; return the loss."""
    if head.softcap is None:
        loss_R, grad_RV = row_loss(z_RV, block)
    else:
        tanh_RV = torch.tanh(z_RV / head.softcap)
        loss_R, grad_RV = row_loss(tanh_RV * head.softcap, block)
        grad_RV = grad_RV.mul_(1 - tanh_RV.square_())
    torch.mul(grad_RV, head.scale, out=z_RV)
    return loss_R.sum()


def _raw_logits(factors: _Factors, rows: slice, room_CV: Tensor | None = None) -> Tensor:
    """Return scaled logits of a chunk, before a soft-cap."""
    out = None if room_CV is None else room_CV[: rows.stop - rows.start]
    with fast_products(factors.operand):
        z_CV = product(factors.hidden_ND[rows], factors.weight_DV, out=out)
    if factors.bias_V is not None:
        z_CV += factors.bias_V
    return z_CV if factors.scale == 1.0 else z_CV.mul_(factors.scale)


def _cap(z_CV: Tensor, softcap: float | None) -> Tensor:
    return z_CV if softcap is None else z_CV.div_(softcap).tanh_().mul_(softcap)


def _blocks(z_CV: Tensor, chunk: int) -> Iterator[slice]:
    rows = math.ceil(chunk / _BLOCKS)
    return _slices(z_CV.shape[0], rows if z_CV.is_cuda else max(1, min(rows, _ENTRIES // z_CV.shape[1])))


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))
