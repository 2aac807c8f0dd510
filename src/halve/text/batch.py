"""A batch: samples of token ids, and what a loss has to know about them.

Shapes: B batch, S seq, N tokens that are counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from halve.model.head import Body

_WIDTHS = 64  # samples with padding are as long as their longest, rounded up to a multiple of this


@dataclass(frozen=True)
class Batch:
    """Samples `ids` and their `numbers` in the corpus, under which a cache stores the teacher's answers.

    `positions` are the tokens' positions in their own documents, if attention ends at document boundaries. They are
    None if a sample is read as one text. `predicted` says which tokens after the first are predicted; None means all.
    `attended` says which tokens are not padding; None means all. Padding is on the right, where causal attention keeps
    it from the tokens before it, and nothing is predicted there.
    """

    ids: Int[Tensor, "batch seq"]
    numbers: tuple[int, ...]
    positions: Int[Tensor, "batch seq"] | None = None
    predicted: Bool[Tensor, "batch predictions"] | None = None
    attended: Bool[Tensor, "batch seq"] | None = None

    def __len__(self) -> int:
        return len(self.numbers)

    def to(self, device: str | torch.device) -> Batch:
        """The same on a device."""
        return self._each(lambda part: part.to(device), self.numbers)

    def split(self, size: int) -> Iterator[Batch]:
        """Parts of at most so many samples, without columns that are padding in all of a part's samples."""
        return (self[start : start + size].trimmed() for start in range(0, len(self), size))

    def trimmed(self) -> Batch:
        """The same without columns at the end that are padding in every sample."""
        if self.attended is None:
            return self
        longest = 1 + max(self.attended.any(0).nonzero()).item()
        width = min(self.ids.shape[1], math.ceil(longest / _WIDTHS) * _WIDTHS)
        places = None if self.positions is None else self.positions[:, :width]
        known = None if self.predicted is None else self.predicted[:, : width - 1]
        return Batch(self.ids[:, :width], self.numbers, places, known, self.attended[:, :width])

    def __getitem__(self, rows: slice) -> Batch:
        return self._each(lambda part: part[rows], self.numbers[rows])

    @classmethod
    def joined(cls, batches: Sequence[Batch]) -> Batch:
        """Batches of one length as one. Where one knows what the others leave open, all of theirs is meant."""
        numbers = tuple(number for batch in batches for number in batch.numbers)

        def all_of(parts: Sequence[Tensor | None], *, width: int) -> Tensor | None:
            if all(part is None for part in parts):
                return None
            return torch.cat(
                [
                    torch.ones(len(batch), width, dtype=torch.bool) if part is None else part
                    for batch, part in zip(batches, parts, strict=True)
                ]
            )

        ids = torch.cat([batch.ids for batch in batches])
        places = [batch.positions for batch in batches if batch.positions is not None]
        assert len(places) in (0, len(batches)), "documents are apart in all or in none"
        predicted = all_of([batch.predicted for batch in batches], width=ids.shape[1] - 1)
        attended = all_of([batch.attended for batch in batches], width=ids.shape[1])
        return cls(ids, numbers, torch.cat(places) if places else None, predicted, attended)

    def rows(self, places: Sequence[int]) -> Batch:
        """Some of its samples, in this order."""
        return self._each(lambda part: part[list(places)], tuple(self.numbers[place] for place in places))

    def _each(self, change: Callable[[Tensor], Tensor], numbers: tuple[int, ...]) -> Batch:
        parts = (None if part is None else change(part) for part in (self.positions, self.predicted, self.attended))
        return Batch(change(self.ids), numbers, *parts)

    def counted(self) -> Bool[Tensor, "batch predictions"] | None:
        """Which positions but the last predict a token that counts, of their own document; None if all do."""
        if self.positions is None:
            return self.predicted
        own_BT = self.positions[:, 1:] > 0
        return own_BT if self.predicted is None else own_BT & self.predicted

    @property
    def weights(self) -> Int[Tensor, " batch"] | None:
        """How many predictions each sample has where samples are of unequal length; None where they are packed."""
        counted = self.counted()
        return None if self.attended is None or counted is None else counted.sum(1)

    def labels(self) -> Int[Tensor, " tokens"]:
        """The token that follows each counted position."""
        counted = self.counted()
        following = self.ids[:, 1:]
        return following.reshape(-1) if counted is None else following[counted]


def predictions(body: Body, batch: Batch) -> Float[Tensor, "tokens hidden"]:
    """Return the hidden states at every position whose next token is in the sample and in the same document."""
    # from positions that restart at 0, transformers builds attention that ends at a document boundary
    where = {} if batch.positions is None else {"position_ids": batch.positions}
    return at_predictions(body(batch.ids, **where), batch)


def at_predictions(values: Float[Tensor, "batch seq width"], batch: Batch) -> Float[Tensor, "tokens width"]:
    """Take the positions whose next token is in the sample and in the same document."""
    counted, rows_BSW = batch.counted(), values[:, :-1]
    return rows_BSW.reshape(-1, values.shape[-1]) if counted is None else rows_BSW[counted]
