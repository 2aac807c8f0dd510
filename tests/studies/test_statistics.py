"""Statistics over seeds against figures worked out by hand."""

from __future__ import annotations

import math

import pytest

from halve.studies.statistics import differences, mean, standard_error, verdict


def test_the_mean() -> None:
    assert mean([2.0, 4.0, 9.0]) == 5.0


def test_the_standard_error() -> None:
    # around 5: -3, -1, 4; squares 9 + 1 + 16 = 26; variance 26 / 2 = 13; 13 / 3 under the root
    assert standard_error([2.0, 4.0, 9.0]) == pytest.approx(math.sqrt(13 / 3))
    assert standard_error([7.0, 7.0]) == 0.0
    assert standard_error([7.0]) is None


def test_pairs_leave_out_what_seeds_share() -> None:
    easy, hard = [1.0, 11.0, 101.0], [2.0, 13.0, 102.0]
    effects = differences(hard, easy)
    assert effects == [1.0, 2.0, 1.0]
    # around 4/3: squares 1/9 + 4/9 + 1/9 = 2/3; variance 1/3; 1/9 under the root
    assert standard_error(effects) == pytest.approx(1 / 3)
    assert verdict(effects) == "inconclusive"  # t is 4, two degrees of freedom ask for 4.303
    with pytest.raises(ValueError, match=r"zip\(\) argument 2 is longer"):
        differences([1.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("effects", "want"),
    [
        ([1.0, 2.0, 0.5, 0.5], "inconclusive"),  # t is 2.83, three degrees of freedom ask for 3.182
        ([1.0, 2.0, 0.9, 0.9], "held"),  # t is 4.47
        ([-1.0, -2.0, -0.9, -0.9], "reversed"),
        ([3.0, 1.0], "inconclusive"),  # t is 2, one degree of freedom asks for 12.7
        ([0.5, -0.5], "inconclusive"),
        ([0.0, 0.0], "inconclusive"),
        ([5.0], "inconclusive"),  # one seed knows no error
        ([0.2, 0.2, 0.2], "held"),
    ],
)
def test_the_verdict(effects: list[float], want: str) -> None:
    assert verdict(effects) == want
