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

from halve.anatomy import Arch
from halve.cut.plan.plan import Plan, select
from halve.cut.plan.sizes import Candidate
from halve.cut.score.calibration import Calibration
from halve.cut.score.scores import Scores
from halve.cut.score.sites import writes
from halve.cut.surgery.trim import trim
from halve.cut.trial import Tried
from halve.model.hooks import first_input, hooked
from halve.model.reference import Reference, affordable
from halve.search.additive import BlockValues, solve_blocks

_NEURONS: Final = 6
"""Sizes of ffn at which a layer is measured; between them harm is interpolated."""
_SAMPLES: Final = 16


def additive_choice(calibration: Calibration, scores: Scores, candidates: Sequence[Candidate]) -> Tried:
    """The shape and the layers that the integer program chooses among the candidates' widths, and the sum of its harms.

    Any number of layers may have any of these widths if its parameters are between those of the smallest and of the
    largest candidate. Raises `PlanError` if the program has no solution.
    """
    archs = [candidate.arch for candidate in candidates]
    whole = calibration.anatomy.sizes.layers
    widths = list(dict.fromkeys(arch.at(layers=whole) for arch in archs))
    params = [candidate.counts.params for candidate in candidates]
    values = _values(calibration, scores, widths)
    best = solve_blocks(values, least=float(min(params)), most=float(max(params)))
    return Tried(widths[best.width].at(layers=len(best.layers)), best.layers, best.value)


def _values(calibration: Calibration, scores: Scores, widths: Sequence[Arch]) -> BlockValues:
    anatomy, samples_BS = calibration.anatomy, calibration.samples_BS
    few = affordable(min(_SAMPLES, len(samples_BS)), samples_BS.shape[1], anatomy.sizes.vocab)
    bench = _Bench(calibration.first(few), scores)
    layers, sizes = range(anatomy.sizes.layers), anatomy.sizes
    neurons = sorted({arch.ffn for arch in widths})
    grid = sorted({neurons[round(i)] for i in np.linspace(0, len(neurons) - 1, min(_NEURONS, len(neurons)))})
    groups = {(arch.heads, arch.kv_heads) for arch in widths}
    with calibration.progress.task("values of blocks", len(layers) * (len(grid) + len(groups) + 1)) as task:
        ffn, heads, gone = [], [], []
        for layer in layers:
            ffn.append([bench.masked(layer, sizes.at(ffn=size)) for size in grid])
            heads.append({pair: bench.masked(layer, sizes.at(heads=pair[0], kv_heads=pair[1])) for pair in groups})
            gone.append(bench.trimmed(sizes.at(layers=sizes.layers - 1), [i for i in layers if i != layer]))
            task.advance(len(grid) + len(groups) + 1)
        hidden = {size: bench.trimmed(sizes.at(hidden=size), list(layers)) for size in {a.hidden for a in widths}}
    kept_LW = np.array(
        [[np.interp(a.ffn, grid, ffn[i]) + heads[i][a.heads, a.kv_heads] for a in widths] for i in layers]
    )
    outside_params_W = np.array([_params(calibration, arch) for arch in widths], dtype=float)
    layer_params_LW = np.array([[_params(calibration, arch, i) for arch in widths] for i in layers], dtype=float)
    return BlockValues(
        outside_W=np.array([hidden[arch.hidden] for arch in widths]),
        kept_LW=kept_LW,
        gone_L=np.array(gone),
        outside_params_W=outside_params_W,
        layer_params_LW=layer_params_LW - outside_params_W,
    )


def _params(calibration: Calibration, arch: Arch, *kept: int) -> int:
    return calibration.anatomy.ledger.count(arch.at(layers=len(kept)), kept_layers=kept).params


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
