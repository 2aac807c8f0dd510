"""All weights of one entry of an axis, as rows, found from the anatomy's expressions.

Removing a neuron removes a row of gate, a row of up and a column of down (a coupled structure, LLM-Pruner, arXiv
2305.11627, Sec. 3.1). Here a parameter is rearranged so that row n holds all its weights of entry n, even if it is
fused, interleaved or transposed. A function that scores rows then scores structures.

Legend: L layers, N entries of an axis, X weights that one parameter has of an entry, P positions of a dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from halve.anatomy import Anatomy, Expr


def owners(expr: Expr, axis: str, sizes: Mapping[str, int]) -> Int64[Tensor, " positions"]:
    """The entry of an axis that each position of a dimension belongs to; -1 where it belongs to none.

    >>> expr = Expr.parse("heads 2 + ffn")
    >>> owners(expr, "heads", {"heads": 2, "ffn": 3}).tolist()
    [0, 0, 1, 1, -1, -1, -1]
    """
    parts = []
    for term in expr.terms:
        lengths = [factor if isinstance(factor, int) else sizes[factor] for factor in term]
        position_P = torch.arange(prod(lengths))
        if axis in term:
            place = term.index(axis)
            parts.append(position_P // prod(lengths[place + 1 :]) % lengths[place])
        else:
            parts.append(torch.full_like(position_P, -1))
    return torch.cat(parts)


def axis_positions(expr: Expr, axis: str, sizes: Mapping[str, int]) -> Int64[Tensor, "entries positions"]:
    """The positions of a dimension that belong to each entry of an axis, in their order.

    >>> axis_positions(Expr.parse("heads 2 + heads"), "heads", {"heads": 2}).tolist()
    [[0, 1, 4], [2, 3, 5]]
    """
    owner_P = owners(expr, axis, sizes)
    order_P = owner_P.argsort(stable=True)
    return order_P[int((owner_P < 0).sum()) :].view(sizes[axis], -1)


def rows(value: Tensor, dim: int, positions_NP: Int64[Tensor, "entries positions"]) -> Float[Tensor, "entries weights"]:
    """The weights of a parameter for each entry along one of its dimensions."""
    return value.movedim(dim, 0)[positions_NP.to(value.device)].flatten(1)


_CHUNK_NUMEL = 2**24
"""How many weights are rearranged at a time: a whole embedding would need its memory twice."""


def row_scores(
    score: Callable[..., Float[Tensor, " some"]],
    *values: Tensor,
    dim: int,
    positions_NP: Int64[Tensor, "entries positions"],
) -> Float[Tensor, " entries"]:
    """`score` of the rows of one or more tensors of a parameter's shape, such as its weight and its gradient.

    >>> index = torch.tensor([[0], [1]])
    >>> row_scores(lambda x, y: (x * y).sum(1), torch.ones(2, 3), torch.ones(2, 3), dim=0, positions_NP=index).tolist()
    [3.0, 3.0]
    """
    step = max(1, _CHUNK_NUMEL * len(positions_NP) // max(1, values[0].numel()))
    parts = [score(*(rows(value, dim, part_NP) for value in values)) for part_NP in torch.split(positions_NP, step)]
    return torch.cat(parts)


@dataclass(frozen=True, eq=False)
class AxisPlace:
    """One dimension of one parameter that carries an axis."""

    name: str
    layer: int | None
    dim: int
    positions: Int64[Tensor, "entries positions"]


def places(anatomy: Anatomy, axis: str) -> Iterator[AxisPlace]:
    """Every dimension of every parameter that carries an axis. A tied table is listed once."""
    sizes = anatomy.sizes.sizes
    for name, shape in anatomy.params.items():
        for dim, expr in enumerate(shape):
            if axis in expr.axes:
                yield AxisPlace(name, anatomy.layer_of(name), dim, axis_positions(expr, axis, sizes))


@dataclass(frozen=True, eq=False)
class Totals:
    """The scores of an axis' structures, summed over parameters."""

    layers: Float64[Tensor, "layers entries"]
    outside: Float64[Tensor, " entries"]
    """The part from parameters outside the layers: embeddings and the final norm."""


def totals(anatomy: Anatomy, axis: str, score: Callable[[AxisPlace], Float[Tensor, " entries"]]) -> Totals:
    """Add up `score` over every place of an axis, in float64 on the CPU."""
    num = anatomy.sizes.sizes[axis]
    layers_LN = torch.zeros(anatomy.sizes.layers, num, dtype=torch.float64)
    outside_N = torch.zeros(num, dtype=torch.float64)
    for place in places(anatomy, axis):
        target_N = outside_N if place.layer is None else layers_LN[place.layer]
        target_N += score(place).double().cpu()
    return Totals(layers_LN, outside_N)
