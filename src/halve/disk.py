"""The disk plan: what a run holds at its fullest moment, stage by stage, before anything is written.

    models       every stage's, in the precision of the checkpoint; they stay
    states       masters and moments of a training that is going on: `keep_checkpoints` and one that is being written
    caches       teachers' answers at most
    text         tokens of the training text, if there is as much of it as is trained on

Not counted: scores, hidden states that a refit spills (it says how many bytes before it does), reports.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from halve.memory import Memory, Place
from halve.recipe import Recipe, Training
from halve.rounds import named, rounds
from halve.train.schedule import spans

_NARROW_VOCAB = 2**16  # tokens of a larger one take four bytes instead of two


@dataclass
class _Timeline:
    """What lies on the disk, and the most that ever did."""

    held: int = 0
    peak: int = 0

    def make(self, num_bytes: int, *, state: int = 0, training: Training | None = None, context: int = 0) -> None:
        """A stage that leaves so many bytes; while it trains, states of `state` bytes lie beside."""
        written = 0
        if training is not None:
            steps = sum(span.steps for span in spans(training, context))
            written = (steps - 1) // training.checkpoint_every + (training.on_spike == "rewind")
            keep = training.keep_checkpoints
            self.peak = max(self.peak, self.held + min(written, keep + 1) * state)
            written = min(written, keep)
        self.held += num_bytes
        self.peak = max(self.peak, self.held + written * state)


@dataclass(frozen=True)
class Disk:
    """Bytes of a run's folder."""

    model_bytes: int
    """Models and training states, at the fullest moment."""
    cache_bytes: int
    text_bytes: int

    @property
    def total_bytes(self) -> int:
        """The sum."""
        return self.model_bytes + self.cache_bytes + self.text_bytes


def planned(
    recipe: Recipe,
    *,
    teacher: int,
    students: Sequence[int],
    itemsize: int,
    vocab: int,
    memory: Mapping[str, Memory],
    place: Place,
    cache_bytes: int = 0,
) -> Disk:
    """Plan a run from the parameters of the teacher and of every round's student, and from its memory plan.

    `itemsize` is that of the checkpoint's precision.
    """
    trained = [part for part in (recipe.correct, *(one.distill for one in rounds(recipe))) if part is not None]
    tokens = max((part.tokens for part in trained), default=recipe.score.samples * recipe.data.context)
    line, context, whole = _Timeline(), recipe.data.context, teacher * itemsize
    if recipe.correct is not None and recipe.corrects_before:
        its = memory["correct"]
        state = its.gradient_bytes * place.shards + _moments(recipe.correct, its, place)
        line.make(whole, state=state, training=recipe.correct, context=context)
    for number, (part, params) in enumerate(zip(rounds(recipe), students, strict=True), 1):
        own, training = params * itemsize, part.distill
        line.make(own)
        if training is None:
            continue
        its = memory[named("distill", number)]
        state = its.masters_bytes * place.shards + _moments(training, its, place)
        for variant in ("student", *training.baselines):
            if variant == "random_prune":
                line.make(own)  # its start is a model of its own
            made, states = own, state
            if recipe.corrects_beside and variant != "ce":
                made, states = made + whole, states + its.teacher_bytes * place.shards
            line.make(made, state=states, training=training, context=context)
    return Disk(line.peak, cache_bytes, tokens * (4 if vocab > _NARROW_VOCAB else 2))


def _moments(training: Training, memory: Memory, place: Place) -> int:
    """Those that wait in main memory are in checkpoints, too."""
    each = 2 * memory.gradient_bytes if training.offload_optimizer else memory.moment_bytes
    return each * place.shards
