"""Kendall's tau with its interval, and who got worse."""

from __future__ import annotations

import pytest
import torch

from halve.search.agreement import Agreement, rank_agreement, rises


def spread(means: list[float], *, noise: float, samples: int = 24, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.tensor(means, dtype=torch.float64)[:, None] + noise * torch.randn(
        len(means), samples, generator=draw, dtype=torch.float64
    )


def test_one_swap_of_four_costs_two_of_six_pairs() -> None:
    before_CS, after_CS = spread([1, 2, 3, 4], noise=1e-3), spread([1, 3, 2, 4], noise=1e-3, seed=1)
    found = rank_agreement(before_CS, after_CS, seed=0)
    assert found is not None
    assert found.tau == pytest.approx(4 / 6)
    assert (found.low, found.high) == (None, None)  # every draw of the samples gives this value
    assert found.candidates == 4


def test_noisy_samples_widen_the_interval() -> None:
    before_CS, after_CS = spread([1, 2, 3, 4], noise=3.0), spread([1, 2, 3, 4], noise=3.0, seed=1)
    found = rank_agreement(before_CS, after_CS, seed=0)
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.tau <= found.high
    assert found.high - found.low > 0.5
    assert rank_agreement(before_CS, after_CS, seed=0) == found


def test_one_sample_has_no_interval() -> None:
    kl_CS = spread([1, 2, 3, 4], noise=0.0, samples=1)
    assert rank_agreement(kl_CS, kl_CS, seed=0) == Agreement(1.0, None, None, 4)


def test_three_candidates_have_no_interval() -> None:
    before_CS, after_CS = spread([1, 2, 3], noise=3.0), spread([1, 2, 3], noise=3.0, seed=1)
    found = rank_agreement(before_CS, after_CS, seed=0)
    assert found is not None
    assert (found.low, found.high, found.candidates) == (None, None, 3)


def test_where_there_are_no_ranks() -> None:
    assert rank_agreement(spread([1], noise=1), spread([1], noise=1), seed=0) is None
    assert rank_agreement(torch.ones(3, 24, dtype=torch.float64), spread([1, 2, 3], noise=0), seed=0) is None


def test_a_rise_beyond_its_error_is_told() -> None:
    before_CS = spread([0.5, 0.6, 0.7], noise=0.01)
    after_CS = before_CS + spread([-0.1, 0.2, 0.001], noise=0.01, seed=1)
    (found,) = rises(torch.stack([before_CS, after_CS]))
    assert (found.row, found.rung) == (1, 1)
    assert found.by.value == pytest.approx(0.2, abs=0.02)


def test_a_rung_that_was_not_reached_is_no_rise() -> None:
    kl_RCS = torch.stack([spread([0.5], noise=0.01), torch.full((1, 24), torch.nan, dtype=torch.float64)])
    assert rises(kl_RCS) == ()
