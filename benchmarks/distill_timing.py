"""The time and the memory of distillation steps at one vocabulary: all systems in turn, the floor beside them."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from distill_floor import products, seconds
from distill_peers import COMPILED, OURS, SYSTEMS, Loss, Pair, batch_of, compiled, summed
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from halve.text.batch import Batch
from halve.train.loop.step import Trained, apply, gradients

SAMPLES, SEQ, LR = 4, 1024, 1e-5


@dataclass
class Case:
    """What was measured of one system in one precision."""

    half: bool
    system: str
    micro_batch: int
    times: list[float] = field(default_factory=list)
    bytes: int | None = None

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(self.times)


@dataclass
class Timing:
    """All cases at one vocabulary, and the floor of every round: in float32, with bfloat16."""

    vocab: int
    cases: list[Case] = field(default_factory=list)
    floors: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))

    def of(self, half: bool) -> dict[str, Case]:
        """The cases of one precision, by system."""
        return {case.system: case for case in self.cases if case.half == half}

    def save(self, path: Path) -> None:
        """Write it, for `load` in another process."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Timing:
        """What `save` wrote."""
        raw = json.loads(path.read_text(encoding="utf-8"))
        whole, half = raw["floors"]
        return cls(raw["vocab"], [Case(**case) for case in raw["cases"]], (whole, half))


def models(vocab: int, seq: int) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The teacher and the student, drawn at random."""
    torch.manual_seed(0)
    return llama(vocab, seq, 512, 1408, 8).requires_grad_(False), llama(vocab, seq, 384, 1024, 6)


def llama(vocab: int, seq: int, hidden: int, ffn: int, heads: int, layers: int = 8) -> PreTrainedModel:
    """A Llama with random weights, in float32."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=vocab,
        max_position_embeddings=seq,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()


def measure(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    *,
    seq: int,
    rounds: int,
    micro_batches: Sequence[int],
    with_compiled: bool = False,
    halves: Sequence[bool] = (False, True),
) -> Timing:
    """Time all systems on one pair in float32, with bfloat16 (`halves`), or both, and the floor beside them."""
    vocab: int = teacher.config.vocab_size
    optimizer = torch.optim.AdamW(student.parameters(), lr=LR, fused=True)
    ids_BS = torch.randint(vocab, (SAMPLES, seq), generator=torch.Generator().manual_seed(1))
    work = products(teacher.config, student.config, samples=SAMPLES, seq=seq)
    timing = Timing(vocab)
    for half in halves:
        pair = Pair(teacher, student, half, SAMPLES * (seq - 1))
        losses = {name: system.make(pair) for name, system in SYSTEMS.items() if half or not system.only_half}
        steps = {name: partial(step, loss, student, optimizer) for name, loss in losses.items()}
        students = dict.fromkeys(losses, student)
        for name, one in {OURS: pair, **({COMPILED: compiled(pair)} if with_compiled else {})}.items():
            own, students[name] = summed(one), one.student
            moved = optimizer if name == OURS else torch.optim.AdamW(one.student.parameters(), lr=LR, fused=True)
            losses[name] = partial(_sum, own)
            steps[name] = partial(own_step, own, Trained({"student": one.student}, moved))
        cases: dict[str, Case] = {}
        for name, loss in losses.items():
            sizes = [cases[OURS].micro_batch] if name == COMPILED else micro_batches
            cases[name] = Case(half, name, _best(loss, students[name], ids_BS, sizes))
            if not half:
                cases[name].bytes = working_bytes(loss, students[name], ids_BS[:2])
        running = list(losses)
        for turn in range(rounds):
            timing.floors[half].append(seconds(work, half=half))
            for name in running[turn % len(running) :] + running[: turn % len(running)]:
                cases[name].times.append(_clock(partial(steps[name], ids_BS, cases[name].micro_batch)))
                print(f"{vocab} {'bf16' if half else 'float32'} {name}: {cases[name].times[-1]:.2f} s", flush=True)
            fastest = min(cases[name].median for name in losses if name not in (OURS, COMPILED))
            running = [name for name in running if cases[name].median <= 2 * fastest]
        timing.cases += cases.values()
    return timing


def step(
    loss: Loss, student: PreTrainedModel, optimizer: torch.optim.Optimizer, ids_BS: Tensor, micro_batch: int
) -> None:
    """Micro-batches, clipping, AdamW."""
    backward(loss, ids_BS, micro_batch)
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0, foreach=True)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _sum(of_batch: Callable[[Batch], tuple[Tensor, int]], ids_BS: Tensor) -> Tensor:
    """The loss as halve's loop has it."""
    return of_batch(batch_of(ids_BS))[0]


def own_step(
    of_batch: Callable[[Batch], tuple[Tensor, int]], trained: Trained, ids_BS: Tensor, micro_batch: int
) -> None:
    """The same in halve's loop: sums, and one pass that takes the mean and clips."""
    found = gradients(trained, of_batch, batch_of(ids_BS).split(micro_batch))
    apply(trained, found, lr=LR, clip=1.0)


def backward(loss: Loss, ids_BS: Tensor, micro_batch: int) -> None:
    """The gradients of all samples."""
    for part_BS in torch.split(ids_BS, micro_batch):
        torch.autograd.backward(loss(part_BS))


def _best(loss: Loss, student: PreTrainedModel, ids_BS: Tensor, candidates: Sequence[int]) -> int:
    """The micro-batch that is fastest on the samples of the largest; this warms up, too."""
    some_BS = ids_BS[: max(candidates)]
    times = {size: _clock(partial(backward, loss, some_BS, size)) for size in candidates}
    student.zero_grad(set_to_none=True)
    return min(times, key=lambda size: times[size])


def working_bytes(loss: Loss, student: PreTrainedModel, ids_BS: Tensor) -> int:
    """The most bytes in tensors at any moment, less those of the gradients (parameters were there before).

    One sample at a time for all, whichever micro-batch is fastest.
    """
    peak = most_bytes(partial(backward, loss, ids_BS, 1))
    gradients: int = sum(p.grad.nbytes for p in student.parameters() if p.grad is not None)
    student.zero_grad(set_to_none=True)
    return peak - gradients


def most_bytes(work: Callable[[], Any]) -> int:
    """The most bytes in tensors that this work makes, at any moment of it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    live, peak = 0, 0
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"]):
        live += int(event["args"]["Bytes"])
        peak = max(peak, live)
    return peak


def _clock(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
