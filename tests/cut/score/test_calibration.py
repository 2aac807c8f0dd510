"""Calibration samples that cannot say anything are refused in three lines."""

from __future__ import annotations

import pytest
import torch

from halve.cut.score.calibration import require_calibration
from halve.errors import CorpusError

GOOD = torch.tensor([[1, 2, 3], [4, 5, 6]])


def test_sound_samples_pass() -> None:
    require_calibration(GOOD, vocab=7)
    one_is_dull = torch.tensor([[1, 1, 1], [4, 5, 6], [0, 1, 2]])
    require_calibration(one_is_dull, vocab=7)


@pytest.mark.parametrize(
    ("samples", "what"),
    [
        (GOOD[:1], "1 calibration samples are too few"),
        (GOOD[:0], "0 calibration samples are too few"),
        (torch.full((4, 3), 2), "calibration samples are constant"),
        (torch.tensor([[1, 1, 1], [2, 2, 2]]), "calibration samples are constant"),
        (torch.tensor([[1, 1, 1], [2, 2, 2], [1, 2, 3]]), "calibration samples are constant"),
        (torch.tensor([[1, 2, 3]] * 4), "calibration samples are constant"),
        (GOOD + 1, "calibration samples hold token 7"),
        (GOOD - 2, "calibration samples hold token -1"),
    ],
)
def test_bad_samples_are_refused(samples: torch.Tensor, what: str) -> None:
    with pytest.raises(CorpusError) as error:
        require_calibration(samples, vocab=7)
    assert error.value.what == what
    assert len(str(error.value).splitlines()) == 3
