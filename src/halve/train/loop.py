"""The one training loop: correction, distillation and its baselines differ in their objective alone.

A step is a pure function of the weights, the optimizer's moments and the step's number: samples are
drawn by number, dropout is off, nothing else is random. So a checkpoint is all a killed run needs to
end with the same bits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from halve.errors import Stopped, TrainError
from halve.progress import SILENT, Progress
from halve.recipe import Training
from halve.train import shards
from halve.train.batch import Batch
from halve.train.checkpoints import Keeper
from halve.train.course import Course
from halve.train.journal import Mute, open_journal
from halve.train.objectives import Heldout, Objective
from halve.train.optimizers import make_optimizer
from halve.train.ranks import gone_guard, here, require_shares, sigterm
from halve.train.step import Beside, Found, Trained, apply, gradients

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    course: Course,
    *,
    seed: int,
    device: str,
    work: Path,
    metrics: Path,
    progress: Progress = SILENT,
    heldout: Heldout | None = None,
    extra: nn.Module | None = None,
    beside: Beside | None = None,
    name: str = "train",
) -> TrainResult:
    """Train `student` in place, as float32 masters on `device`; the caller exports it.

    The loss of a step is the sum over all its tokens divided by their number, however many micro-batches
    it is made in. `extra` holds parameters of the objective that are trained beside the student's and are no part
    of it. `beside` learns from the same samples, after the student's step. `work` keeps the last `keep_checkpoints`
    complete checkpoints; a second call with the same arguments goes on from the newest. `metrics` gets one JSON
    line a step (`step tokens loss grad_norm lr tokens_per_second`, and `heldout` with its figures at step 0, every
    `eval_every` steps and at the end). `name` says what the progress bar shows and, with `seed` and the course's
    `training`, whose checkpoints these are.

    Where several ranks train (see `ranks`), each takes its share of a step's samples, the model ends in shards
    (`shards.save` writes it), and rank 0 writes `metrics`.

    Raises `TrainError` when a loss is not finite or another rank is gone, `DiskError` when a checkpoint finds no room,
    and, after a SIGTERM, `Stopped` with a checkpoint of the last step.
    """
    training, ranks = course.training, here()
    require_shares(training, ranks.size)
    learner = shards.learner(student, training, device=device, half=is_half(training, device))
    modules: dict[str, nn.Module] = {"student": student} | ({} if extra is None else {"extra": extra.to(device)})
    parameters = [parameter for module in modules.values() for parameter in module.parameters()]
    trained = Trained(modules, make_optimizer(parameters, training))
    groups = [trained] if beside is None else [trained, beside.trained]
    identity = {"name": name, "seed": seed, "training": training.model_dump(mode="json")}
    loss: float | None = None
    figures: Mapping[str, float] = {}

    def measured() -> dict[str, Any]:
        nonlocal figures
        if heldout is None:
            return {}
        with torch.no_grad(), autocast(training, device):
            figures = dict(heldout(learner.body, learner.head()))
        learner.rest()
        _require_finite(figures, step, keeper, training)
        return {"heldout": figures}

    with (
        gone_guard(),
        sigterm() as asked_to_stop,
        Keeper(work, groups, identity, keep=training.keep_checkpoints, ranks=ranks) as keeper,
    ):
        start = step = keeper.restore().step
        with open_journal(metrics, step=start) if ranks.leads else nullcontext(Mute()) as journal:
            if start == 0 and (first := measured()):
                journal.write({"step": 0, "tokens": 0, **first})
            with progress.task(name, course.tokens(course.steps), done=course.tokens(start)) as task:
                for step in range(start + 1, course.steps + 1):
                    began = time.perf_counter()
                    lr, tokens = course.lr(step), course.tokens(step) - course.tokens(step - 1)
                    parts = list(ranks.share(course.batch(step)).split(training.micro_batch or training.batch))
                    found = _gradients(trained, learner, objective, parts, autocast(training, device), device)
                    loss = found.loss
                    _require_finite({"loss": loss, "grad_norm": found.norm}, step, keeper, training)
                    apply(trained, found, lr=lr, clip=training.clip)
                    line = {
                        "step": step,
                        "tokens": course.tokens(step),
                        "loss": loss,
                        "grad_norm": found.norm,
                        "lr": lr,
                    }
                    if beside is not None:
                        line |= beside.step(parts, step=step)
                    rate = tokens / (time.perf_counter() - began)
                    line["tokens_per_second"] = round(rate, 1)
                    if step % training.eval_every == 0 or step == course.steps:
                        line |= measured()
                    journal.write(line)
                    task.advance(tokens, loss=loss)
                    stopping = ranks.any(asked_to_stop())
                    if (step % training.checkpoint_every == 0 or stopping) and step < course.steps:
                        journal.sync()
                        keeper.save(step)
                    if stopping and step < course.steps:
                        raise _stopped(step, keeper.wait())
    return TrainResult(course.steps, course.tokens(course.steps), start, loss, figures)


def _gradients(
    trained: Trained,
    learner: shards.Learner,
    objective: Objective,
    parts: Sequence[Batch],
    precision: torch.autocast,
    device: str,
) -> Found:
    head = learner.head()

    def summed(part: Batch) -> tuple[Tensor, int]:
        with precision:
            return objective(learner.body, head, part.to(device))

    return gradients(trained, summed, parts, settle=lambda: learner.settle(head))


def autocast(training: Training, device: str) -> torch.autocast:
    """Give the context of a forward pass: bfloat16 where the recipe says so or, by default, where it is faster."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=is_half(training, device))


def is_half(training: Training, device: str) -> bool:
    """Whether matrix products are taken in bfloat16 on this device."""
    if training.precision != "auto":
        return training.precision == "bfloat16"
    return torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def _stopped(step: int, saved: Path | None) -> Stopped:
    return Stopped(
        f"stopped by SIGTERM after step {step}",
        why=f"the process was asked to end; its state is in {saved}",
        fix="the same command goes on from there",
    )


def _require_finite(figures: Mapping[str, float], step: int, keeper: Keeper, training: Training) -> None:
    bad = {name: value for name, value in figures.items() if not math.isfinite(value)}
    if not bad:
        return
    if step == 0:
        raise TrainError(
            "the loss is not finite before the first step",
            why=", ".join(f"{name} is {value}" for name, value in bad.items()),
            fix="check the weights of the model that is to be trained, or try precision: float32",
        )
    saved = keeper.wait()
    kept = f"the last checkpoint is {saved}" if saved else "there is no checkpoint yet"
    raise TrainError(
        f"the loss is not finite at step {step}",
        why=", ".join(f"{name} is {value}" for name, value in bad.items()) + f"; {kept}",
        fix=f"lower lr (now {training.lr:g}) or clip (now {training.clip:g}), or try precision: float32",
    )
