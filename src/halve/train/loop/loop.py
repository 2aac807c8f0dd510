"""The one training loop. Correction, distillation and baselines differ only in their objective.

A step is a pure function of the weights, the optimizer's moments and the step number: samples are drawn by number,
dropout is off, and nothing else is random. So from a checkpoint, a killed run ends with a bit-identical result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from halve.anatomy.work import FlopsPerToken
from halve.errors import HalveError, Stopped, TrainError
from halve.model.finite import is_finite, not_finite
from halve.progress import SILENT, Progress
from halve.recipe.schema import HOW, Alignment, Training
from halve.text.batch import Batch
from halve.text.course import Course
from halve.train.loop import watch
from halve.train.loop.checkpoints import Keeper
from halve.train.loop.journal import Journal, Mute, open_journal
from halve.train.loop.optimizers import make_optimizer
from halve.train.loop.step import Beside, StepGradients, Trained, apply, drop, gradients
from halve.train.loop.watch import Running, Spike
from halve.train.objectives.logits import Heldout, Objective
from halve.train.ranks import blocks, shards
from halve.train.ranks.group import ALONE, Ranks, gone_guard, require_shares, sigterm

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


@dataclass(frozen=True)
class Turns:
    """Steps that differ, by their number, counted from 1."""

    objective: Callable[[int], Objective]
    kind: Callable[[int], str]
    """Equal for steps whose losses can be compared. Only these are looked at to find a spike."""


@dataclass(frozen=True)
class Lesson:
    """What a model is trained for, and what is measured during training."""

    objective: Objective
    extra: nn.Module | None = None
    """Parameters of the objective that are trained with the model and are not part of it."""
    beside: Beside | None = None
    """Trains on the same samples, after the model's step."""
    heldout: Heldout | None = None
    """Its metrics are written at step 0, every `eval_every` steps and at the end."""
    flops: FlopsPerToken | None = None
    """The FLOPs of a token."""
    turns: Turns | None = None
    """If steps differ in what learns. Every rank then holds all of the model."""
    gate: Gate | None = None
    """Measures what the held-out metrics do not show, now and then; its result is part of the step's line."""


class Gate(Protocol):
    """A measurement of the trained model that is due now and then."""

    def first(self) -> dict[str, Any]:
        """Return part of the journal's first line, before any step."""

    def due(self, before: int, tokens: int, *, last: bool) -> bool:
        """Whether it is due after the step between these numbers of tokens."""

    def measure(self, student: PreTrainedModel, figures: Mapping[str, float]) -> dict[str, Any]:
        """Measure; `figures` are the last held-out metrics. Returns part of a journal's line."""


@dataclass(frozen=True)
class TrainFiles:
    """The paths of a training's checkpoints and metrics, and what identifies them. The progress bar shows the name."""

    work: Path
    metrics: Path
    seed: int
    name: str = "train"

    def identity(self, training: Training) -> dict[str, Any]:
        """What identifies a checkpoint as one of this training."""
        how = training.model_dump(mode="json", exclude=set(HOW))
        return {"name": self.name, "seed": self.seed, "training": how}


def train(
    student: PreTrainedModel,
    lesson: Lesson,
    course: Course,
    files: TrainFiles,
    *,
    device: str,
    until: int | None = None,
    ranks: Ranks = ALONE,
    progress: Progress = SILENT,
) -> TrainResult:
    """Train `student` in place, as float32 masters on `device`. The caller exports it.

    With `until`, it pauses after this step, with metrics and a checkpoint. A later call with a larger one, or without,
    goes on from there, and ends with the same bits as without a pause.

    The loss of a step is the sum over all its tokens divided by their number, for any number of micro-batches.
    `files.work` keeps the last `keep_checkpoints` complete checkpoints; a second call with the same arguments resumes
    from the newest. `files.metrics` gets one JSON line per step (`step tokens loss grad_norm lr tokens_per_second
    data_wait peak_memory_bytes`, `mfu` if the lesson's `flops` gives the FLOPs of a token, and its `heldout`).

    If several ranks train (see `ranks`), each gets its share of a step's samples. The model is then in shards
    (`shards.save` writes it), and rank 0 writes the metrics.

    `on_spike` says what happens after a spike or a loss that is not finite (`watch.Running`). `stop` raises. `skip`
    skips the step's update. `rewind` loads the last checkpoint, skips the steps since then and continues after them. A
    line with `spike`, `why` and `samples` reports it, on all ranks alike.

    Raises `TrainError` if a loss is not finite or spikes, if spikes are skipped too often, or if another rank is gone.
    Raises `DiskError` if a checkpoint finds no room. After a SIGTERM, raises `Stopped` with a checkpoint of the last
    step.
    """
    training = course.training
    require_shares(training, ranks.size)
    whole, half = lesson.turns is not None, is_half(training, device)
    learner = shards.learner(student, training, device=device, half=half, ranks=ranks, whole=whole)
    trained = _trained(student, lesson.extra, training, device=device)
    groups = [trained] if lesson.beside is None else [trained, lesson.beside.trained]
    with (
        gone_guard(ranks),
        sigterm() as asked_to_stop,
        Keeper(files.work, groups, files.identity(training), keep=training.keep_checkpoints, ranks=ranks) as keeper,
    ):
        restored = keeper.restore()
        start, last = restored.step, course.steps if until is None else min(until, course.steps)
        assert start <= last, f"a checkpoint of step {start} is later than the pause after step {last}"
        running, loss = Running.of(restored.notes), restored.notes.get("loss")
        under_way = _UnderWay(trained, learner, lesson, course, device, keeper, running, last, loss)
        with _journal(files, training, start, ranks) as journal:
            if start == 0:
                under_way.begin(journal)
            with progress.task(files.name, course.tokens(last), done=course.tokens(start)) as task:
                for step in range(start + 1, last + 1):
                    journal.write(under_way.advance(step))
                    task.advance(course.tokens(step) - course.tokens(step - 1), **under_way.shown())
                    under_way.keep(step, journal, stopping=ranks.any(asked_to_stop()))
            if start == last:  # stopped after this step; what follows from the weights is missing
                under_way.measure(start)
    return TrainResult(last, course.tokens(last), start, under_way.loss, under_way.figures)


def _journal(files: TrainFiles, training: Training, step: int, ranks: Ranks) -> AbstractContextManager[Journal | Mute]:
    """The journal from this step on. Only the first rank writes."""
    if not ranks.leads:
        return nullcontext(Mute())
    return open_journal(files.metrics, step=step, loggers=training.loggers, name=files.name)


def _trained(student: PreTrainedModel, extra: nn.Module | None, training: Training, *, device: str) -> Trained:
    """The student and its optimizer. Call it after `shards.learner`, which replaces parameters."""
    modules: dict[str, nn.Module] = {"student": student} | ({} if extra is None else {"extra": extra.to(device)})
    parameters = [parameter for module in modules.values() for parameter in module.parameters()]
    between = [parameter for layer in blocks.layers(student) for parameter in layer.parameters()]
    return Trained(modules, make_optimizer(parameters, training, between=between))


@dataclass
class _UnderWay:
    """The trained modules and the state of the training."""

    trained: Trained
    learner: shards.Learner
    lesson: Lesson
    course: Course
    device: str
    keeper: Keeper
    running: Running
    last: int
    """The step after which it pauses or ends."""
    loss: float | None = None
    figures: Mapping[str, float] = field(default_factory=dict)

    def begin(self, journal: Journal | Mute) -> None:
        """Measure and save what is needed before the first step."""
        gate = self.lesson.gate
        if first := self.measure(0) | ({} if gate is None else gate.first()):
            journal.write({"step": 0, "tokens": 0, **first})
        if self.course.training.on_spike == "rewind":
            self.keeper.save(0)  # rewind needs a checkpoint to return to

    def advance(self, step: int) -> dict[str, Any]:
        """Take one step, and measure if it is time to. Returns the step's line of the journal."""
        line = self.step(step)
        if step == self.last or step % self.course.training.eval_every == 0:
            line |= self.measure(step)
        gate, tokens = self.lesson.gate, self.course.tokens
        if gate is not None and gate.due(tokens(step - 1), tokens(step), last=step == self.course.steps):
            with torch.no_grad(), autocast(self.course.training, self.device):
                line |= gate.measure(self.student, self.figures)
            self.learner.rest()
        return line

    @property
    def student(self) -> PreTrainedModel:
        """The trained model itself."""
        model: PreTrainedModel = self.trained.modules["student"]
        return model

    def shown(self) -> dict[str, float]:
        """The figures of the progress bar."""
        return {} if self.loss is None else {"loss": self.loss}

    def keep(self, step: int, journal: Journal | Mute, *, stopping: bool) -> None:
        """Save the state after a step if it is time to. If `stopping`, save it and raise `Stopped`."""
        training = self.course.training
        due = step == self.last or step % training.checkpoint_every == 0
        if stopping or (due and step != self.course.steps):
            journal.sync()
            self.keeper.save(step, notes=self.running.notes() | {"loss": self.loss})
        if stopping:
            raise _stopped(step, self.keeper.wait())

    def step(self, step: int) -> dict[str, Any]:
        """Take one step, or skip it if it spikes. Returns its line of the journal."""
        began, training, ranks = time.perf_counter(), self.course.training, self.learner.ranks
        batch = self.course.batch(step)
        waited = time.perf_counter() - began
        parts = list(ranks.share(batch).split(training.micro_batch or training.batch))
        step_gradients = self._gradients(parts, step)
        line: dict[str, Any] = {"step": step, "tokens": self.course.tokens(step)}
        if self.lesson.turns is not None:
            self.running = self.running.at(self.lesson.turns.kind(step))
        spike = self.running.objection(step_gradients.loss, step_gradients.norm, factor=training.spike_factor)
        if spike is not None:
            drop(self.trained)
            return line | self._leave_out(step, spike, batch)
        self.loss, self.running = step_gradients.loss, self.running.accept(step_gradients.loss)
        lr = self.course.lr(step)
        apply(self.trained, step_gradients, lr=lr, clip=training.clip)
        line |= {"loss": step_gradients.loss, "grad_norm": step_gradients.norm, "lr": lr}
        if self.lesson.beside is not None:
            line |= self.lesson.beside.step(parts, step=step)
        widths = [(part.ids.numel(), part.ids.shape[1]) for part in parts]  # without columns that are all padding
        seconds = time.perf_counter() - began  # last, so that the whole step is timed
        return line | _speed(self.lesson, step, widths, seconds, waited, self.device, training, ranks)

    def measure(self, step: int) -> dict[str, Any]:
        """The metrics on held-out samples, if there are any, as part of a line."""
        if self.lesson.heldout is None:
            return {}
        training = self.course.training
        with torch.no_grad(), autocast(training, self.device):
            self.figures = dict(self.lesson.heldout(self.learner.body, self.learner.head()))
        self.learner.rest()
        _require_finite(self.figures, step, self.keeper, training)
        return {"heldout": self.figures}

    def _gradients(self, parts: Sequence[Batch], step: int) -> StepGradients:
        turns = self.lesson.turns
        objective = self.lesson.objective if turns is None else turns.objective(step)
        head, precision = self.learner.head(), autocast(self.course.training, self.device)

        def summed(part: Batch) -> tuple[Tensor, int]:
            with precision:
                return objective(self.learner.body, head, part.to(self.device))

        settle, ranks = partial(self.learner.settle, head), self.learner.ranks
        return gradients(self.trained, summed, parts, settle=settle, ranks=ranks)

    def _leave_out(self, step: int, spike: Spike, batch: Batch) -> dict[str, Any]:
        """Handle a spike as the recipe says."""
        training = self.course.training
        spikes = self.running.leave_out(step)
        if training.on_spike == "stop" or spikes.exhausted:
            raise _spiked(step, spike, batch, self.keeper, training)
        line: dict[str, Any] = {"spike": training.on_spike, "why": str(spike), "samples": list(batch.numbers)}
        self.running = spikes
        if training.on_spike == "rewind":
            back = self.keeper.restore()
            line["back_to"] = back.step
            self.running = replace(Running.of(back.notes), spikes=spikes.spikes)
        return line


def autocast(training: Training, device: str) -> torch.autocast:
    """The context of a forward pass: bfloat16 if the recipe says so or, by default, if it is faster."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=is_half(training, device))


def is_half(training: Training | Alignment, device: str) -> bool:
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


def _work(lesson: Lesson, context: int, step: int) -> float | None:
    """FLOPs per token of all training in a step."""
    if lesson.flops is None:
        return None
    return lesson.flops(context) + (0.0 if lesson.beside is None else lesson.beside.work(context, step=step))


def _speed(
    lesson: Lesson,
    step: int,
    widths: Sequence[tuple[int, int]],
    seconds: float,
    waited: float,
    device: str,
    training: Training,
    ranks: Ranks,
) -> dict[str, Any]:
    """The speed of a step, and how long it waited for data.

    `widths` are the tokens and the context of each part of this rank; other ranks are taken to have as many. Padding
    that no pass computes is not among them.
    """
    tokens = ranks.size * sum(count for count, _ in widths)
    line = {
        "tokens_per_second": round(tokens / seconds, 1),
        "data_wait": round(waited / seconds, 4),
        "peak_memory_bytes": watch.peak_memory_bytes(device),
    }
    works = [_work(lesson, context, step) for _, context in widths]
    done = sum(count * work for (count, _), work in zip(widths, works, strict=True) if work is not None)
    if None in works:
        return line
    share = watch.mfu(ranks.size * done, seconds, device=device, half=is_half(training, device), ranks=ranks.size)
    return line if share is None else line | {"mfu": round(share, 4)}


def _spiked(step: int, spike: Spike, batch: Batch, keeper: Keeper, training: Training) -> HalveError:
    kept = _last_checkpoint(keeper)
    often = "" if training.on_spike == "stop" else f", after {watch.MOST} others within {watch.WITHIN} steps"
    numbers = ", ".join(map(str, batch.numbers[:_SHOWN])) + (", ..." if len(batch) > _SHOWN else "")
    why = f"{spike}{often}; its samples are {numbers}; {kept}"
    fix = _smaller_steps(training)
    if training.on_spike == "stop":
        fix += "; or resume with --on-spike skip or rewind"
    if spike.mean is None:
        return not_finite("the loss", verb="is", where=f" at step {step}", why=why, fix=fix, kind=TrainError)
    return TrainError(f"the loss spikes at step {step}", why=why, fix=fix)


def _require_finite(figures: Mapping[str, float], step: int, keeper: Keeper, training: Training) -> None:
    bad = ", ".join(f"{name} is {value}" for name, value in figures.items() if not is_finite(value))
    if not bad:
        return
    if step:
        when, why, fix = f" at step {step}", f"{bad}; {_last_checkpoint(keeper)}", _smaller_steps(training)
    else:
        when, why = " before the first step", bad
        fix = "check the weights of the model that is to be trained, or try precision: float32"
    raise not_finite("the loss", verb="is", where=when, why=why, fix=fix, kind=TrainError)


def _last_checkpoint(keeper: Keeper) -> str:
    saved = keeper.wait()
    return f"the last checkpoint is {saved}" if saved else "there is no checkpoint yet"


def _smaller_steps(training: Training) -> str:
    return f"lower lr (now {training.lr:g}) or clip (now {training.clip:g}), or try precision: float32"
