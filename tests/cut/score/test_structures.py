"""Rows of weights by entry of an axis, in plain, fused, interleaved and transposed layouts."""

from __future__ import annotations

import pytest
import torch
from families import PROVED, config

from halve.anatomy import Expr, discover
from halve.cut.score.structures import axis_positions, owners, places, rows, totals

SIZES = {"heads": 3, "kv_heads": 1, "head_dim": 2, "ffn": 4, "hidden": 5}


@pytest.mark.parametrize(
    ("text", "axis", "expected"),
    [
        ("heads head_dim", "heads", [[0, 1], [2, 3], [4, 5]]),
        ("heads 3 head_dim", "heads", [list(range(6 * h, 6 * h + 6)) for h in range(3)]),
        ("heads head_dim + kv_heads head_dim + kv_heads head_dim", "kv_heads", [[6, 7, 8, 9]]),
        ("ffn + ffn", "ffn", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("2 ffn", "ffn", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("ffn 2", "ffn", [[0, 1], [2, 3], [4, 5], [6, 7]]),
    ],
)
def test_positions(text: str, axis: str, expected: list[list[int]]) -> None:
    assert axis_positions(Expr.parse(text), axis, SIZES).tolist() == expected


def test_positions_agree_with_what_surgery_takes() -> None:
    expr = Expr.parse("heads head_dim + kv_heads head_dim + 2 heads")
    own = axis_positions(expr, "heads", SIZES)
    taken = expr.indices(SIZES, {"heads": [1]}).tolist()
    free = (owners(expr, "heads", SIZES) < 0).nonzero()[:, 0].tolist()
    assert sorted(own[1].tolist() + free) == sorted(taken)


def test_rows_of_either_dimension() -> None:
    weight = torch.arange(8.0).view(4, 2)
    index = torch.tensor([[0, 2], [1, 3]])
    assert rows(weight, 0, index).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert rows(weight.T, 1, index).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]


@pytest.mark.parametrize("family", PROVED)
def test_every_weight_of_an_entry_is_counted_once(family: str) -> None:
    anatomy = discover(config(family))
    smaller = anatomy.sizes.at(ffn=anatomy.sizes.ffn - 1)
    found = totals(anatomy, "ffn", lambda place: torch.full((len(place.positions),), 1.0) * _numel(anatomy, place))
    gone = anatomy.ledger.count(anatomy.sizes).params - anatomy.ledger.count(smaller).params
    assert found.layers[:, 0].sum() + found.outside[0] == gone


def _numel(anatomy, place) -> int:  # type: ignore[no-untyped-def]
    """Weights that one entry has in one parameter."""
    shape = [expr.size(anatomy.sizes.sizes) for expr in anatomy.params[place.name]]
    shape[place.dim] = place.positions.shape[1]
    return int(torch.tensor(shape).prod())


def test_places_of_fused_transposed_and_tied_weights() -> None:
    anatomy = discover(config("gpt2"))
    heads = {(place.name.split(".", 3)[-1], place.dim) for place in places(anatomy, "heads") if place.layer == 0}
    assert heads == {("attn.c_attn.weight", 1), ("attn.c_attn.bias", 0), ("attn.c_proj.weight", 0)}
    outside = [place.name for place in places(anatomy, "hidden") if place.layer is None]
    assert sorted(outside) == [
        "transformer.ln_f.bias", "transformer.ln_f.weight", "transformer.wpe.weight", "transformer.wte.weight"
    ]  # fmt: skip
