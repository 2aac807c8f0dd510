"""Whether samples can say anything about a model: checked before weights are read."""

from __future__ import annotations

from typing import Final

from jaxtyping import Int
from torch import Tensor

from halve.errors import CorpusError

MIN_SAMPLES: Final = 2


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
