"""The one training loop: correction, distillation and its baselines differ in their objective alone.

A step is a pure function of the weights, the optimizer's moments and the step's number: samples are
drawn by number, dropout is off, nothing else is random. So a checkpoint is all a killed run needs to
end with the same bits.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from halve.errors import TrainError
from halve.head import split
from halve.progress import SILENT, Progress
from halve.recipe import Training
from halve.rundir import atomic_file, disk_guard
from halve.train import checkpoints
from halve.train.objectives import Heldout, Objective

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HALF = (torch.bfloat16, torch.float16)


@runtime_checkable
class Samples(Protocol):
    """Packed samples whose order is a function of the step (see `corpus.Samples`)."""

    @property
    def context(self) -> int:
        """Tokens in a sample."""

    def batch(self, step: int, batch: int) -> Tensor:
        """Return the token ids [batch, context] of step `step`, counted from 0."""


@dataclass(frozen=True)
class TrainResult:
    """What a run of the loop came to."""

    steps: int
    tokens: int
    resumed_from: int
    loss: float | None
    heldout: Mapping[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Return what describes the trained model, not how often the run was interrupted."""
        return {"steps": self.steps, "tokens": self.tokens, "loss": self.loss, "heldout": dict(self.heldout)}


def train(
    student: PreTrainedModel,
    objective: Objective,
    samples: Samples,
    training: Training,
    *,
    seed: int,
    device: str,
    work: Path,
    metrics: Path,
    progress: Progress = SILENT,
    heldout: Heldout | None = None,
    name: str = "train",
) -> TrainResult:
    """Train `student` in place, as float32 masters on `device`; the caller exports it.

    The loss of a step is the sum over all its tokens divided by their number, however many micro-batches
    it is made in. `work` keeps the last complete checkpoint; a second call with the same arguments goes on
    from there. `metrics` gets one JSON line a step (`step tokens loss grad_norm lr tokens_per_second`, and
    `heldout` with its figures at step 0, every `eval_every` steps and at the end). `name` says what the
    progress bar shows and, with `seed` and `training`, whose checkpoints these are.

    Raises `TrainError` when a loss is not finite and `DiskError` when a checkpoint finds no room.
    """
    student.eval().to(device)  # not train(): dropout would make a step depend on more than its number
    if student.dtype in _HALF:
        student.float()
    body, head = split(student)
    optimizer = make_optimizer(student, training)
    identity = {"name": name, "seed": seed, "training": training.model_dump(mode="json")}
    steps, step_tokens = num_steps(training, samples.context), training.batch * samples.context
    start = step = checkpoints.restore(work, student, optimizer, identity)
    saved = checkpoints.folder(work, start) if start else None
    _truncate(metrics, start)
    loss: float | None = None
    figures: Mapping[str, float] = {}

    def measured() -> dict[str, Any]:
        nonlocal figures
        if heldout is None:
            return {}
        with autocast(training, device):
            figures = dict(heldout(body, head))
        _require_finite(figures, step, saved, training)
        return {"heldout": figures}

    def summed(ids_BS: Tensor) -> tuple[Tensor, int]:
        with autocast(training, device):
            return objective(body, head, ids_BS.to(device))

    with disk_guard(metrics), metrics.open("a", encoding="utf-8") as log:
        if start == 0 and (first := measured()):
            _write(log, {"step": 0, "tokens": 0, **first})
        with progress.task(name, steps * step_tokens, done=start * step_tokens) as task:
            for step in range(start + 1, steps + 1):
                began = time.perf_counter()
                lr = learning_rate(step, steps=steps, training=training)
                ids = torch.split(samples.batch(step - 1, training.batch), training.micro_batch or training.batch)
                loss, norm = optimize(student, summed, ids, optimizer, lr=lr, clip=training.clip)
                _require_finite({"loss": loss, "grad_norm": norm}, step, saved, training)
                rate = step_tokens / (time.perf_counter() - began)
                line = {"step": step, "tokens": step * step_tokens, "loss": loss, "grad_norm": norm, "lr": lr}
                line["tokens_per_second"] = round(rate, 1)
                if step % training.eval_every == 0 or step == steps:
                    line |= measured()
                _write(log, line)
                task.advance(step_tokens, loss=loss)
                if step % training.checkpoint_every == 0 and step < steps:
                    os.fsync(log.fileno())
                    saved = checkpoints.save(work, step, student, optimizer, identity)
    return TrainResult(steps, steps * step_tokens, start, loss, figures)


def autocast(training: Training, device: str) -> torch.autocast:
    """Give the context of a forward pass: bfloat16 where the recipe says so or, by default, where it is faster."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=is_half(training, device))


def is_half(training: Training, device: str) -> bool:
    """Whether matrix products are taken in bfloat16 on this device."""
    if training.precision != "auto":
        return training.precision == "bfloat16"
    return torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def num_steps(training: Training, context: int) -> int:
    """Return how many whole optimizer steps cover the token budget."""
    return math.ceil(training.tokens / (training.batch * context))


def learning_rate(step: int, *, steps: int, training: Training) -> float:
    """Return the rate of step `step` of 1..`steps`: linear warm-up, then a cosine that ends at `min_lr`."""
    if step <= training.warmup_steps:
        return training.lr * step / training.warmup_steps
    done = (step - training.warmup_steps) / max(steps - training.warmup_steps, 1)
    return training.min_lr + (training.lr - training.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def make_optimizer(model: nn.Module, training: Training) -> torch.optim.AdamW:
    """AdamW with decay on matrices alone: norms and biases have no scale to shrink."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=training.lr, betas=training.betas, fused=True
    )


def optimize(
    student: nn.Module,
    summed: Callable[[Tensor], tuple[Tensor, int]],
    batches: Iterable[Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    lr: float,
    clip: float,
) -> tuple[float, float]:
    """Take one optimizer step on the mean loss of all tokens; return it and the norm of its gradient."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for ids_BS in batches:
        loss, num_tokens = summed(ids_BS)
        torch.autograd.backward(loss)
        total, count = total.to(loss.device) + loss.detach(), count + num_tokens
    grads = [parameter.grad for parameter in student.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads, foreach=True) / count
    # The gradients so far are those of the sum: one pass both takes the mean and clips it.
    torch._foreach_mul_(grads, (clip / (norm + 1e-6)).clamp(max=1.0) / count)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    mean_and_norm: tuple[float, float] = tuple(torch.stack([total / count, norm.double()]).tolist())
    return mean_and_norm


def _require_finite(figures: Mapping[str, float], step: int, saved: Path | None, training: Training) -> None:
    bad = {name: value for name, value in figures.items() if not math.isfinite(value)}
    if not bad:
        return
    if step == 0:
        raise TrainError(
            "the loss is not finite before the first step",
            why=", ".join(f"{name} is {value}" for name, value in bad.items()),
            fix="check the weights of the model that is to be trained, or try precision: float32",
        )
    kept = f"the last checkpoint is {saved}" if saved else "there is no checkpoint yet"
    raise TrainError(
        f"the loss is not finite at step {step}",
        why=", ".join(f"{name} is {value}" for name, value in bad.items()) + f"; {kept}",
        fix=f"lower lr (now {training.lr:g}) or clip (now {training.clip:g}), or try precision: float32",
    )


def _write(log: IO[str], line: Mapping[str, Any]) -> None:
    log.write(json.dumps(line) + "\n")
    log.flush()


def _truncate(metrics: Path, step: int) -> None:
    """Leave out what a killed run wrote after the checkpoint that this one goes on from."""
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True) if metrics.exists() and step else []
    with atomic_file(metrics) as draft:
        draft.write_text("".join(line for line in lines if _step_of(line) <= step), encoding="utf-8")


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):  # the kill cut it short
        return math.inf
