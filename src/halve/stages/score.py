"""The score stage: score every axis of the teacher on calibration samples, and compare layers for removal."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from torch import Tensor

from halve.anatomy import Anatomy
from halve.cut.layers.chosen import DEPTH, choose_layers, read_of
from halve.cut.plan.sizes import target
from halve.cut.repair.rotate import student_anatomy
from halve.cut.score import width
from halve.cut.score.calibration import Calibration, require_calibration
from halve.cut.score.scores import Scores, samples_fingerprint
from halve.disk.files import write_json
from halve.model import measure
from halve.model.checkpoint import Checkpoint, resolve_device
from halve.progress import SILENT, Progress
from halve.recipe.schema import Recipe, Score
from halve.text.boundary import warn_of_boundaries
from halve.text.mixture import open_mixture
from halve.text.opened import require_embedded

SCORES = "scores.safetensors"


def run(recipe: Recipe, *, teacher: Checkpoint, cache: Path, out: Path, progress: Progress = SILENT) -> dict[str, Any]:
    """Score every axis of the teacher and write `out/scores.safetensors` (see `halve.cut.score.scores`).

    If the recipe drops layers by a criterion other than single block importance, `out/depth.json` has every set that
    was compared (`halve.cut.layers.depth.DepthChoice`), measured on `score.depth_samples` samples. A comparison of
    single layers is valid for any number of layers, so another size needs no new scores. If a trial decides how many
    layers are dropped, the prune stage makes the comparison, and the search stage if the recipe searches.

    The samples are spread evenly over the training text, at places that depend on the seed. They contain a mixture's
    parts in their shares, have `data.context` tokens, and documents are joined. A corpus with fewer than
    `score.samples` gives all it has; compare `samples` with `samples_asked` in the returned metrics. `cache` is the
    run's folder of token files.

    Raises `CorpusError` for unsuitable samples and `PlanError` for invalid sizes, before weights are read. Raises
    `CheckpointError` if activations are not finite. Warns of a teacher that has not learned the tokens between
    documents (`BoundaryWarning`).
    """
    measure.require_context(teacher.config, recipe.data.context, "a sample")
    anatomy = teacher.anatomy
    remove = 0 if recipe.search is not None else _removed(recipe, anatomy)
    tokenizer = teacher.tokenizer
    require_embedded(recipe, teacher, "train", cache=cache, progress=progress)
    samples = open_mixture(recipe, cache=cache, tokenizer=tokenizer, progress=progress)
    samples_BS = samples.calibration(recipe.score.samples)
    require_calibration(samples_BS, vocab=anatomy.sizes.vocab)
    device = resolve_device(recipe.device)
    model = teacher.load_to_run(dtype=recipe.dtype, device=device)
    warn_of_boundaries(model, samples_BS, samples.parts[0].tokens.marks, tokenizer)
    calibration = Calibration(model, anatomy, samples_BS, recipe.score.micro_batch, progress)
    start = time.perf_counter()
    scores = width.score(
        calibration,
        method=recipe.score.method,
        ffn_point=recipe.score.ffn_point,
        batch_agg=recipe.score.batch_agg,
        seq_agg=recipe.score.seq_agg,
        seed=recipe.seed,
        model_fingerprint=teacher.fingerprint,
        samples_fingerprint=samples_fingerprint(samples_BS),
    )
    seconds = time.perf_counter() - start
    scores.save(out / SCORES)
    figures = _figures(recipe.score, scores, samples_BS, seconds)
    if remove and (number := read_of(recipe.score, remove)) is not None:
        few = calibration.on(samples.calibration(recipe.score.depth_samples))
        choice = choose_layers(recipe, few, remove=int(number), tokenizer=tokenizer, scores=scores)
        write_json(out / DEPTH, choice.to_json())
        figures["depth"] = {key: choice.to_json()[key] for key in ("criterion", "pattern", "passes", "whole")}
    return figures


def _removed(recipe: Recipe, anatomy: Anatomy) -> int:
    """How many layers the recipe drops without naming them."""
    after, named = target(student_anatomy(anatomy, recipe.prune), recipe.prune)
    return 0 if named is not None else anatomy.sizes.layers - after.layers


def _figures(asked: Score, scores: Scores, samples_BS: Tensor, seconds: float) -> dict[str, Any]:
    return {
        "method": asked.method,
        "samples": len(samples_BS),
        "samples_asked": asked.samples,
        "tokens": samples_BS.numel(),
        "tokens_per_second": samples_BS.numel() / seconds,
        "axes": sorted(scores.by_axis()),
        "block_importance": scores.layers.tolist(),
    }
