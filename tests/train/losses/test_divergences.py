"""Every loss of rows against float64 autograd of its plain formula, and what must hold of each.

Shapes: N tokens, V vocab, K likeliest tokens or draws.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_losses import TERMS, K, Plain, soft
from torch import Tensor

from halve.train.losses import divergences as d

F64 = torch.float64
N, V = 9, 29
DIVERGENCES = [name for name in TERMS if name not in ("mse", "cosine")]
ZERO_AT_EQUALS = [name for name in TERMS if name != "top_k"]


def logits(*, seed: int = 0, size: float = 3.0, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    student, teacher = (size * torch.randn(N, V, generator=random, dtype=F64) for _ in range(2))
    return student.to(dtype), teacher.to(dtype)


def assert_plain(rows: d.TeacherRows, plain: Plain, student: Tensor, teacher: Tensor) -> None:
    before = student.clone(), teacher.clone()
    loss_N, grad_NV = rows(student, teacher)
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])
    leaf = student.clone().requires_grad_()
    want_N = plain(leaf, teacher)
    (want_NV,) = torch.autograd.grad(want_N.sum(), leaf)
    torch.testing.assert_close(loss_N, want_N.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grad_NV, want_NV, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", TERMS)
def test_value_and_gradient_are_the_plain_formula(name: str) -> None:
    assert_plain(*TERMS[name], *logits())


@pytest.mark.parametrize("temperature", [0.5, 3.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_at_a_temperature(name: str, temperature: float) -> None:
    rows, plain = (partial(part, temperature=temperature) for part in TERMS[name])
    assert_plain(rows, plain, *logits(seed=1))


def test_a_sum_is_the_weighted_sum() -> None:
    names = ["kl", "mse", "cosine"]
    rows = d.weighted([(0.5, TERMS["kl"][0]), (2.0, TERMS["mse"][0]), (0.3, TERMS["cosine"][0])])

    def plain(z: Tensor, t: Tensor) -> Tensor:
        return sum(weight * TERMS[name][1](z, t) for weight, name in zip((0.5, 2.0, 0.3), names, strict=True))

    assert_plain(rows, plain, *logits(seed=2))


def test_cross_entropy_is_the_plain_formula() -> None:
    student, _ = logits(seed=3)
    labels = torch.arange(N) % V
    assert_plain(
        lambda z, _: d.ce_rows(z, labels),
        lambda z, _: torch.nn.functional.cross_entropy(z, labels, reduction="none"),
        student,
        student,
    )


@settings(max_examples=25)
@given(st.sampled_from(DIVERGENCES), st.integers(0, 10**6), st.floats(0.01, 30.0), st.floats(0.3, 4.0))
def test_a_divergence_is_never_negative(name: str, seed: int, size: float, temperature: float) -> None:
    loss_N, grad_NV = TERMS[name][0](*logits(seed=seed, size=size, dtype=torch.float32), temperature=temperature)
    assert (loss_N >= 0).all()
    assert grad_NV.isfinite().all()


@settings(max_examples=25)
@given(st.sampled_from(ZERO_AT_EQUALS), st.integers(0, 10**6), st.floats(0.01, 30.0))
def test_equal_logits_differ_by_exactly_nothing(name: str, seed: int, size: float) -> None:
    student, _ = logits(seed=seed, size=size, dtype=torch.float32)
    loss_N, grad_NV = TERMS[name][0](student, student.clone())
    assert not loss_N.any()
    assert not grad_NV.any()


@pytest.mark.parametrize("name", TERMS)
def test_distributions_without_common_tokens_stay_finite(name: str) -> None:
    teacher = torch.full((N, V), -300.0)
    student = teacher.clone()
    teacher[:, 0], student[:, 1] = 300.0, 300.0
    loss_N, grad_NV = TERMS[name][0](student, teacher)
    assert loss_N.isfinite().all()
    assert grad_NV.isfinite().all()
    if name.startswith("jsd"):  # its bound, reached where nothing is shared
        beta = torch.tensor(float(name.split()[1]))
        want = -(beta * beta.log() + (1 - beta) * (1 - beta).log())
        torch.testing.assert_close(loss_N, want.expand(N))
    assert (loss_N > 0).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_small_divergence_survives_large_logits(name: str) -> None:
    _, teacher = logits(seed=4, size=5.0)
    teacher += 40
    student = teacher + 1e-2 * torch.randn(N, V, dtype=F64, generator=torch.Generator().manual_seed(0))
    want_N, want_NV = TERMS[name][0](student, teacher)
    have_N, have_NV = TERMS[name][0](student.float(), teacher.float())
    assert (have_N.sum() / want_N.sum() - 1).abs() < 0.002
    assert (have_NV - want_NV).norm() < 0.002 * want_NV.norm()


def test_the_mixture_leans_to_the_teacher_with_beta() -> None:
    """Scaled by its weight, JSD goes to KL(p || q) as the student makes the mixture, to KL(q || p) as the teacher."""
    student, teacher = logits(size=1.0)
    near_0, near_1 = (d.jsd_rows(student, teacher, beta=beta)[0] for beta in (1e-6, 1 - 1e-6))
    torch.testing.assert_close(near_0 / 1e-6, d.kl_rows(student, teacher)[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(near_1 / 1e-6, d.reverse_kl_rows(student, teacher)[0], rtol=1e-4, atol=0)


@pytest.mark.parametrize("rows", [d.top_k_kl_rows, d.top_k_tail_kl_rows])
def test_the_top_of_all_tokens_is_kl(rows: Callable[..., tuple[Tensor, Tensor]]) -> None:
    pair = logits(seed=5)
    for k in (V, V + 7):
        for have, want in zip(rows(*pair, k=k), d.kl_rows(*pair), strict=True):
            assert torch.equal(have, want)
    torch.testing.assert_close(d.top_k_tail_kl_rows(*pair, k=V - 1)[0], d.kl_rows(*pair)[0])


def test_only_the_tail_keeps_a_perfect_student_in_place() -> None:
    teacher, _ = logits(seed=6)
    assert d.top_k_kl_rows(teacher, teacher, k=K)[1].abs().sum() > 0.1
    assert not d.top_k_tail_kl_rows(teacher, teacher, k=K)[1].any()


def test_a_row_of_zeros_has_no_direction() -> None:
    student, teacher = logits()
    loss_N, grad_NV = d.cosine_rows(torch.zeros_like(student), teacher)
    torch.testing.assert_close(loss_N, torch.full((N,), 0.5, dtype=F64))
    assert not grad_NV.any()


def sampled(teacher: Tensor, *, draws: int, temperature: float, seed: int) -> d.Sampled:
    p_NV = soft(teacher, temperature)
    ids_NK = torch.multinomial(p_NV, draws, replacement=True, generator=torch.Generator().manual_seed(seed))
    entropy_N = -(p_NV * p_NV.log()).sum(-1)
    return d.Sampled(ids_NK, torch.full(ids_NK.shape, 1 / draws, dtype=F64), entropy_N)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_draws_give_the_divergence_in_expectation(temperature: float) -> None:
    student, teacher = logits(seed=7, size=1.0)
    draws = sampled(teacher, draws=200_000, temperature=temperature, seed=0)
    want_N, want_NV = d.kl_rows(student, teacher, temperature=temperature)
    have_N, have_NV = d.sampled_kl_rows(student, draws, temperature=temperature)
    torch.testing.assert_close(have_N, want_N, rtol=0.02, atol=0.02)
    torch.testing.assert_close(have_NV, want_NV, rtol=0, atol=0.01)


def test_a_draw_of_all_tokens_by_their_probability_is_kl() -> None:
    student, teacher = logits(seed=8)
    p_NV = soft(teacher, 1.0)
    ids_NV = torch.arange(V).expand(N, V)
    all_of_it = d.Sampled(ids_NV, p_NV, -(p_NV * p_NV.log()).sum(-1))
    for have, want in zip(d.sampled_kl_rows(student, all_of_it), d.kl_rows(student, teacher), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-9, atol=1e-12)


def test_a_filler_of_share_zero_counts_for_nothing() -> None:
    student, teacher = logits(seed=9)
    draws = sampled(teacher, draws=4, temperature=1.0, seed=1)
    filler = torch.zeros(N, 2)
    filled = d.Sampled(
        torch.cat([draws.ids, filler.long()], -1), torch.cat([draws.shares, filler.double()], -1), draws.entropy
    )
    for have, want in zip(d.sampled_kl_rows(student, filled), d.sampled_kl_rows(student, draws), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-12, atol=1e-12)
