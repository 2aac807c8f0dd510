"""Monitoring of a training: loss spikes, and the utilization of the device."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any

import torch

from halve.model.finite import is_finite

HORIZON = 64
"""The horizon of the running mean, in steps."""
FLOOR = 0.05
"""The smallest spike, in nats, because a loss near zero fluctuates by more than its own size."""
SCATTER = 6.0
"""The smallest spike, in standard deviations, because a loss that is estimated from draws fluctuates around zero."""
KNOWN = 8
"""Few losses underestimate the standard deviation, so it is multiplied by `1 + KNOWN / count`. With fewer than three
losses, a spike must exceed `KNOWN` times `FLOOR`."""
MOST, WITHIN = 4, 100
"""At most this many steps may be skipped within this many steps. More spikes are not caused by a few samples."""

GPU_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}
"""Dense bf16 FLOP/s by data sheet, by a part of the device's name. The first match counts."""
_PROBE, _PROBE_S = 768, 0.25


@dataclass(frozen=True)
class Spike:
    """The reason to skip a step: a figure that is not finite, or too far above its running mean."""

    figure: str
    value: float
    mean: float | None = None
    """The running mean, if the figure is finite."""

    def __str__(self) -> str:
        if self.mean is None:
            return f"{self.figure} is {self.value}"
        return f"{self.figure} {self.value:.4g}, its running mean {self.mean:.4g}"


@dataclass(frozen=True)
class Running:
    """Statistics of past steps: mean and variance of accepted losses, and the skipped steps."""

    mean: float = 0.0
    count: int = 0
    spikes: tuple[int, ...] = ()
    variance: float = 0.0
    kind: str = ""
    """Of which kind of steps. Losses of different kinds, such as those of students of several sizes, differ anyway."""
    others: Mapping[str, tuple[float, int, float]] = field(default_factory=dict)
    """Mean, count and variance of the steps of other kinds."""

    def at(self, kind: str) -> Running:
        """The same for a step of a kind."""
        if kind == self.kind:
            return self
        others = {**self.others, self.kind: (self.mean, self.count, self.variance)}
        mean, count, variance = others.pop(kind, (0.0, 0, 0.0))
        return Running(mean, count, self.spikes, variance, kind, others)

    def accept(self, loss: float) -> Running:
        """Add a loss: a plain mean over the first `HORIZON` losses, then an exponential one with this horizon."""
        count, off = self.count + 1, loss - self.mean
        mean = self.mean + off / min(count, HORIZON)
        variance = self.variance + (off * (loss - mean) - self.variance) / min(count, HORIZON)
        return replace(self, mean=mean, count=count, variance=variance)

    def leave_out(self, step: int) -> Running:
        """Add a skipped step."""
        return replace(self, spikes=(*(spike for spike in self.spikes if spike > step - WITHIN), step))

    @property
    def exhausted(self) -> bool:
        """Whether too many spikes were skipped recently to continue."""
        return len(self.spikes) > MOST

    def objection(self, loss: float, norm: float, *, factor: float) -> Spike | None:
        """What makes a step's loss a spike; None if it is not.

        It is a spike if the loss or the gradient norm is not finite, or if the loss exceeds the running mean by more
        than all of these: `factor` times the size of the mean, `SCATTER` standard deviations, and `FLOOR`.
        """
        for name, value in (("loss", loss), ("grad_norm", norm)):
            if not is_finite(value):
                return Spike(name, value)
        if not self.count:
            return None
        scatter = math.sqrt(self.variance) * (1 + KNOWN / self.count)
        floor = FLOOR if self.count > 2 else KNOWN * FLOOR
        limit = self.mean + max(factor * abs(self.mean), SCATTER * scatter, floor)
        return Spike("loss", loss, self.mean) if loss > limit else None

    def notes(self) -> dict[str, Any]:
        """As plain data for a checkpoint."""
        return asdict(self)

    @classmethod
    def of(cls, notes: Mapping[str, Any]) -> Running:
        """Read from `notes`. Without notes, the initial state."""
        if not notes:
            return cls()
        others = {
            kind: (float(mean), int(count), float(of)) for kind, (mean, count, of) in notes.get("others", {}).items()
        }
        read = (notes["mean"], notes["count"], tuple(notes["spikes"]), notes.get("variance", 0.0))
        return cls(*read, notes.get("kind", ""), others)


def mfu(flops: float, seconds: float, *, device: str, half: bool, ranks: int) -> float | None:
    """Model FLOPs utilization: `flops` of all ranks over their devices' peak. None for a device of unknown speed."""
    rate = matrix_rate(device, half)
    return None if rate is None else flops / seconds / (rate * ranks)


@cache
def matrix_rate(device: str, half: bool) -> float | None:
    """FLOP/s of matrix products: a GPU's bf16 data sheet, or a short measurement on a CPU in the given precision."""
    where = torch.device(device)
    if where.type == "cuda":
        name = torch.cuda.get_device_name(where)
        return next((rate for part, rate in GPU_FLOPS.items() if part in name), None)
    return _measured(torch.bfloat16 if half else torch.float32) if where.type == "cpu" else None


def peak_memory_bytes(device: str) -> int:
    """The peak memory so far: of the allocator on CUDA, of the process on a CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@torch.no_grad()
def _measured(dtype: torch.dtype) -> float:
    """The fastest square product within a quarter of a second, of at least five. Other work only slows them down."""
    left, right = torch.ones(2, _PROBE, _PROBE, dtype=dtype).unbind()
    seconds: list[float] = []
    while len(seconds) < 5 or sum(seconds) < _PROBE_S:
        began = time.perf_counter()
        torch.mm(left, right)
        seconds.append(time.perf_counter() - began)
    return 2.0 * _PROBE**3 / min(seconds)
