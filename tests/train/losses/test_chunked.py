"""The chunked losses against the plain formulas in float64, and the memory that they do without.

Shapes: N tokens, D hidden, V vocab.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_losses import TERMS
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from halve.model.head import Head
from halve.train.losses import chunked, divergences

F64 = torch.float64
N, D, TEACHER_D, V = 23, 8, 11, 29


class Case(NamedTuple):
    """Two heads with their hidden states, of which the student's parts want gradients."""

    hidden_ND: Tensor
    head: Head
    teacher_ND: Tensor
    teacher_head: Head
    labels: Tensor


def case(
    *,
    seed: int = 0,
    scale: float = 1.0,
    softcap: float | None = None,
    bias: bool = False,
    rows: int = V,
    teacher_rows: int = V,
    dtype: torch.dtype = F64,
) -> Case:
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=F64).to(dtype)

    def head(rows: int, width: int, grad: bool) -> Head:
        parts = [draw(rows, width), draw(rows)]
        weight, shift = (nn.Parameter(part) if grad else part for part in parts)
        return Head(weight, shift if bias else None, scale, softcap)

    hidden_ND = draw(N, D).requires_grad_()
    labels = torch.randint(V, (N,), generator=random)
    return Case(hidden_ND, head(rows, D, True), draw(N, TEACHER_D), head(teacher_rows, TEACHER_D, False), labels)


def plain_logits(hidden_ND: Tensor, head: Head, vocab: int) -> Tensor:
    z_NV = hidden_ND @ head.weight[:vocab].t()
    if head.bias is not None:
        z_NV = z_NV + head.bias[:vocab]
    z_NV = z_NV * head.scale
    return z_NV if head.softcap is None else torch.tanh(z_NV / head.softcap) * head.softcap


def plain_kl(one: Case, *, vocab: int = V, temperature: float = 1.0) -> Tensor:
    q = torch.softmax(plain_logits(one.hidden_ND, one.head, vocab) / temperature, -1)
    p = torch.softmax(plain_logits(one.teacher_ND, one.teacher_head, vocab) / temperature, -1)
    return (p * (p.log() - q.log())).sum() * temperature**2


def plain_ce(one: Case, *, vocab: int = V) -> Tensor:
    return nn.functional.cross_entropy(plain_logits(one.hidden_ND, one.head, vocab), one.labels, reduction="sum")


def chunked_kl(one: Case, *, chunk: int, vocab: int = V, temperature: float = 1.0) -> Tensor:
    rows = partial(divergences.kl_rows, temperature=temperature)
    target = chunked.follow(one.teacher_ND, one.teacher_head, rows, vocab=vocab)
    return chunked.chunked(one.hidden_ND, one.head, target, vocab=vocab, chunk=chunk)


def chunked_ce(one: Case, *, chunk: int, vocab: int = V) -> Tensor:
    return chunked.chunked(one.hidden_ND, one.head, chunked.cross_entropy_target(one.labels), vocab=vocab, chunk=chunk)


def chunked_term(name: str, one: Case, *, chunk: int, vocab: int = V) -> Tensor:
    target = chunked.follow(one.teacher_ND, one.teacher_head, TERMS[name][0], vocab=vocab)
    return chunked.chunked(one.hidden_ND, one.head, target, vocab=vocab, chunk=chunk)


def plain_term(name: str, one: Case, *, vocab: int = V) -> Tensor:
    student_NV, teacher_NV = (
        plain_logits(hidden, head, vocab)
        for hidden, head in ((one.hidden_ND, one.head), (one.teacher_ND, one.teacher_head))
    )
    return TERMS[name][1](student_NV, teacher_NV).sum()


def gradients(loss: Tensor, one: Case) -> list[Tensor]:
    wanted = [one.hidden_ND, one.head.weight] + ([] if one.head.bias is None else [one.head.bias])
    return list(torch.autograd.grad(loss, wanted))


def assert_same(have: Tensor, want: Tensor, one: Case) -> None:
    torch.testing.assert_close(have, want, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(gradients(have * 0.7, one), gradients(want * 0.7, one), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.25},
    "softcap": {"softcap": 2.0},
    "all": {"bias": True, "scale": 3.0, "softcap": 2.0},
}


@pytest.mark.parametrize("chunk", [1, 7, 16, N, 100])
@pytest.mark.parametrize("kind", HEADS)
def test_kl_is_the_plain_formula(kind: str, chunk: int) -> None:
    one = case(**HEADS[kind])
    assert_same(chunked_kl(one, chunk=chunk), plain_kl(one), one)


@pytest.mark.parametrize("chunk", [1, 7, N])
@pytest.mark.parametrize("kind", HEADS)
def test_ce_is_the_plain_formula(kind: str, chunk: int) -> None:
    one = case(**HEADS[kind])
    assert_same(chunked_ce(one, chunk=chunk), plain_ce(one), one)


@pytest.mark.parametrize("chunk", [1, 7, N])
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("name", [name for name in TERMS if name != "kl"])
def test_every_term_is_the_plain_formula(name: str, kind: str, chunk: int) -> None:
    one = case(**HEADS[kind], rows=V + 2, teacher_rows=V + 5)
    assert_same(chunked_term(name, one, chunk=chunk), plain_term(name, one), one)


def test_a_sum_of_targets_is_the_weighted_sum() -> None:
    one = case(scale=0.5)
    rows = divergences.weighted([(0.7, TERMS["kl"][0]), (0.2, TERMS["cosine"][0])])
    teacher = chunked.follow(one.teacher_ND, one.teacher_head, rows, vocab=V)
    target = chunked.sum_of([(1.0, teacher), (0.3, chunked.cross_entropy_target(one.labels))])
    have = chunked.chunked(one.hidden_ND, one.head, target, vocab=V, chunk=10)
    assert_same(have, 0.7 * plain_kl(one) + 0.2 * plain_term("cosine", one) + 0.3 * plain_ce(one), one)


def test_draws_of_the_teacher_are_taken_by_chunk() -> None:
    one = case()
    p_NV = torch.softmax(plain_logits(one.teacher_ND, one.teacher_head, V), -1)
    everything = divergences.Sampled(torch.arange(V).expand(N, V), p_NV, -(p_NV * p_NV.log()).sum(-1))
    have = chunked.chunked(one.hidden_ND, one.head, chunked.follow_draws(everything), vocab=V, chunk=7)
    assert_same(have, plain_kl(one), one)


@pytest.mark.parametrize(("rows", "teacher_rows"), [(V, V + 5), (V + 5, V), (V + 3, V + 5)])
def test_padded_vocabularies_are_aligned(rows: int, teacher_rows: int) -> None:
    one = case(rows=rows, teacher_rows=teacher_rows, bias=True)
    loss = chunked_kl(one, chunk=9)
    assert_same(loss, plain_kl(one), one)
    _, weight_VD, bias_V = gradients(chunked_kl(one, chunk=9), one)
    assert weight_VD.shape[0] == rows
    assert not weight_VD[V:].any()
    assert not bias_V[V:].any()
    assert_same(chunked_ce(one, chunk=9, vocab=V), plain_ce(one), one)


def test_tied_weights_gather_both_gradients() -> None:
    one = case()
    ids = torch.randint(V, (N,), generator=torch.Generator().manual_seed(1))
    tied_VD, inner_DD = one.head.weight, torch.randn(D, D, dtype=F64)

    def gradient(kl: Any, **options: Any) -> Tensor:
        student = one._replace(hidden_ND=torch.tanh(tied_VD[ids] @ inner_DD))
        return torch.autograd.grad(kl(student, **options), tied_VD)[0]

    torch.testing.assert_close(gradient(chunked_kl, chunk=5), gradient(plain_kl), rtol=1e-9, atol=1e-10)


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.lists(st.booleans(), min_size=N, max_size=N), st.sampled_from([1, 4, 50]))
def test_padding_never_counts(seed: int, keep: list[bool], chunk: int) -> None:
    one, mask = case(seed=seed), torch.tensor(keep)
    with torch.no_grad():
        one.hidden_ND[~mask] = math.nan
    clean = [part[mask] for part in (one.hidden_ND, one.teacher_ND, one.labels)]
    kept = one._replace(hidden_ND=clean[0], teacher_ND=clean[1], labels=clean[2])
    hidden_ND, weight_VD = gradients(chunked_kl(kept, chunk=chunk) + chunked_ce(kept, chunk=chunk), one)
    assert not hidden_ND[~mask].any()
    bare = kept._replace(hidden_ND=clean[0].detach().requires_grad_())
    want_ND, want_VD = gradients(plain_kl(bare) + plain_ce(bare), bare)
    torch.testing.assert_close(hidden_ND[mask], want_ND, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(weight_VD, want_VD, rtol=1e-9, atol=1e-10)


@settings(max_examples=10)
@given(st.integers(0, 10**6), st.floats(0.3, 4.0))
def test_equal_models_diverge_by_exactly_nothing(seed: int, temperature: float) -> None:
    one = case(seed=seed, dtype=torch.float32, softcap=4.0)
    head = Head(one.head.weight.detach(), softcap=4.0)
    same = one._replace(teacher_ND=one.hidden_ND.detach(), teacher_head=head)
    loss = chunked_kl(same, chunk=8, temperature=temperature)
    assert loss == 0
    assert not any(grad.any() for grad in gradients(loss, same))


def test_half_precision_weights_give_logits_that_are_not_rounded() -> None:
    one = case(dtype=torch.bfloat16)
    exact = Case(
        one.hidden_ND.detach().double().requires_grad_(),
        Head(nn.Parameter(one.head.weight.detach().double())),
        one.teacher_ND.double(),
        Head(one.teacher_head.weight.double()),
        one.labels,
    )
    loss, want = chunked_kl(one, chunk=8), plain_kl(exact)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=0)
    for ours, theirs in zip(gradients(loss, one), gradients(want, exact), strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.double(), theirs, rtol=2**-8, atol=1e-4)


def test_a_half_operand_rounds_the_hidden_states_gradient_alone_on_a_cpu() -> None:
    one, half = case(dtype=torch.float32), torch.bfloat16
    setting = torch.backends.mkldnn.matmul.fp32_precision
    target = chunked.follow(one.teacher_ND, one.teacher_head, divergences.kl_rows, vocab=V, operand=half)
    have = chunked.chunked(one.hidden_ND, one.head, target, vocab=V, chunk=8, operand=half)
    want = chunked_kl(one, chunk=8)
    fine = 2**-7 if torch.cpu._is_amx_tile_supported() else 1e-5  # such units round the factors of the logits
    torch.testing.assert_close(have, want, rtol=fine, atol=fine)
    (hidden_ND, weight_VD), (exact_ND, exact_VD) = gradients(have, one), gradients(want, one)
    torch.testing.assert_close(weight_VD, exact_VD, rtol=fine, atol=fine)
    error = (hidden_ND - exact_ND).norm() / exact_ND.norm()
    assert 1e-5 < error < 2**-7
    assert torch.backends.mkldnn.matmul.fp32_precision == setting


def test_autocast_does_not_reach_the_logits() -> None:
    one = case(dtype=torch.float32)
    want = chunked_kl(one, chunk=8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(chunked_kl(one, chunk=8), want)


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_that_accumulates_gathers_the_same_sum_in_its_own_gradient(tied: bool) -> None:
    one = case(rows=V + 2, bias=True)
    ids = torch.randint(V, (N,), generator=torch.Generator().manual_seed(1))
    weight_VD, bias_V = one.head.weight, one.head.bias
    assert bias_V is not None
    found = []
    for head in (one.head, replace(one.head, accumulates=True)):
        for _ in range(2):
            hidden_ND = one.hidden_ND + (weight_VD[ids] if tied else 0)
            chunked_kl(one._replace(hidden_ND=hidden_ND, head=head), chunk=5).backward()
        found.append([weight_VD.grad, bias_V.grad, one.hidden_ND.grad])
        weight_VD.grad = bias_V.grad = one.hidden_ND.grad = None
    for ours, want in zip(*found, strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-12, atol=1e-12)


def test_a_head_that_accumulates_holds_no_second_gradient() -> None:
    tokens, vocab, width, chunk = 64, 400, 64, 8
    random = torch.Generator().manual_seed(0)
    hidden_ND, taught_ND = (torch.randn(tokens, width, generator=random) for _ in range(2))
    weight_VD, its_VD = (torch.randn(vocab, width, generator=random) for _ in range(2))
    peaks = []
    for accumulates in (False, True):
        head = Head(nn.Parameter(weight_VD), accumulates=accumulates)
        with Allocations() as seen:
            head.weight.grad = torch.zeros_like(weight_VD)  # of an earlier micro-batch
            target = chunked.follow(taught_ND, Head(its_VD), divergences.kl_rows, vocab=vocab)
            chunked.chunked(hidden_ND.requires_grad_(), head, target, vocab=vocab, chunk=chunk).backward()
        peaks.append(seen.peak_bytes)
    with_second, without = peaks
    assert with_second - without > 0.9 * weight_VD.nbytes


def test_half_precision_heads_do_not_accumulate_in_place() -> None:
    one = case(dtype=torch.bfloat16)
    for head in (one.head, replace(one.head, accumulates=True)):
        chunked_kl(one._replace(head=head), chunk=8).backward()
    twice, once = one.head.weight.grad, gradients(chunked_kl(one, chunk=8), one)[1]
    assert twice is not None
    torch.testing.assert_close(twice, 2 * once)


def test_a_frozen_head_gets_no_gradient() -> None:
    one = case()
    frozen = one._replace(head=Head(one.head.weight.detach()))
    loss = chunked_kl(frozen, chunk=8)
    torch.testing.assert_close(
        torch.autograd.grad(loss, one.hidden_ND), torch.autograd.grad(plain_kl(frozen), one.hidden_ND)
    )


class Allocations(TorchDispatchMode):
    """Watches the storage of every result: the largest one's entries, and the most bytes that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.peak_bytes = 0
        self._alive: dict[int, tuple[int, int]] = {}  # by address: how many tensors have it, its bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and (address := leaf.untyped_storage().data_ptr()):
                num_bytes = leaf.untyped_storage().nbytes()
                self.largest = max(self.largest, num_bytes // leaf.element_size())
                self._alive[address] = (self._alive.get(address, (0, 0))[0] + 1, num_bytes)
                weakref.finalize(leaf, self._drop, address)
        self.peak_bytes = max(self.peak_bytes, sum(num_bytes for _, num_bytes in self._alive.values()))
        return result

    def _drop(self, address: int) -> None:
        holders, num_bytes = self._alive.pop(address)
        if holders > 1:
            self._alive[address] = (holders - 1, num_bytes)


@pytest.mark.parametrize("kind", ["plain", "all"])
@pytest.mark.parametrize("name", ["ce", *TERMS])
def test_no_tensor_holds_more_logits_than_a_chunk(name: str, kind: str) -> None:
    one, chunk = case(**HEADS[kind]), 12
    assert N > chunk > TEACHER_D > D  # so that all other tensors are smaller, and the logits of all are larger
    with Allocations() as seen:
        (chunked_ce(one, chunk=chunk) if name == "ce" else chunked_term(name, one, chunk=chunk)).backward()
    assert seen.largest == chunk * V


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("name", [*TERMS, "sum"])
def test_two_chunks_of_logits_and_a_few_blocks_are_alive_at_once(name: str, softcap: float | None) -> None:
    tokens, width, vocab, chunk = 128, 4, 4000, 64
    random = torch.Generator().manual_seed(0)
    hidden_ND, taught_ND = (torch.randn(tokens, width, generator=random) for _ in range(2))
    weight_VD, its_VD = (torch.randn(vocab, width, generator=random) for _ in range(2))
    rows = divergences.weighted(
        [(1.0, TERMS[term][0]) for term in (("kl", "mse", "cosine") if name == "sum" else [name])]
    )
    head = Head(nn.Parameter(weight_VD), softcap=softcap)
    with Allocations() as seen:
        target = chunked.follow(taught_ND, Head(its_VD, softcap=softcap), rows, vocab=vocab)
        chunked.chunked(hidden_ND.requires_grad_(), head, target, vocab=vocab, chunk=chunk)
    gradients_bytes = 4 * (vocab + tokens) * width
    assert seen.peak_bytes < gradients_bytes + 2.75 * 4 * chunk * vocab


def test_measures_are_the_plain_formulas() -> None:
    one = case(softcap=3.0)
    found = chunked.divergence_sums(
        one.hidden_ND, one.head, one.teacher_ND, one.teacher_head, one.labels, vocab=V, chunk=6
    )
    torch.testing.assert_close(found.kl, plain_kl(one).detach())
    torch.testing.assert_close(found.ce, plain_ce(one).detach())
    best = [
        plain_logits(hidden, head, V).argmax(-1)
        for hidden, head in ((one.hidden_ND, one.head), (one.teacher_ND, one.teacher_head))
    ]
    assert found.agreement == (best[0] == best[1]).sum()
    loss_N = chunked.token_losses(one.hidden_ND, one.head, one.labels, vocab=V, chunk=6)
    torch.testing.assert_close(loss_N.sum(), plain_ce(one).detach())


def test_chunks_fit_the_vocabulary() -> None:
    assert chunked.chunk_tokens(2048, cuda=False) * 2048 <= 2**21
    assert chunked.chunk_tokens(128_256, cuda=True) * 128_256 <= 2**25
    assert chunked.chunk_tokens(2**30, cuda=False) == 192
