"""The rule of the tournament, on made-up curves: crossing ones, noise, ties and the end of the budget."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from halve.errors import RecipeError
from halve.search.halving import FEWEST, SLACK, Ladder, is_tied, ladder, leader, ranking, select_candidates

RUNGS = Ladder(tokens=(0, 100, 200, 400), places=(8, 8, 4, 2), budget=2000)


def measured(means: list[float], *, samples: int = 32, noise: float = 0.02, seed: int = 0) -> Tensor:
    """KL by candidate and sample: every sample is as hard for all, and each candidate has a little of its own."""
    draw = torch.Generator().manual_seed(seed)
    hard_S = torch.randn(samples, generator=draw, dtype=torch.float64) * 0.3
    own_CS = torch.randn(len(means), samples, generator=draw, dtype=torch.float64) * noise
    own_CS -= own_CS.mean(1, keepdim=True)  # so that the means are those asked for
    return torch.tensor(means, dtype=torch.float64)[:, None] + hard_S + own_CS


def test_rungs_and_places() -> None:
    found = ladder(8, tokens=800, rungs=3, keep=0.5, step=10)
    assert found.tokens == (0, 200, 400, 800)
    assert found.places == (8, 8, 4, 2)
    planned = 8 * 200 + 4 * 200 + 2 * 400
    assert sum(found.cost(rung, place) for rung, place in enumerate(found.places)) == planned
    assert found.budget == int(SLACK * planned)
    assert found.left(0, 8) == planned
    assert found.left(1, 5) == 5 * 200 + 2 * 400


@pytest.mark.parametrize(
    ("keep", "share"),
    [
        (0.1, Fraction(1, 10)),
        (0.2, Fraction(1, 5)),
        (0.25, Fraction(1, 4)),
        (0.4, Fraction(2, 5)),
        (0.5, Fraction(1, 2)),
    ],
)
def test_no_rung_is_a_step_too_long(keep: float, share: Fraction) -> None:
    for rungs, factor in itertools.product((2, 3, 4, 5), (1, 3, 7)):
        last = factor * share.denominator ** (rungs - 1)
        found = ladder(8, tokens=last * 4096, rungs=rungs, keep=keep, step=4096)
        exact = [last * share ** (rungs - rung) for rung in range(1, rungs + 1)]
        assert found.tokens == (0, *(4096 * steps for steps in exact)), (rungs, factor)
        found = ladder(8, tokens=last * 4096 + 1, rungs=rungs, keep=keep, step=4096)
        assert found.tokens == (0, *(4096 * (steps + 1) for steps in exact)), "a started step is a whole one"


def test_no_rung_trains_nothing() -> None:
    found = ladder(8, tokens=800, rungs=0, keep=0.5, step=10)
    assert (found.tokens, found.places, found.budget) == ((0,), (8,), 0)


@pytest.mark.parametrize(("keep", "places"), [(0.5, (5, 5, 3, 2)), (0.25, (5, 5, 2, 2)), (0.9, (5, 5, 5, 5))])
def test_the_last_rung_has_two(keep: float, places: tuple[int, ...]) -> None:
    found = ladder(5, tokens=10_000, rungs=3, keep=keep, step=10)
    assert found.places == places
    assert found.places[-1] >= FEWEST


def test_one_candidate_needs_no_place_for_another() -> None:
    assert ladder(1, tokens=400, rungs=2, keep=0.5, step=10).places == (1, 1, 1)


def test_too_few_tokens_are_refused() -> None:
    for tokens, rungs in ((20, 3), (800, 10**12)):
        with pytest.raises(RecipeError, match=f"{tokens} tokens are too few for {rungs} rungs"):
            ladder(8, tokens=tokens, rungs=rungs, keep=0.5, step=10)


def test_the_worse_half_goes() -> None:
    kl_CS = measured([0.9, 0.2, 0.8, 0.3, 0.7, 0.4, 0.6, 0.5], noise=1e-3)
    found = select_candidates(kl_CS, RUNGS, 1, 800)
    assert found.kept == (1, 3, 5, 7)
    assert found.gone == (6, 4, 2, 0)
    assert found.ties == found.forced == ()


def test_a_tie_with_the_last_place_goes_on_while_the_budget_allows() -> None:
    kl_CS = measured([0.1, 0.2, 0.3, 0.4000, 0.4001, 0.4002, 0.8, 0.9])
    assert is_tied(kl_CS[4], kl_CS[3])
    assert not is_tied(kl_CS[6], kl_CS[3])
    rich = select_candidates(kl_CS, RUNGS, 1, 800)
    assert rich.kept == (0, 1, 2, 3, 4, 5)
    assert (rich.ties, rich.forced) == ((4, 5), ())
    # 5 x 100 to the next rung and 2 x 200 to the last: one tie fits, two do not
    assert RUNGS.left(1, 5) == 900
    narrow = select_candidates(kl_CS, Ladder(RUNGS.tokens, RUNGS.places, 1700), 1, 800)
    assert narrow.kept == (0, 1, 2, 3, 4)
    assert (narrow.ties, narrow.forced) == ((4,), (5,))
    poor = select_candidates(kl_CS, Ladder(RUNGS.tokens, RUNGS.places, 1600), 1, 800)
    assert (poor.kept, poor.forced) == ((0, 1, 2, 3), (4, 5))


def test_a_clear_candidate_behind_ends_the_ties() -> None:
    kl_CS = measured([0.1, 0.2, 0.3, 0.4, 0.6, 0.6001, 0.8, 0.9])
    assert select_candidates(kl_CS, RUNGS, 1, 800).ties == ()


def test_ties_are_paired() -> None:
    """What is hard for both says nothing about their gap."""
    kl_CS = measured([0.40, 0.41], noise=1e-3)
    assert float(kl_CS.std(1).min()) > 0.2
    assert not is_tied(kl_CS[0], kl_CS[1])
    assert is_tied(kl_CS[0], kl_CS[1].roll(1))


def test_a_single_sample_knows_no_tie() -> None:
    kl_CS = measured([0.40, 0.41], samples=1)
    assert not is_tied(kl_CS[0], kl_CS[1] + 1)
    assert leader(kl_CS).row == int(kl_CS[1, 0] < kl_CS[0, 0])


def test_the_leader_and_how_far_ahead_it_is() -> None:
    clear = leader(measured([0.5, 0.3, 0.4], noise=1e-3))
    assert (clear.row, clear.second, clear.clear) == (1, 2, True)
    assert clear.gap is not None
    assert clear.gap.value == pytest.approx(0.1)
    near = leader(measured([0.3001, 0.3], noise=0.1))
    assert (near.row, near.second, near.clear) == (1, 0, False)
    assert leader(measured([0.3])).second is None


def test_of_equal_candidates_the_first_leads() -> None:
    assert ranking(torch.zeros(3, 4, dtype=torch.float64)) == [0, 1, 2]


# ---- made-up curves


def curves(seed: int, *, candidates: int = 8, crossing: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Where each candidate ends, where it starts, and how fast it learns, as candidates of a real field do.

    KL(t) = end + (start - end) / (1 + t / half). Crossing: who ends lower starts higher.
    """
    draw = torch.Generator().manual_seed(seed)
    end_C = 0.20 + 0.02 * torch.rand(candidates, generator=draw, dtype=torch.float64).sort().values * candidates
    above_C = 0.4 + 0.3 * torch.rand(candidates, generator=draw, dtype=torch.float64)
    if crossing:
        above_C = above_C.sort(descending=True).values
    half_C = 60 + 30 * torch.rand(candidates, generator=draw, dtype=torch.float64)
    return end_C, end_C + above_C, half_C


def at(tokens: int, end_C: Tensor, start_C: Tensor, half_C: Tensor, *, noise: float, seed: int) -> Tensor:
    """What 32 held-out samples show at a rung."""
    draw = torch.Generator().manual_seed(1000 * seed + tokens)
    mean_C = end_C + (start_C - end_C) / (1 + tokens / half_C)
    hard_S = 0.3 * torch.randn(32, generator=draw, dtype=torch.float64)
    return mean_C[:, None] + hard_S + noise * torch.randn(len(mean_C), 32, generator=draw, dtype=torch.float64)


def play(seed: int, *, crossing: bool, noise: float, budget: int | None = None) -> tuple[bool, bool, int]:
    """Whether the eventual best won, whether it was best straight after the cut, and the tokens that it took."""
    end_C, start_C, half_C = curves(seed, crossing=crossing)
    plan = ladder(8, tokens=800, rungs=3, keep=0.5, step=10)
    plan = Ladder(plan.tokens, plan.places, plan.budget if budget is None else budget)
    eventual = at(2000, end_C, start_C, half_C, noise=0.0, seed=seed).mean(1).argmin()
    alive, spent = torch.arange(8), 0
    for rung in range(1, len(plan.tokens)):
        spent += plan.cost(rung, len(alive))
        kl_CS = at(plan.tokens[rung], end_C[alive], start_C[alive], half_C[alive], noise=noise, seed=seed)
        if rung < len(plan.tokens) - 1:
            alive = alive[list(select_candidates(kl_CS, plan, rung, spent).kept)]
    won = alive[leader(kl_CS).row] == eventual
    return bool(won), bool(start_C.argmin() == eventual), spent


def chances(*, crossing: bool, noise: float, budget: int | None = None, seeds: int = 200) -> tuple[float, float]:
    """How often the eventual best wins, and how often it is best straight after the cut."""
    games = [play(seed, crossing=crossing, noise=noise, budget=budget) for seed in range(seeds)]
    return sum(won for won, _, _ in games) / seeds, sum(first for _, first, _ in games) / seeds


def test_the_best_is_found_though_curves_cross() -> None:
    won, first = chances(crossing=True, noise=0.01)
    assert first < 0.05  # nearly every one of these fields has a flip
    assert won > 0.75


def test_the_best_is_found_where_the_start_says_little() -> None:
    won, first = chances(crossing=False, noise=0.01)
    assert first < 0.45
    assert won > 0.85


def test_keeping_ties_helps_against_noise() -> None:
    """With more noise the cut is closer to a coin. The same fields without a budget for ties are lost more often."""
    with_ties, _ = chances(crossing=True, noise=0.3)
    without, _ = chances(crossing=True, noise=0.3, budget=0)
    assert with_ties > without


def test_the_budget_holds() -> None:
    plan = ladder(8, tokens=800, rungs=3, keep=0.5, step=10)
    spent = [play(seed, crossing=True, noise=0.3)[2] for seed in range(100)]
    assert max(spent) <= plan.budget
    assert max(spent) > plan.budget / SLACK
