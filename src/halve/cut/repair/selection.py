"""Choose what to cut by what a refit cannot compensate for: the selection of OSSCAR.

The output of a matrix W that reads channels x is W x. If only the channels of a set S are kept and the matrix that
reads them is solved for again, the output changes by

    Q(S) = min_V  sum_n |W x_n - V x_n[S]|^2

So removing one of two equal channels costs nothing, even if both are very active. OSSCAR (arXiv 2403.12983) minimizes Q
over S by local search with low-rank updates of the inverse Gram matrix. Here only its removals are used, without swaps:
one structure at a time, each exact given those before. The cost of a removal follows from the inverse (Hassibi and
Stork 1993, for structures of several channels): `tr(W_g (H^-1)_gg^-1 W_g^T)` for the current refit W.

Legend: X channels read, Y channels written, M structures of `size` channels each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

SPARSE = 0.85
"""Below this share of channels that are left the matrices are made smaller."""


def removal_order(
    gram_XX: Float[Tensor, "x x"],
    weight_YX: Float[Tensor, "y x"],
    *,
    size: int,
    keep: int,
    cells: Sequence[int],
    strength: float,
) -> tuple[int, ...]:
    """Structures in the best order of removal, until `keep` are left in every cell.

    A structure is `size` neighboring channels: 1 for neurons, head_dim for heads. `cells[m]` is the cell of
    structure m: heads of one key-value group share a cell. `strength` is the ridge of the Gram matrix relative to its
    mean diagonal. float64; about x^2 (x + y) operations.

    >>> same = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.25]])  # channels 0 and 1 are equal
    >>> removal_order(same, torch.ones(1, 3), size=1, keep=2, cells=[0, 0, 0], strength=1e-6)[0] in (0, 1)
    True
    """
    channels = len(gram_XX)
    num = channels // size
    assert channels == num * size
    assert len(cells) == num
    gram_XX = gram_XX.double()
    ridge = strength * gram_XX.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    eye_XX = torch.eye(channels, dtype=torch.float64, device=gram_XX.device)
    inverse_XX = torch.cholesky_inverse(torch.linalg.cholesky(gram_XX + ridge * eye_XX))
    refit_YX = weight_YX.double().clone()
    alive_M = torch.ones(num, dtype=torch.bool, device=gram_XX.device)
    cell_M = torch.as_tensor(cells, device=gram_XX.device)
    left = {cell: list(cells).count(cell) for cell in set(cells)}
    assert all(count >= keep for count in left.values()), "cells have fewer structures than they must keep"
    order: list[int] = []
    places_M = torch.arange(num, device=gram_XX.device)
    full_M = torch.tensor([left[cell] <= keep for cell in cells], device=gram_XX.device)
    changes = torch.empty_like(inverse_XX), torch.empty_like(refit_YX)
    while any(count > keep for count in left.values()):
        stays_M = (~alive_M | full_M)[places_M]
        cost_M = _costs(inverse_XX, refit_YX, size).masked_fill(stays_M, torch.inf)
        worst = int(cost_M.argmin())
        structure = int(places_M[worst])
        _take_out(inverse_XX, refit_YX, slice(worst * size, (worst + 1) * size), changes)
        alive_M[structure] = False
        cell = int(cell_M[structure])
        left[cell] -= 1
        if left[cell] <= keep:
            full_M |= cell_M == cell
        order.append(structure)
        if size == 1 and int(alive_M.sum()) < SPARSE * len(places_M):  # what is gone costs time, but changes nothing
            stay = alive_M[places_M].nonzero()[:, 0]
            places_M, inverse_XX, refit_YX = places_M[stay], inverse_XX[stay][:, stay], refit_YX[:, stay]
            changes = torch.empty_like(inverse_XX), torch.empty_like(refit_YX)
    return tuple(order)


def _costs(inverse_XX: Tensor, refit_YX: Tensor, size: int) -> Tensor:
    if size == 1:
        return refit_YX.square().sum(0) / inverse_XX.diagonal().clamp_min(torch.finfo(torch.float64).tiny)
    num = len(inverse_XX) // size
    blocks_MEE = inverse_XX.reshape(num, size, num, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    dead_M = blocks_MEE.diagonal(dim1=1, dim2=2).sum(1) == 0
    blocks_MEE = blocks_MEE + dead_M[:, None, None] * torch.eye(size, dtype=torch.float64, device=inverse_XX.device)
    weights_MEY = refit_YX.T.reshape(num, size, -1)
    costs_M: Tensor = (weights_MEY * torch.linalg.solve(blocks_MEE, weights_MEY)).sum((1, 2))
    return costs_M


def _take_out(inverse_XX: Tensor, refit_YX: Tensor, gone: slice, changes: tuple[Tensor, Tensor]) -> None:
    """Make them the inverse Gram matrix and the refit of those that remain, with rows and columns of `gone` zero.

    `changes` is memory for what is subtracted: most of the time would go to asking for it anew.
    """
    pull_EX = torch.linalg.solve(inverse_XX[gone, gone], inverse_XX[gone])
    for matrix, change in zip((inverse_XX, refit_YX), changes, strict=True):
        torch.mm(matrix[:, gone], pull_EX, out=change)
        matrix -= change
    refit_YX[:, gone] = 0
    inverse_XX[gone] = 0
    inverse_XX[:, gone] = 0
