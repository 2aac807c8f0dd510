"""The ridge that unfitted tokens choose, against trying every strength and against the weights of the cut."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halve.cut.repair.gram import Gram
from halve.cut.repair.ridge import STRENGTHS, Problem, chosen_ridge, ridge

X, Y = 24, 5


def _problem(seed: int, tokens: int, *, noise: float, change: float) -> tuple[Gram, Gram, Tensor, Tensor, Tensor]:
    """Sums of few tokens and of as many others; the prior, and the inputs and outputs of the others."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    prior_YX = normal(Y, X)
    true_YX = prior_YX + change * normal(Y, X)
    grams = []
    for _ in range(2):
        x_NX = normal(tokens, X)
        y_NY = x_NX @ true_YX.T + noise * normal(tokens, Y)
        gram = Gram(X, Y)
        gram.add(x_NX, y_NY)
        grams.append(gram)
    return grams[0], grams[1], prior_YX, x_NX, y_NY


def _left(weight_YX: Tensor, x_NX: Tensor, y_NY: Tensor) -> float:
    return float((y_NY - x_NX @ weight_YX.T).square().sum())


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    tokens=st.integers(2, 300),
    noise=st.sampled_from([0.0, 0.1, 1.0, 10.0]),
    change=st.sampled_from([0.0, 0.1, 1.0]),
)
def test_the_error_it_reports_is_that_of_the_held_tokens_and_never_above_the_cuts(
    seed: int, tokens: int, noise: float, change: float
) -> None:
    fitted, held, prior_YX, x_NX, y_NY = _problem(seed, tokens, noise=noise, change=change)
    fit = chosen_ridge(fitted, held, prior_YX)
    before, after = _left(prior_YX, x_NX, y_NY), _left(fit.weight_YX, x_NX, y_NY)
    assert after <= before * (1 + 1e-9) + 1e-9
    if before > 1e-6:
        assert fit.error == pytest.approx(after / before, abs=1e-6)


@pytest.mark.parametrize("tokens", [8, 40, 400])
def test_no_strength_nearby_does_better(tokens: int) -> None:
    fitted, held, prior_YX, x_NX, y_NY = _problem(3, tokens, noise=1.0, change=0.3)
    fit = chosen_ridge(fitted, held, prior_YX)
    errors = [_left(ridge(fitted.xx_XX, fitted.yx_YX, prior_YX, strength=s), x_NX, y_NY) for s in STRENGTHS]
    assert _left(fit.weight_YX, x_NX, y_NY) == pytest.approx(min(errors))


def test_where_only_noise_was_seen_the_cut_stays() -> None:
    fitted, held, prior_YX, _, _ = _problem(0, 4, noise=30.0, change=0.0)
    fit = chosen_ridge(fitted, held, prior_YX)
    assert fit.strength == math.inf
    assert fit.error == 1
    assert torch.equal(fit.weight_YX, prior_YX)


def test_many_tokens_without_noise_find_the_matrix_behind_the_data() -> None:
    fitted, held, prior_YX, x_NX, y_NY = _problem(0, 2000, noise=0.0, change=1.0)
    fit = chosen_ridge(fitted, held, prior_YX)
    assert fit.strength == STRENGTHS[0]
    assert _left(fit.weight_YX, x_NX, y_NY) < 1e-6 * _left(prior_YX, x_NX, y_NY)


def test_without_held_tokens_the_strength_is_the_given_one() -> None:
    fitted, _, prior_YX, _, _ = _problem(0, 100, noise=0.1, change=1.0)
    problem = Problem(X, Y, device=torch.device("cpu"))
    problem.fitted = fitted
    fit = problem.solve(prior_YX, strength=0.3, what="here")
    assert fit.strength == 0.3
    assert torch.equal(fit.weight_YX, ridge(fitted.xx_XX, fitted.yx_YX, prior_YX, strength=0.3))
