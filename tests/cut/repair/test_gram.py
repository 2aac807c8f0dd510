"""Streamed Gram matrices and the ridge solve against plain least squares."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halve.cut.repair.gram import Gram, SingularGramWarning
from halve.cut.repair.ridge import ridge
from halve.errors import CheckpointError


def _data(tokens: int = 200, x: int = 7, y: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_NX = torch.randn(tokens, x, generator=generator, dtype=torch.float64)
    true_YX = torch.randn(y, x, generator=generator, dtype=torch.float64)
    return x_NX, x_NX @ true_YX.T, true_YX


@given(cuts=st.lists(st.integers(1, 199), max_size=5))
@settings(max_examples=20)
def test_how_tokens_are_grouped_does_not_matter(cuts: list[int]) -> None:
    x_NX, y_NY, _ = _data()
    whole, parts = Gram(7, 3), Gram(7, 3)
    whole.add(x_NX, y_NY)
    edges = [0, *sorted(set(cuts)), 200]
    for start, stop in itertools.pairwise(edges):
        parts.add(x_NX[start:stop], y_NY[start:stop])
    torch.testing.assert_close(parts.xx_XX, whole.xx_XX)
    torch.testing.assert_close(parts.yx_YX, whole.yx_YX)
    assert parts.tokens == whole.tokens == 200
    torch.testing.assert_close(whole.xx_XX, x_NX.T @ x_NX)


def test_half_precision_is_raised_before_products() -> None:
    x_NX = torch.full((3, 2), 300.0, dtype=torch.float16)
    gram = Gram(2)
    gram.add(x_NX)
    assert gram.xx_XX.tolist() == [[270000.0, 270000.0], [270000.0, 270000.0]]  # above float16's largest number


def test_a_small_ridge_finds_the_matrix_behind_the_data() -> None:
    x_NX, y_NY, true_YX = _data()
    found = ridge(x_NX.T @ x_NX, y_NY.T @ x_NX, torch.zeros(3, 7, dtype=torch.float64), strength=1e-12)
    torch.testing.assert_close(found, true_YX, atol=1e-9, rtol=0)


def test_ridge_is_the_stacked_least_squares_problem() -> None:
    """Ridge toward a prior = ordinary least squares with one more row a channel."""
    x_NX, y_NY, _ = _data(tokens=20)
    y_NY = y_NY + 1.0
    prior_YX = torch.ones(3, 7, dtype=torch.float64)
    found = ridge(x_NX.T @ x_NX, y_NY.T @ x_NX, prior_YX, strength=0.3)
    r = 0.3 * (x_NX.T @ x_NX).diagonal().mean()
    rows = torch.cat([x_NX, r.sqrt() * torch.eye(7, dtype=torch.float64)])
    goals = torch.cat([y_NY, r.sqrt() * prior_YX.T])
    torch.testing.assert_close(found, torch.linalg.lstsq(rows, goals).solution.T)


def test_a_prior_that_explains_everything_comes_back() -> None:
    x_NX, y_NY, true_YX = _data(tokens=3)  # singular: fewer tokens than channels
    found = ridge(x_NX.T @ x_NX, y_NY.T @ x_NX, true_YX, strength=1e-3)
    torch.testing.assert_close(found, true_YX, atol=1e-10, rtol=0)


def test_channels_that_are_never_active_keep_their_prior() -> None:
    x_NX, y_NY, _ = _data()
    x_NX[:, 2] = 0
    prior_YX = torch.arange(21, dtype=torch.float64).reshape(3, 7)
    found = ridge(x_NX.T @ x_NX, y_NY.T @ x_NX, prior_YX, strength=1e-3)
    torch.testing.assert_close(found[:, 2], prior_YX[:, 2])
    silent = ridge(torch.zeros(7, 7).double(), torch.zeros(3, 7).double(), prior_YX, strength=1e-3)
    torch.testing.assert_close(silent, prior_YX)


def test_fewer_tokens_than_channels_are_warned_about() -> None:
    gram = Gram(7)
    gram.add(_data(tokens=3)[0])
    with pytest.warns(SingularGramWarning, match=r"3 calibration tokens for 7 channels at here.*refit_samples"):
        gram.check("here")
    gram.add(_data(tokens=4)[0])
    gram.check("here")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(bad: float) -> None:
    gram = Gram(7, 3)
    x_NX, y_NY, _ = _data()
    y_NY[5, 1] = bad
    gram.add(x_NX, y_NY)
    with pytest.raises(CheckpointError, match="not finite at layer 3") as caught:
        gram.check("layer 3")
    assert len(str(caught.value).splitlines()) == 3
