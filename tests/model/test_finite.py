"""What is not finite, and how it is said."""

from __future__ import annotations

import math

import pytest
import torch

from halve.errors import CheckpointError, TrainError
from halve.model.finite import is_finite, not_finite, require_finite


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_value_among_numbers_and_tensors_is_enough(bad: float) -> None:
    good = (1.0, torch.ones(2, 3), torch.zeros(0), torch.tensor(7))
    assert is_finite(*good)
    assert not is_finite(*good, bad)
    for dtype in (torch.float64, torch.bfloat16):
        assert not is_finite(*good, torch.tensor([[0.0, bad]], dtype=dtype))


def test_what_is_finite_is_required_in_these_words() -> None:
    require_finite("activations", torch.ones(2), 1.0)
    with pytest.raises(CheckpointError, match=r"^the student's perplexity is not finite\n  why: NaN or inf"):
        require_finite("the student's perplexity", math.nan, verb="is")
    told = not_finite("the loss", verb="is", where=" at step 3", why="loss is nan", fix="lower lr", kind=TrainError)
    assert isinstance(told, TrainError)
    assert (told.what, told.why, told.fix) == ("the loss is not finite at step 3", "loss is nan", "lower lr")
