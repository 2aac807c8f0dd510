"""The correct stage: fine-tune the teacher on the corpus before it teaches (2408.11796, Sec. 2.1).

All of it, its norms alone, or adapters that are merged when it is written (`train.adapters`). A correction beside the
distillation is the distill stage's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from halve import checkpoint, measure
from halve.card import name_of
from halve.progress import SILENT, Progress
from halve.recipe import Recipe
from halve.train import adapters, loop, objectives, shards, watch
from halve.train.course import open_course, open_heldout
from halve.train.documents import require_apart


def run(recipe: Recipe, *, teacher: Path | str, cache: Path, out: Path, progress: Progress = SILENT) -> dict[str, Any]:
    """Write the corrected teacher to `out/model` and the course of its training to `out/metrics.jsonl`.

    The model keeps the precision that its weights had. `cache` is the run's folder of token files; what a
    killed run left in `out` is gone on with. Raises `TrainError` when a loss is not finite, `CorpusError`, and
    `RecipeError` where the method finds nothing to train or lacks its package.
    """
    assert recipe.correct is not None
    training = recipe.correct
    device = checkpoint.resolve_device(recipe.device)
    tokenizer = checkpoint.load_tokenizer(teacher)
    config = checkpoint.load_config(teacher)
    checkpoint.check_tokenizer(tokenizer, config, source=teacher)
    measure.require_context(config, recipe.data.context, "a sample")
    course = open_course(recipe, training, cache=cache, tokenizer=tokenizer, progress=progress)
    heldout = open_heldout(recipe, training, cache=cache, tokenizer=tokenizer, progress=progress)
    model = checkpoint.load_model(teacher, dtype=recipe.dtype, device=device)
    own_dtype = model.dtype
    if recipe.data.documents == "apart":
        require_apart(model)
    adapters.choose(model, training, seed=recipe.seed)
    result = loop.train(
        model,
        objectives.cross_entropy(),
        course,
        seed=recipe.seed,
        device=device,
        work=out / ".checkpoints",
        metrics=out / "metrics.jsonl",
        progress=progress,
        heldout=objectives.heldout_loss(heldout, micro_batch=training.micro_batch or training.batch),
        flops=watch.learning(model.config),
        name="correct",
    )
    record = {
        "stage": "correct",
        "base_model": name_of(recipe.model),
        "teacher": checkpoint.fingerprint(teacher),
        "seed": recipe.seed,
        "corpus": course.fingerprint,
        "training": training.model_dump(mode="json"),
        **result.as_dict(),
    }
    adapters.merge(model)
    shards.save(model, out / "model", dtype=own_dtype, extra_from=teacher, record=record)
    return result.as_dict()
