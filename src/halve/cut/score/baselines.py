"""The scores with which Minitron is compared: pure functions of one weight matrix and its input.

Each scores the rows of `[structures, weights]`, where one row holds all weights of a structure in one matrix, or the
input channels of `[outputs, channels]`. All are additive: a structure's score is the sum over all its matrices, which
is LLM-Pruner's "sum" over a coupled group. `halve.cut.score.width` computes this sum.

    higher = keep                             reads                       passes
    random                                    nothing                     none
    magnitude                                 weights                     none
    activation_times_weight (Wanda)           weights, inputs             forward
    fluctuation (FLAP)                        weights, inputs             forward
    taylor_element                            weights, gradients          forward and backward

Sums are float64.

Legend: N structures, X weights of a structure in one matrix, Y outputs, C input channels.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor


def random(*shape: int, generator: torch.Generator) -> Float32[Tensor, "*shape"]:
    """Uniform random numbers in [0, 1): the control for every score.

    >>> random(2, 3, generator=torch.Generator().manual_seed(0)).shape
    torch.Size([2, 3])
    """
    return torch.rand(*shape, generator=generator)


def magnitude(weight_NX: Float[Tensor, "structures weights"]) -> Float64[Tensor, " structures"]:
    """Score structures by their squared weights, `sum_x w^2`.

    The magnitude baseline of LLM-Pruner, arXiv 2305.11627 (its L2 criterion, summed over the coupled group); the order
    is that of the group's L2 norm.

    >>> magnitude(torch.tensor([[3.0, -4.0], [1.0, 0.0]])).tolist()
    [25.0, 1.0]
    """
    return weight_NX.double().square().sum(1)


def activation_times_weight(
    norm_C: Float[Tensor, " channels"], weight_YC: Float[Tensor, "outputs channels"]
) -> Float64[Tensor, " channels"]:
    """Score input channels by weight times activation, `sum_y |w_yc| * ||x_c||`.

    Wanda, arXiv 2306.11695, Sec. 3: `S_yc = |W_yc| * ||X_c||_2`, the norm of an input channel over all tokens. Wanda
    removes single weights; summed over a column it scores channels, as FLAP's comparison (its Wanda-sp) has it.

    >>> activation_times_weight(torch.tensor([2.0, 10.0]), torch.tensor([[1.0, 0.5], [-2.0, 0.25]])).tolist()
    [6.0, 7.5]
    """
    return norm_C.double() * weight_YC.double().abs().sum(0)


def fluctuation(
    variance_C: Float[Tensor, " channels"], weight_YC: Float[Tensor, "outputs channels"]
) -> Float64[Tensor, " channels"]:
    """Score input channels by how far their part of the output strays from its mean, `var(x_c) * sum_y w_yc^2`.

    FLAP, arXiv 2312.11983, Sec. 3 (its WIFV): the sum over tokens of the squared deviation from the channel's mean,
    over the number of tokens less one, times the squared norm of the weight's column. FLAP then adds the mean part of
    what it removes to a bias. The output and down projections of most families have none, and a student's config has
    no place for one, so that compensation is left out; `halve.cut.repair.refit` makes up for removed channels within
    the weights that are there. To compare layers FLAP standardizes each (`halve.cut.score.importance.network`).

    >>> fluctuation(torch.tensor([2.0, 0.0]), torch.tensor([[1.0, 9.0], [-2.0, 9.0]])).tolist()
    [10.0, 0.0]
    """
    return variance_C.double() * weight_YC.double().square().sum(0)


def taylor_element(
    weight_NX: Float[Tensor, "structures weights"], gradient_NX: Float[Tensor, "structures weights"]
) -> Float64[Tensor, " structures"]:
    """Score structures by the first-order change of the loss, weight by weight: `sum_x |w * dL/dw|`.

    LLM-Pruner, arXiv 2305.11627, Sec. 3.2, element-wise, to first order (its "Element 1").

    >>> taylor_element(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0]])).tolist()
    [5.0]
    """
    return (weight_NX.double() * gradient_NX.double()).abs().sum(1)
