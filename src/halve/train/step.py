"""One optimizer step, however many micro-batches it is made in: gradients first, then, if they are taken, the move."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from halve.train.batch import Batch


@dataclass(frozen=True)
class Trained:
    """Modules that one optimizer moves, by the names that a checkpoint gives them."""

    modules: dict[str, nn.Module]
    optimizer: torch.optim.Optimizer

    def parameters(self) -> list[nn.Parameter]:
        """All their parameters."""
        return [parameter for module in self.modules.values() for parameter in module.parameters()]

    def gradients(self) -> list[Tensor]:
        """The gradients that are there."""
        return [parameter.grad for parameter in self.parameters() if parameter.grad is not None]


@runtime_checkable
class Beside(Protocol):
    """Something that learns in the same loop from the same samples with an optimizer of its own."""

    @property
    def trained(self) -> Trained:
        """What a checkpoint keeps of it."""

    def step(self, parts: Sequence[Batch], *, lr: float) -> Mapping[str, float]:
        """Learn from a step's micro-batches at the student's rate; give figures for the journal."""


@dataclass(frozen=True)
class Found:
    """What `gradients` found: the mean loss of `count` tokens, and the norm of its gradient."""

    loss: float
    norm: float
    count: int


def gradients(trained: Trained, summed: Callable[[Batch], tuple[Tensor, int]], parts: Iterable[Batch]) -> Found:
    """Leave the gradient of the losses' sum over all tokens in the parameters; give the mean loss and its norm."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for part in parts:
        loss, num_tokens = summed(part)
        torch.autograd.backward(loss)
        total, count = total.to(loss.device) + loss.detach(), count + num_tokens
    norm = torch.nn.utils.get_total_norm(trained.gradients(), foreach=True) / count
    mean, size = torch.stack([total / count, norm.double()]).tolist()
    return Found(mean, size, count)


def apply(trained: Trained, found: Found, *, lr: float, clip: float) -> None:
    """Take one optimizer step along the gradients that were found, and drop them."""
    # they are those of the sum: one pass both takes the mean and clips it
    torch._foreach_mul_(trained.gradients(), min(clip / (found.norm + 1e-6), 1.0) / found.count)
    for group in trained.optimizer.param_groups:
        group["lr"] = lr
    trained.optimizer.step()
    drop(trained)


def drop(trained: Trained) -> None:
    """Leave the gradients unused."""
    trained.optimizer.zero_grad(set_to_none=True)
