"""The page that `distill_step.py` writes: which precision everybody ran in, the figures, a verdict on every target.

Where the allocator's settings were given and left out, both are shown, and targets are judged with them.
"""

from __future__ import annotations

import datetime
import platform
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from distill_exact import Exactness
from distill_peers import COMPILED, OURS, versions
from distill_timing import SAMPLES, Case, Timing

FLOOR = {False: 0.80, True: 0.70}
FASTER = {32000: 1.15, 128000: 1.4}
HALF_FASTER, LEANER, PARITY = 1.4, 4.0, 0.005
WITH, WITHOUT = "with the settings", "without"
"""The allocator's settings that halve's documentation recommends, given to every system, or to none."""


@dataclass(frozen=True)
class Findings:
    """All that was measured."""

    timings: Mapping[str, Sequence[Timing]]
    """By whether the allocator was set (`WITH`, `WITHOUT`): one a vocabulary."""
    exactness: Mapping[tuple[bool, str], Exactness]
    parity: tuple[float, float]
    parity_steps: int
    settings: Mapping[str, str]
    seq: int
    rounds: int
    minutes: float

    @property
    def judged(self) -> str:
        """The allocator under which targets are judged."""
        return WITH if WITH in self.timings else WITHOUT

    def exact(self, half: bool, name: str) -> bool:
        """Whether a system counts."""
        return self.exactness[half, name].exact


def page(found: Findings) -> list[str]:
    """As markdown."""
    lines = [f"# Distillation step, {datetime.date.today()}", ""]
    threads = f"{torch.get_num_threads()} threads of {platform.processor() or platform.machine()}"
    library = " ".join(platform.libc_ver())
    lines += [f"{threads}, {library}; {found.rounds} rounds, {found.minutes:.0f} min", ""]
    lines += [", ".join(f"{name} {version}" for name, version in versions().items()), ""]
    lines += ["DistillKit: in no package index, left out.", ""]
    settings = " ".join(f"{name}={value}" for name, value in found.settings.items())
    lines += [f"The allocator's settings, for all systems alike: `{settings}`. Targets are judged {found.judged}"]
    lines[-1] += "." if found.judged == WITH else " them."
    lines += ["", "## Precisions", ""]
    lines += ["Seen in the operations of a forward pass: products of the bodies, logits, exponentials of the loss.", ""]
    lines += ["| run | system | bodies / head / loss | error of the loss | counts |", "|---|---|---|---|---|"]
    for (half, name), one in found.exactness.items():
        counts = "yes" if one.exact else "no"
        lines.append(f"| {_word(half)} | {name} | {one.precision} | {one.error:.1e} | {counts} |")
    lines += ["", "## Against the fastest rivals", "", "Tokens/s of halve over the rival's, lowest to highest.", ""]
    lines += ["| vocabulary | run | allocator | fastest exact rival | halve | fastest of all rivals | halve |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for allocator, timings in found.timings.items():
        for timing in timings:
            lines += [_against(found, allocator, timing, half) for half in (False, True)]
    for allocator, timings in found.timings.items():
        for timing in timings:
            lines += ["", f"## Vocabulary {timing.vocab}, allocator {allocator}", "", *_table(found, timing)]
    verdicts = [line for timing in found.timings[found.judged] for line in _verdicts(found, timing)]
    drift = abs(found.parity[1] / found.parity[0] - 1)
    verdicts.append(_verdict(f"bf16 loss after {found.parity_steps} steps", drift, PARITY, "at most", "{:.2%}"))
    return [*lines, "", f"## Targets, allocator {found.judged}", "", *verdicts]


def _table(found: Findings, timing: Timing) -> Iterator[str]:
    yield "| bodies / head / loss | system | micro-batch | s/step | tokens/s | of the floor | working MB |"
    yield "|---|---|---|---|---|---|---|"
    for case in timing.cases:
        spread = f"{min(case.times):.2f} to {max(case.times):.2f}"
        memory = "" if case.bytes is None else f"{case.bytes / 1e6:.0f}"
        yield (
            f"| {found.exactness[case.half, case.system].precision} | {case.system} | {case.micro_batch} |"
            f" {case.median:.2f} ({spread}) | {SAMPLES * found.seq / case.median:.0f} |"
            f" {_share(timing.floors[case.half], case):.0%} | {memory} |"
        )


def _against(found: Findings, allocator: str, timing: Timing, half: bool) -> str:
    cells = []
    for exact in (True, False):
        rival = _rival(found, timing, half, exact=exact)
        ratios = _ratios(timing.of(half)[OURS], rival)
        precision = found.exactness[rival.half, rival.system].precision
        cells.append(f"{rival.system} ({precision}) | {_spread(ratios)}")
    return f"| {timing.vocab} | {_word(half)} | {allocator} | {cells[0]} | {cells[1]} |"


def _rival(found: Findings, timing: Timing, half: bool, *, exact: bool) -> Case:
    """The fastest rival of a run in float32; of one in bfloat16 the fastest in either precision."""
    runs = (False, True) if half else (False,)
    rivals = [
        case
        for run in runs
        for name, case in timing.of(run).items()
        if name not in (OURS, COMPILED) and (found.exact(run, name) or not exact)
    ]
    return min(rivals, key=lambda case: case.median)


def _ratios(ours: Case, rival: Case) -> list[float]:
    return [theirs / mine for theirs, mine in zip(rival.times, ours.times, strict=False)]


def _spread(ratios: Sequence[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def _share(floor: Sequence[float], case: Case) -> float:
    """Of the floor that was measured in the same round, at the median."""
    return statistics.median(least / took for least, took in zip(floor, case.times, strict=False))


def _verdicts(found: Findings, timing: Timing) -> Iterator[str]:
    """The targets at one vocabulary."""
    for half in (False, True):
        cases, rival = timing.of(half), _rival(found, timing, half, exact=True)
        ratios = _ratios(cases[OURS], rival)
        wanted = HALF_FASTER if half else FASTER.get(timing.vocab, min(FASTER.values()))
        what = f"{timing.vocab}, {_word(half)}: tokens/s of the fastest exact rival, {rival.system},"
        what += f" ({min(ratios):.2f} to {max(ratios):.2f})"
        yield _verdict(what, statistics.median(ratios), wanted, "at least", "{:.2f} times")
        for name in (OURS, COMPILED):
            if name in cases:
                share = _share(timing.floors[half], cases[name])
                what = f"{timing.vocab}, {_word(half)}: {name}, share of the floor"
                yield _verdict(what, share, FLOOR[half], "at least", "{:.0%}")
    if timing.vocab != max(one.vocab for one in found.timings[found.judged]):
        return
    whole = timing.of(False)
    lean = min(
        case.bytes or 0 for name, case in whole.items() if name not in (OURS, COMPILED) and found.exact(False, name)
    )
    what = f"{timing.vocab}, float32: working memory of the leanest exact rival's"
    yield _verdict(what, (whole[OURS].bytes or 0) / lean, 1 / LEANER, "at most", "{:.0%}")


def _verdict(what: str, found: float, wanted: float, bound: str, form: str) -> str:
    reached = found >= wanted if bound == "at least" else found <= wanted
    gap = "" if reached else f", the gap is {form.format(abs(found - wanted))}"
    target = f"{bound} {form.format(wanted)}"
    return f"- {'reached' if reached else 'MISSED'}: {what} {form.format(found)} ({target}{gap})"


def _word(half: bool) -> str:
    return "bf16" if half else "float32"
