"""What a training run is watched by: loss spikes, and how well the device is used."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import torch

from halve.anatomy import Anatomy
from halve.recipe.schema import Correct, Distill

HORIZON = 64
"""Steps over which the running mean forgets."""
FLOOR = 0.05
"""Nats that a spike has at least: a loss near zero trembles by more than its own size."""
SCATTER = 6.0
"""Standard deviations that a spike has at least: a loss estimated from a few draws scatters, also below zero."""
KNOWN = 8
"""Losses that tell how much they scatter. Fewer understate it: they count as `1 + KNOWN / count` times as much, and
before there are three a spike has `KNOWN` times `FLOOR`."""
MOST, WITHIN = 4, 100
"""So many steps may be left out within so many; beyond that the cause is not a few samples."""

GPU_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}
"""Dense bf16 rates by data sheet, by a part of the device's name; the first that fits counts."""
_PROBE, _PROBE_S = 768, 0.25


@dataclass(frozen=True)
class Running:
    """What past steps say of the next loss: mean and variance of accepted ones, and which steps were left out."""

    mean: float = 0.0
    count: int = 0
    spikes: tuple[int, ...] = ()
    variance: float = 0.0

    def accept(self, loss: float) -> Running:
        """With one loss more: the plain mean of the first `HORIZON`, then one that forgets at that pace."""
        count, off = self.count + 1, loss - self.mean
        mean = self.mean + off / min(count, HORIZON)
        variance = self.variance + (off * (loss - mean) - self.variance) / min(count, HORIZON)
        return Running(mean, count, self.spikes, variance)

    def leave_out(self, step: int) -> Running:
        """With one spike more."""
        return replace(self, spikes=(*(one for one in self.spikes if one > step - WITHIN), step))

    @property
    def exhausted(self) -> bool:
        """Whether so many spikes were left out lately that going on is no use."""
        return len(self.spikes) > MOST

    def objection(self, loss: float, norm: float, *, factor: float) -> str | None:
        """Why a step's loss is a spike; None if it is none.

        It is one where loss or gradient norm is not finite, or where the loss exceeds the running mean by more than
        `factor` times the mean's size, `SCATTER` standard deviations, and `FLOOR`.
        """
        for name, value in (("loss", loss), ("grad_norm", norm)):
            if not math.isfinite(value):
                return f"{name} is {value}"
        if not self.count:
            return None
        scatter = math.sqrt(self.variance) * (1 + KNOWN / self.count)
        floor = FLOOR if self.count > 2 else KNOWN * FLOOR
        limit = self.mean + max(factor * abs(self.mean), SCATTER * scatter, floor)
        return f"loss {loss:.4g}, its running mean {self.mean:.4g}" if loss > limit else None

    def notes(self) -> dict[str, Any]:
        """As plain data for a checkpoint."""
        return asdict(self)

    @classmethod
    def of(cls, notes: Mapping[str, Any]) -> Running:
        """From `notes`; from nothing, the start."""
        if not notes:
            return cls()
        return cls(notes["mean"], notes["count"], tuple(notes["spikes"]), notes.get("variance", 0.0))


FlopsPerToken = Callable[[int], float]
"""FLOPs of a token of training by the context's length."""


def training_work(student: Anatomy) -> FlopsPerToken:
    """FLOPs a token of a model in training: three times its forward pass, `3 (2N + a) + 6 V H`."""
    return lambda context: 3.0 * _forward(student, context)


def correction_work(teacher: Anatomy, section: Correct) -> FlopsPerToken:
    """FLOPs a token of a correction: three times the forward pass.

    Where matrices stay frozen they have no gradient of their own, and count twice; attention has no weights.
    """
    if section.method == "full":
        return training_work(teacher)
    return lambda context: 3.0 * _forward(teacher, context) - _forward(teacher, 0)


def distilling(student: Anatomy, teacher: Anatomy, training: Distill) -> FlopsPerToken:
    """FLOPs a token of distillation: `(2N_T + a_T) + 3 (2N_S + a_S) + V (6 H_S + 2 H_T)`.

    Of a teacher whose hidden states are cached the head alone counts, of one whose logits are, nothing.
    """
    own = training_work(student)

    def work(context: int) -> float:
        if training.cache == "logits":
            return own(context)
        if training.cache == "hidden":
            return own(context) + 2.0 * teacher.sizes.vocab * teacher.sizes.hidden
        return own(context) + _forward(teacher, context)

    return work


def mfu(flops: float, seconds: float, *, device: str, half: bool, ranks: int) -> float | None:
    """Model FLOPs utilization: `flops` of all ranks over what their devices do; None for a device of unknown rate."""
    rate = matrix_rate(device, half)
    return None if rate is None else flops / seconds / (rate * ranks)


@cache
def matrix_rate(device: str, half: bool) -> float | None:
    """FLOPs a second of matrix products: a GPU's bf16 data sheet, a CPU's by a short measurement in its precision."""
    where = torch.device(device)
    if where.type == "cuda":
        name = torch.cuda.get_device_name(where)
        return next((rate for part, rate in GPU_FLOPS.items() if part in name), None)
    return _measured(torch.bfloat16 if half else torch.float32) if where.type == "cpu" else None


def peak_memory_bytes(device: str) -> int:
    """The most memory so far: in the allocator's tensors on CUDA, in the process on a CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _forward(anatomy: Anatomy, context: int) -> float:
    return float(anatomy.ledger.count(anatomy.sizes, context=context).flops_per_token)


@torch.no_grad()
def _measured(dtype: torch.dtype) -> float:
    """The best of a quarter of a second of square products, five at least: a busy machine only ever slows them."""
    left, right = torch.ones(2, _PROBE, _PROBE, dtype=dtype).unbind()
    seconds: list[float] = []
    while len(seconds) < 5 or sum(seconds) < _PROBE_S:
        began = time.perf_counter()
        torch.mm(left, right)
        seconds.append(time.perf_counter() - began)
    return 2.0 * _PROBE**3 / min(seconds)
