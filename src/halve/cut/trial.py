"""The trial: shapes that meet a budget are cut, refit and measured, to choose between depth and width.

The papers prefer width because of long retraining of large models, and search by short distillation. Here a refit takes
the place of the first steps of that distillation. It takes seconds per shape and no gradients. What the trial finds on
small teachers, and how well it predicts the loss after retraining, is in docs/decisions/0011-shape.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from halve.anatomy import Arch
from halve.cut.apply import Goal, Turned, cut
from halve.cut.plan.plan import select
from halve.cut.score.calibration import Calibration
from halve.cut.score.scores import Scores
from halve.errors import CorpusError
from halve.model import measure
from halve.recipe.schema import Prune

FIT_SAMPLES, MEASURED_SAMPLES = 8, 8
TIE_TOLERANCE = 0.1
"""Shapes this close to the best count as equal. The deepest of them wins, because by the papers it learns best."""
NOISE = 0.03
"""If a shape is worse than its neighbor by less than this, the search still continues in this direction."""
HOPELESS = 1.25
"""A list whose middle exceeds this times the lowest KL so far is skipped. On the demo's teacher, a list that beats the
others is at most 19 % lower than its middle (docs/decisions/0011-shape.md)."""


@dataclass(frozen=True)
class Tried:
    """A shape, the layers that it keeps, and its KL from the teacher in nats per token."""

    arch: Arch
    kept_layers: tuple[int, ...]
    kl: float

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def require_tried(num_samples: int) -> None:
    """Raise `CorpusError` for fewer calibration samples than a trial needs."""
    if num_samples < 3:
        raise CorpusError(
            f"{num_samples} calibration samples are too few to compare shapes",
            why="some are fitted and others measured on",
            fix="give more text, a smaller data.context, or set prune.shape: width",
        )


def try_shapes(
    calibration: Calibration, scores: Scores, prune: Prune, shapes: Sequence[Sequence[Arch]], *, turned: Turned
) -> tuple[Tried, ...]:
    """Cut to shapes as `prune` says, on few samples, and measure each on samples that the refit did not see.

    Within each list in `shapes` (see `sizes.shapes`, deepest first), KL falls and then rises as layers are dropped in
    favor of width. So the middle of each list is measured first. From there the trial follows falling KL, and the best
    list comes first. Lists whose middle is too high are skipped. A shape in two lists is cut only once.

    Layers are dropped by `scores.layers`. Up to 8 samples, and at most a third of them, are for measurements. Up to 8
    of the others are for fitting. Neurons are chosen by score and not by refit, and heads and layers are not merged.

    Raises `CorpusError` for fewer than three samples, and what `cut` raises.
    """
    model, anatomy, samples_BS = calibration.model, calibration.anatomy, calibration.samples_BS
    require_tried(len(samples_BS))
    held, fitted = fewer_samples(prune, len(samples_BS))
    measured_BS, fit_BS = _apart(samples_BS, held)
    fitting = calibration.on(fit_BS).silent()
    asked = without_extras(prune)
    cost = fitted * samples_BS.shape[1]
    tried: dict[Arch, Tried] = {}

    def measured(arch: Arch) -> float:
        if arch in tried:  # it is in another list, too
            return tried[arch].kl
        kept = select(anatomy, anatomy.sizes.at(layers=arch.layers), scores, gain="none").layers
        student = cut(fitting, scores, asked, Goal(arch, kept), turned=turned).student
        apart = measure.divergence(student, model, measured_BS, micro_batch=calibration.micro_batch)
        kl = float(apart.kl.mean())
        tried[arch] = Tried(arch, kept, kl)
        sizes = {axis: float(getattr(arch, axis)) for axis in ("layers", "hidden", "ffn", "heads", "kv_heads")}
        task.advance(cost, kl=kl, **sizes)
        return kl

    distinct = {arch for family in shapes for arch in family}
    with calibration.progress.task("try shapes", len(distinct) * cost) as task:
        begun = [measured(family[len(family) // 2]) for family in shapes]
        for kl, family in sorted(zip(begun, shapes, strict=True), key=lambda entry: entry[0]):
            if kl <= HOPELESS * min(one.kl for one in tried.values()):
                _descend(family, kl, measured)
    found = best(tuple(tried.values()))
    calibration.progress.say(f"tried {len(tried)} of {len(distinct)} shapes; chosen: {found.arch} (KL {found.kl:.4g})")
    return tuple(tried.values())


def without_extras(prune: Prune) -> Prune:
    """The settings with which shapes are cut in the trial."""
    usual = Prune(hidden=1)
    few = {"refit_samples": min(prune.refit_samples, FIT_SAMPLES)}
    merged = {"head_merge": usual.head_merge, "layer_merge": usual.layer_merge}
    return prune.model_copy(update={"selection": "rank", "steps": 1, **merged, **few})


def fewer_samples(prune: Prune, num_samples: int) -> tuple[int, int]:
    """The numbers of samples for measuring and for fitting shapes, from the available ones.

    >>> fewer_samples(Prune(hidden=1), 1024), fewer_samples(Prune(hidden=1), 9)
    ((8, 8), (3, 6))
    """
    held = min(MEASURED_SAMPLES, num_samples // 3)
    return held, min(prune.refit_samples, FIT_SAMPLES, num_samples - held)


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
    """The deepest of those within `TIE_TOLERANCE` of the lowest KL.

    >>> sizes = dict(hidden=8, ffn=8, heads=2, kv_heads=2, head_dim=4, vocab=9)
    >>> found = {6: 2.0, 5: 1.05, 4: 1.0}
    >>> best([Tried(Arch.of({**sizes, "layers": n}), tuple(range(n)), kl) for n, kl in found.items()]).arch.layers
    5
    """
    lowest = min(one.kl for one in tried)
    return max((one for one in tried if one.kl <= (1 + TIE_TOLERANCE) * lowest), key=lambda one: one.arch.layers)


def _apart(samples_BS: Tensor, held: int) -> tuple[Tensor, Tensor]:
    """`held` samples spread over all, and the others."""
    chosen = torch.zeros(len(samples_BS), dtype=torch.bool)
    chosen[torch.arange(held) * len(samples_BS) // held] = True
    return samples_BS[chosen], samples_BS[~chosen]
