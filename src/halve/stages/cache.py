"""The cache stage: the teacher runs once on every sample that the distillation will draw, and its answers are stored.

Students of any size that train on these samples read the answers instead of running the teacher.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from halve.model.checkpoint import Checkpoint, resolve_device
from halve.process.waits import bytes_in_words
from halve.progress import SILENT, Progress
from halve.recipe.schema import Recipe
from halve.text.documents import require_apart
from halve.text.opened import open_text
from halve.train.loop import loop
from halve.train.objectives import logits as objectives
from halve.train.teachers import answers
from halve.train.teachers import cache as caches
from halve.train.teachers import live as teachers
from halve.train.teachers.cache import HELDOUT, TRAIN, Answer


def run(
    recipe: Recipe,
    *,
    teacher: Checkpoint,
    cache: Path,
    out: Path,
    progress: Progress = SILENT,
    shard_bytes: int = caches.SHARD_BYTES,
) -> dict[str, Any]:
    """Write the cache of `distill.cache` to `out` (see `train.teachers.cache`). Shards of a killed run are kept.

    Each sample of the course is answered once, even if several epochs draw it. The teacher is checked first. `cache` is
    the run's folder of token files. Raises `TrainError`, `CorpusError` and `DiskError`.
    """
    assert recipe.distill is not None
    training = recipe.distill
    device = resolve_device(recipe.device)
    text = open_text(recipe, training, teacher, cache=cache, progress=progress)
    course, heldout = text.course, text.heldout
    needed = answers.Needed.by(course)
    micro_batch, half = training.micro_batch or training.batch, loop.is_half(training, device)

    model, live = teachers.load_teacher(teacher, training, dtype=recipe.dtype, device=device, half=half)
    if recipe.data.documents == "apart":
        require_apart(model)
    vocab, hidden = live.head.weight.shape
    precision = loop.autocast(training, device)
    with precision:
        ce = objectives.check_teacher(live, live.body, live.head, heldout, vocab=vocab, micro_batch=micro_batch)
    bound = answers.bound_to(
        recipe,
        training,
        teacher=teacher.fingerprint,
        tokenizer=text.tokenizer,
        course=course,
        heldout=heldout,
        vocab=vocab,
    )
    most = answers.answer_bytes(training.cache, hidden=hidden, vocab=vocab, samples=training.cache_samples, half=half)
    each = max(1, shard_bytes // (most * max(span.context for span in course.spans)))
    states = partial(answers.hidden_states, live, half=half)
    kept = states if bound.kind == "hidden" else partial(answers.drawn_logits, live, bound=bound, seed=recipe.seed)

    with progress.task(f"cache, at most {bytes_in_words(most * needed.tokens)}", needed.tokens) as task:

        def trained(numbers: Sequence[int]) -> Iterator[Answer]:
            for batch in needed.batches(course, numbers, micro_batch=micro_batch):
                with precision:
                    yield from list(kept(batch.to(device)))
                task.advance(batch.ids.numel())

        caches.write_shards(out, TRAIN, list(needed.steps), trained, bound=bound, each=each)

    def held(numbers: Sequence[int]) -> Iterator[Answer]:
        first = heldout.numbers.index(numbers[0])
        for batch in heldout[first : first + len(numbers)].split(micro_batch):
            with precision:
                yield from list(states(batch.to(device)))

    caches.write_shards(out, HELDOUT, heldout.numbers, held, bound=bound, each=each)
    numbers = {TRAIN: list(needed.steps), HELDOUT: list(heldout.numbers)}
    caches.write_index(out, bound, live.head, ce=ce, drawn=answers.drawn(recipe, training), each=each, numbers=numbers)
    return _figures(bound.kind, needed, caches.cache_bytes(out), ce)


def _figures(kind: str, needed: answers.Needed, num_bytes: int, ce: float) -> dict[str, Any]:
    return {
        "kind": kind,
        "samples": len(needed.steps),
        "tokens": needed.tokens,
        "bytes": num_bytes,
        "bytes_per_token": num_bytes / needed.tokens,
        "teacher_ce": ce,
    }
