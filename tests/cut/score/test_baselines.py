"""Baseline importances against numbers worked out by hand."""

from __future__ import annotations

import torch

from halve.cut.score import baselines

W = torch.tensor([[1.0, -2.0, 0.0], [0.5, 3.0, -1.0]])
G = torch.tensor([[2.0, 1.0, 5.0], [-4.0, 1.0, 1.0]])


def test_magnitude_is_the_sum_of_squares() -> None:
    assert baselines.magnitude(W).tolist() == [5.0, 10.25]


def test_wanda_is_the_column_sum_of_absolute_weights_times_the_inputs_norm() -> None:
    # columns: 1 + 0.5, 2 + 3, 0 + 1
    assert baselines.activation_times_weight(torch.tensor([2.0, 0.5, 0.0]), W).tolist() == [3.0, 2.5, 0.0]


def test_fluctuation_is_the_variance_times_the_squared_norm_of_the_column() -> None:
    # columns: 1 + 0.25, 4 + 9, 0 + 1
    assert baselines.fluctuation(torch.tensor([4.0, 1.0, 0.0]), W).tolist() == [5.0, 13.0, 0.0]


def test_taylor_is_by_element_so_that_weights_do_not_cancel() -> None:
    # products: [2, -2, 0], [-2, 3, -1], whose sums are zero
    assert baselines.taylor_element(W, G).tolist() == [4.0, 6.0]


def test_random_numbers_are_a_function_of_the_generator() -> None:
    def draw(seed: int) -> torch.Tensor:
        return baselines.random(2, 5, generator=torch.Generator().manual_seed(seed))

    assert draw(1).equal(draw(1))
    assert not draw(1).equal(draw(2))
    assert bool(((draw(1) >= 0) & (draw(1) < 1)).all())


def test_sums_are_float64_whatever_the_weights() -> None:
    weight = torch.full((1, 4096), 0.01, dtype=torch.bfloat16)
    assert baselines.magnitude(weight).dtype == torch.float64
    exact = 4096 * float(weight[0, 0]) ** 2
    assert abs(float(baselines.magnitude(weight)) - exact) < 1e-12
