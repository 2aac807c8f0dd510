"""From scores to a smaller model: all steps of a recipe's `prune` section, in order.

    target sizes -> which entries (ranked, in steps, or by refit) -> plan -> merge -> trim -> refit

The residual stream is rotated before its channels are ranked. Merging and rotation work on a copy of the teacher, whose
own weights are never changed. The plan is complete before the first weight is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel

from halve.anatomy import Anatomy, Arch
from halve.cut.iterative import select_iteratively
from halve.cut.layers import layer_merge
from halve.cut.plan import heads
from halve.cut.plan.plan import Importance, Plan, select
from halve.cut.repair.refit import refit
from halve.cut.repair.refit_scores import score_by_refit
from halve.cut.repair.rotate import principal_basis, rotate, rotates, stream_moment, tie_head
from halve.cut.score.scores import Scores
from halve.cut.surgery.gain import constant_gains, fit_gains
from halve.cut.surgery.trim import trim
from halve.process.waits import wait
from halve.progress import SILENT, Progress
from halve.recipe.schema import Prune

FEW_SAMPLES = 32
"""For fits with one unknown per norm or channel: gains, and the final norm of a head that stays tied."""

Rescore = Callable[[PreTrainedModel, Anatomy], Importance]
"""Scores a partly cut model again, for `prune.steps` above 1."""


@dataclass(frozen=True, eq=False)
class Turned:
    """The model in the basis in which hidden is cut. `energy_D` is None for the model's own basis."""

    model: PreTrainedModel
    anatomy: Anatomy
    energy_D: Tensor | None


@dataclass(frozen=True, eq=False)
class Cut:
    """A student and how it was made. `anatomy` is that of the model whose entries the plan lists."""

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
    sizes: Sequence[Arch],
    micro_batch: int,
    progress: Progress = SILENT,
) -> Turned:
    """Rotate the residual stream to its principal axes if `prune` asks for it and the family allows it.

    `sizes` are the possible sizes of the cut. If none of them cuts hidden, nothing is rotated. Raises `AnatomyError`
    for `rotation: pca` in a family whose norms do not allow it.
    """
    if not rotates(anatomy, prune) or all(after.hidden == anatomy.sizes.hidden for after in sizes):
        return Turned(model, anatomy, None)
    samples_BS = samples_BS[: prune.refit_samples]
    moment_DD = stream_moment(model, anatomy, samples_BS, micro_batch=micro_batch, progress=progress)
    with wait("rotating the weights to the principal axes of the residual stream"):
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
    merges: Sequence[layer_merge.Merge] = (),
    micro_batch: int,
    progress: Progress = SILENT,
    planned: Callable[[Plan], None] | None = None,
) -> Cut:
    """Cut a model to valid sizes as `prune` says. The model itself is not changed.

    `samples_BS` are the calibration samples for the selection, the gains and the refit. The first `refit_samples` are
    used, and the first 32 of these for gains. `turned` is the result of `turn`; a cut that keeps hidden does not use
    it. `planned` receives the plan before any weight is cut. `rescore` is needed for `prune.steps` above 1. `merges`
    are those that `layer_merge: laco_search` found.

    Raises `PlanError` and `CheckpointError`.
    """
    samples_BS = samples_BS[: prune.refit_samples]
    few_BS = samples_BS[:FEW_SAMPLES]
    if kept_layers is None:
        kept_layers = select(anatomy, anatomy.sizes.at(layers=after.layers), scores, gain="none").layers
    figures: dict[str, Any] = {}
    source, own, ranking = model, anatomy, scores
    if turned.energy_D is not None and after.hidden < anatomy.sizes.hidden:
        source, own = turned.model, turned.anatomy
        scores = replace(scores, hidden=turned.energy_D.float(), statistics=None)
        figures["energy_kept"] = float(turned.energy_D[: after.hidden].sum())
    if selects_by_refit(prune, scores.method):
        chosen = score_by_refit(
            model,
            anatomy,
            after,
            samples_BS,
            layers=kept_layers,
            strength=prune.ridge,
            micro_batch=micro_batch,
            progress=progress,
        )
        ffn, heads_, groups = (chosen.get(axis, getattr(scores, axis)) for axis in ("ffn", "heads", "kv_heads"))
        scores = replace(scores, statistics=None, ffn=ffn, heads=heads_, kv_heads=groups)
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
    gains = _gains(source, own, plan, few_BS, micro_batch, progress)
    merged = source
    if prune.head_merge:
        merged = heads.merge_heads(merged, plan, own, ranking, coefficient=prune.head_merge)
    if prune.layer_merge == "laco":
        merged = layer_merge.merge_layers(merged, own, plan.layers)
    if merges:
        merged = layer_merge.apply_merges(merged, own, merges)
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
            with wait("tying the head again"):
                student = tie_head(
                    student, source, own.final_norm, few_BS, strength=prune.ridge, micro_batch=micro_batch
                )
            own = anatomy
    return Cut(student, own, plan, gains, figures)


def selects_by_refit(prune: Prune, method: str) -> bool:
    """Whether neurons and heads are chosen by what a refit cannot compensate for, instead of by score."""
    if prune.selection != "auto":
        return prune.selection == "refit"
    return prune.refit != "none" and prune.steps == 1 and method == "activation"


def _gains(
    model: PreTrainedModel,
    anatomy: Anatomy,
    plan: Plan,
    samples_BS: Tensor,
    micro_batch: int,
    progress: Progress,
) -> dict[str, float]:
    """Gains that compensate for fewer channels in the norms. A refit of the readers starts from these, too."""
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
