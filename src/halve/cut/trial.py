"""The trial: shapes that meet a budget are cut, refit and measured, to choose between depth and width.

The papers prefer width because of long retraining of large models, and search by short distillation. Here a refit takes
the place of the first steps of that distillation. It takes seconds per shape and no gradients. What the trial finds on
small teachers, and how well it predicts the loss after retraining, is in docs/decisions/0011-shape.md.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from halve.anatomy import Arch
from halve.cut.apply import Goal, Repair, Turned, cut_once
from halve.cut.plan.plan import select
from halve.cut.repair.budget import trial_budget
from halve.cut.repair.taught import Taught
from halve.cut.score.calibration import Calibration
from halve.cut.score.scores import Scores
from halve.disk.lines import JsonLines
from halve.errors import CorpusError
from halve.model.reference import Reference
from halve.recipe.schema import Prune

TIE_TOLERANCE = 0.1
"""Shapes this close to the best count as equal. The deepest of them wins, because by the papers it learns best."""
NOISE = 0.03
"""If a shape is worse than its neighbor by less than this, the search still continues in this direction."""
HOPELESS = 1.25
"""A list whose middle exceeds this times the lowest KL so far is skipped. On the demo's teacher, a list that beats the
others is at most 19 % lower than its middle (docs/decisions/0011-shape.md)."""


@dataclass(frozen=True)
class Tried:
    """A shape, the layers that it keeps, and its KL to the teacher in nats a token, by sample and their mean."""

    arch: Arch
    kept_layers: tuple[int, ...]
    kl: float
    by_sample: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Tried:
        """The inverse of `to_json`."""
        return cls(Arch.of(data["arch"]), tuple(data["kept_layers"]), data["kl"], tuple(data["by_sample"]))

    def behind(self, other: Tried) -> tuple[float, float]:
        """How much higher its KL is than another's, and the standard error of that, sample by sample."""
        gaps = [mine - theirs for mine, theirs in zip(self.by_sample, other.by_sample, strict=True)]
        if len(gaps) < 2:
            return self.kl - other.kl, 0.0
        return self.kl - other.kl, statistics.stdev(gaps) / math.sqrt(len(gaps))


class Tries:
    """The shapes that were tried, in memory and, where a path is given, in a file that outlives a kill."""

    def __init__(self, path: Path | None = None) -> None:
        self.lines = None if path is None else JsonLines(path, Tried.from_json)
        self.found = {one.arch: one for one in (self.lines.kept if self.lines else ())}

    def add(self, one: Tried) -> None:
        """Keep one more."""
        self.found[one.arch] = one
        if self.lines is not None:
            self.lines.add(one, one.to_json())


LEAST_SAMPLES: Final = 3
"""Some are fitted and others measured on."""


def require_tried(num_samples: int, *, searched: bool) -> None:
    """Raise `CorpusError` for fewer calibration samples than a trial, or that of a search, needs."""
    if num_samples < LEAST_SAMPLES:
        instead = "choose search.method: additive" if searched else "set prune.shape: width"
        raise CorpusError(
            f"{num_samples} calibration samples are too few to compare shapes",
            why="some are fitted and others measured on",
            fix=f"give more text, a smaller data.context, score.samples of {LEAST_SAMPLES} or more, or {instead}",
        )


def try_shapes(
    calibration: Calibration,
    scores: Scores,
    prune: Prune,
    shapes: Sequence[Sequence[Arch]],
    *,
    turned: Turned,
    path: Path | None = None,
    kept_layers: Mapping[int, tuple[int, ...]] | None = None,
) -> tuple[Tried, ...]:
    """Cut to shapes as `prune` says, on few samples, and measure each on samples that the refit did not see.

    Within each list in `shapes` (see `sizes.shapes`, deepest first) KL falls and then rises with every layer that makes
    room for width: of each the middle is measured, and from there the trial goes down, the best list first; lists that
    begin too high are left. A shape that stands in two lists is cut once. What is measured is kept in `path`, where
    that is given, and a second call does not measure it again.

    `kept_layers` says which layers stay, by their number; without it they go by `scores.layers`. How many samples are
    for what is in `budget.trial_budget`. Neurons are ranked, not selected by refit, and whatever merges heads or layers
    is left out. The teacher runs once for all shapes.

    Raises `CorpusError` for fewer than three samples, and what `cut` raises.
    """
    require_tried(len(calibration.samples_BS), searched=kept_layers is not None)
    bench = _Bench(calibration, scores, prune, turned, kept_layers or {})
    tries, distinct = Tries(path), {arch for family in shapes for arch in family}
    reached: list[float] = []  # a resumed trial finds in `tries` what it comes to later

    def measured(arch: Arch) -> float:
        if arch not in tries.found:
            tries.add(bench.tried(arch))
            sizes = {axis: float(getattr(arch, axis)) for axis in ("layers", "hidden", "ffn", "heads", "kv_heads")}
            task.advance(bench.cost, kl=tries.found[arch].kl, **sizes)
        reached.append(tries.found[arch].kl)
        return reached[-1]

    with calibration.progress.task("try shapes", len(distinct) * bench.cost) as task:
        begun = [measured(family[len(family) // 2]) for family in shapes]
        for kl, family in sorted(zip(begun, shapes, strict=True), key=lambda entry: entry[0]):
            if kl <= HOPELESS * min(reached):
                _descend(family, kl, measured)
    tried = tuple(one for arch, one in tries.found.items() if arch in distinct)  # the file may hold others
    calibration.progress.say(f"tried {len(tried)} of {len(distinct)} shapes; chosen: {outcome_of_trial(tried)}")
    return tried


class _Bench:
    """Cuts shapes and measures them, all on the same samples."""

    def __init__(
        self,
        calibration: Calibration,
        scores: Scores,
        prune: Prune,
        turned: Turned,
        kept_layers: Mapping[int, tuple[int, ...]],
    ) -> None:
        self.kept_layers = kept_layers
        samples_BS, sizes = calibration.samples_BS, calibration.anatomy.sizes
        self.budget = trial_budget(prune, sizes, context=samples_BS.shape[1], available=len(samples_BS))
        measured_BS, fit_BS = _apart(samples_BS, self.budget.compared)
        self.fitting = calibration.on(fit_BS[: self.budget.used]).silent()
        self.scores, self.prune, self.turned = scores, without_extras(prune), turned
        self.reference = Reference(calibration.model, measured_BS, micro_batch=calibration.micro_batch)
        self.taught: dict[bool, Taught] = {}
        self.cost = self.budget.used * samples_BS.shape[1]

    def tried(self, arch: Arch) -> Tried:
        """Cut, refit and measured."""
        anatomy = self.fitting.anatomy
        kept = self.kept_layers.get(arch.layers)
        if kept is None:
            kept = select(anatomy, anatomy.sizes.at(layers=arch.layers), self.scores, gain="none").layers
        made = cut_once(
            self.fitting,
            self.scores,
            self.prune,
            Goal(arch, kept),
            turned=self.turned,
            repair=Repair(self.budget.held, self.taught),
        )
        by_sample = self.reference.divergences(made.student)
        return Tried(arch, kept, float(by_sample.mean()), tuple(by_sample.tolist()))


def without_extras(prune: Prune) -> Prune:
    """The settings with which shapes are cut in the trial."""
    usual = Prune(hidden=1)
    merged = {"head_merge": usual.head_merge, "layer_merge": usual.layer_merge}
    return prune.model_copy(update={"selection": "rank", "steps": 1, **merged})


def _descend(family: Sequence[Arch], begun: float, measured: Callable[[Arch], float]) -> None:
    """Measure from the middle toward more layers, then toward fewer if KL rises, each until it gets worse."""
    middle, lowest = len(family) // 2, begun
    for way in (range(middle - 1, -1, -1), range(middle + 1, len(family))):
        for i in way:
            kl = measured(family[i])
            if kl > (1 + NOISE) * lowest:
                break
            lowest = min(lowest, kl)
        if lowest < begun:
            return


def best(tried: Sequence[Tried]) -> Tried:
    """The deepest of those whose KL is within `TIE_TOLERANCE` of the lowest, or within two standard errors of it.

    >>> sizes = dict(hidden=8, ffn=8, heads=2, kv_heads=2, head_dim=4, vocab=9)
    >>> found = {6: 2.0, 5: 1.05, 4: 1.0}
    >>> best([Tried(Arch.of({**sizes, "layers": n}), tuple(range(n)), kl) for n, kl in found.items()]).arch.layers
    5
    """
    lowest = min(tried, key=lambda one: one.kl)
    return max(_ties(tried, lowest), key=lambda one: one.arch.layers)


def num_ties(tried: Sequence[Tried]) -> int:
    """How many shapes count as equal to the best beside it."""
    return len(_ties(tried, min(tried, key=lambda one: one.kl))) - 1


def _ties(tried: Sequence[Tried], lowest: Tried) -> list[Tried]:
    ties = []
    for tried_shape in tried:
        gap, error = tried_shape.behind(lowest)
        if gap <= max(TIE_TOLERANCE * lowest.kl, 2 * error):
            ties.append(tried_shape)
    return ties


def outcome_of_trial(tried: Sequence[Tried]) -> str:
    """Which shape was chosen, how far it is from the teacher, and who is too near to tell."""
    chosen, lowest = best(tried), min(tried, key=lambda one: one.kl)
    gap, error = chosen.behind(lowest)
    ties = num_ties(tried)
    near = f"; {ties} more count as equal, the deepest is taken" if ties else ""
    return f"{chosen.arch} (KL {chosen.kl:.4g}, {gap:.2g} ± {error:.2g} above the lowest{near})"


def _apart(samples_BS: Tensor, held: int) -> tuple[Tensor, Tensor]:
    """`held` samples spread over all, and the others."""
    chosen = torch.zeros(len(samples_BS), dtype=torch.bool)
    chosen[torch.arange(held) * len(samples_BS) // held] = True
    return samples_BS[chosen], samples_BS[~chosen]
