"""The cache stage: the teacher runs once on every sample that the distillation will draw, and its answers are stored.

Students of any size that train on these samples read the answers instead of running the teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from halve.model.checkpoint import Checkpoint, resolve_device
from halve.process.waits import bytes_in_words
from halve.progress import SILENT, Progress
from halve.recipe.schema import Distill, Recipe
from halve.text.batch import Batch
from halve.text.documents import require_apart
from halve.text.opened import open_text
from halve.train.loop import loop
from halve.train.objectives import logits as objectives
from halve.train.teachers import answers
from halve.train.teachers import cache as caches
from halve.train.teachers import live as teachers
from halve.train.teachers.cache import HELDOUT, TRAIN, Answer
from halve.train.teachers.live import Live


@dataclass(frozen=True)
class _Asked:
    """A loaded teacher, and how its answers are computed."""

    live: Live
    device: str
    half: bool
    precision: torch.autocast
    micro_batch: int

    def states(self, batch: Batch) -> Iterator[Answer]:
        """The hidden states of each sample."""
        return answers.hidden_states(self.live, batch, half=self.half)

    def answers(self, batch: Batch, kept: Callable[[Batch], Iterator[Answer]]) -> Iterator[Answer]:
        """What is kept of each sample, computed in the teacher's precision."""
        with self.precision:
            yield from list(kept(batch.to(self.device)))


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
    text = open_text(recipe, training, teacher, cache=cache, progress=progress)
    course, heldout = text.course, text.heldout
    needed = answers.Needed.by(course)
    asked = _asked(recipe, training, teacher)
    live, (vocab, hidden) = asked.live, asked.live.head.weight.shape
    with asked.precision:
        ce = objectives.check_teacher(live, live.body, live.head, heldout, vocab=vocab, micro_batch=asked.micro_batch)
    bound = answers.bound_to(
        recipe,
        training,
        teacher=teacher.fingerprint,
        tokenizer=text.tokenizer,
        course=course,
        heldout=heldout,
        vocab=vocab,
    )
    most = answers.answer_bytes(
        training.cache, hidden=hidden, vocab=vocab, samples=training.cache_samples, half=asked.half
    )
    each = max(1, shard_bytes // (most * max(span.context for span in course.spans)))
    numbers = {TRAIN: list(needed.steps), HELDOUT: list(heldout.numbers)}
    drawn = partial(answers.drawn_logits, live, bound=bound, seed=recipe.seed)
    kept = asked.states if bound.kind == "hidden" else drawn
    with progress.task(f"cache, at most {bytes_in_words(most * needed.tokens)}", needed.tokens) as task:

        def trained(some: Sequence[int]) -> Iterator[Answer]:
            for batch in needed.batches(course, some, micro_batch=asked.micro_batch):
                yield from asked.answers(batch, kept)
                task.advance(batch.ids.numel())

        caches.write_shards(out, TRAIN, numbers[TRAIN], trained, bound=bound, each=each)
    caches.write_shards(out, HELDOUT, numbers[HELDOUT], partial(_held, asked, heldout), bound=bound, each=each)
    caches.write_index(out, bound, live.head, ce=ce, drawn=answers.drawn(recipe, training), each=each, numbers=numbers)
    return _figures(bound.kind, needed, caches.cache_bytes(out), ce)


def _asked(recipe: Recipe, training: Distill, teacher: Checkpoint) -> _Asked:
    device = resolve_device(recipe.device)
    half = loop.is_half(training, device)
    model, live = teachers.load_teacher(teacher, training, dtype=recipe.dtype, device=device, half=half)
    if recipe.data.documents == "apart":
        require_apart(model)
    return _Asked(live, device, half, loop.autocast(training, device), training.micro_batch or training.batch)


def _held(asked: _Asked, heldout: Batch, numbers: Sequence[int]) -> Iterator[Answer]:
    """The hidden states of held-out samples. Their numbers are consecutive."""
    first = heldout.numbers.index(numbers[0])
    for batch in heldout[first : first + len(numbers)].split(asked.micro_batch):
        yield from asked.answers(batch, asked.states)


def _figures(kind: str, needed: answers.Needed, num_bytes: int, ce: float) -> dict[str, Any]:
    return {
        "kind": kind,
        "samples": len(needed.steps),
        "tokens": needed.tokens,
        "bytes": num_bytes,
        "bytes_per_token": num_bytes / needed.tokens,
        "teacher_ce": ce,
    }
