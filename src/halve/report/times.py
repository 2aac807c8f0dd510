"""Times in words: of a run, of its stages, and of the parts of a cut that can take long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from halve.model.checkpoint import Checkpoint
    from halve.preflight.device import PlannedDevice
    from halve.preflight.forecast import Forecast
    from halve.preflight.sizes import PlannedRound
    from halve.recipe.schema import Recipe

AN_H100 = "an H100"
"""The name of the card that is planned beside every device."""
MUCH_FASTER = 2.0
"""How many times as fast products in bfloat16 must be for the plan to name them."""


def times_on(
    device: PlannedDevice, hours: Mapping[str, float | None], gpu_hours: Mapping[str, float | None]
) -> tuple[list[str], dict[str, list[str]]]:
    """The names of the devices, and for every stage its time on each of them."""
    columns = {f"on {device.name}": hours, f"on {AN_H100}": gpu_hours}
    return [*columns], {stage: [_time(by_stage[stage]) for by_stage in columns.values()] for stage in hours}


def _time(hours: float | None) -> str:
    return "?" if hours is None else duration(hours)


def times_of_the_cut(recipe: Recipe, teacher: Checkpoint, shapes: Sequence[PlannedRound]) -> list[str]:
    """A line for each part of the cut that can take long. If its work cannot be counted, a line says why."""
    from halve.model.precision import computing_dtype
    from halve.preflight.device import at_hand
    from halve.preflight.times import a_card, hours_by_stage
    from halve.preflight.work import planned_work

    device = at_hand(recipe.device, computing_dtype(recipe.dtype, teacher.config, on_cpu=True))
    try:
        work = planned_work(recipe, shapes, teacher)
    except Exception as error:  # a run may still work, and check has found no error
        return [f"no times are known: {' '.join(f'{type(error).__name__}: {error}'.split())[:200]}"]
    columns, times = times_on(device, *(hours_by_stage(work, place) for place in (device, a_card(device))))
    return [
        f"{at_most(stage)}: {', '.join(f'{time} {where}' for where, time in zip(columns, told, strict=True))}"
        for stage, told in times.items()
        if stage.split("-")[0] in _LONG_PARTS
    ]


_LONG_PARTS = ("trial", "selection", "refit")


def at_most(stage: str) -> str:
    """The name of a stage, with a word where its work is an upper bound."""
    return f"{stage}, at most" if stage.startswith(("trial", "selection", "finalists", "search")) else stage


def time_of_a_run(found: Forecast) -> str:
    """The time that the run takes on the device, and on an H100 for comparison."""
    device, ranks = found.device, found.place.ranks
    mfu = f"{found.gpu_mfu:.0%} MFU"
    card = f"about {duration(found.gpu_hours)} of an H100 at {mfu}"
    if device.name == AN_H100 and found.hours is not None:
        return card + (f", {duration(found.hours)} on {ranks} of them" if ranks > 1 else "")
    if found.hours is None:
        return f"{card}; the speed of {device} is not known"
    at = f" at {mfu}" if device.cuda else ""
    return f"about {duration(found.hours)} on {f'{ranks} of ' if device.cuda and ranks > 1 else ''}{device}{at}; {card}"


def other_precision(found: Forecast) -> str | None:
    """A line where this CPU multiplies much faster in the models' bfloat16 than in the float32 that is trained in."""
    device = found.device
    if device.cuda or found.place.half or not found.memory or not device.flops or not device.full_flops:
        return None
    times = device.flops / device.full_flops
    if times < MUCH_FASTER:
        return None
    return (
        f"trainings compute in float32; this CPU multiplies {times:.1f} times as fast in bfloat16, which the key"
        " `precision: bfloat16` of a training asks for"
    )


def duration(hours: float) -> str:
    """A duration in a unit that suits its length.

    >>> [duration(h) for h in (1e-5, 0.012, 0.4, 3.3, 200.0, 2.3e4, 6e4)]
    ['0.036 seconds', '43 seconds', '24 minutes', '3.3 hours', '8.3 days', '958 days', '6.8 years']
    """
    units = (("days", 24.0), ("hours", 1.0), ("minutes", 1 / 60), ("seconds", 1 / 3600))
    unit, each = next((candidate for candidate in units if hours >= 2 * candidate[1]), units[-1])
    if hours > 1000 * 24:
        unit, each = "years", 365.25 * 24
    return f"{hours / each:,.0f} {unit}" if hours >= 10 * each else f"{hours / each:.2g} {unit}"
