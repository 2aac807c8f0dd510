"""How long the stages of a run take on a device."""

from __future__ import annotations

from collections.abc import Mapping

from halve.cut.cost import Work
from halve.preflight.device import GPU_MFU, PlannedDevice, card
from halve.recipe.rounds import TOGETHER, parsed


def hours_by_stage(
    done: Mapping[str, Work], device: PlannedDevice, *, ranks: int = 1, half: bool = True
) -> dict[str, float | None]:
    """Hours of every stage on the device. None if its speed is not known. Only trainings are shared by the ranks.

    `half`: trainings compute in bfloat16. Otherwise a CPU trains in float32.
    """
    trained = {stage: parsed(stage.split()[0])[0] in TOGETHER for stage in done}
    return {
        stage: device.hours(work, ranks=ranks if trained[stage] else 1, full=trained[stage] and not half)
        for stage, work in done.items()
    }


def a_card(device: PlannedDevice) -> PlannedDevice:
    """The H100 beside the device: with the same share of its peak, if the device is a card as well."""
    return card(mfu=device.mfu if device.cuda else GPU_MFU)
