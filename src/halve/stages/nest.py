"""The nest stage: sort the student's axes by importance, so that smaller students are its first parts.

Nothing is removed here and no weight is solved for. The stage writes the sorted student, and for every smaller one its
sizes, its layers and the gains of its norms (`cut.surgery.gain`). The distill stage trains them together.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from halve.anatomy import Anatomy
from halve.cut.apply import FEW_SAMPLES
from halve.cut.given import score_again
from halve.cut.plan.nest import nested_axes, nested_layers, nested_sizes, prefix_plan, sorting_plan
from halve.cut.plan.plan import Plan
from halve.cut.proof.prove import prove
from halve.cut.score.calibration import Calibration, require_calibration
from halve.cut.surgery.gain import constant_gains, fit_gains
from halve.cut.surgery.trim import trim
from halve.disk.files import write_json
from halve.errors import CheckpointError
from halve.model import saving
from halve.model.card import name_of
from halve.model.checkpoint import Checkpoint, resolve_device
from halve.model.precision import cast_weights, stored_dtype
from halve.progress import SILENT, Progress
from halve.recipe.schema import Recipe
from halve.stages.smaller import NEST
from halve.text.mixture import open_mixture


def run(recipe: Recipe, *, student: Checkpoint, cache: Path, out: Path, progress: Progress = SILENT) -> dict[str, Any]:
    """Write the sorted student to `out/model`, the order of its entries to `out/plan.json`, and `out/nest.json`.

    The student is scored by the section `score`. Only axes that some smaller student cuts are sorted. Layers are ranked
    by block importance. Raises `PlanError` and `AnatomyError` for sizes that do not nest, before weights are read, and
    `CheckpointError` if the sorted student is another function.
    """
    assert recipe.nest is not None
    anatomy = student.anatomy
    sizes = nested_sizes(anatomy, recipe.nest)
    proof = prove(anatomy)
    for arch in sizes[1:]:
        proof.demand(anatomy.sizes, arch)
    samples_BS = open_mixture(recipe, cache=cache, tokenizer=student.tokenizer, progress=progress).calibration(
        recipe.score.samples
    )
    require_calibration(samples_BS, vocab=anatomy.sizes.vocab)
    model = student.load_to_run(dtype=recipe.dtype, device=resolve_device(recipe.device))
    calibration = Calibration(model, anatomy, samples_BS, recipe.score.micro_batch, progress)
    scores = score_again(recipe, calibration)
    order = sorting_plan(anatomy, scores, axes=nested_axes(sizes))
    sorted_model = trim(model, order, anatomy)
    difference = _require_same(model, sorted_model, samples_BS[:1])
    layers = nested_layers(scores.layers, [arch.layers for arch in sizes])
    plans = [
        prefix_plan(anatomy, a, layers=kept, gain=recipe.prune.gain) for a, kept in zip(sizes, layers, strict=True)
    ]
    few = calibration.of(sorted_model, anatomy).first(FEW_SAMPLES)
    inside = [{"arch": plan.after.sizes, "layers": plan.layers, "gains": _gains(few, plan)} for plan in plans[1:]]
    write_json(out / "plan.json", order.to_json())
    write_json(out / NEST, {"sizes": inside})
    record = {"stage": "nest", "base_model": name_of(recipe.model), "sizes": [entry["arch"] for entry in inside]}
    stored = stored_dtype(recipe.dtype, student.config)
    saving.save_model(cast_weights(sorted_model, stored), out / "model", extra_from=student.files, record=record)
    counts = [anatomy.ledger.count(plan.after, kept_layers=plan.layers) for plan in plans]
    return {
        "difference": difference,
        "params": [count.params for count in counts],
        "non_embedding": [count.non_embedding for count in counts],
        "layers": [list(plan.layers) for plan in plans],
    }


def _gains(calibration: Calibration, plan: Plan) -> dict[str, float]:
    """The gains of a smaller student's norms, on the activations of the sorted student."""
    anatomy: Anatomy = calibration.anatomy
    if plan.gain == "none" or plan.after.hidden == plan.before.hidden:
        return {}
    if plan.gain == "constant":
        return constant_gains(anatomy, plan)
    return fit_gains(calibration.model, anatomy, plan, calibration.batches)


@torch.no_grad()
def _require_same(model: PreTrainedModel, sorted_model: PreTrainedModel, ids: Tensor) -> float:
    """The largest difference of the logits relative to the largest logit, which only rounding may explain."""
    ids = ids.to(model.device)
    want, have = (one(input_ids=ids, use_cache=False).logits.float() for one in (model, sorted_model))
    difference = float((want - have).abs().max() / want.abs().max())
    if not difference <= (1e-3 if model.dtype in (torch.float32, torch.float64) else 5e-2):
        raise CheckpointError(
            "the sorted student is not the student",
            why=f"their logits differ by {difference:.2g} of the largest one",
            fix="report this with the model's config.json",
        )
    return difference
