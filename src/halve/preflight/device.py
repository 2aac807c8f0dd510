"""The device that a run is planned for: the one at hand, or a card that the command names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import psutil
import torch

from halve.recipe import schema as recipe
from halve.train.loop import watch

GPU_MFU: Final = 0.4
CPU_MFU: Final = 0.5
"""What the demo's distillation reaches of the products that are measured here: 0.50 to 0.52 on two cores."""
CARD_BYTES: Final = 80e9


@dataclass(frozen=True)
class PlannedDevice:
    """What runs a recipe, how much it holds, and how fast it multiplies."""

    name: str
    cuda: bool
    memory_bytes: float
    """Of a CPU the machine's main memory, which its processes share."""
    flops: float | None
    """Matrix products a second: a GPU's by its data sheet, a CPU's as just measured; None where nobody knows."""
    mfu: float
    cores: int | None = None

    def hours(self, flops: float, *, ranks: int = 1) -> float | None:
        """How long so many FLOPs take; the ranks of one CPU share it."""
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
    """An H100 with so much memory, wherever it may be."""
    return PlannedDevice("an H100", True, memory_bytes, watch.GPU_FLOPS["H100"], mfu)


def device_name(gigabytes: float | None, mfu: float | None, ranks: int | None) -> PlannedDevice | None:
    """The card that the command's flags speak of; None where none is given, so that the device at hand is meant."""
    if gigabytes is mfu is ranks is None:
        return None
    return card(CARD_BYTES if gigabytes is None else gigabytes * 1e9, GPU_MFU if mfu is None else mfu)


def at_hand(asked: recipe.Device) -> PlannedDevice:
    """The device of this machine that a recipe would run on; a card where it asks for CUDA that is not there.

    A CPU's rate is measured: a fraction of a second.
    """
    if asked != "cpu" and torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        return PlannedDevice(found.name, True, float(found.total_memory), watch.matrix_rate("cuda", True), GPU_MFU)
    if asked == "cuda":
        return card()
    rate = watch.matrix_rate("cpu", False)
    there = float(psutil.virtual_memory().total)
    return PlannedDevice("this CPU", False, there, rate, CPU_MFU, torch.get_num_threads())
