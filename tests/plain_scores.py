"""One channel's importance from its activations alone, without hooks, models or micro-batches."""

from __future__ import annotations

from torch import Tensor

from halve.cut.score.importance import aggregate, seq_statistics, sums_over_batch
from halve.recipe.schema import Aggregator


def channel_importance(act_BSC: Tensor, *, batch_agg: Aggregator = "l2", seq_agg: Aggregator = "mean") -> Tensor:
    """With the defaults `F_i = sqrt( sum_b ( mean_s |a[b, s, i]| )^2 )`."""
    sums = sums_over_batch(seq_statistics(act_BSC))
    return aggregate(sums, num_samples=act_BSC.shape[0], batch_agg=batch_agg, seq_agg=seq_agg).float()
