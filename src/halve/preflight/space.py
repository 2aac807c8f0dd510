"""The disk plan: the largest size of a run folder, stage by stage, before anything is written.

    models       one for each stage, in the precision of the checkpoint; and what is made of a GGUF file
    states       masters and moments of the current training: `keep_checkpoints`, and one that is being written
    caches       upper bound for the teachers' answers
    text         tokens, about as many bytes as the text has; for a hub data set, the tokens that are trained on

Not counted: scores, reports, and hidden states that a refit writes to disk (it reports their bytes first).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from halve.disk.gguf_header import DEQUANTIZED_BYTES, is_gguf
from halve.disk.textfiles import DAMAGED, unpacked_bytes
from halve.errors import HalveError
from halve.model.precision import stored_dtype
from halve.preflight.alignment import like_corrections
from halve.preflight.memory import moments
from halve.preflight.nests import planned_nest
from halve.preflight.rehearsal import Learned, learned
from halve.preflight.sizes import PlannedRound
from halve.recipe.rounds import learns_from_previous, rounds, trainings
from halve.recipe.schema import Recipe, Training
from halve.recipe.tournaments import adapters_rank, tournament_training
from halve.text import sources
from halve.text.schedule import spans
from halve.train.teachers.answers import answer_bytes

_FLOAT32_BYTES = 4
_NARROW_VOCAB = 2**16  # tokens of a larger one take four bytes instead of two


@dataclass
class _Timeline:
    """The bytes on disk, and their largest value so far."""

    held: int = 0
    peak: int = 0

    def make(self, num_bytes: int, *, state: int = 0, training: Training | None = None, context: int = 0) -> None:
        """A stage that leaves this many bytes. While it trains, there are `state` more bytes of states."""
        written = 0
        if training is not None:
            steps = sum(span.steps for span in spans(training, context))
            written = (steps - 1) // training.checkpoint_every + (training.on_spike == "rewind")
            keep = training.keep_checkpoints
            self.peak = max(self.peak, self.held + min(written, keep + 1) * state)
            written = min(written, keep)
        self.held += num_bytes
        self.peak = max(self.peak, self.held + written * state)

    def pass_through(self, num_bytes: int) -> None:
        """A stage that holds so many bytes while it works and leaves none."""
        self.peak = max(self.peak, self.held + num_bytes)


@dataclass(frozen=True)
class Disk:
    """Bytes of a run's folder."""

    model_bytes: int
    """Models and training states, at their largest."""
    cache_bytes: int
    text_bytes: int

    @property
    def total_bytes(self) -> int:
        """The sum."""
        return self.model_bytes + self.cache_bytes + self.text_bytes


def planned_disk(recipe: Recipe, found: Sequence[PlannedRound], *, cuda: bool) -> Disk:
    """Plan a run from the sizes of every round. Only the sizes of text files are read."""
    teacher = found[0].before
    itemsize, params = stored_dtype(recipe.dtype, teacher.config).itemsize, teacher.ledger.count(teacher.sizes).params
    line, context, whole = _Timeline(), recipe.data.context, params * itemsize
    if is_gguf(recipe.model):
        line.make(params * DEQUANTIZED_BYTES)
    if recipe.correct is not None and recipe.corrects_before:
        changed = learned(teacher.config, recipe.correct)
        state = _state(recipe.correct, changed, changed.trained)
        line.make(whole, state=state, training=recipe.correct, context=context)
    for part, shape in zip(rounds(recipe), found, strict=True):
        line.pass_through(_tournament_bytes(part, shape, itemsize))
        student, training = shape.counts().params, part.distill
        student_bytes = student * itemsize
        line.make(student_bytes)
        inside = 0
        if recipe.nest is not None:
            line.make(student_bytes)  # with its axes sorted
            anatomy, sizes = planned_nest(recipe, found)
            inside = sum(anatomy.ledger.count(arch).params for arch in sizes[1:]) * itemsize
        if training is None:
            continue
        state, beside = _state(training, learned(shape.config(), training), student), 0
        if recipe.correct is not None and recipe.corrects_beside:
            beside = _state(recipe.correct, learned(teacher.config, recipe.correct), params)
        for variant in ("student", *training.baselines):
            if variant == "random_prune":
                line.make(student_bytes)  # its starting point is a separate model
            made, states = student_bytes + inside, state
            if recipe.corrects_beside and variant != "ce":
                made, states = made + whole, states + beside
            line.make(made, state=states, training=training, context=context)
    last = found[-1]
    for step in like_corrections(recipe, last.after.hidden):
        made, changed = last.counts().params * itemsize, learned(last.config(), step)
        line.make(made, state=_state(step, changed, changed.trained), training=step, context=context)
    return Disk(line.peak, _cache_bytes(recipe, found, cuda=cuda), _text_bytes(recipe, teacher.sizes.vocab))


def _tournament_bytes(part: Recipe, shape: PlannedRound, itemsize: int) -> int:
    """The finalists of a tournament: each as it was cut and trained, its states, and one that is being written."""
    if part.search is None or part.search.method != "tournament":
        return 0
    training, rank, params = tournament_training(part), adapters_rank(part), shape.counts().params
    changed = learned(shape.config(), training, lora_rank=rank)
    state = _state(training, changed, params if rank is None else changed.trained)
    steps = training.tokens // (training.batch * part.data.context)
    written = steps // training.checkpoint_every + part.search.tournament.rungs  # there is one at every rung
    models = 2 if part.search.tournament.choices else 1
    each = models * params * itemsize + min(training.keep_checkpoints, written) * state
    return part.search.candidates * each + state


def _state(training: Training, changed: Learned, weights: int) -> int:
    """One checkpoint of a training: float32 weights, and moments of the trained ones."""
    return round(_FLOAT32_BYTES * weights + moments(training, changed))


def _cache_bytes(recipe: Recipe, found: Sequence[PlannedRound], *, cuda: bool) -> int:
    """Upper bound of caches. Samples that are drawn several times are stored once, in the compute precision."""
    total = 0
    for number, part in enumerate(rounds(recipe), 1):
        if part.search is not None and part.search.method == "tournament" and number == 1:  # its answers serve all
            cached = part.model_copy(update={"search": None, "distill": tournament_training(part)})
            total += _cache_bytes(cached, found[:1], cuda=cuda)
        if part.distill is not None:
            teacher = found[number - 1 if learns_from_previous(recipe, number) else 0].before.sizes
            total += part.distill.tokens * answer_bytes(
                part.distill.cache,
                hidden=teacher.hidden,
                vocab=teacher.vocab,
                samples=part.distill.cache_samples,
                half=part.distill.precision == "bfloat16" or (cuda and part.distill.precision == "auto"),
            )
    return total


def _text_bytes(recipe: Recipe, vocab: int) -> int:
    listed = (*recipe.data.train_sources, *recipe.data.valid)
    text, wide = 0, vocab > _NARROW_VOCAB or recipe.data.messages_field is not None
    for source in (entry for entry in listed if not entry.startswith(sources.HUB)):
        with suppress(HalveError):  # a missing file is reported elsewhere
            text += sum(map(_text_in, sources.files(source)))
    if recipe.data.messages_field is not None:
        text *= 2  # a token takes four bytes, which mark what counts
    if any(source.startswith(sources.HUB) for source in listed):
        trained = [training.tokens for training in trainings(recipe).values()]
        tokens = max(trained, default=recipe.score.samples * recipe.data.context)
        text += tokens * (4 if wide else 2)
    return text


def _text_in(path: Path) -> int:
    """Bytes of a file's text; damaged files are reported elsewhere."""
    try:
        return unpacked_bytes(path)
    except (*DAMAGED, HalveError, ValueError):  # those of parquet are values
        return path.stat().st_size
