"""Statistics over seeds: plain numbers in, plain numbers out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from scipy.stats import t

Verdict = Literal["held", "reversed", "inconclusive"]


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean.

    >>> mean([1.0, 2.0, 6.0])
    3.0
    """
    return math.fsum(values) / len(values)


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean, s / sqrt(n) with the n - 1 estimate of s; None for fewer than two values.

    >>> standard_error([1.0, 3.0, 5.0, 3.0, 3.0])  # s = sqrt(2), n = 5
    0.6324555320336759
    """
    count = len(values)
    if count < 2:
        return None
    middle = mean(values)
    variance = math.fsum((value - middle) ** 2 for value in values) / (count - 1)
    return math.sqrt(variance / count)


def differences(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """`first` minus `second`, seed by seed. Effects that both share, such as an easy order of the text, cancel.

    >>> differences([3.0, 5.0], [1.0, 4.0])
    [2.0, 1.0]
    """
    return [a - b for a, b in zip(first, second, strict=True)]


def verdict(effects: Sequence[float]) -> Verdict:
    """The verdict on the claim that the effects are above zero, one effect per seed.

    Inconclusive unless the mean differs from zero by Student's two-sided t-test at 5 %. One seed is always
    inconclusive. Three seeds have two degrees of freedom, so the mean must be 4.3 standard errors away from zero.

    >>> verdict([1.0, 1.1, 0.9]), verdict([-1.0, -1.1, -0.9]), verdict([1.0, 2.0, 1.0])
    ('held', 'reversed', 'inconclusive')
    """
    effect, error = mean(effects), standard_error(effects)
    if error is None or effect == 0 or abs(effect) <= error * float(t.ppf(0.975, len(effects) - 1)):
        return "inconclusive"
    return "held" if effect > 0 else "reversed"
