"""Times on the machine at hand: what one layer takes at a few widths, interpolated to all shapes of a space.

A model of these widths with random weights and about half of the layers runs (`timing`); hooks tell the time that its
layers take from the rest (embedding, final norm, head). A matrix product takes time in proportion to each of its sides,
so times are interpolated linearly in hidden, in ffn, and in the number of heads and key-value heads together; ffn and
heads do not meet in a layer.

    seconds(layers, hidden, ffn, heads) = rest(hidden) + layers x block(hidden, ffn, heads)
    block(hidden, ffn, heads) = block(hidden, ffn, all) + block(hidden, all, heads) - block(hidden, all, all)

How far the result is from whole models is measured in benchmarks/latency.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from halve.anatomy import Anatomy, Arch
from halve.anatomy.many import Integers
from halve.cut.plan.sizes import is_legal
from halve.disk.files import read_object, write_json
from halve.errors import RunError
from halve.model.checkpoint import resolve_device
from halve.process.waits import wait
from halve.recipe.schema import Device
from halve.recipe.searching import Search, ShapeBudget, TimeLimits
from halve.search.positions import require_positions
from halve.search.quantities import Reals
from halve.search.space import Space, legal_shapes
from halve.search.timing import BlockTimes, Condition, Pace, time_blocks

_AT = (1.0, 0.6, 0.25)
"""The shares of each axis at which layers are timed."""
_OF_A_COPY = ("_name_or_path", "architectures", "dtype", "transformers_version")
"""What the config says of one copy of a model."""
Phase_ = Literal["prefill", "decode"]


def needed(budget: ShapeBudget) -> list[Condition]:
    """The batches and contexts at which a budget bounds times, each once."""
    times = [limits for limits in budget.bounds.values() if isinstance(limits, TimeLimits)]
    return list(dict.fromkeys(Condition(limits.batch, limits.context) for limits in times))


@dataclass(frozen=True, eq=False)
class TimeTable:
    """Times of layers at a few widths, for some batches and contexts."""

    whole: Arch
    times: dict[Condition, dict[Arch, BlockTimes]] = field(default_factory=dict)

    @classmethod
    def measured(
        cls, anatomy: Anatomy, search: Search, *, path: Path | None = None, device: Device = "auto"
    ) -> TimeTable:
        """Time the widths that the budgets of a search need, minutes at most. What `path` has is not measured again.

        A file is used only by the same machine, torch, precision and model. On a CPU times are of float32, on CUDA of
        bfloat16. Raises `PlanError` for a context that is too long for the model.
        """
        budgets = [search.budget] if search.budget is not None else list(search.targets)
        for budget in budgets:
            require_positions(anatomy, budget)
        place = resolve_device(device)
        dtype = torch.bfloat16 if place == "cuda" else torch.float32
        table = cls(anatomy.sizes)
        key = machine_key(anatomy, place, dtype)
        kept = _read(path, key)
        for condition in dict.fromkeys(condition for budget in budgets for condition in needed(budget)):
            archs = nodes(anatomy, legal_shapes(anatomy, search))
            known = {arch: times for arch, times in kept.get(condition, {}).items() if arch in archs}
            missing = [arch for arch in archs if arch not in known]
            if missing:
                with wait(f"timing layers of {len(missing)} widths on this machine"):
                    pace = Pace(anatomy, condition, device=place, dtype=dtype)
                    known |= time_blocks(anatomy, missing, pace)
                kept[condition] = {**kept.get(condition, {}), **known}
                _write(path, key, kept)
            table.times[condition] = known
        return table

    def prefill_seconds(self, space: Space, layers: int, *, batch: int, context: int) -> Reals:
        """Seconds of one forward pass over prompts of `context` tokens, [W, F]."""
        return self._seconds(space, layers, Condition(batch, context), "prefill")

    def decode_seconds(self, space: Space, layers: int, *, batch: int, context: int) -> Reals:
        """Seconds of one more token of every sequence after `context` tokens, [W, F]."""
        return self._seconds(space, layers, Condition(batch, context), "decode")

    def _seconds(self, space: Space, layers: int, condition: Condition, phase: Phase_) -> Reals:
        times, sizes, whole = self.times[condition], space.sizes, self.whole
        hidden, heads, ffn = sizes["hidden"], sizes["heads"] + sizes["kv_heads"], sizes["ffn"]
        all_heads = whole.heads + whole.kv_heads
        blocks = {_point(arch): getattr(entry, f"{phase}_block") for arch, entry in times.items()}
        rests = {_point(arch): getattr(entry, f"{phase}_rest") for arch, entry in times.items()}
        hiddens = sorted({point[0] for point in blocks})
        rest = _between(hiddens, [min(v for p, v in rests.items() if p[0] == h) for h in hiddens], hidden)
        by_ffn, by_heads, at_whole = [], [], []
        for h in hiddens:
            here = {point[1:]: seconds for point, seconds in blocks.items() if point[0] == h}
            most = max(n for _, n in here)  # where heads follow hidden, those of this hidden
            ffns = sorted(f for f, n in here if n == most)
            counts = sorted(n for f, n in here if f == whole.ffn)
            by_ffn.append(_between(ffns, [here[f, most] for f in ffns], ffn))
            by_heads.append(_between(counts, [here[whole.ffn, n] for n in counts], np.minimum(heads, all_heads)))
            at_whole.append(np.full((1, 1), here[whole.ffn, most]))
        block = _mixed(hiddens, by_ffn, hidden) + _mixed(hiddens, by_heads, hidden) - _mixed(hiddens, at_whole, hidden)
        least = min(blocks.values()) / 8
        seconds: Reals = np.maximum(rest, min(rests.values()) / 8) + layers * np.maximum(block, least)
        return seconds


def nodes(anatomy: Anatomy, space: Space) -> list[Arch]:
    """The widths that are timed: of each hidden some sizes of ffn with all heads, and some heads with the whole ffn."""
    whole = anatomy.sizes
    hiddens = _spaced([hidden for hidden, _, _ in space.widths], whole.hidden)
    shapes: dict[Arch, None] = {}
    for hidden in hiddens:
        heads = [(h, g) for width, h, g in space.widths if width == hidden]
        most, counts = max(heads), _spaced([h + g for h, g in heads], sum(max(heads)))
        for ffn in _spaced((whole.ffn, *space.ffns), whole.ffn):
            shapes[whole.at(hidden=hidden, heads=most[0], kv_heads=most[1], ffn=ffn)] = None
        for h, g in (next(pair for pair in heads if sum(pair) == count) for count in counts):
            shapes[whole.at(hidden=hidden, heads=h, kv_heads=g)] = None
    return [arch for arch in shapes if arch.hidden == whole.hidden or is_legal(anatomy, arch)]


def _spaced(sizes: Sequence[int], whole: int) -> list[int]:
    return list(dict.fromkeys(min(sizes, key=lambda size: (abs(size - share * whole), -size)) for share in _AT))


def _point(arch: Arch) -> tuple[int, int, int]:
    return arch.hidden, arch.ffn, arch.heads + arch.kv_heads


def _between(points: Sequence[int], values: Sequence[float], at: Integers) -> Reals:
    """Linear between points, and on along the last line beyond them; constant if there is one point.

    >>> _between([2, 4], [10.0, 20.0], np.array([2, 3, 5])).tolist()
    [10.0, 15.0, 25.0]
    """
    return _mixed(points, [np.full((1,) * at.ndim, value) for value in values], at)


def _mixed(points: Sequence[int], values: Sequence[Reals], at: Integers) -> Reals:
    """The same where the values are arrays, one for each point."""
    if len(points) == 1:
        return values[0] + np.zeros(at.shape)
    right = np.clip(np.searchsorted(points, at), 1, len(points) - 1)
    total = np.zeros(at.shape)
    for i in range(1, len(points)):
        share = (at - points[i - 1]) / (points[i] - points[i - 1])
        total = total + np.where(right == i, (1 - share) * values[i - 1] + share * values[i], 0.0)
    return np.asarray(total)


# ---- the file


def machine_key(anatomy: Anatomy, device: str, dtype: torch.dtype) -> str:
    """What times depend on besides sizes: machine, threads, device, precision, torch, and the model's config.

    Not where a model lies and what wrote it: a corrected teacher has the times of the teacher.
    """
    card = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    config = {key: value for key, value in anatomy.config.to_dict().items() if key not in _OF_A_COPY}
    said = json.dumps(config, sort_keys=True, default=str)
    parts = [platform.node(), card, os.cpu_count(), torch.get_num_threads(), device, dtype, torch.__version__]
    return " | ".join([*map(str, parts), anatomy.family, hashlib.sha256(said.encode()).hexdigest()[:16]])


def _read(path: Path | None, key: str) -> dict[Condition, dict[Arch, BlockTimes]]:
    if path is None or not path.exists():
        return {}
    kept: dict[Condition, dict[Arch, BlockTimes]] = {}
    try:
        for entry in read_object(path).get(key, []):
            condition = Condition(entry["batch"], entry["context"])
            kept.setdefault(condition, {})[Arch.of(entry["arch"])] = BlockTimes(**entry["times"])
    except (KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"cannot read the times in {path}",
            why=f"an entry is not what halve wrote: {error}",
            fix="delete the file; the times are measured again",
        ) from error
    return kept


def _write(path: Path | None, key: str, kept: dict[Condition, dict[Arch, BlockTimes]]) -> None:
    if path is None:
        return
    others = read_object(path) if path.exists() else {}
    entries = [
        {"batch": condition.batch, "context": condition.context, "arch": arch.sizes, "times": vars(times)}
        for condition, of_archs in kept.items()
        for arch, times in of_archs.items()
    ]
    write_json(path, {**others, key: entries})
