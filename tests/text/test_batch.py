"""Batches: parts of them, positions, and which tokens are predicted."""

from __future__ import annotations

import pytest
import torch

from halve.text.batch import Batch
from halve.text.documents import positions
from halve.text.tokenize import Separator

IDS = torch.tensor([[5, 6, 0, 7, 8, 0, 0, 9], [1, 2, 3, 4, 5, 6, 7, 0]])
END, BEGIN = Separator(0, ends=True), Separator(0, ends=False)


def batch(*, apart: bool) -> Batch:
    return Batch(IDS, (3, 8), positions(IDS, END) if apart else None)


def test_positions_begin_anew_after_each_end() -> None:
    assert positions(IDS, END).tolist() == [[0, 1, 2, 0, 1, 2, 0, 0], list(range(8))]


def test_positions_begin_anew_at_each_beginning() -> None:
    assert positions(IDS, BEGIN).tolist() == [[0, 1, 0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6, 0]]


def test_a_sample_that_ends_a_document_begins_the_next_ones_anew() -> None:
    ids = torch.tensor([[4, 0], [0, 4]])
    assert positions(ids, END).tolist() == [[0, 1], [0, 0]]
    assert ids.tolist() == [[4, 0], [0, 4]]


def test_every_token_but_the_first_is_predicted_where_documents_are_joined() -> None:
    joined = batch(apart=False)
    assert joined.counted() is None
    assert joined.labels().tolist() == [6, 0, 7, 8, 0, 0, 9, 2, 3, 4, 5, 6, 7, 0]


def test_no_document_predicts_the_next_ones_first_token() -> None:
    apart = batch(apart=True)
    assert apart.labels().tolist() == [6, 0, 8, 0, 2, 3, 4, 5, 6, 7, 0]
    counted = apart.counted()
    assert counted is not None
    assert counted.tolist()[0] == [True, True, False, True, True, False, False]


@pytest.mark.parametrize("apart", [True, False])
def test_parts_hold_the_same_samples(apart: bool) -> None:
    whole = batch(apart=apart)
    assert len(whole) == 2
    parts = list(whole.split(1))
    assert [part.numbers for part in parts] == [(3,), (8,)]
    assert torch.equal(torch.cat([part.labels() for part in parts]), whole.labels())
    assert [len(part) for part in whole.split(5)] == [2]
    moved = whole[1:].to("cpu")
    assert moved.ids.tolist() == [IDS[1].tolist()]
    assert (moved.positions is not None) == apart
