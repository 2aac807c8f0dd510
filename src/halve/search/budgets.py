"""A budget against a teacher: shares become numbers, and contradictions are named."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from halve.anatomy import Anatomy
from halve.cut.plan.sizes import BUDGET_TOLERANCE
from halve.errors import PlanError
from halve.recipe.searching import Limits, MemoryLimits, Quantity, ShapeBudget, TimeLimits
from halve.search.quantities import TIMED, Clock, Prices, Reals, in_words
from halve.search.space import Space


@dataclass(frozen=True)
class Range:
    """What a quantity may be, in its own unit."""

    quantity: Quantity
    limits: Limits
    low: float
    high: float
    goal: float
    """What shapes should come close to: the middle of `about`, otherwise the bound up to which a model may grow."""

    def __str__(self) -> str:
        words = [f"{self.quantity} {sign} {in_words(self.quantity, value)}" for sign, value in self._bounds]
        return " and ".join(words) + _conditions(self.limits)

    @property
    def _bounds(self) -> list[tuple[str, float]]:
        if self.limits.about is not None:
            return [("about", self.goal)]
        bounds = [(">=", self.low), ("<=", self.high)]
        return [(sign, value) for sign, value in bounds if 0 < value < math.inf]

    def holds(self, values: Reals) -> npt.NDArray[np.bool_]:
        """Whether each value is in the range."""
        return (self.low <= values) & (values <= self.high)

    def away(self, values: Reals) -> Reals:
        """How far each value is from the goal, as a share of the goal."""
        return np.abs(values / self.goal - 1)

    def missed(self, values: Reals) -> Reals:
        """How far each value is outside the range, as the logarithm of a factor; 0 inside."""
        under = np.log(self.low / values) if self.low > 0 else np.zeros_like(values)
        over = np.log(values / self.high) if self.high < math.inf else np.zeros_like(values)
        return np.maximum(0.0, np.maximum(under, over))


def resolve(
    anatomy: Anatomy, budget: ShapeBudget, *, clock: Clock | None = None, timed: bool = True
) -> tuple[Range, ...]:
    """The ranges of a budget for a teacher. Without `timed`, quantities that have to be measured are left out.

    Raises `PlanError` where the bounds of a quantity contradict each other, and where all of the teacher is allowed.
    """
    teacher = Prices(Space.whole(anatomy), clock)
    ranges = []
    for quantity, limits in budget.bounds.items():
        if quantity in TIMED and not timed:
            continue
        now = float(teacher.values(quantity, limits, anatomy.sizes.layers)[0, 0])
        ranges.append(_range(quantity, limits, now))
    return tuple(ranges)


def _range(quantity: Quantity, limits: Limits, now: float) -> Range:
    amounts = {key: amount.of(now) for key, amount in limits.given.items()}
    if "about" in amounts:
        goal = amounts["about"]
        return Range(quantity, limits, goal * (1 - BUDGET_TOLERANCE), goal * (1 + BUDGET_TOLERANCE), goal)
    low, high = amounts.get("min", 0.0), amounts.get("max", math.inf)
    if low > high:
        raise PlanError(
            f"search.budget.{quantity}: min {limits.min} is above max {limits.max}",
            why=f"the teacher has {in_words(quantity, now)}, so min is {in_words(quantity, low)}"
            f" and max {in_words(quantity, high)}",
            fix=f"lower the min, now {limits.min}, or raise the max, now {limits.max}",
        )
    # a model may grow until it costs the most, or is as slow as is allowed
    grows_to = (low or high) if quantity == "throughput" or high == math.inf else high
    return Range(quantity, limits, low, high, grows_to)


def _conditions(limits: Limits) -> str:
    if isinstance(limits, MemoryLimits | TimeLimits):
        return f" (batch {limits.batch}, context {limits.context:,})"
    return ""


def budget_in_words(ranges: Sequence[Range]) -> str:
    """All ranges of a budget."""
    return ", ".join(map(str, ranges))
