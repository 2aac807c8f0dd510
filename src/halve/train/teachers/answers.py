"""The answers that a training needs from its teacher, and computing them for a cache, sample by sample.

Shapes: B batch, S seq, N tokens (those that a batch predicts), D hidden, C tokens of a chunk, V vocab.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from halve.model.head import Head
from halve.recipe.schema import Cache, Distill, Recipe
from halve.text import tokenize
from halve.text.batch import Batch
from halve.text.course import Course
from halve.text.opened import Text
from halve.train.teachers import draws
from halve.train.teachers.cache import Bound, Store
from halve.train.teachers.draws import Packed
from halve.train.teachers.live import Hidden, Teacher

_ROWS = 256  # tokens whose logits are computed at once for drawing


@dataclass(frozen=True)
class Needed:
    """The samples that a course draws, each once, in the order of first draws: number -> step of the first draw."""

    steps: Mapping[int, int]
    tokens: int

    @classmethod
    def by(cls, course: Course) -> Needed:
        """Collect them from a course. No token is read."""
        steps: dict[int, int] = {}
        tokens = 0
        for step in range(1, course.steps + 1):
            before = len(steps)
            for number in course.numbers(step):
                steps.setdefault(number, step)
            tokens += (len(steps) - before) * course.context(step)
        return cls(steps, tokens)

    def batches(self, course: Course, numbers: Sequence[int], *, micro_batch: int) -> Iterator[Batch]:
        """Samples by their numbers, in batches of at most `micro_batch`. Each batch is from one step."""
        for step, some in itertools.groupby(numbers, key=self.steps.__getitem__):
            batch = course.batch(step)
            rows = [batch.numbers.index(number) for number in some]
            yield from batch.rows(rows).split(micro_batch)


def drawn(recipe: Recipe, training: Distill) -> str:
    """A SHA-256 that is equal for two trainings only if they draw the same samples of the same text."""
    train = recipe.data.train
    weights = {name: part.weight for name, part in train.items()} if isinstance(train, dict) else None
    schedule = training.model_dump(mode="json", include={"tokens", "batch", "phases"})
    what = {"seed": recipe.seed, "context": recipe.data.context, "weights": weights, **schedule}
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def bound_to(
    recipe: Recipe,
    training: Distill,
    *,
    teacher: str,
    tokenizer: PreTrainedTokenizerBase,
    course: Course,
    heldout: Batch,
    vocab: int,
) -> Bound:
    """Everything that the answers depend on. `teacher` is a fingerprint, `vocab` the number of tokens that count."""
    draws_logits = training.cache == "logits"
    return Bound(
        teacher=teacher,
        tokenizer=tokenize.tokenizer_fingerprint(tokenizer),
        corpus=course.fingerprint,
        heldout=hashlib.sha256(heldout.ids.numpy().tobytes()).hexdigest(),
        context=recipe.data.context,
        documents=recipe.data.documents,
        kind=training.cache,
        vocab=vocab,
        draws=training.cache_samples if draws_logits else None,
        temperature=training.temperature if draws_logits else None,
    )


def open_store(folder: Path, recipe: Recipe, training: Distill, *, teacher: str, text: Text) -> Store:
    """Open a cache that belongs to this teacher (a fingerprint) and this text, and has all of the course's samples.

    Raises `TrainError` if it does not.
    """
    store, course = Store.open(folder), text.course
    vocab = store.bound.vocab  # of the teacher's head, which the fingerprint of the teacher covers
    store.require(
        bound_to(
            recipe,
            training,
            teacher=teacher,
            tokenizer=text.tokenizer,
            course=course,
            heldout=text.heldout,
            vocab=vocab,
        )
    )
    if store.facts.drawn != drawn(recipe, training):
        store.require_samples(Needed.by(course).steps)
    return store


@torch.no_grad()
def hidden_states(teacher: Teacher[Hidden], batch: Batch, *, half: bool) -> Iterator[Mapping[str, Tensor]]:
    """The hidden states of each sample, in bfloat16 if the teacher's products are, otherwise unchanged."""
    for states_ND in _by_sample(teacher.answer(batch).states, batch):
        yield {"hidden": states_ND.to(torch.bfloat16 if half else states_ND.dtype, copy=True)}


@torch.no_grad()
def drawn_logits(teacher: Teacher[Hidden], batch: Batch, *, bound: Bound, seed: int) -> Iterator[Mapping[str, Tensor]]:
    """Draws from the teacher's distribution at each token of each sample, packed."""
    states_ND, head = teacher.answer(batch)
    for number, some_ND in zip(batch.numbers, _by_sample(states_ND, batch), strict=True):
        yield _drawn(some_ND, head, bound, seed=seed, number=number)._asdict()


def answer_bytes(kind: Cache, *, hidden: int, vocab: int, samples: int, half: bool) -> int:
    """Return the most bytes of a training token in a cache. Repeated draws take less."""
    if kind == "none":
        return 0
    if kind == "hidden":
        return hidden * (2 if half else 4)
    return draws.draw_bytes(vocab, samples)


def _drawn(states_ND: Tensor, head: Head, bound: Bound, *, seed: int, number: int) -> Packed:
    assert bound.draws is not None
    assert bound.temperature is not None
    uniform_NK = draws.uniforms(len(states_ND), bound.draws, seed=seed, sample=number).to(states_ND.device)
    ids_NK, entropy_N = uniform_NK.long(), uniform_NK[:, 0].float()
    for first in range(0, len(states_ND), _ROWS):
        rows = slice(first, first + _ROWS)
        z_CV = head.logits(states_ND[rows])
        ids_NK[rows] = draws.draw(z_CV, uniform_NK[rows], temperature=bound.temperature)
        entropy_N[rows] = draws.entropy(z_CV, temperature=bound.temperature)
    return draws.pack(ids_NK, entropy_N, vocab=bound.vocab)


def _by_sample(states_ND: Tensor, batch: Batch) -> tuple[Tensor, ...]:
    counted_BS = batch.counted()
    sizes = [batch.ids.shape[1] - 1] * len(batch) if counted_BS is None else counted_BS.sum(1).tolist()
    return torch.split(states_ND, sizes)
