"""The optimizers of a training run, by the recipe."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from halve.recipe import Training


def make_optimizer(parameters: Iterable[nn.Parameter], training: Training) -> torch.optim.Optimizer:
    """AdamW with decay on matrices alone: norms and biases have no scale to shrink."""
    moved = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in moved if p.ndim >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in moved if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=training.lr, betas=training.betas, fused=True
    )
