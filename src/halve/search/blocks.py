"""What each block of a model is worth alone, for the additive baseline (see `additive`).

Nothing is refit and no layer is built: entries that are cut in one layer are masked where the layer reads them. Harm is
the KL to the whole model on calibration samples, in nats a token.

Shapes: W widths, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from halve.anatomy import Anatomy, Arch
from halve.cut.plan.plan import Plan, select
from halve.cut.plan.sizes import Candidate
from halve.cut.score.calibration import Calibration
from halve.cut.score.scores import Scores
from halve.cut.score.sites import writes
from halve.cut.surgery.trim import trim
from halve.cut.trial import Tried
from halve.model.hooks import first_input, hooked
from halve.model.reference import Reference, affordable
from halve.recipe.searching import Limits
from halve.search.additive import BlockSum, BlockValues, solve_blocks
from halve.search.budgets import Range
from halve.search.candidates import Found
from halve.search.quantities import Prices, price
from halve.search.space import Space

_NEURONS: Final = 6
"""Sizes of ffn at which a layer is measured; between them harm is interpolated."""
_SAMPLES: Final = 16
_SLACK: Final = 1e-6
"""The share by which the program's ranges shrink where the solver's tolerance lets a choice break a bound."""


def additive_choice(
    calibration: Calibration, scores: Scores, candidates: Sequence[Candidate], seen: Found | None = None
) -> Tried:
    """The shape and the layers that the integer program chooses among the candidates' widths, and the sum of its harms.

    Any layers may have any of these widths if `seen` allows their number and what they cost. Without `seen`, parameters
    are between those of the smallest and of the largest candidate. Raises `PlanError` if the program has no solution.
    """
    before = calibration.anatomy.sizes
    seen = seen or _between(calibration.anatomy, candidates)
    widths = list(dict.fromkeys(candidate.arch.at(layers=before.layers) for candidate in candidates))
    values = _values(calibration, scores, widths)
    sums = [_sum(seen, r, widths, candidates) for r in seen.ranges]
    space, slack = seen.prices.space, 0.0
    whole = widths.index(before) if before in widths else None
    while True:
        best = solve_blocks(values, sums, depths=space.depths, keep=space.keep, whole=whole, slack=slack)
        arch = widths[best.width].at(layers=len(best.layers))
        if seen.allows(arch, best.layers):
            return Tried(arch, best.layers, best.value)
        slack = max(_SLACK, 10 * slack)


def samples_of_values(available: int, context: int, vocab: int) -> int:
    """The calibration samples on which blocks are measured, of so many."""
    return affordable(min(_SAMPLES, available), context, vocab)


def measured_at(widths: Sequence[Arch]) -> tuple[list[int], list[tuple[int, int]], list[int]]:
    """Of these widths the sizes of ffn, the choices of heads and groups, and of hidden at which blocks are measured."""
    neurons = sorted({arch.ffn for arch in widths})
    grid = sorted({neurons[round(i)] for i in np.linspace(0, len(neurons) - 1, min(_NEURONS, len(neurons)))})
    groups = dict.fromkeys((arch.heads, arch.kv_heads) for arch in widths)
    return grid, [*groups], [*dict.fromkeys(arch.hidden for arch in widths)]


def _between(anatomy: Anatomy, candidates: Sequence[Candidate]) -> Found:
    params = [float(candidate.counts.params) for candidate in candidates]
    space = replace(Space.whole(anatomy), depths=tuple(range(anatomy.sizes.layers, 0, -1)))
    total = Range("total", Limits(min="1"), min(params), max(params), max(params))
    return Found((total,), Prices(space), ())


def _sum(seen: Found, bound: Range, widths: Sequence[Arch], candidates: Sequence[Candidate]) -> BlockSum:
    """A bound of the budget as a sum over blocks. A rate is not one, but its inverse is, the time of a token."""
    space, clock = seen.prices.space, seen.prices.clock
    kinds, inverse = space.anatomy.ledger.kinds, bound.quantity == "throughput"

    def cost(arch: Arch, kept_layers: Sequence[int]) -> float:
        at = arch.at(layers=len(kept_layers))
        value = price(space.anatomy, at, bound.quantity, bound.limits, clock, kept_layers=kept_layers)
        return 1 / value if inverse else value

    outside_W = np.array([cost(arch, ()) for arch in widths])
    of_kinds = {kind: np.array([cost(arch, (kind,)) for arch in widths]) - outside_W for kind in {*kinds}}
    low, high = bound.low, bound.high
    if inverse:
        low, high = 1 / high, 1 / low if low > 0 else np.inf
    elif high == np.inf:  # a student is no larger than it has to be
        high = max(cost(candidate.arch, space.order[: candidate.arch.layers]) for candidate in candidates)
    return BlockSum(str(bound), outside_W, np.stack([of_kinds[kind] for kind in kinds]), low, high)


def _values(calibration: Calibration, scores: Scores, widths: Sequence[Arch]) -> BlockValues:
    anatomy, samples_BS = calibration.anatomy, calibration.samples_BS
    few = samples_of_values(len(samples_BS), samples_BS.shape[1], anatomy.sizes.vocab)
    bench = _Bench(calibration.first(few), scores)
    layers, sizes = range(anatomy.sizes.layers), anatomy.sizes
    grid, groups, hiddens = measured_at(widths)
    with calibration.progress.task("values of blocks", len(layers) * (len(grid) + len(groups) + 1)) as task:
        ffn, heads, gone = [], [], []
        for layer in layers:
            ffn.append([bench.masked(layer, sizes.at(ffn=size)) for size in grid])
            heads.append({pair: bench.masked(layer, sizes.at(heads=pair[0], kv_heads=pair[1])) for pair in groups})
            gone.append(bench.trimmed(sizes.at(layers=sizes.layers - 1), [i for i in layers if i != layer]))
            task.advance(len(grid) + len(groups) + 1)
        hidden = {size: bench.trimmed(sizes.at(hidden=size), list(layers)) for size in hiddens}
    kept_LW = np.array(
        [[np.interp(a.ffn, grid, ffn[i]) + heads[i][a.heads, a.kv_heads] for a in widths] for i in layers]
    )
    return BlockValues(np.array([hidden[arch.hidden] for arch in widths]), kept_LW, np.array(gone))


class _Bench:
    """The whole model and its distributions on a few samples."""

    def __init__(self, calibration: Calibration, scores: Scores) -> None:
        self.model, self.anatomy = calibration.model, calibration.anatomy
        self.scores = replace(scores, statistics=None)
        self.reference = Reference(self.model, calibration.samples_BS, micro_batch=calibration.micro_batch)

    def _harm(self, model: Any) -> float:
        return float(self.reference.divergences(model).mean())

    def trimmed(self, arch: Arch, kept_layers: Sequence[int]) -> float:
        """The harm of these sizes, with these layers."""
        if arch == self.anatomy.sizes:
            return 0.0
        plan = select(self.anatomy, arch, self.scores, gain="none", kept_layers=kept_layers)
        return self._harm(trim(self.model, plan, self.anatomy))

    def masked(self, layer: int, arch: Arch) -> float:
        """The harm of a narrower ffn or fewer heads in this layer alone."""
        if arch == self.anatomy.sizes:
            return 0.0
        plan = select(self.anatomy, arch, self.scores, gain="none")
        with ExitStack() as hooks:
            for name in self.anatomy.modules:
                if self.anatomy.layer_of(name) == layer and writes(self.anatomy, name):
                    module = self.model.get_submodule(name)
                    hooks.enter_context(hooked([module], before=self._mask(name, plan, layer)))
            return self._harm(self.model)

    def _mask(self, name: str, plan: Plan, layer: int) -> Callable[..., Any]:
        expr, sizes = self.anatomy.modules[name], self.anatomy.sizes.sizes
        keeps = torch.zeros(expr.size(sizes), device=self.model.device, dtype=self.model.dtype)
        keeps[expr.indices(sizes, plan.kept(layer)).to(keeps.device)] = 1

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Tensor, ...], Any]:
            return (first_input(args, kwargs) * keeps, *args[1:]), kwargs

        return before
