"""From scores to a smaller model: everything that `prune` in a recipe can ask for, in its order.

    target sizes -> which entries (ranked, in steps, or by refit) -> plan -> merge -> trim -> refit

The residual stream is turned before its channels are ranked; what was merged or turned is a copy of the teacher, and
its own weights are never changed. The plan is complete before the first weight is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel

from halve.anatomy import Anatomy, Arch
from halve.cut import heads, layer_merge
from halve.cut.gain import constant_gains, fit_gains
from halve.cut.gram import Gram
from halve.cut.iterative import select_iteratively
from halve.cut.plan import Importance, Plan, select
from halve.cut.refit import refit
from halve.cut.rotate import principal_basis, rotate, stream_moment, tie, turns
from halve.cut.scores import Scores
from halve.cut.selection import removal_order
from halve.cut.sites import input_dim
from halve.cut.surgery import trim
from halve.cut.taps import find_points, on_input
from halve.cut.walk import Call, States, first_states, layer_modules, record_calls, run_layer
from halve.progress import SILENT, Progress
from halve.recipe import Prune

FEW_SAMPLES = 32
"""For what has one unknown a norm or a channel: gains, and the final norm of a head that stays tied."""

Rescore = Callable[[PreTrainedModel, Anatomy], Importance]
"""Scores a partly cut model anew, for `prune.steps` above 1."""


@dataclass(frozen=True, eq=False)
class Turned:
    """The model in the basis that its hidden is cut in; `energy_D` is None in its own."""

    model: PreTrainedModel
    anatomy: Anatomy
    energy_D: Tensor | None


@dataclass(frozen=True, eq=False)
class Cut:
    """A student and how it came about; `anatomy` is that of the model whose entries the plan names."""

    student: PreTrainedModel
    anatomy: Anatomy
    plan: Plan
    gains: dict[str, float]
    figures: dict[str, Any]


def turn(
    model: PreTrainedModel,
    anatomy: Anatomy,
    prune: Prune,
    samples_BS: Int64[Tensor, "batch seq"],
    *,
    micro_batch: int,
    progress: Progress = SILENT,
) -> Turned:
    """Turn the residual stream to its principal axes where `prune` asks for it and the family allows it.

    Raises `AnatomyError` for `rotation: pca` in a family whose norms do not allow it.
    """
    if not turns(anatomy, prune):
        return Turned(model, anatomy, None)
    samples_BS = samples_BS[: prune.refit_samples]
    moment_DD = stream_moment(model, anatomy, samples_BS, micro_batch=micro_batch, progress=progress)
    basis = principal_basis(moment_DD)
    turned, own = rotate(model, anatomy, basis.columns_DD)
    return Turned(turned, own, basis.energy_D)


def cut(
    model: PreTrainedModel,
    anatomy: Anatomy,
    scores: Scores,
    prune: Prune,
    samples_BS: Int64[Tensor, "batch seq"],
    *,
    after: Arch,
    kept_layers: Sequence[int] | None,
    turned: Turned,
    rescore: Rescore | None = None,
    micro_batch: int,
    progress: Progress = SILENT,
    planned: Callable[[Plan], None] | None = None,
) -> Cut:
    """Cut a model to legal sizes the way `prune` says; the model is not changed.

    `samples_BS` are the calibration samples of the selection, the gains and the refit: the first `refit_samples` are
    used, of them the first 32 for gains. `turned` is what `turn` gave; a cut that leaves hidden alone does not use
    it. `planned` gets the plan before any weight is cut. `rescore` is needed for `prune.steps` above 1.

    Raises `PlanError` and `CheckpointError`.
    """
    samples_BS = samples_BS[: prune.refit_samples]
    few_BS = samples_BS[:FEW_SAMPLES]
    if kept_layers is None:
        kept_layers = select(anatomy, anatomy.sizes.at(layers=after.layers), scores, gain="none").layers
    figures: dict[str, Any] = {}
    source, own = model, anatomy
    if turned.energy_D is not None and after.hidden < anatomy.sizes.hidden:
        source, own = turned.model, turned.anatomy
        scores = replace(scores, hidden=turned.energy_D.float(), statistics=None)
        figures["energy_kept"] = float(turned.energy_D[: after.hidden].sum())
    if _by_refit(prune, scores):
        chosen = score_by_refit(
            model, anatomy, after, samples_BS, layers=kept_layers, strength=prune.ridge, micro_batch=micro_batch
        )
        ffn, heads_ = chosen.get("ffn", scores.ffn), chosen.get("heads", scores.heads)
        scores = replace(scores, statistics=None, ffn=ffn, heads=heads_)
    if prune.steps > 1:
        assert rescore is not None, "cutting in steps needs a function that scores"

        def gains_of(part: PreTrainedModel, part_anatomy: Anatomy, plan: Plan) -> dict[str, float]:
            return _gains(part, part_anatomy, plan, few_BS, micro_batch, SILENT)

        plan = select_iteratively(
            source,
            own,
            after,
            steps=prune.steps,
            score=rescore,
            gain=prune.gain,
            kept_layers=kept_layers,
            gains=gains_of,
        )
    else:
        plan = select(own, after, scores, gain=prune.gain, kept_layers=kept_layers)
    if planned is not None:
        planned(plan)
    # what a gain could do, a refit of the readers does
    gains = {} if prune.refit == "all" else _gains(source, own, plan, few_BS, micro_batch, progress)
    merged = source
    if prune.head_merge:
        merged = heads.merge(merged, plan, own, scores, coefficient=prune.head_merge)
    if prune.layer_merge == "laco":
        merged = layer_merge.merge_layers(merged, own, plan.layers)
    student = trim(merged, plan, own, gains=gains)
    if prune.refit != "none":
        student = refit(
            student,
            source,
            plan,
            own,
            samples_BS,
            strength=prune.ridge,
            everything=prune.refit == "all",
            micro_batch=micro_batch,
            progress=progress,
        )
    if anatomy.tied and not own.tied:
        figures["more_params_untied"] = anatomy.sizes.vocab * after.hidden if prune.untie else 0
        if not prune.untie:
            assert own.final_norm is not None, "rotation folds the final norm, so that there is one"
            student = tie(student, source, own.final_norm, few_BS, strength=prune.ridge, micro_batch=micro_batch)
            own = anatomy
    return Cut(student, own, plan, gains, figures)


def _by_refit(prune: Prune, scores: Scores) -> bool:
    """Whether neurons and heads are chosen by what a refit cannot make up for, rather than by their scores."""
    if prune.selection != "auto":
        return prune.selection == "refit"
    return prune.refit != "none" and prune.steps == 1 and scores.method == "activation"


@torch.no_grad()
def score_by_refit(
    model: PreTrainedModel,
    anatomy: Anatomy,
    after: Arch,
    samples_BS: Int64[Tensor, "batch seq"],
    *,
    layers: Sequence[int],
    strength: float,
    micro_batch: int,
) -> dict[str, Tensor]:
    """Scores of neurons, and of heads where heads are cut: the later the refit can spare one, the higher.

    See `halve.cut.selection`. One forward pass, layer by layer, so that only one layer's Gram matrices are held.
    Layers that are not listed score zero.
    """
    before, points = anatomy.sizes, find_points(model, anatomy)
    per_group = before.heads // before.kv_heads
    cells = {"ffn": [0] * before.ffn, "heads": [head // per_group for head in range(before.heads)]}
    keep = {"ffn": after.ffn, "heads": after.heads // after.kv_heads}
    size = {"ffn": 1, "heads": before.head_dim}
    axes = [axis for axis in cells if getattr(after, axis) < getattr(before, axis)]
    scores = {axis: torch.zeros(before.layers, len(cells[axis])) for axis in axes}
    if not axes:
        return scores
    states = States(len(samples_BS), samples_BS.shape[1], before.hidden, dtype=model.dtype)
    calls: dict[int, list[Call]] = {}
    parts = [slice(start, start + micro_batch) for start in range(0, len(samples_BS), micro_batch)]
    for rows in parts:
        ids_BS = samples_BS[rows]
        if len(ids_BS) not in calls:
            calls[len(ids_BS)] = record_calls(model, anatomy, ids_BS)[0]
        states[rows] = first_states(model, anatomy, ids_BS)
    for layer, module in enumerate(layer_modules(model, anatomy)[: max(layers) + 1]):
        names = {axis: dict(points[axis])[layer] for axis in axes}
        grams = {axis: Gram(len(cells[axis]) * size[axis], device=model.device) for axis in axes}
        with ExitStack() as hooks:
            for axis in axes if layer in layers else ():
                hooks.enter_context(on_input(model.get_submodule(names[axis]), grams[axis].add))
            for rows in parts:
                x_BSD = states[rows].to(model.device)
                states[rows] = run_layer(module, calls[len(x_BSD)][layer], x_BSD)
        for axis in axes if layer in layers else ():
            name = names[axis]
            grams[axis].check(name)
            weight = model.get_parameter(f"{name}.weight")
            weight_YX = weight if input_dim(anatomy, name) == 1 else weight.T
            order = removal_order(
                grams[axis].xx_XX,
                weight_YX,
                size=size[axis],
                keep=keep[axis],
                cells=cells[axis],
                strength=strength,
            )
            scores[axis][layer] = len(cells[axis])
            scores[axis][layer, list(order)] = torch.arange(len(order), dtype=torch.float32)
    return scores


def _gains(
    model: PreTrainedModel, anatomy: Anatomy, plan: Plan, samples_BS: Tensor, micro_batch: int, progress: Progress
) -> dict[str, float]:
    if plan.gain == "none" or plan.before.hidden == plan.after.hidden:
        return {}
    if plan.gain == "constant":
        return constant_gains(anatomy, plan)

    def batches() -> Iterator[Tensor]:
        with progress.task("fit norm gains", samples_BS.numel()) as task:
            for part_BS in torch.split(samples_BS, micro_batch):
                yield part_BS
                task.advance(part_BS.numel())

    return fit_gains(model, anatomy, plan, batches())
