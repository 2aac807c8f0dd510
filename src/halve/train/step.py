"""One optimizer step, however many micro-batches it is made in."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

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


def optimize(
    trained: Trained,
    summed: Callable[[Batch], tuple[Tensor, int]],
    batches: Iterable[Batch],
    *,
    lr: float,
    clip: float,
) -> tuple[float, float]:
    """Take one optimizer step on the mean loss of all tokens; return it and the norm of its gradient."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for batch in batches:
        loss, num_tokens = summed(batch)
        torch.autograd.backward(loss)
        total, count = total.to(loss.device) + loss.detach(), count + num_tokens
    grads = [parameter.grad for parameter in trained.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads, foreach=True) / count
    # The gradients so far are those of the sum: one pass both takes the mean and clips it.
    torch._foreach_mul_(grads, (clip / (norm + 1e-6)).clamp(max=1.0) / count)
    for group in trained.optimizer.param_groups:
        group["lr"] = lr
    trained.optimizer.step()
    trained.optimizer.zero_grad(set_to_none=True)
    mean_and_norm: tuple[float, float] = tuple(torch.stack([total / count, norm.double()]).tolist())
    return mean_and_norm
