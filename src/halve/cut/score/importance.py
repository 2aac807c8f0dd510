"""The importance of channels, heads and layers, from activations: pure functions of tensors.

Minitron, arXiv 2407.14679, Sec. 2.2. The score of a channel takes two reductions of its activations
`a[b, s]`: first over the tokens of one sample (seq), then over the samples (batch). Each is one of

              over seq                        over batch of the numbers x_b
    mean      mean_s |a|                      mean_b x_b
    l2        sqrt( sum_s a^2 )               sqrt( sum_b x_b^2 )
    var       population variance over s      population variance over b

Nine combinations; batch=l2 with seq=mean is the default (the paper's Table 13 compares them). Every seq
statistic is taken within one sample, and samples enter the batch statistics one by one, so that no score
depends on how samples were grouped into micro-batches.

Inside a sample everything is float32, whatever the activations' own type; across samples it is float64.

Legend: B batch, S seq, C channels of any axis, D hidden, K the seq statistics (`SEQ_AGGREGATORS`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import torch
from jaxtyping import Float, Float32, Float64, Int
from torch import Tensor

from halve.recipe.schema import Aggregator

SEQ_AGGREGATORS: Final[tuple[Aggregator, ...]] = ("mean", "l2", "var")

# Elements of a slice of tokens: small enough to stay in a cache between passes, large enough to share among threads.
_SLICE_NUMEL = 2**20
_PILOT_TOKENS = 16


def seq_statistics(act_BSC: Float[Tensor, "batch seq channels"]) -> Float32[Tensor, "3 batch channels"]:
    """Reduce activations over the tokens of each sample: mean |a|, l2 norm and variance, in this order.

    Accumulates in float32.

    >>> seq_statistics(torch.tensor([[[3.0], [-4.0]]])).flatten().tolist()
    [3.5, 5.0, 12.25]
    """
    # Which kernels are fast differs: on a CPU a norm over a strided dimension is many times slower than
    # elementwise passes in the cache, and a GPU would spend its time on launching those.
    return fused_statistics(act_BSC) if act_BSC.is_cuda else sliced_statistics(act_BSC)


def sliced_statistics(act_BSC: Float[Tensor, "batch seq channels"]) -> Float32[Tensor, "3 batch channels"]:
    """`seq_statistics` sample by sample, in slices that stay in a cache.

    Sums over tokens are products with a row of ones: on a CPU these are several times faster than a sum over a strided
    dimension. Deviations are taken from each channel's mean over the sample's first tokens, a pilot near enough to
    the true mean m that nothing cancels. With d = a - pilot: `var = mean d^2 - (mean d)^2`,
    `l2^2 = S (var + m^2)`.
    """
    _, seq, channels = act_BSC.shape
    tokens = min(seq, max(1, _SLICE_NUMEL // channels))
    # Written over and over: fresh memory for every intermediate result would cost more than the arithmetic.
    buffers = torch.empty(2, tokens, channels, device=act_BSC.device)
    ones_1S = torch.ones(1, tokens, device=act_BSC.device)
    with torch.no_grad():
        return torch.stack([_sample_statistics(act_SC, ones_1S, buffers) for act_SC in act_BSC], dim=1)


def _sample_statistics(act_SC: Tensor, ones_1S: Tensor, buffers: Tensor) -> Tensor:
    (seq, channels), tokens = act_SC.shape, ones_1S.shape[1]
    pilot_C = act_SC[:_PILOT_TOKENS].float().mean(0)
    sums_3C = torch.zeros(3, channels, device=act_SC.device)
    for part_SC in torch.split(act_SC, tokens):
        ones, work_SC = ones_1S[:, : len(part_SC)], buffers[0, : len(part_SC)]
        if part_SC.dtype != torch.float32:
            part_SC = buffers[1, : len(part_SC)].copy_(part_SC)
        sums_3C[:1] += ones @ torch.abs(part_SC, out=work_SC)
        sums_3C[1:2] += ones @ torch.sub(part_SC, pilot_C, out=work_SC)
        sums_3C[2:] += ones @ work_SC.square_()
    absolute_C, shift_C, square_C = sums_3C / seq
    var_C = (square_C - shift_C.square()).clamp_min(0)
    return torch.stack((absolute_C, (seq * (var_C + (pilot_C + shift_C).square())).sqrt(), var_C))


def fused_statistics(act_BSC: Float[Tensor, "batch seq channels"]) -> Float32[Tensor, "3 batch channels"]:
    """`seq_statistics` as three reductions that read the activations in their own type and make no copy.

    `var = l2^2 / S - m^2`: the float32 sums carry a relative error of about 1e-7 (m / deviation)^2 into it.
    """
    seq = act_BSC.shape[1]
    absolute_BC = torch.linalg.vector_norm(act_BSC, 1, dim=1, dtype=torch.float32) / seq
    l2_BC = torch.linalg.vector_norm(act_BSC, 2, dim=1, dtype=torch.float32)
    mean_BC = act_BSC.sum(1, dtype=torch.float32) / seq
    var_BC = (l2_BC.double().square() / seq - mean_BC.double().square()).clamp_min(0)
    return torch.stack((absolute_BC, l2_BC, var_BC.float()))


def sums_over_batch(x_KBC: Float[Tensor, "k batch channels"]) -> Float[Tensor, "2 k channels"]:
    """Sum per-sample numbers and their squares over samples, in float64: what every batch aggregator needs.

    Sums of micro-batches add up to the sums of the whole.
    """
    x_KBC = x_KBC.double()
    return torch.stack((x_KBC.sum(1), x_KBC.square().sum(1)))


def _mean(sums: Tensor, num_samples: int) -> Tensor:
    return sums[0] / num_samples


def _l2(sums: Tensor, num_samples: int) -> Tensor:
    return sums[1].sqrt()


def _var(sums: Tensor, num_samples: int) -> Tensor:
    return (sums[1] / num_samples - (sums[0] / num_samples).square()).clamp_min(0)


BATCH_AGGREGATORS: Final[Mapping[Aggregator, Callable[[Tensor, int], Tensor]]] = {
    "mean": _mean,
    "l2": _l2,
    "var": _var,
}
"""From `sums_over_batch` and the number of samples to one number per channel."""


def aggregate(
    sums: Float[Tensor, "2 3 *rest"], *, num_samples: int, batch_agg: Aggregator, seq_agg: Aggregator
) -> Float[Tensor, "*rest"]:
    """One of the nine combinations from the sums over samples of the three seq statistics.

    `sums[0]` holds the sums of `mean`, `l2` and `var`, `sums[1]` those of their squares.
    """
    return BATCH_AGGREGATORS[batch_agg](sums[:, SEQ_AGGREGATORS.index(seq_agg)], num_samples)


def head_importance(channels: Float[Tensor, "*layers channels"], *, head_dim: int) -> Float[Tensor, "*layers heads"]:
    """Score heads: the L2 norm over the scores of each head's channels in the output projection's input.

    2407.14679 takes the norm over a head's channels at each token, before the reductions. Here, as in NVIDIA's code, it
    is taken after them, so that one set of sums serves every aggregator. Rank heads within a key-value group.

    >>> head_importance(torch.tensor([3.0, 4.0, 0.0, 1.0]), head_dim=2).tolist()
    [5.0, 1.0]
    """
    heads: Tensor = torch.linalg.vector_norm(channels.reshape(*channels.shape[:-1], -1, head_dim), dim=-1)
    return heads


def group_importance(heads: Float[Tensor, "*layers heads"], *, kv_heads: int) -> Float[Tensor, "*layers kv_heads"]:
    """Score key-value groups: the sum over the query heads that read each.

    >>> group_importance(torch.tensor([1.0, 2.0, 3.0, 4.0]), kv_heads=2).tolist()
    [3.0, 7.0]
    """
    return heads.reshape(*heads.shape[:-1], kv_heads, -1).sum(-1)


def token_cosine(
    x_BSD: Float[Tensor, "batch seq hidden"], y_BSD: Float[Tensor, "batch seq hidden"]
) -> Float32[Tensor, "batch seq"]:
    """Cosine between two states of each token, in float32; 0 where either is zero."""
    x_BSD, y_BSD = x_BSD.float(), y_BSD.float()
    norms = torch.linalg.vector_norm(x_BSD, dim=-1) * torch.linalg.vector_norm(y_BSD, dim=-1)
    cosine: Tensor = torch.linalg.vecdot(x_BSD, y_BSD) / norms
    return cosine.masked_fill(norms == 0, 0.0)


def block_importance(
    input_BSD: Float[Tensor, "batch seq hidden"], output_BSD: Float[Tensor, "batch seq hidden"]
) -> Float[Tensor, " batch"]:
    """Score a layer by how much it changes the direction of its input, per sample. The mean over samples is BI.

    ShortGPT's Block Influence as used in 2407.14679, Sec. 2.2: `BI = 1 - E[ cos(x_in, x_out) ]`, over tokens.
    In [0, 2]; 0 for a layer that only scales. Cosines are float32, their mean is float64.

    >>> x = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    >>> block_importance(x, 3 * x).tolist(), block_importance(x, x.flip(-1)).tolist()
    ([0.0], [1.0])
    """
    return 1 - token_cosine(input_BSD, output_BSD).mean(-1, dtype=torch.float64)


def rank(scores: Float[Tensor, "*layers channels"]) -> Int[Tensor, "*layers channels"]:
    """Indices from the most to the least important. For equal scores, the lower index comes first.

    >>> rank(torch.tensor([1.0, 5.0, 1.0])).tolist()
    [1, 0, 2]
    """
    return scores.argsort(dim=-1, descending=True, stable=True)


def network(scores_LC: Float[Tensor, "layers channels"]) -> Float[Tensor, "layers channels"]:
    """Scores that are comparable across layers: those of each layer are standardized to mean 0 and variance 1.

    FLAP, arXiv 2312.11983, Sec. 3: layers differ in scale, so that scores are standardized before one ranking spans
    the network. The variance is the unbiased one, as in its code. A layer whose scores are all equal gets zeros.

    >>> network(torch.tensor([[1.0, 3.0, 5.0], [10.0, 30.0, 50.0], [2.0, 2.0, 2.0]])).tolist()
    [[-1.0, 0.0, 1.0], [-1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    """
    centered_LC = scores_LC - scores_LC.mean(1, keepdim=True)
    spread_L1 = (centered_LC.square().sum(1, keepdim=True) / max(1, scores_LC.shape[1] - 1)).sqrt()
    flat_L1 = (scores_LC == scores_LC[:, :1]).all(1, keepdim=True)
    return (centered_LC / spread_L1).masked_fill(flat_L1, 0.0)


def token_moments(act_BSC: Float[Tensor, "batch seq channels"]) -> Float64[Tensor, "3 channels"]:
    """Sums over samples that `token_variance` reads: of each sample's mean, its square and the variance about it.

    Float32 inside a sample, float64 across; sums of micro-batches add up.
    """
    act_BSC = act_BSC.to(torch.promote_types(act_BSC.dtype, torch.float32))
    var_BC, mean_BC = torch.var_mean(act_BSC, dim=1, correction=0)
    mean_BC = mean_BC.double()
    return torch.stack((mean_BC.sum(0), mean_BC.square().sum(0), var_BC.double().sum(0)))


def token_variance(
    moments: Float64[Tensor, "3 *points channels"], *, num_samples: int, num_tokens: int
) -> Float64[Tensor, "*points channels"]:
    """The unbiased variance of channels over all tokens of all samples, which are equally long.

    >>> act = torch.tensor([[[1.0], [2.0]], [[3.0], [6.0]]])  # tokens 1, 2, 3, 6
    >>> round(token_variance(token_moments(act), num_samples=2, num_tokens=4).item(), 4)
    4.6667
    """
    mean, square, within = moments / num_samples
    biased = (within + square - mean.square()).clamp_min(0)
    variance: Tensor = biased * (num_tokens / max(1, num_tokens - 1))
    return variance
