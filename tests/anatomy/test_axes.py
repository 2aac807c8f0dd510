from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halve.anatomy import AXES, Expr

SIZES = {"hidden": 5, "ffn": 4, "heads": 6, "kv_heads": 3, "head_dim": 2}
terms = st.lists(st.sampled_from([*SIZES, "3"]), min_size=1, max_size=3).map(" ".join)
expressions = st.lists(terms, min_size=1, max_size=3).map(" + ".join)


def test_the_vocabulary_is_closed() -> None:
    assert AXES == ("layers", "hidden", "ffn", "heads", "kv_heads", "head_dim", "vocab", "experts", "expert_ffn")
    with pytest.raises(ValueError, match="intermediate_size"):
        Expr.parse("intermediate_size")


def test_blocks_and_interleaving_are_different_layouts() -> None:
    blocks, woven = Expr.parse("ffn + ffn"), Expr.parse("ffn 2")
    assert blocks.size(SIZES) == woven.size(SIZES) == 8
    assert blocks.indices(SIZES, {"ffn": [0, 3]}).tolist() == [0, 3, 4, 7]
    assert woven.indices(SIZES, {"ffn": [0, 3]}).tolist() == [0, 1, 6, 7]


def test_interleaved_heads() -> None:
    assert Expr.parse("heads 3 head_dim").indices({"heads": 2, "head_dim": 2}, {"heads": [1]}).tolist() == [
        *range(6, 12)
    ]


@given(expressions)
def test_text_is_read_back(text: str) -> None:
    expr = Expr.parse(text)
    assert Expr.parse(str(expr)) == expr


@given(expressions, st.sampled_from(sorted(SIZES)), st.randoms(use_true_random=False))
def test_a_permuted_axis_permutes_the_dimension(text: str, axis: str, random) -> None:  # type: ignore[no-untyped-def]
    expr, order = Expr.parse(text), list(range(SIZES[axis]))
    random.shuffle(order)
    found = expr.indices(SIZES, {axis: order})
    assert sorted(found.tolist()) == list(range(expr.size(SIZES)))
    back = expr.indices(SIZES, {axis: torch.argsort(torch.tensor(order))})
    assert found[back].tolist() == list(range(expr.size(SIZES)))


@given(expressions, st.sampled_from(sorted(SIZES)), st.data())
def test_kept_entries_are_as_many_as_the_smaller_size(text: str, axis: str, data: st.DataObject) -> None:
    expr = Expr.parse(text)
    kept = sorted(data.draw(st.sets(st.integers(0, SIZES[axis] - 1), min_size=1)))
    found = expr.indices(SIZES, {axis: kept})
    assert len(found) == expr.size({**SIZES, axis: len(kept)})
    assert len(set(found.tolist())) == len(found)
