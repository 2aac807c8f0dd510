"""The device for which a run is planned: the one of this machine, or a card that the command names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import psutil
import torch

from halve.errors import PlanError
from halve.recipe import schema as recipe
from halve.train.loop import watch

GPU_MFU: Final = 0.4
CPU_MFU: Final = 0.5
"""The share of the measured matrix rate that the demo's distillation reaches: 0.50 to 0.52 on two cores."""
CARD_BYTES: Final = 80e9


@dataclass(frozen=True)
class PlannedDevice:
    """A device with its memory and its speed of matrix products."""

    name: str
    cuda: bool
    memory_bytes: float
    """For a CPU this is the machine's main memory, which its processes share."""
    flops: float | None
    """FLOP/s of matrix products: a GPU's by its data sheet, a CPU's as measured. None if it is not known."""
    mfu: float
    cores: int | None = None

    def hours(self, flops: float, *, ranks: int = 1) -> float | None:
        """How long this many FLOPs take. The ranks on one CPU share it."""
        if self.flops is None:
            return None
        return flops / (self.flops * self.mfu) / 3600 / (ranks if self.cuda else 1)

    def __str__(self) -> str:
        if self.cores is None:
            return self.name
        assert self.flops is not None
        cores = "1 core" if self.cores == 1 else f"{self.cores} cores"
        return f"{self.name} ({cores}, {self.flops / 1e9:,.0f} GFLOP/s measured)"


def card(memory_bytes: float = CARD_BYTES, mfu: float = GPU_MFU) -> PlannedDevice:
    """An H100 with this much memory, which need not be in this machine."""
    return PlannedDevice("an H100", True, memory_bytes, watch.GPU_FLOPS["H100"], mfu)


def gpu(name: str, mfu: float = GPU_MFU) -> PlannedDevice:
    """A GPU by a part of its name, with the rate in its data sheet. Raises `PlanError` for one that is not known."""
    rate = watch.GPU_FLOPS.get(name.upper().replace(" PCIE", " PCIe"))
    if rate is None:
        raise PlanError(
            f"no rate is known for a {name}",
            why=f"known are {', '.join(watch.GPU_FLOPS)}",
            fix="take the one whose speed is nearest, and set --mfu",
        )
    return PlannedDevice(f"one {name.upper()}", True, CARD_BYTES, rate, mfu)


def device_name(gigabytes: float | None, mfu: float | None, ranks: int | None) -> PlannedDevice | None:
    """The card that the command's flags describe. None without such flags: then the device of this machine is meant."""
    if gigabytes is mfu is ranks is None:
        return None
    return card(CARD_BYTES if gigabytes is None else gigabytes * 1e9, GPU_MFU if mfu is None else mfu)


def at_hand(asked: recipe.Device) -> PlannedDevice:
    """The device of this machine on which a recipe would run. If it asks for CUDA and there is none, a card.

    The speed of a CPU is measured, which takes a fraction of a second.
    """
    if asked != "cpu" and torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        return PlannedDevice(gpu.name, True, float(gpu.total_memory), watch.matrix_rate("cuda", True), GPU_MFU)
    if asked == "cuda":
        return card()
    rate = watch.matrix_rate("cpu", False)
    there = float(psutil.virtual_memory().total)
    return PlannedDevice("this CPU", False, there, rate, CPU_MFU, torch.get_num_threads())
