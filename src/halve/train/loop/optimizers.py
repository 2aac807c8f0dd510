"""The optimizers of a training, by the recipe.

For every kind, `state` holds tensors by parameter and `param_groups` holds the learning rates, so that checkpoints
treat all of them alike.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw
from torch.overrides import TorchFunctionMode

from halve.errors import TrainError
from halve.model.precision import is_slow_here
from halve.recipe.schema import Training


def make_optimizer(
    parameters: Iterable[nn.Parameter], training: Training, *, between: Iterable[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """Make the optimizer of `parameters`. Weight decay is only on matrices, not on norms and biases.

    `between` are the parameters between hidden states, whose matrices `muon` updates. Raises `TrainError` like
    `require`, and for moments in 8 bits or in main memory if parameters are in shards.
    """
    require(training)
    moved = [parameter for parameter in parameters if parameter.requires_grad]
    if training.offload_optimizer:
        return _offloaded(moved, training)
    if training.optimizer == "adamw8bit":
        return _eight_bit(moved, training)
    if training.optimizer == "muon":
        return _muon(moved, training, {id(parameter) for parameter in between})
    return _adamw(moved, training)


def require(training: Training) -> None:
    """Raise `TrainError` if the recipe's optimizer needs a package that is not installed."""
    if training.optimizer == "adamw8bit" and importlib.util.find_spec("torchao") is None:
        raise TrainError(
            "optimizer: adamw8bit needs the package torchao",
            why="it is not installed; moments in 8 bits are an extra of halve",
            fix="pip install 'halve[lowbit]', or optimizer: adamw",
        )


class Together(torch.optim.Optimizer):
    """Several optimizers as one: their groups in one list, their states in one mapping."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts
        for part in parts:
            part.state = self.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step every optimizer."""
        assert closure is None
        for part in self.parts:
            part.step()


class Offloaded(torch.optim.AdamW):
    """AdamW with moments in main memory. One parameter at a time, gradients are copied there and masters back."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update each parameter by PyTorch's own fused AdamW on the CPU."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)

    def _move(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, device="cpu")
        master = parameter.detach().cpu()  # the same tensor if it is already on the CPU
        adamw(
            [master],
            [parameter.grad.cpu()],  # type: ignore[union-attr]
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        if master.data_ptr() != parameter.data_ptr():
            parameter.copy_(master)


def _groups(moved: Sequence[nn.Parameter], training: Training) -> list[dict[str, Any]]:
    """Groups with the same decay. A fused step takes either shards or whole tensors."""
    groups = [
        {
            "params": [p for p in moved if isinstance(p, DTensor) == shards and (p.ndim >= 2) == decays],
            "weight_decay": training.weight_decay if decays else 0.0,
        }
        for shards in (False, True)
        for decays in (True, False)
    ]
    return [group for group in groups if group["params"]]


def _adamw(moved: Sequence[nn.Parameter], training: Training) -> torch.optim.Optimizer:
    return torch.optim.AdamW(_groups(moved, training), lr=training.lr, betas=training.betas, fused=True)


def _muon(moved: Sequence[nn.Parameter], training: Training, between: set[int]) -> torch.optim.Optimizer:
    """Muon for matrices between hidden states, scaled to AdamW's step length, so that both use one learning rate."""
    matrices = [p for p in moved if id(p) in between and p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in moved if id(p) not in chosen]
    parts: list[torch.optim.Optimizer] = []
    if matrices:
        decay = training.weight_decay
        kind = _WideMuon if iterates_wide(on_cpu=matrices[0].device.type == "cpu") else torch.optim.Muon
        parts.append(kind(matrices, training.lr, decay, adjust_lr_fn="match_rms_adamw"))
    if rest:
        parts.append(_adamw(rest, training))
    return Together(parts)


def iterates_wide(*, on_cpu: bool) -> bool:
    """Whether Muon's iteration is computed in float32: on a CPU that has no units for bfloat16."""
    return on_cpu and is_slow_here(torch.bfloat16)


class _WideMuon(torch.optim.Muon):
    """Muon whose iteration is computed in float32. PyTorch's own rounds each update to bfloat16 first."""

    def step(self, closure: Any = None) -> Any:
        with _Unrounded():
            return super().step(closure)  # type: ignore[no-untyped-call]


class _Unrounded(TorchFunctionMode):
    """In this context a tensor that is cast to bfloat16 is copied to float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.bfloat16:
            return args[0].to(torch.float32, copy=True)
        return func(*args, **(kwargs or {}))


def _eight_bit(moved: Sequence[nn.Parameter], training: Training) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit

    _require_one_device(moved, "optimizer: adamw8bit", "set optimizer: adamw, or start one process")
    made: torch.optim.Optimizer = AdamW8bit(_groups(moved, training), lr=training.lr, betas=training.betas)
    made.register_step_pre_hook(_rates_as_tensors)
    return made


def _rates_as_tensors(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
    """Make learning rates tensors: the library compiles its step, and would compile again for each number."""
    for group in optimizer.param_groups:
        if not isinstance(group["lr"], Tensor):
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float32, device=group["params"][0].device)


def _offloaded(moved: Sequence[nn.Parameter], training: Training) -> torch.optim.Optimizer:
    _require_one_device(moved, "offload_optimizer", "set offload_optimizer: false, or start one process")
    return Offloaded(_groups(moved, training), lr=training.lr, betas=training.betas)


def _require_one_device(moved: Sequence[nn.Parameter], what: str, fix: str) -> None:
    """Refuse several ranks. torchao's compiled step fails if shards are uneven (0.18 on torch 2.13)."""
    if any(isinstance(parameter, DTensor) for parameter in moved):
        raise TrainError(
            f"{what} does not go with several ranks",
            why="it saves the moments' memory on one device; ranks hold shards of them already",
            fix=fix,
        )
