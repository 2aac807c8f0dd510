"""Who overtakes the finalist with the lowest KL, on made-up curves."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from halve.anatomy import Arch, Counts
from halve.cut.plan.sizes import Candidate
from halve.cut.trial import Tried
from halve.search.extrapolation import REACH, overtaking
from halve.search.halving import Ladder
from halve.search.outcome import outcome
from halve.search.tournament import Played, Showing

RUNGS = (100_000, 200_000)


def curves(*lines: tuple[float, float], noise: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """KL of candidates at both rungs, [candidates, samples]. Samples differ; `noise` is what is not paired."""
    generator = torch.Generator().manual_seed(seed)
    shared_S = torch.rand(40, generator=generator, dtype=torch.float64)
    before, last = (
        torch.stack(
            [
                line[i] * shared_S / shared_S.mean() + noise * torch.randn(40, generator=generator).double()
                for line in lines
            ]
        )
        for i in (0, 1)
    )
    return before, last


def test_lines_that_cross_before_the_end() -> None:
    """The lead of 0.06 becomes 0.02 while tokens double. So at twice the tokens again it is -0.02."""
    found = overtaking(*curves((0.20, 0.16), (0.26, 0.18)), RUNGS, end=400_000)
    assert found is not None
    assert (found.row, found.other, found.tokens) == (1, 0, 400_000)
    assert found.behind.value == pytest.approx(0.02)
    assert found.ahead.value == pytest.approx(0.02)
    assert found.ahead.value > 2 * found.ahead.stderr > 0


@pytest.mark.parametrize("end", [100_000, 200_000, 210_000])
def test_lines_that_cross_behind_the_end(end: int) -> None:
    assert overtaking(*curves((0.20, 0.16), (0.26, 0.18)), RUNGS, end=end) is None


def test_nobody_overtakes_by_less_than_its_error() -> None:
    lines = (0.20, 0.16), (0.26, 0.18)
    assert overtaking(*curves(*lines, noise=0.001), RUNGS, end=400_000) is not None
    assert overtaking(*curves(*lines, noise=0.1), RUNGS, end=400_000) is None


def test_one_sample_overtakes_nobody() -> None:
    before, last = curves((0.20, 0.16), (0.26, 0.18))
    assert overtaking(before[:, :1], last[:, :1], RUNGS, end=400_000) is None


def test_one_candidate_overtakes_nobody() -> None:
    before, last = curves((0.20, 0.16))
    assert overtaking(before, last, RUNGS, end=400_000) is None


def test_nothing_is_extrapolated_farther_than_was_measured() -> None:
    """The lead of 0.06 is 0.03 at the last rung, and gone at twice its tokens; 0.024 to 0.02 needs 32 times as many."""
    found = overtaking(*curves((0.20, 0.16), (0.26, 0.18)), RUNGS, end=10**12)
    assert found is not None
    assert found.tokens == REACH * RUNGS[1]
    assert overtaking(*curves((0.20, 0.16), (0.224, 0.18)), RUNGS, end=10**12) is None


@given(
    st.lists(st.tuples(st.floats(0.1, 1), st.floats(0.1, 1)), min_size=1, max_size=5),
    st.integers(RUNGS[1], 500_000),
)
def test_whoever_overtakes_is_behind_now_and_ahead_of_all_at_the_end(
    lines: list[tuple[float, float]], end: int
) -> None:
    before, last = curves(*lines)
    found = overtaking(before, last, RUNGS, end=end)
    steps = math.log2(end / RUNGS[1])
    ends = [now + (now - then) * steps for then, now in lines]
    if found is None:
        lowest = min(range(len(lines)), key=lambda i: last[i].mean().item())
        gap = ends[lowest] - min(ends)
        assert gap == pytest.approx(0, abs=1e-9) or end == RUNGS[1]
    else:
        assert last[found.other].mean() == last.mean(1).min()
        assert found.behind.value >= 0
        assert ends[found.row] == pytest.approx(min(ends), abs=1e-9)
        assert found.ahead.value == pytest.approx(ends[found.other] - ends[found.row], abs=1e-9)


def result(end: int | None, tokens: tuple[int, ...] = (0, *RUNGS)) -> dict[str, object]:
    """The outcome of two finalists that cross at 283,000 tokens."""
    kl = {0: (0.30, 0.20, 0.16), 1: (0.45, 0.26, 0.18)}
    spread = [0.8, 1.0, 1.2]
    showings = tuple(
        Showing(finalist, rung, tokens[rung], at, at, 1.0, tuple(at * part for part in spread))
        for finalist, curve in kl.items()
        for rung, at in enumerate(curve[: len(tokens)])
    )
    arch = Arch(layers=2, hidden=8, ffn=16, heads=2, kv_heads=2, head_dim=4, vocab=32)
    pair = Candidate(arch, Counts(10, 10, 10, 10, 10, 20), (0, 1)), Tried(arch, (0, 1), 0.3, (0.3,))
    plan = Ladder(tokens, (2,) * len(tokens), 10**9)
    return outcome([pair, pair], plan, Played(showings, (), (0, 1)), trial=0, answered=None, seed=0, end=end)


def test_the_outcome_chooses_whoever_overtakes() -> None:
    found = result(400_000)
    assert found["chosen"] == 1
    assert found["second"]["finalist"] == 0  # type: ignore[index]
    assert found["second"]["gap"]["value"] == pytest.approx(0.02)  # type: ignore[index]
    assert found["overtakes"]["finalist"] == 0  # type: ignore[index]
    assert found["overtakes"]["behind"]["value"] == pytest.approx(0.02)  # type: ignore[index]
    assert found["straight"] == 0


@pytest.mark.parametrize(("end", "tokens"), [(None, (0, *RUNGS)), (200_000, (0, *RUNGS)), (400_000, (0, 100_000))])
def test_the_last_rung_chooses_where_nothing_is_extrapolated(end: int | None, tokens: tuple[int, ...]) -> None:
    """Without a distillation, up to its end, and with one rung."""
    found = result(end, tokens)
    assert (found["chosen"], found["overtakes"]) == (0, None)
