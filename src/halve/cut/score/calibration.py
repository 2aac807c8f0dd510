"""A model with its calibration samples, and the check of such samples before weights are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from jaxtyping import Int, Int64
from torch import Tensor
from transformers import PreTrainedModel

from halve.anatomy import Anatomy
from halve.errors import CorpusError
from halve.progress import SILENT, Progress

MIN_SAMPLES: Final = 2


@dataclass(frozen=True, eq=False)
class Calibration:
    """A model and its calibration samples, which are run `micro_batch` at a time."""

    model: PreTrainedModel
    anatomy: Anatomy
    samples_BS: Int64[Tensor, "batch seq"]
    micro_batch: int
    progress: Progress = SILENT

    @property
    def batches(self) -> Sequence[Tensor]:
        """The micro-batches in their order."""
        return torch.split(self.samples_BS, self.micro_batch)

    def first(self, num_samples: int) -> Calibration:
        """The same model with only the first samples."""
        return self.on(self.samples_BS[:num_samples])

    def of(self, model: PreTrainedModel, anatomy: Anatomy) -> Calibration:
        """Another model with the same samples."""
        return replace(self, model=model, anatomy=anatomy)

    def on(self, samples_BS: Int64[Tensor, "batch seq"]) -> Calibration:
        """The same model with other samples."""
        return replace(self, samples_BS=samples_BS)

    def silent(self) -> Calibration:
        """The same without progress bars."""
        return replace(self, progress=SILENT)


def require_calibration(samples_BS: Int[Tensor, "batch seq"], *, vocab: int) -> None:
    """Refuse calibration samples that are unsuitable for scores, gains and refits.

    Raises `CorpusError` for fewer than two samples, for fewer than two samples with more than one distinct token, for
    samples that are all equal, and for token ids outside the vocabulary. Activations that are not finite are refused
    when they are measured (`CheckpointError`).
    """
    if len(samples_BS) < MIN_SAMPLES:
        raise CorpusError(
            f"{len(samples_BS)} calibration samples are too few",
            why=f"statistics over samples need at least {MIN_SAMPLES}",
            fix="give more text in data.train, a smaller data.context, or a larger score.samples",
        )
    low, high = int(samples_BS.min()), int(samples_BS.max())
    if low < 0 or high >= vocab:
        raise CorpusError(
            f"calibration samples hold token {low if low < 0 else high}",
            why=f"the model's vocabulary has {vocab} entries, 0 to {vocab - 1}",
            fix="use the tokenizer that belongs to this model",
        )
    # every sample may begin with the same token
    varied = int((samples_BS[:, 2:] != samples_BS[:, 1:2]).any(1).sum())
    if varied < MIN_SAMPLES:
        raise CorpusError(
            "calibration samples are constant",
            why=f"{len(samples_BS) - varied} of {len(samples_BS)} repeat one token and drive few of the model's parts",
            fix="give real text in data.train",
        )
    if bool((samples_BS == samples_BS[:1]).all()):
        raise CorpusError(
            "calibration samples are constant",
            why=f"all {len(samples_BS)} are the same, and statistics over samples see no difference",
            fix="give more text in data.train",
        )
