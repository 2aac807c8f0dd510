"""The optimizers of a training run, by the recipe."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from halve.recipe import Training


def make_optimizer(parameters: Iterable[nn.Parameter], training: Training) -> torch.optim.Optimizer:
    """AdamW with decay on matrices alone: norms and biases have no scale to shrink."""
    moved = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [  # a fused step takes shards or whole tensors, not both
        {
            "params": [p for p in moved if isinstance(p, DTensor) == shards and (p.ndim >= 2) == decays],
            "weight_decay": training.weight_decay if decays else 0.0,
        }
        for shards in (False, True)
        for decays in (True, False)
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=training.lr, betas=training.betas, fused=True
    )
