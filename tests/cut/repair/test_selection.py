"""Selection by refit against trying everything."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from halve.cut.repair.selection import removal_order


def _problem(channels: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    return mix @ mix.T + 0.1 * torch.eye(channels), torch.randn(4, channels, generator=generator, dtype=torch.float64)


def _loss(gram: Tensor, weight: Tensor, kept: tuple[int, ...]) -> float:
    """Q(S) from its definition: the best matrix on the kept channels, solved for anew."""
    index = torch.tensor(kept)
    inner = gram[index][:, index]
    cross = weight @ gram[:, index]
    best = torch.linalg.solve(inner, cross.T).T
    total = torch.trace(weight @ gram @ weight.T)
    return float(total - torch.trace(best @ cross.T))


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_every_removal_is_the_cheapest_one(size: int, seed: int) -> None:
    gram, weight = _problem(8, seed)
    num = 8 // size
    order = removal_order(gram, weight, size=size, keep=1, cells=[0] * num, strength=1e-12)
    alive = set(range(num))
    for gone in order:
        losses = {}
        for one in alive:
            left = [m * size + i for m in sorted(alive - {one}) for i in range(size)]
            losses[one] = _loss(gram, weight, tuple(left))
        assert gone == min(losses, key=lambda one: losses[one])
        alive.remove(gone)
    assert len(alive) == 1


@pytest.mark.parametrize("seed", range(4))
def test_it_is_near_the_best_of_all_sets_and_better_than_activity(seed: int) -> None:
    gram, weight = _problem(8, seed)
    gone = removal_order(gram, weight, size=1, keep=4, cells=[0] * 8, strength=1e-12)
    kept = tuple(sorted({*range(8)}.difference(gone)))
    losses = sorted(_loss(gram, weight, s) for s in combinations(range(8), 4))
    assert _loss(gram, weight, kept) <= losses[len(losses) // 10]
    active = tuple(sorted(gram.diagonal().argsort(descending=True)[:4].tolist()))
    assert _loss(gram, weight, kept) <= _loss(gram, weight, active)


def test_of_two_channels_that_say_the_same_one_goes_first() -> None:
    x = torch.randn(100, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = torch.cat([10 * x[:, :1], 10 * x[:, :1], 0.1 * x[:, 1:]], dim=1)  # two loud twins, two quiet strangers
    order = removal_order(x.T @ x, torch.ones(1, 4), size=1, keep=3, cells=[0] * 4, strength=1e-9)
    assert order[0] in (0, 1)


def test_cells_keep_the_same_number() -> None:
    gram, weight = _problem(12, 0)
    gram[:6] *= 0.01  # the first cell's heads matter little, and still two of them stay
    gram[:, :6] *= 0.01
    gone = removal_order(gram, weight, size=2, keep=2, cells=[0, 0, 0, 1, 1, 1], strength=1e-9)
    kept = {*range(6)}.difference(gone)
    assert [sum(m < 3 for m in kept), sum(m >= 3 for m in kept)] == [2, 2]


def test_dead_channels_go_first() -> None:
    gram, weight = _problem(6, 1)
    gram[2:4] = 0
    gram[:, 2:4] = 0
    assert set(removal_order(gram, weight, size=1, keep=4, cells=[0] * 6, strength=1e-6)) == {2, 3}
    assert removal_order(gram, weight, size=2, keep=2, cells=[0] * 3, strength=1e-6) == (1,)
