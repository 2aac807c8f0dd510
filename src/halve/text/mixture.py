"""A mixture: samples from several texts in fixed shares, in an order that is a function of (seed, draw) alone.

recipe -> parts (token files) -> Mixture -> Batch
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from halve.errors import CorpusError
from halve.progress import SILENT, Progress
from halve.recipe.schema import Recipe
from halve.text.batch import Batch
from halve.text.conversation_samples import samples_of, say_cut
from halve.text.corpus import Samples, Tokens, prepare
from halve.text.rendering import Chat
from halve.text.tokenize import Separator


def shares(weights: Sequence[float], draws: int) -> list[int]:
    """How many of the first `draws` draws each part gets.

    Each draw goes to the part that is furthest behind its share: the one with the smallest (count + 1/2) / weight, and
    the first of several equal ones (Sainte-Lague's rule of apportionment). So counts never shrink as draws grow. They
    are weight * draws, rounded, wherever these roundings add up to `draws`. Weights are taken as decimal numbers, not
    as rounded binary ones. A part of weight 0 gets no draws.

    >>> shares([0.7, 0.2, 0.1], 1_000_000_000_000)
    [700000000000, 200000000000, 100000000000]
    """
    whole = _whole(weights)
    # Up to some draw before the last, each share can be rounded by itself; the few draws after it are assigned in turn.
    counts = [(2 * weight * max(draws - len(whole), 0) + sum(whole)) // (2 * sum(whole)) for weight in whole]
    for _ in range(draws - sum(counts)):
        counts[_next(whole, counts)] += 1
    return counts


def turns(weights: Sequence[float], first: int, count: int) -> Iterator[tuple[int, int]]:
    """The draws `first`, `first + 1`, ...: which part each is from, and how many that part had before.

    >>> [part for part, _ in turns([2.0, 1.0], 0, 6)]
    [0, 1, 0, 0, 1, 0]
    """
    whole, counts = _whole(weights), shares(weights, first)
    for _ in range(count):
        part = _next(whole, counts)
        yield part, counts[part]
        counts[part] += 1


@dataclass(frozen=True)
class Mixture:
    """Samples of several texts. The samples of one text have consecutive numbers, followed by those of the next text.

    `offset` is the number of the first sample. `drawn` is how many draws each part has had in earlier phases: each part
    continues its own epochs, so that no sample comes twice before all have come once. A mixture of one text is that
    text's `Samples`.
    """

    parts: tuple[Samples, ...]
    weights: tuple[float, ...]
    offset: int = 0
    drawn: tuple[int, ...] = ()

    @property
    def context(self) -> int:
        """Tokens in a sample, the same in every part."""
        return self.parts[0].context

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def batch(self, step: int, batch: int) -> Batch:
        """The `batch` samples of step `step`, counted from 0."""
        return self._at(self._places(step, batch))

    def numbers(self, step: int, batch: int) -> tuple[int, ...]:
        """The numbers of the samples of step `step`; no token is read."""
        starts = self._starts()
        return tuple(starts[part] + place for part, place in self._places(step, batch))

    def after(self, draws: int) -> tuple[int, ...]:
        """How many draws each part has had after this many draws from the mixture."""
        drawn = self.drawn or (0,) * len(self.parts)
        return tuple(before + had for before, had in zip(drawn, shares(self.weights, draws), strict=True))

    def numbered(self, numbers: Sequence[int]) -> Batch:
        """Samples by their numbers."""
        starts = self._starts()
        return self._at([(part := _last(starts, n), n - starts[part]) for n in numbers])

    def calibration(self, num_samples: int) -> Int64[Tensor, "samples length"]:
        """At most `num_samples` samples in the mixture's shares, spread within each part as in `Samples.calibration`.

        They are in the order of draws, so the first few have the same shares. A part that is too small gives all its
        samples. Asking for more than a hundred times the samples of all parts gives nothing more. All samples have the
        same length, the shortest `calibration_length` of a part, because conversations are not padded here.
        """
        num_samples = min(num_samples, 100 * len(self))
        counts = shares(self.weights, num_samples)
        length = min(part.calibration_length for part, n in zip(self.parts, counts, strict=True) if n)
        rows = [
            iter(part.calibration(n, length)) if n else iter(()) for part, n in zip(self.parts, counts, strict=True)
        ]
        samples = (next(rows[part], None) for part, _ in self._turns(0, num_samples))
        return torch.stack([row for row in samples if row is not None])

    def _places(self, step: int, batch: int) -> list[tuple[int, int]]:
        drawn = self.drawn or (0,) * len(self.parts)
        return [(part, self.parts[part].draw(drawn[part] + had)) for part, had in self._turns(step * batch, batch)]

    def _turns(self, first: int, count: int) -> Iterator[tuple[int, int]]:
        return turns(self.weights, first, count)

    def _starts(self) -> list[int]:
        return list(itertools.accumulate((len(part) for part in self.parts[:-1]), initial=self.offset))

    def _at(self, places: Sequence[tuple[int, int]]) -> Batch:
        starts = self._starts()
        rows: list[int] = []
        read: list[Batch] = []
        for part in sorted({part for part, _ in places}):
            rows += (part_rows := [row for row, (row_part, _) in enumerate(places) if row_part == part])
            read.append(self.parts[part].numbered([places[row][1] for row in part_rows]))
        batch = Batch.joined(read).rows(sorted(range(len(rows)), key=rows.__getitem__))
        return replace(batch, numbers=tuple(starts[part] + place for part, place in places))


@dataclass(frozen=True)
class Texts:
    """The token files of a recipe's training text, by the names of its parts."""

    names: tuple[str, ...]
    tokens: tuple[Tokens, ...]
    weights: tuple[float, ...]

    def cut(
        self, context: int, *, seed: int, separator: Separator | None = None, apart: bool = False
    ) -> tuple[Samples, ...]:
        """Each part's samples of `context` tokens; with `apart`, documents are kept apart at the separator.

        Raises `CorpusError` naming a part that is too small for one.
        """
        for name, tokens in zip(self.names, self.tokens, strict=True):
            if name and not tokens.chat and tokens.count < context:
                raise CorpusError(
                    f"part {name} of data.train has fewer tokens than one sample: {tokens.count} of {context}",
                    why="samples are packed to the context and none is padded",
                    fix=f"give {name} more text, merge it with another part, or set a smaller context",
                )
        return tuple(
            samples_of(tokens, context, seed, separator=separator, apart=apart, stream=stream)
            for stream, tokens in enumerate(self.tokens)
        )

    def say_cut(self, samples: Sequence[Samples], progress: Progress) -> None:
        """Say of each text's samples how many conversations are cut or left out."""
        for name, part in zip(self.names, samples, strict=True):
            say_cut(progress, f"part {name} of data.train" if name else "data.train", part)


def open_texts(
    recipe: Recipe, *, cache: Path, tokenizer: PreTrainedTokenizerBase, progress: Progress = SILENT
) -> Texts:
    """The token files of a recipe's training text. Missing ones are made in `cache`."""
    data = recipe.data
    if isinstance(data.train, dict):
        named = {name: (part.sources, part.weight, part.plain) for name, part in data.train.items()}
    else:
        named = {"": (data.train, 1.0, False)}
    tokens = [
        prepare(
            sources,
            tokenizer=tokenizer,
            boundary=data.boundary,
            text_field=data.text_field,
            chat=Chat.of(data, plain=plain),
            cache=cache,
            workers=data.workers,
            progress=progress,
        )
        for sources, _, plain in named.values()
    ]
    return Texts(tuple(named), tuple(tokens), tuple(weight for _, weight, _ in named.values()))


def open_mixture(
    recipe: Recipe, *, cache: Path, tokenizer: PreTrainedTokenizerBase, progress: Progress = SILENT
) -> Mixture:
    """The recipe's training text for scores and calibration: `data.context` tokens per sample, documents joined.

    Each conversation is a sample.
    """
    texts = open_texts(recipe, cache=cache, tokenizer=tokenizer, progress=progress)
    parts = texts.cut(recipe.data.context, seed=recipe.seed)
    texts.say_cut(parts, progress)
    return Mixture(parts, texts.weights)


def _whole(weights: Sequence[float]) -> list[int]:
    """Integers in the ratio of the weights, which are taken as decimal numbers."""
    exact = [Fraction(repr(float(weight))) for weight in weights]
    assert all(weight >= 0 for weight in exact)
    assert any(exact)
    common = math.lcm(*(weight.denominator for weight in exact))
    return [int(weight * common) for weight in exact]


def _next(whole: Sequence[int], counts: Sequence[int]) -> int:
    """The part with the smallest (2 count + 1) / weight, computed without division."""
    best = next(part for part, weight in enumerate(whole) if weight)
    for part in range(best + 1, len(whole)):
        if (2 * counts[part] + 1) * whole[best] < (2 * counts[best] + 1) * whole[part]:
            best = part
    return best


def _last(starts: Sequence[int], number: int) -> int:
    """The part to which a sample number belongs."""
    return max(part for part, start in enumerate(starts) if start <= number)
