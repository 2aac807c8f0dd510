"""One optimizer step over any number of micro-batches and ranks: first the gradients, then the update."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from halve.text.batch import Batch
from halve.train.ranks.group import ALONE, Ranks


@dataclass(frozen=True)
class Trained:
    """Modules of one optimizer, by their names in a checkpoint."""

    modules: dict[str, nn.Module]
    optimizer: torch.optim.Optimizer

    def parameters(self) -> list[nn.Parameter]:
        """All their parameters."""
        return [parameter for module in self.modules.values() for parameter in module.parameters()]

    def gradients(self) -> list[Tensor]:
        """This rank's part of the existing gradients."""
        return [_local(parameter.grad) for parameter in self.parameters() if parameter.grad is not None]


@runtime_checkable
class Beside(Protocol):
    """Another model that is trained in the same loop, on the same samples, with its own optimizer."""

    @property
    def trained(self) -> Trained:
        """What a checkpoint stores of it."""

    def step(self, parts: Sequence[Batch], *, step: int) -> Mapping[str, float]:
        """Train on the micro-batches of a step, counted from 1. Returns metrics for the journal."""

    def work(self, context: int, *, step: int) -> float:
        """FLOPs per token of its training in a step, with samples of this many tokens."""


@dataclass(frozen=True)
class StepGradients:
    """The result of `gradients`: the mean loss of `count` tokens, and the norm of its gradient."""

    loss: float
    norm: float
    count: int


def gradients(
    trained: Trained,
    summed: Callable[[Batch], tuple[Tensor, int]],
    parts: Iterable[Batch],
    *,
    settle: Callable[[], None] | None = None,
    ranks: Ranks = ALONE,
) -> StepGradients:
    """Compute the gradient of the summed loss of all ranks into the parameters. Returns mean loss and norm.

    `parts` are the micro-batches of this one of `ranks`. `settle` is called after the last (see
    `shards.Learner.settle`).
    """
    total, count = torch.zeros((), dtype=torch.float64), 0
    for part in parts:
        loss, num_tokens = summed(part)
        torch.autograd.backward(loss)
        total, count = total.to(loss.device) + loss.detach(), count + num_tokens
    if settle is not None:
        settle()
    both = ranks.sum(torch.stack([total, total.new_tensor(float(count))]))
    total, tokens = both.unbind()
    norm = _norm(trained, ranks) / tokens.to(torch.float32)
    mean, size, number = torch.stack([total / tokens, norm.double(), tokens]).tolist()
    return StepGradients(mean, size, int(number))


def apply(trained: Trained, found: StepGradients, *, lr: float, clip: float) -> None:
    """Take one optimizer step with these gradients, and drop them."""
    # gradients are of the sum: one pass both divides by the count and clips
    torch._foreach_mul_(trained.gradients(), min(clip / (found.norm + 1e-6), 1.0) / found.count)
    for group in trained.optimizer.param_groups:
        group["lr"] = lr
    trained.optimizer.step()
    drop(trained)


def drop(trained: Trained) -> None:
    """Drop the gradients without an update."""
    trained.optimizer.zero_grad(set_to_none=True)


def _norm(trained: Trained, ranks: Ranks) -> Tensor:
    """The norm of all gradients. For unsharded parameters they are summed over ranks first."""
    grads = [parameter.grad for parameter in trained.parameters() if parameter.grad is not None]
    shards = [grad for grad in grads if isinstance(grad, DTensor)]
    whole = [grad for grad in grads if not isinstance(grad, DTensor)]
    if not ranks.alone:
        for grad in whole:
            dist.all_reduce(grad)
    norm = torch.nn.utils.get_total_norm(whole, foreach=True)
    if not shards:
        return norm
    square = torch.nn.utils.get_total_norm([_local(grad) for grad in shards], foreach=True).double().square()
    dist.all_reduce(square, group=shards[0].device_mesh.get_group("shard"))
    return (square + norm.to(square).square()).sqrt().float()


@torch.no_grad()
def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
