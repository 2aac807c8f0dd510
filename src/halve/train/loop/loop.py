"""The one training loop. Correction, distillation and baselines differ only in their objective.

A step is a pure function of the weights, the optimizer's moments and the step number: samples are drawn by number,
dropout is off, and nothing else is random. So from a checkpoint, a killed run ends with a bit-identical result.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from halve.anatomy.work import FlopsPerToken
from halve.errors import Stopped, TrainError
from halve.progress import SILENT, Progress
from halve.recipe.schema import HOW, Training
from halve.text.batch import Batch
from halve.text.course import Course
from halve.train.loop import watch
from halve.train.loop.checkpoints import Keeper
from halve.train.loop.journal import Mute, open_journal
from halve.train.loop.optimizers import make_optimizer
from halve.train.loop.step import Beside, StepGradients, Trained, apply, drop, gradients
from halve.train.loop.watch import Running
from halve.train.objectives.logits import Heldout, Objective
from halve.train.ranks import blocks, shards
from halve.train.ranks.group import Ranks, gone_guard, here, require_shares, sigterm

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_SHOWN = 64  # the most samples that an error lists


@dataclass(frozen=True)
class TrainResult:
    """The result of a run of the loop."""

    steps: int
    tokens: int
    resumed_from: int
    loss: float | None
    heldout: Mapping[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Return what describes the trained model, without how often the run was interrupted."""
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
    flops: FlopsPerToken | None = None,
    name: str = "train",
) -> TrainResult:
    """Train `student` in place, as float32 masters on `device`. The caller exports it.

    The loss of a step is the sum over all its tokens divided by their number, for any number of micro-batches. `extra`
    holds parameters of the objective that are trained with the student and are not part of it. `beside` trains on the
    same samples, after the student's step. `work` keeps the last `keep_checkpoints` complete checkpoints; a second call
    with the same arguments resumes from the newest. `metrics` gets one JSON line per step (`step tokens loss grad_norm
    lr tokens_per_second data_wait peak_memory_bytes`, `mfu` if `flops` gives the FLOPs of a token, and `heldout` with
    its metrics at step 0, every `eval_every` steps and at the end). `name` is shown in the progress bar. Together with
    `seed` and the course's `training`, it identifies the checkpoints.

    If several ranks train (see `ranks`), each gets its share of a step's samples. The model is then in shards
    (`shards.save` writes it), and rank 0 writes `metrics`.

    `on_spike` says what happens after a spike or a loss that is not finite (`watch.Running`). `stop` raises. `skip`
    skips the step's update. `rewind` loads the last checkpoint, skips the steps since then and continues after them. A
    line with `spike`, `why` and `samples` reports it, on all ranks alike.

    Raises `TrainError` if a loss is not finite or spikes, if spikes are skipped too often, or if another rank is gone.
    Raises `DiskError` if a checkpoint finds no room. After a SIGTERM, raises `Stopped` with a checkpoint of the last
    step.
    """
    training, ranks = course.training, here()
    require_shares(training, ranks.size)
    learner = shards.learner(student, training, device=device, half=is_half(training, device))
    modules: dict[str, nn.Module] = {"student": student} | ({} if extra is None else {"extra": extra.to(device)})
    parameters = [parameter for module in modules.values() for parameter in module.parameters()]
    between = [parameter for layer in blocks.layers(student) for parameter in layer.parameters()]
    trained = Trained(modules, make_optimizer(parameters, training, between=between))
    groups = [trained] if beside is None else [trained, beside.trained]
    identity = {"name": name, "seed": seed, "training": training.model_dump(mode="json", exclude=set(HOW))}
    with (
        gone_guard(),
        sigterm() as asked_to_stop,
        Keeper(work, groups, identity, keep=training.keep_checkpoints, ranks=ranks) as keeper,
    ):
        restored = keeper.restore()
        start = restored.step
        under_way = _UnderWay(
            trained, learner, objective, course, device, keeper, heldout, beside, flops, Running.of(restored.notes)
        )
        under_way.loss = restored.notes.get("loss")
        opened = (
            open_journal(metrics, step=start, loggers=training.loggers, name=name)
            if ranks.leads
            else nullcontext(Mute())
        )
        with opened as journal:
            if start == 0 and (first := under_way.measure(0)):
                journal.write({"step": 0, "tokens": 0, **first})
            if start == 0 and training.on_spike == "rewind":
                keeper.save(0)  # rewind needs a checkpoint to return to
            with progress.task(name, course.tokens(course.steps), done=course.tokens(start)) as task:
                for step in range(start + 1, course.steps + 1):
                    line, last = under_way.step(step), step == course.steps
                    if last or step % training.eval_every == 0:
                        line |= under_way.measure(step)
                    journal.write(line)
                    shown = {} if under_way.loss is None else {"loss": under_way.loss}
                    task.advance(course.tokens(step) - course.tokens(step - 1), **shown)
                    stopping = ranks.any(asked_to_stop())
                    if stopping or (not last and step % training.checkpoint_every == 0):
                        journal.sync()
                        keeper.save(step, notes=under_way.running.notes() | {"loss": under_way.loss})
                    if stopping:
                        raise _stopped(step, keeper.wait())
            if start == course.steps:  # stopped after its last step; only the export is missing
                under_way.measure(start)
    return TrainResult(course.steps, course.tokens(course.steps), start, under_way.loss, under_way.figures)


@dataclass
class _UnderWay:
    """The trained modules and the state of the training."""

    trained: Trained
    learner: shards.Learner
    objective: Objective
    course: Course
    device: str
    keeper: Keeper
    heldout: Heldout | None
    beside: Beside | None
    flops: FlopsPerToken | None
    running: Running
    loss: float | None = None
    figures: Mapping[str, float] = field(default_factory=dict)

    def step(self, step: int) -> dict[str, Any]:
        """Take one step, or skip it if it spikes. Returns its line of the journal."""
        began, training, ranks = time.perf_counter(), self.course.training, here()
        batch = self.course.batch(step)
        waited = time.perf_counter() - began
        parts = list(ranks.share(batch).split(training.micro_batch or training.batch))
        found = self._gradients(parts)
        line: dict[str, Any] = {"step": step, "tokens": self.course.tokens(step)}
        why = self.running.objection(found.loss, found.norm, factor=training.spike_factor)
        if why is not None:
            drop(self.trained)
            return line | self._leave_out(step, why, batch)
        self.loss, self.running = found.loss, self.running.accept(found.loss)
        lr = self.course.lr(step)
        apply(self.trained, found, lr=lr, clip=training.clip)
        line |= {"loss": found.loss, "grad_norm": found.norm, "lr": lr}
        if self.beside is not None:
            line |= self.beside.step(parts, step=step)
        tokens = self.course.tokens(step) - self.course.tokens(step - 1)
        per_token = _work(self.flops, self.beside, batch.ids.shape[1], step)
        seconds = time.perf_counter() - began  # last, so that the whole step is timed
        return line | _speed(per_token, tokens, seconds, waited, self.device, training, ranks)

    def measure(self, step: int) -> dict[str, Any]:
        """The metrics on held-out samples, if there are any, as part of a line."""
        if self.heldout is None:
            return {}
        training = self.course.training
        with torch.no_grad(), autocast(training, self.device):
            self.figures = dict(self.heldout(self.learner.body, self.learner.head()))
        self.learner.rest()
        _require_finite(self.figures, step, self.keeper, training)
        return {"heldout": self.figures}

    def _gradients(self, parts: Sequence[Batch]) -> StepGradients:
        head, precision = self.learner.head(), autocast(self.course.training, self.device)

        def summed(part: Batch) -> tuple[Tensor, int]:
            with precision:
                return self.objective(self.learner.body, head, part.to(self.device))

        return gradients(self.trained, summed, parts, settle=lambda: self.learner.settle(head))

    def _leave_out(self, step: int, why: str, batch: Batch) -> dict[str, Any]:
        """Handle a spike as the recipe says."""
        training = self.course.training
        spikes = self.running.leave_out(step)
        if training.on_spike == "stop" or spikes.exhausted:
            raise _spike(step, why, batch, self.keeper, training)
        line: dict[str, Any] = {"spike": training.on_spike, "why": why, "samples": list(batch.numbers)}
        self.running = spikes
        if training.on_spike == "rewind":
            back = self.keeper.restore()
            line["back_to"] = back.step
            self.running = replace(Running.of(back.notes), spikes=spikes.spikes)
        return line


def autocast(training: Training, device: str) -> torch.autocast:
    """The context of a forward pass: bfloat16 if the recipe says so or, by default, if it is faster."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=is_half(training, device))


def is_half(training: Training, device: str) -> bool:
    """Whether matrix products are computed in bfloat16 on this device."""
    if training.precision != "auto":
        return training.precision == "bfloat16"
    return torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def _stopped(step: int, saved: Path | None) -> Stopped:
    return Stopped(
        f"stopped by SIGTERM after step {step}",
        why=f"the process was asked to end; its state is in {saved}",
        fix="the same command resumes from there",
    )


def _work(flops: FlopsPerToken | None, beside: Beside | None, context: int, step: int) -> float | None:
    """FLOPs per token of all training in a step."""
    if flops is None:
        return None
    return flops(context) + (0.0 if beside is None else beside.work(context, step=step))


def _speed(
    work: float | None,
    tokens: int,
    seconds: float,
    waited: float,
    device: str,
    training: Training,
    ranks: Ranks,
) -> dict[str, Any]:
    """The speed of a step, and how long it waited for data."""
    line = {
        "tokens_per_second": round(tokens / seconds, 1),
        "data_wait": round(waited / seconds, 4),
        "peak_memory_bytes": watch.peak_memory_bytes(device),
    }
    if work is None:
        return line
    share = watch.mfu(tokens * work, seconds, device=device, half=is_half(training, device), ranks=ranks.size)
    return line if share is None else line | {"mfu": round(share, 4)}


def _spike(step: int, why: str, batch: Batch, keeper: Keeper, training: Training) -> TrainError:
    saved = keeper.wait()
    kept = f"the last checkpoint is {saved}" if saved else "there is no checkpoint yet"
    kind = "spikes" if why.startswith("loss ") and "mean" in why else "is not finite"
    often = "" if training.on_spike == "stop" else f", after {watch.MOST} others within {watch.WITHIN} steps"
    numbers = ", ".join(map(str, batch.numbers[:_SHOWN])) + (", ..." if len(batch) > _SHOWN else "")
    going = "; or resume with --on-spike skip or rewind" if training.on_spike == "stop" else ""
    return TrainError(
        f"the loss {kind} at step {step}",
        why=f"{why}{often}; its samples are {numbers}; {kept}",
        fix=f"lower lr (now {training.lr:g}) or clip (now {training.clip:g}), or try precision: float32{going}",
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
