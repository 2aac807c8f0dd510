"""The nine aggregators, heads, groups, BI and ranking: values by hand, and what must hold of any activations."""

from __future__ import annotations

import doctest
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_scores import channel_importance
from torch import Tensor

from halve.cut.score import importance
from halve.cut.score.importance import (
    BATCH_AGGREGATORS,
    SEQ_AGGREGATORS,
    block_importance,
    fused_statistics,
    group_importance,
    head_importance,
    rank,
    seq_statistics,
    sliced_statistics,
    sums_over_batch,
)
from halve.recipe.schema import Aggregator

NINE = list(itertools.product(BATCH_AGGREGATORS, SEQ_AGGREGATORS))
# One channel, samples (3, -1) and (0, 4): mean |a| 2, 2; l2 sqrt 10, 4; var 4, 4
BY_HAND = torch.tensor([[[3.0], [-1.0]], [[0.0], [4.0]]])
ROOT10 = 10**0.5
EXPECTED = {
    ("mean", "mean"): 2.0,
    ("l2", "mean"): 8**0.5,
    ("var", "mean"): 0.0,
    ("mean", "l2"): (ROOT10 + 4) / 2,
    ("l2", "l2"): 26**0.5,
    ("var", "l2"): ((4 - ROOT10) / 2) ** 2,
    ("mean", "var"): 4.0,
    ("l2", "var"): 32**0.5,
    ("var", "var"): 0.0,
}


def activations(seed: int, *, batch: int = 3, seq: int = 7, channels: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    offset_C = torch.randn(channels, generator=generator)
    return torch.randn(batch, seq, channels, generator=generator) + offset_C


def reference(act_BSC: Tensor, batch_agg: Aggregator, seq_agg: Aggregator) -> Tensor:
    """The formulas as printed, in float64."""
    act_BSC = act_BSC.double()
    over_seq = {
        "mean": lambda a: a.abs().mean(1),
        "l2": lambda a: a.square().sum(1).sqrt(),
        "var": lambda a: a.var(1, correction=0),
    }
    over_batch = {
        "mean": lambda x: x.mean(0),
        "l2": lambda x: x.square().sum(0).sqrt(),
        "var": lambda x: x.var(0, correction=0),
    }
    found: Tensor = over_batch[batch_agg](over_seq[seq_agg](act_BSC))
    return found


@pytest.mark.parametrize(("batch_agg", "seq_agg"), NINE)
def test_values_by_hand(batch_agg: Aggregator, seq_agg: Aggregator) -> None:
    found = channel_importance(BY_HAND, batch_agg=batch_agg, seq_agg=seq_agg)
    assert found.item() == pytest.approx(EXPECTED[batch_agg, seq_agg], rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(("batch_agg", "seq_agg"), NINE)
def test_formulas_over_many_slices(batch_agg: Aggregator, seq_agg: Aggregator) -> None:
    act_BSC = activations(0, batch=5, seq=700)
    found = channel_importance(act_BSC, batch_agg=batch_agg, seq_agg=seq_agg)
    torch.testing.assert_close(found.double(), reference(act_BSC, batch_agg, seq_agg), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("kernel", [sliced_statistics, fused_statistics])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_both_kernels_accumulate_in_float32(kernel, dtype) -> None:  # type: ignore[no-untyped-def]
    act_BSC = activations(1, batch=2, seq=600).to(dtype)
    exact_BSC = act_BSC.double()
    mean_BC, l2_BC, var_BC = kernel(act_BSC)
    torch.testing.assert_close(mean_BC.double(), exact_BSC.abs().mean(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(l2_BC.double(), exact_BSC.square().sum(1).sqrt(), rtol=1e-5, atol=0)
    torch.testing.assert_close(var_BC.double(), exact_BSC.var(1, correction=0), rtol=1e-4, atol=0)


def test_variance_does_not_cancel_under_a_large_mean() -> None:
    act_BSC = 1000 + activations(2, batch=1, seq=900)
    exact_BC = act_BSC.double().var(1, correction=0)
    torch.testing.assert_close(seq_statistics(act_BSC)[2].double(), exact_BC, rtol=1e-4, atol=0)


@given(seed=st.integers(0, 10**6), combination=st.sampled_from(NINE))
@settings(max_examples=40)
def test_never_negative_and_permutes_with_the_channels(seed: int, combination: tuple[Aggregator, Aggregator]) -> None:
    batch_agg, seq_agg = combination
    act_BSC = activations(seed)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    found = channel_importance(act_BSC, batch_agg=batch_agg, seq_agg=seq_agg)
    assert (found >= 0).all()
    permuted = channel_importance(act_BSC[:, :, order], batch_agg=batch_agg, seq_agg=seq_agg)
    torch.testing.assert_close(permuted, found[order])


@given(seed=st.integers(0, 10**6), power=st.integers(-8, 8), combination=st.sampled_from(NINE))
@settings(max_examples=40)
def test_scales_with_the_activations(seed: int, power: int, combination: tuple[Aggregator, Aggregator]) -> None:
    batch_agg, seq_agg = combination
    degree = (2 if seq_agg == "var" else 1) * (2 if batch_agg == "var" else 1)
    act_BSC, scale = activations(seed), -(2.0**power)
    found = channel_importance(scale * act_BSC, batch_agg=batch_agg, seq_agg=seq_agg)
    expected = abs(scale) ** degree * channel_importance(act_BSC, batch_agg=batch_agg, seq_agg=seq_agg)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@given(seed=st.integers(0, 10**6), split=st.integers(1, 4))
@settings(max_examples=20)
def test_sums_of_micro_batches_add_up(seed: int, split: int) -> None:
    x_KBC = seq_statistics(activations(seed, batch=5))
    parts = sum(sums_over_batch(part) for part in x_KBC.split([split, 5 - split], dim=1))
    assert isinstance(parts, Tensor)
    torch.testing.assert_close(parts, sums_over_batch(x_KBC), rtol=1e-14, atol=0)


def test_heads_and_groups() -> None:
    channels_LC = torch.tensor([[3.0, 4.0, 0.0, 2.0, 5.0, 12.0, 1.0, 0.0], [0.0] * 8])
    heads_LH = head_importance(channels_LC, head_dim=2)
    assert heads_LH.tolist() == [[5.0, 2.0, 13.0, 1.0], [0.0] * 4]
    assert group_importance(heads_LH, kv_heads=2).tolist() == [[7.0, 14.0], [0.0, 0.0]]
    assert group_importance(heads_LH, kv_heads=4).equal(heads_LH)


def test_block_importance_by_hand() -> None:
    x_BSD = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[1.0, 1.0], [2.0, 0.0]]])
    y_BSD = torch.tensor([[[0.0, 3.0], [1.0, 1.0]], [[-2.0, -2.0], [1.0, 1.0]]])
    # cosines: 0, and 0 for a zero state; -1 and sqrt(1/2)
    expected = [1.0, 1 - (-1 + 0.5**0.5) / 2]
    assert block_importance(x_BSD, y_BSD).tolist() == pytest.approx(expected, abs=1e-7)


@given(seed=st.integers(0, 10**6), scale=st.floats(0.01, 100))
@settings(max_examples=20)
def test_block_importance_sees_directions_only(seed: int, scale: float) -> None:
    x_BSD, y_BSD = activations(seed), activations(seed + 1)
    found = block_importance(x_BSD, y_BSD)
    assert ((found >= -1e-6) & (found <= 2 + 1e-6)).all()
    torch.testing.assert_close(block_importance(x_BSD, scale * y_BSD), found, rtol=0, atol=1e-6)
    torch.testing.assert_close(block_importance(x_BSD, scale * x_BSD), torch.zeros_like(found), rtol=0, atol=1e-6)


def test_small_turns_survive_bfloat16() -> None:
    x_BSD = activations(3, channels=256).bfloat16()
    y_BSD = (x_BSD.float() + 0.05 * activations(4, channels=256)).bfloat16()
    exact = 1 - torch.cosine_similarity(x_BSD.double(), y_BSD.double(), dim=-1).mean(-1)
    torch.testing.assert_close(block_importance(x_BSD, y_BSD), exact, rtol=1e-3, atol=0)


def test_rank_keeps_the_order_of_equals() -> None:
    assert rank(torch.tensor([[1.0, 2.0, 1.0, 3.0], [0.0] * 4])).tolist() == [[3, 1, 0, 2], [0, 1, 2, 3]]


def test_examples_in_docstrings() -> None:
    result = doctest.testmod(importance)
    assert result.attempted >= 8
    assert result.failed == 0


def test_scores_across_the_network() -> None:
    scores_LC = torch.tensor([[1.0, 2.0, 6.0], [100.0, 200.0, 600.0], [4.0, 4.0, 4.0]])
    found = importance.network(scores_LC)
    # mean 3, deviations -2, -1, 3, unbiased variance 14 / 2
    expected = torch.tensor([-2.0, -1.0, 3.0]) / 7**0.5
    torch.testing.assert_close(found[:2], torch.stack((expected, expected)))
    assert found[2].tolist() == [0.0, 0.0, 0.0]
    assert importance.network(torch.ones(2, 1)).tolist() == [[0.0], [0.0]]


def test_the_variance_over_tokens_survives_a_large_mean_and_any_grouping() -> None:
    act_BSC = torch.randn(6, 50, 3, generator=torch.Generator().manual_seed(0)) + torch.tensor([0.0, 10.0, 1000.0])
    expected = act_BSC.double().flatten(0, 1).var(0)
    whole = importance.token_moments(act_BSC)
    parts = importance.token_moments(act_BSC[:1]) + importance.token_moments(act_BSC[1:])
    for moments in (whole, parts):
        found = importance.token_variance(moments, num_samples=6, num_tokens=300)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)
