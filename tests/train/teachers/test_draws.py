"""Draws of a teacher's distribution: their expectation, their bytes, and the loss that they estimate."""

from __future__ import annotations

import pytest
import torch

from halve.train.losses import divergences
from halve.train.teachers import draws

VOCAB, TOKENS = 24, 6


@pytest.fixture
def logits() -> torch.Tensor:
    return 2 * torch.randn(TOKENS, VOCAB, generator=torch.Generator().manual_seed(0))


def sampled(logits: torch.Tensor, *, seed: int, count: int = 16, temperature: float = 1.0) -> divergences.Sampled:
    uniform = draws.uniforms(len(logits), count, seed=seed, sample=5)
    ids = draws.draw(logits, uniform, temperature=temperature)
    entropy = draws.entropy(logits, temperature=temperature)
    return draws.unpack(draws.pack(ids, entropy, vocab=logits.shape[1]), draws=count)


def dense(found: divergences.Sampled) -> torch.Tensor:
    return torch.zeros(TOKENS, VOCAB).scatter_add_(1, found.ids, found.shares)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_shares_are_the_distribution_in_expectation(logits: torch.Tensor, temperature: float) -> None:
    p = torch.softmax(logits / temperature, -1)
    seeds, count = 2000, 16
    mean = sum(dense(sampled(logits, seed=seed, temperature=temperature)) for seed in range(seeds)) / seeds
    sigma = (p * (1 - p) / (seeds * count)).sqrt()
    assert bool(((mean - p).abs() < 5 * sigma + 1e-9).all())
    # the likeliest tokens alone, renormalized, are far from it by the same measure
    top = torch.zeros_like(p).scatter(1, p.topk(4).indices, 1.0) * p
    assert not bool(((top / top.sum(-1, keepdim=True) - p).abs() < 5 * sigma + 1e-9).all())


def test_loss_and_gradient_are_those_of_kl_in_expectation(logits: torch.Tensor) -> None:
    student = logits + torch.randn(TOKENS, VOCAB, generator=torch.Generator().manual_seed(1))
    kl, want = divergences.kl_rows(student, logits)
    seeds = 2000
    found = [divergences.sampled_kl_rows(student, sampled(logits, seed=seed)) for seed in range(seeds)]
    losses, grads = torch.stack([loss for loss, _ in found]), torch.stack([grad for _, grad in found])
    assert bool(((losses.mean(0) - kl).abs() < 5 * losses.std(0) / seeds**0.5).all())
    assert bool(((grads.mean(0) - want).abs() < 5 * grads.std(0) / seeds**0.5 + 1e-4).all())


def test_uniforms_are_the_seeds_and_the_samples_alone() -> None:
    once, again = (draws.uniforms(3, 4, seed=1, sample=2) for _ in range(2))
    assert torch.equal(once, again)
    assert not torch.equal(once, draws.uniforms(3, 4, seed=2, sample=2))
    assert not torch.equal(once, draws.uniforms(3, 4, seed=1, sample=3))
    assert bool(((once >= 0) & (once < 1)).all())


def test_a_token_that_float32_sums_would_lose_is_drawn() -> None:
    logits = torch.tensor([[0.0, -20.0]])  # p = 2e-9, below half a step of float32 near 1
    uniform = torch.tensor([[0.5, 1 - 1e-9, 1 - 2**-53]], dtype=torch.float64)
    assert draws.draw(logits, uniform, temperature=1.0).tolist() == [[0, 1, 1]]


def test_tokens_of_no_probability_are_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    uniform = torch.tensor([[0.0, 0.25, 0.5, 0.75, 1 - 2**-53]], dtype=torch.float64)
    assert draws.draw(logits, uniform, temperature=1.0).tolist() == [[1, 1, 3, 3, 3]]


@pytest.mark.parametrize(("vocab", "count"), [(2, 1), (300, 7), (128_256, 16), (262_144, 64), (50_000, 300)])
def test_what_is_packed_comes_back(vocab: int, count: int) -> None:
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab, (9, count), generator=random)
    ids[0] = vocab - 1  # all draws alike, and the largest number that an entry must hold
    ids[1] = 0
    entropy = torch.rand(9, generator=random)
    packed = draws.pack(ids, entropy, vocab=vocab)
    found = draws.unpack(packed, draws=count)
    assert torch.equal(found.entropy, entropy)
    for row in range(9):
        counted = {int(i): float(s) for i, s in zip(found.ids[row], found.shares[row], strict=True) if s > 0}
        values, counts = ids[row].unique(return_counts=True)
        assert counted == pytest.approx(dict(zip(values.tolist(), (counts / count).tolist(), strict=True)))
    num_bytes = sum(part.numel() * part.itemsize for part in packed)
    assert num_bytes <= 9 * draws.draw_bytes(vocab, count)


def test_sixteen_draws_of_a_large_vocabulary_take_three_bytes_each() -> None:
    assert [draws.entry_bytes(vocab, 16) for vocab in (128_256, 151_936, 262_144)] == [3, 3, 3]
    assert draws.draw_bytes(128_256, 16) == 53


def test_entropy_is_the_definition(logits: torch.Tensor) -> None:
    want = torch.distributions.Categorical(logits=logits.double() / 1.5).entropy()
    assert torch.allclose(draws.entropy(logits, temperature=1.5).double(), want, atol=1e-6)
