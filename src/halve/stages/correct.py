"""The correct stage: fine-tune the teacher on the corpus before it teaches (2408.11796, Sec. 2.1).

It trains the whole teacher, only its norms, or adapters that are merged when the model is written
(`train.loop.adapters`). The distill stage does the correction beside the distillation.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from halve.anatomy.work import by_context, correcting
from halve.model.card import name_of
from halve.model.checkpoint import Checkpoint, resolve_device
from halve.progress import SILENT, Progress
from halve.recipe.schema import Recipe
from halve.text.documents import require_apart
from halve.text.opened import open_text
from halve.train.loop import adapters, loop
from halve.train.objectives import logits as objectives
from halve.train.ranks import shards
from halve.train.ranks.group import here


def run(recipe: Recipe, *, teacher: Checkpoint, cache: Path, out: Path, progress: Progress = SILENT) -> dict[str, Any]:
    """Write the corrected teacher to `out/model` and its training log to `out/metrics.jsonl`.

    The model keeps the precision of its weights. `cache` is the run's folder of token files. A killed run resumes from
    what it left in `out`. Raises `TrainError` if a loss is not finite, `CorpusError`, and `RecipeError` if the method
    finds nothing to train or its package is missing.
    """
    assert recipe.correct is not None
    training = recipe.correct
    device, ranks = resolve_device(recipe.device), here()
    text = open_text(recipe, training, teacher, cache=cache, progress=progress)
    model = teacher.load(dtype=recipe.dtype, device=ranks.home(device))
    own_dtype = model.dtype
    if recipe.data.documents == "apart":
        require_apart(model)
    adapters.choose_trained(model, training, seed=recipe.seed)
    lesson = loop.Lesson(
        objectives.cross_entropy(),
        heldout=objectives.heldout_loss(text.heldout, micro_batch=training.micro_batch or training.batch),
        flops=by_context(partial(correcting, section=training), teacher.anatomy),
    )
    files = loop.TrainFiles(out / ".checkpoints", out / "metrics.jsonl", recipe.seed, "correct")
    result = loop.train(model, lesson, text.course, files, device=device, ranks=ranks, progress=progress)
    record = {
        "stage": "correct",
        "base_model": name_of(recipe.model),
        "teacher": ranks.lead(lambda: teacher.fingerprint),
        "seed": recipe.seed,
        "corpus": text.course.fingerprint,
        "training": training.model_dump(mode="json"),
        **result.as_dict(),
    }
    adapters.merge(model)
    shards.save(model, out / "model", dtype=own_dtype, extra_from=teacher.files, record=record, ranks=ranks)
    return result.as_dict()
