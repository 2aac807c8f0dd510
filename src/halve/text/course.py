"""The course of a run: the samples, context and learning rate of each step, as a function of the step number alone.

recipe -> spans of steps (`schedule`) -> a mixture for each (`mixture`) -> the batch of any step
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol, runtime_checkable

from transformers import PreTrainedTokenizerBase

from halve.progress import SILENT, Progress
from halve.recipe.schema import Recipe, Training
from halve.text import corpus, schedule
from halve.text.batch import Batch
from halve.text.conversation_samples import samples_of, say_cut
from halve.text.documents import require_separator
from halve.text.mixture import Mixture, Texts, open_texts
from halve.text.schedule import Span
from halve.text.tokenize import Separator, separator


@runtime_checkable
class OrderedSamples(Protocol):
    """Packed samples in an order that is a function of the step (see `corpus.Samples` and `mixture.Mixture`)."""

    @property
    def context(self) -> int:
        """Tokens in a sample."""

    def batch(self, step: int, batch: int) -> Batch:
        """The samples of step `step`, counted from 0, of `batch` samples each."""

    def numbers(self, step: int, batch: int) -> tuple[int, ...]:
        """The numbers of that batch; no token is read."""


@dataclass(frozen=True)
class Course:
    """Steps are counted from 1; `step` 0 is the state before the first.

    `samples` are used before the first phase, and `later` has one entry for each phase. `fingerprint` identifies the
    text behind the sample numbers: two courses with the same fingerprint have the same tokens under each number.
    """

    training: Training
    samples: OrderedSamples
    later: tuple[OrderedSamples, ...] = ()
    fingerprint: str = ""

    def __post_init__(self) -> None:
        assert len(self.later) == len(self.training.phases)
        contexts = [span.context for span in self.spans]
        assert contexts == [samples.context for samples in (self.samples, *self.later)]

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """Spans of steps with the same settings: one, and one more for each phase."""
        return schedule.spans(self.training, self.samples.context)

    @cached_property
    def steps(self) -> int:
        """How many whole optimizer steps cover the token budget."""
        return sum(span.steps for span in self.spans)

    def tokens(self, step: int) -> int:
        """Tokens that were trained on when `step` is done."""
        return self.spans[self._span(step)].tokens(step, batch=self.training.batch)

    def batch(self, step: int) -> Batch:
        """The samples of a step, of all ranks together."""
        samples, drawn = self._drawn(step)
        return samples.batch(drawn, self.training.batch)

    def numbers(self, step: int) -> tuple[int, ...]:
        """The numbers of a step's samples; no token is read."""
        samples, drawn = self._drawn(step)
        return samples.numbers(drawn, self.training.batch)

    def context(self, step: int) -> int:
        """Tokens in a sample of a step."""
        return self.spans[self._span(step)].context

    def lr(self, step: int) -> float:
        """The learning rate of a step: linear warm-up to the peak of its phase, then a cosine that ends at `min_lr`."""
        training, peak = self.training, self.spans[self._span(step)].lr
        return schedule.rate(step, steps=self.steps, peak=peak, end=training.min_lr, warmup_steps=training.warmup_steps)

    def _drawn(self, step: int) -> tuple[OrderedSamples, int]:
        """The mixture of a step, and the number of the step within it, counted from 0."""
        which = self._span(step)
        return (self.samples, *self.later)[which], step - self.spans[which].first

    def _span(self, step: int) -> int:
        """The last span that begins at or before the step."""
        return max((i for i, span in enumerate(self.spans) if span.first <= step and span.steps), default=0)


def open_course(
    recipe: Recipe,
    training: Training,
    *,
    cache: Path,
    tokenizer: PreTrainedTokenizerBase,
    progress: Progress = SILENT,
) -> Course:
    """The course of one of the recipe's trainings. Missing token files are made in `cache`.

    Samples are numbered separately for each context. Phases with the same context continue the same epochs. Another
    context cuts the text into new samples with epochs of their own.

    Raises `CorpusError` for too little or unusable text, and `TrainError` if documents cannot be kept apart.
    """
    apart = recipe.data.documents == "apart"
    between = (
        require_separator(separator(tokenizer, recipe.data.boundary)) if apart and recipe.data.reads_text else None
    )
    texts = open_texts(recipe, cache=cache, tokenizer=tokenizer, progress=progress)
    planned = schedule.spans(training, recipe.data.context)
    first, *later = _mixtures(
        texts, planned, batch=training.batch, seed=recipe.seed, between=between, apart=apart, progress=progress
    )
    contexts = list(dict.fromkeys(span.context for span in planned))
    what = {
        "texts": [tokens.fingerprint for tokens in texts.tokens],
        "contexts": contexts,
        "documents": recipe.data.documents,
    }
    fingerprint = hashlib.sha256(json.dumps(what).encode()).hexdigest()
    return Course(training, first, tuple(later), fingerprint)


def open_heldout(
    recipe: Recipe,
    training: Training,
    *,
    cache: Path,
    tokenizer: PreTrainedTokenizerBase,
    progress: Progress = SILENT,
) -> Batch:
    """The held-out samples for measurements during training, with the recipe's `data.context` and `data.documents`."""
    tokens = corpus.open_split(recipe, "valid", cache=cache, tokenizer=tokenizer, progress=progress)
    apart = recipe.data.documents == "apart"
    between = require_separator(separator(tokenizer, recipe.data.boundary)) if apart and not tokens.chat else None
    samples = samples_of(tokens, recipe.data.context, recipe.seed, separator=between, apart=apart)
    say_cut(progress, "data.valid", samples)
    return samples.heldout(training.eval_samples)


def _mixtures(
    texts: Texts,
    planned: tuple[Span, ...],
    *,
    batch: int,
    seed: int,
    between: Separator | None,
    apart: bool,
    progress: Progress,
) -> list[Mixture]:
    """The mixture of each span."""
    mixtures: list[Mixture] = []
    last: dict[int, Mixture] = {}  # by context
    drawn: dict[int, tuple[int, ...]] = {}
    offset = 0
    for span in planned:
        weights = _weights(texts, span.weights)
        known = last.get(span.context)
        if known is None:
            parts = texts.cut(span.context, seed=seed, separator=between, apart=apart)
            texts.say_cut(parts, progress)
            made = Mixture(parts, weights, offset)
            offset += len(made)
        else:
            made = Mixture(known.parts, weights, known.offset, drawn[span.context])
        last[span.context], drawn[span.context] = made, made.after(span.steps * batch)
        mixtures.append(made)
    return mixtures


def _weights(texts: Texts, asked: Mapping[str, float] | None) -> tuple[float, ...]:
    """The weights of a phase in the order of the parts. A part that it does not name has weight 0."""
    return texts.weights if asked is None else tuple(asked.get(name, 0.0) for name in texts.names)
