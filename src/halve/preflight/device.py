"""The device for which a run is planned: the one of this machine, or a card that the command names."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from typing import Final

import psutil
import torch

from halve.cut.cost import UPDATE_PASSES, Work
from halve.errors import PlanError
from halve.recipe import schema as recipe
from halve.train.loop import watch

GPU_MFU: Final = 0.4
CPU_MFU: Final = 0.5
"""The share of the measured matrix rate that the demo's distillation reaches: 0.50 to 0.52 on two cores."""
MEMORY_SHARE: Final = 0.7
"""The share of its memory's rate that a GPU is planned with."""
CARD_BYTES: Final = 80e9
GPU_RATES: Final = {
    "H100 PCIe": (51e12, 2.0e12),
    "H100": (67e12, 3.35e12),
    "H200": (67e12, 4.8e12),
    "A100": (19.5e12, 2.0e12),
    "L40S": (1.4e12, 0.86e12),
    "B200": (40e12, 8e12),
}
"""FLOP/s in full precision, the lower of float32 and float64, and bytes a second of the memory, by data sheet. The
names are those of `watch.GPU_FLOPS`."""
_PROBE, _PROBES = 2048, 5
_HALF_BYTES: Final = 2


@dataclass(frozen=True)
class PlannedDevice:
    """A device with its memory and its speed of matrix products."""

    name: str
    cuda: bool
    memory_bytes: float
    """For a CPU this is the machine's main memory, which its processes share."""
    flops: float | None
    """FLOP/s of matrix products: a GPU's by its data sheet, a CPU's as measured in the models' precision. None if it is
    not known."""
    mfu: float
    full_flops: float | None
    """The same of sums and solutions in float32 and float64. A CPU's is that of float32; solutions take twice as long,
    but are few."""
    bytes_per_second: float | None
    """How fast updates read and write memory. A CPU's is measured."""
    cores: int | None = None

    def hours(self, work: Work, *, ranks: int = 1, full: bool = False) -> float | None:
        """How long this work takes, where ranks share it. The ranks on one CPU share the CPU as well.

        `full`: a CPU runs the models in float32, too, whatever the precision of their files.
        """
        if self.flops is None or self.full_flops is None or self.bytes_per_second is None:
            return None
        of_models = (work.flops - work.full - work.thin) / (self.full_flops if full and not self.cuda else self.flops)
        seconds = (of_models + work.full / self.full_flops) / self.mfu + work.moved_bytes / self.bytes_per_second
        return seconds / 3600 / (ranks if self.cuda else 1)

    def __str__(self) -> str:
        if self.cores is None:
            return self.name
        assert self.flops is not None
        cores = "1 core" if self.cores == 1 else f"{self.cores} cores"
        return f"{self.name} ({cores}, {self.flops / 1e9:,.0f} GFLOP/s measured)"


def card(memory_bytes: float = CARD_BYTES, mfu: float = GPU_MFU) -> PlannedDevice:
    """An H100 with this much memory, which need not be in this machine."""
    return PlannedDevice("an H100", True, memory_bytes, watch.GPU_FLOPS["H100"], mfu, *_rates("H100"))


def gpu(name: str, mfu: float = GPU_MFU) -> PlannedDevice:
    """A GPU by a part of its name, with the rate in its data sheet. Raises `PlanError` for one that is not known."""
    known = name.upper().replace(" PCIE", " PCIe")
    rate = watch.GPU_FLOPS.get(known)
    if rate is None:
        raise PlanError(
            f"no rate is known for a {name}",
            why=f"known are {', '.join(watch.GPU_FLOPS)}",
            fix="take the one whose speed is nearest, and set --mfu",
        )
    return PlannedDevice(f"one {name.upper()}", True, CARD_BYTES, rate, mfu, *_rates(known))


def device_name(gigabytes: float | None, mfu: float | None, ranks: int | None) -> PlannedDevice | None:
    """The card that the command's flags describe. None without such flags: then the device of this machine is meant."""
    if gigabytes is mfu is ranks is None:
        return None
    return card(CARD_BYTES if gigabytes is None else gigabytes * 1e9, GPU_MFU if mfu is None else mfu)


def at_hand(asked: recipe.Device, dtype: torch.dtype = torch.float32) -> PlannedDevice:
    """The device of this machine on which a recipe would run. If it asks for CUDA and there is none, a card.

    The speed of a CPU is measured, which takes a fraction of a second. `dtype` is that of the models: in bfloat16 a
    CPU may be several times as fast as in float32, or slower.
    """
    if asked != "cpu" and torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        rate = watch.matrix_rate("cuda", True)
        return PlannedDevice(gpu.name, True, float(gpu.total_memory), rate, GPU_MFU, *_rates(gpu.name))
    if asked == "cuda":
        return card()
    rate, full = watch.matrix_rate("cpu", dtype.itemsize == _HALF_BYTES), watch.matrix_rate("cpu", False)
    there = float(psutil.virtual_memory().total)
    return PlannedDevice("this CPU", False, there, rate, CPU_MFU, full, _memory_rate(), torch.get_num_threads())


def _rates(name: str) -> tuple[float | None, float | None]:
    """A GPU's FLOP/s in full precision, and the rate at which it is planned to read and write memory."""
    for part, (flops, memory) in GPU_RATES.items():
        if part in name:
            return flops, MEMORY_SHARE * memory
    return None, None


@cache
@torch.no_grad()
def _memory_rate() -> float:
    """Bytes a second of this CPU in an update of rank one, the fastest of a few tries."""
    matrix, change = torch.ones(2, _PROBE, _PROBE, dtype=torch.float64).unbind()
    seconds = []
    for _ in range(_PROBES):
        began = time.perf_counter()
        torch.mm(matrix[:, :1], matrix[:1], out=change)
        matrix -= change
        seconds.append(time.perf_counter() - began)
    return UPDATE_PASSES * matrix.nbytes / min(seconds)
