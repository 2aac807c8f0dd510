"""The score stage: one pass of the teacher over calibration samples, and what it says of every axis."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from halve import checkpoint, measure
from halve.anatomy import discover
from halve.cut import taps
from halve.cut.scores import samples_fingerprint
from halve.progress import SILENT, Progress
from halve.recipe import Recipe
from halve.train import corpus


def run(recipe: Recipe, *, teacher: Path | str, cache: Path, out: Path, progress: Progress = SILENT) -> dict[str, Any]:
    """Score every axis of the teacher and write `out/scores.safetensors` (see `halve.cut.scores`).

    The samples are spread evenly over the training text at places that the seed moves, packed to `data.context`
    tokens. A corpus that has fewer than `score.samples` gives all it has: `samples` beside `samples_asked` in the
    returned figures. `cache` is the run's folder of token files.

    Raises `CorpusError` for text without one whole sample, before weights are read, and `CheckpointError` where
    activations are not finite.
    """
    config = checkpoint.load_config(teacher)
    measure.require_context(config, recipe.data.context, "a sample")
    anatomy = discover(config)
    tokenizer = checkpoint.load_tokenizer(teacher)
    tokens = corpus.open_split(recipe, "train", cache=cache, tokenizer=tokenizer, progress=progress)
    samples_BS = corpus.Samples(tokens, recipe.data.context, recipe.seed).calibration(recipe.score.samples)
    device = checkpoint.resolve_device(recipe.device)
    model = checkpoint.load_model(teacher, dtype=recipe.dtype, device=device)
    start = time.perf_counter()
    statistics = taps.measure(model, anatomy, samples_BS, micro_batch=recipe.score.micro_batch, progress=progress)
    seconds = time.perf_counter() - start
    scores = statistics.scores(
        batch_agg=recipe.score.batch_agg,
        seq_agg=recipe.score.seq_agg,
        model=checkpoint.fingerprint(teacher),
        samples=samples_fingerprint(samples_BS),
    )
    scores.save(out / "scores.safetensors")
    return {
        "samples": len(samples_BS),
        "samples_asked": recipe.score.samples,
        "tokens": samples_BS.numel(),
        "tokens_per_second": samples_BS.numel() / seconds,
        "axes": sorted(scores.by_axis()),
        "block_importance": scores.layers.tolist(),
    }
