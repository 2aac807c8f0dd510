"""Successive halving: which candidates train on, and what that costs. Pure functions of measurements.

The rule is that of Jamieson and Talwalkar (arXiv 1502.07943): all candidates train a little, the better half trains
twice as long, and so on. It differs in one point. A candidate that is tied with the last one kept is kept as well, as
long as the budget allows. Tied means that their gap is at most `TIE` paired standard errors.

Shapes: C candidates, S held-out samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from jaxtyping import Float64
from torch import Tensor

from halve.errors import RecipeError
from halve.model.measure import Estimate, difference

TIE: Final = 2.0
"""Paired standard errors within which two candidates count as equal."""
FEWEST: Final = 2
"""Candidates that reach the last rung: one alone would have nobody to be compared with."""
SLACK: Final = 1.25
"""The budget over what the plan takes. The rest is for ties."""


@dataclass(frozen=True)
class Ladder:
    """The rungs of a tournament. Rung 0 is the state straight after the cut."""

    tokens: tuple[int, ...]
    """For every rung, the tokens that a candidate has then trained on: 0, t, 2t, 4t, ..."""
    places: tuple[int, ...]
    """For every rung, how many candidates reach it if there are no ties."""
    budget: int
    """Tokens of all candidates together."""

    def cost(self, rung: int, alive: int) -> int:
        """Tokens that it takes to bring this many candidates to `rung` from the one before."""
        return alive * (self.tokens[rung] - self.tokens[rung - 1]) if rung else 0

    def left(self, rung: int, alive: int) -> int:
        """Tokens from here to the end if this many candidates train on from `rung` and no tie is kept later."""
        places = [alive, *(min(alive, place) for place in self.places[rung + 2 :])]
        return sum(self.cost(rung + 1 + i, count) for i, count in enumerate(places) if rung + 1 + i < len(self.tokens))


@dataclass(frozen=True)
class Survivors:
    """The candidates after a rung, as rows of the measurements, the best first."""

    kept: tuple[int, ...]
    gone: tuple[int, ...]
    ties: tuple[int, ...]
    """Those of `kept` that are there because they are tied with the last place."""
    forced: tuple[int, ...]
    """Those of `gone` that were tied as well, but the budget was used up."""


@dataclass(frozen=True)
class Leader:
    """The candidate with the lowest KL, the next one, and how far they are apart. Rows of the measurements."""

    row: int
    second: int | None
    gap: Estimate | None
    """KL of the second minus that of the first."""

    @property
    def clear(self) -> bool:
        """Whether the second is worse beyond a tie."""
        return self.gap is None or self.gap.value > TIE * self.gap.stderr


def ladder(candidates: int, *, tokens: int, rungs: int, keep: float, step: int) -> Ladder:
    """The rungs for this many candidates: from each the share `keep` goes on, rounded up, and two at least.

    Candidates train `1 / keep` times as long from rung to rung. `tokens` are those of the last rung, `step` those of an
    optimizer step; rungs end with whole steps. With no rungs, nothing is trained. The budget is `SLACK` times what the
    plan takes. Raises `RecipeError` if two rungs would end with the same step.

    >>> ladder(8, tokens=800_000, rungs=3, keep=0.5, step=4096)
    Ladder(tokens=(0, 200704, 401408, 802816), places=(8, 8, 4, 2), budget=4014080)
    """
    assert candidates > 0
    # A product of floats that is a little too large would be rounded up by a whole step.
    share, exact = Fraction(str(keep)), Fraction(tokens, step)
    steps: list[int] = []
    while len(steps) < rungs and math.ceil(exact) not in steps[:1]:
        steps.insert(0, math.ceil(exact))
        exact *= share
    if len(steps) < rungs:
        raise RecipeError(
            f"{tokens:,} tokens are too few for {rungs} rungs of a tournament",
            why=f"a step takes {step:,} tokens, and each rung trains at least one step longer than the one before",
            fix="raise search.tournament.tokens, or lower its rungs or batch",
        )
    places = [candidates, *[candidates] * min(rungs, 1)]
    for _ in range(rungs - 1):
        places.append(min(places[-1], max(FEWEST, math.ceil(places[-1] * keep - 1e-9))))
    plan = Ladder((0, *(count * step for count in steps)), tuple(places), 0)
    planned = sum(plan.cost(rung, place) for rung, place in enumerate(places))
    return Ladder(plan.tokens, plan.places, int(SLACK * planned))


def select_candidates(kl_CS: Float64[Tensor, "candidates samples"], ladder: Ladder, rung: int, spent: int) -> Survivors:
    """Which candidates go on from a rung that is not the last. `spent` are the tokens of all candidates so far.

    The planned number goes on, and the next ones in order as long as they are tied with the last place and the budget
    has room for the tokens that they need until the end.

    >>> import torch
    >>> kl_CS = torch.tensor([[0.3, 0.5], [0.1, 0.2], [0.9, 0.8], [0.2, 0.1]], dtype=torch.float64)
    >>> select_candidates(kl_CS, Ladder((0, 10, 20), (4, 4, 2), 60), 1, 40)
    Survivors(kept=(1, 3), gone=(0, 2), ties=(), forced=(0,))
    """
    order = ranking(kl_CS)
    places = min(ladder.places[rung + 1], len(order))
    last = order[places - 1]
    tied: list[int] = []
    for row in order[places:]:
        if not is_tied(kl_CS[row], kl_CS[last]):
            break
        tied.append(row)
    room = [n for n in range(len(tied) + 1) if spent + ladder.left(rung, places + n) <= ladder.budget]
    kept_ties = max(room, default=0)
    kept = order[: places + kept_ties]
    return Survivors(tuple(kept), tuple(order[len(kept) :]), tuple(tied[:kept_ties]), tuple(tied[kept_ties:]))


def leader(kl_CS: Float64[Tensor, "candidates samples"]) -> Leader:
    """The candidate with the lowest KL, and how far the next one is behind, sample by sample."""
    first, *others = ranking(kl_CS)
    if not others:
        return Leader(first, None, None)
    return Leader(first, others[0], difference(kl_CS[others[0]], kl_CS[first]))


def ranking(kl_CS: Float64[Tensor, "candidates samples"]) -> list[int]:
    """The rows by their mean, the lowest first; of equal ones the earlier first."""
    order: Sequence[int] = kl_CS.mean(1).argsort(stable=True).tolist()
    return list(order)


def is_tied(kl_S: Float64[Tensor, " samples"], other_S: Float64[Tensor, " samples"]) -> bool:
    """Whether two candidates are within `TIE` paired standard errors. With a single sample there is no error."""
    gap = difference(kl_S, other_S)
    return abs(gap.value) <= TIE * (0.0 if math.isnan(gap.stderr) else gap.stderr)
