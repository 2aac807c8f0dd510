"""Scores, paired differences and McNemar's test, against other ways to compute them."""

from __future__ import annotations

import math
import random

import pytest
import torch
from scipy.stats import binomtest

from halve.evaluation.results import mean_score, paired


def test_verdicts_have_a_binomial_error_and_other_values_that_of_their_spread() -> None:
    verdicts = [1.0, 0.0, 0.0, 1.0, 1.0]
    assert mean_score(verdicts).value == pytest.approx(0.6)
    assert mean_score(verdicts).stderr == pytest.approx(math.sqrt(0.6 * 0.4 / 5))
    shares = [0.25, 0.5, 1.0]
    assert mean_score(shares).stderr == pytest.approx(float(torch.tensor(shares).std()) / math.sqrt(3))


def test_pairs_are_surer_than_two_separate_scores() -> None:
    draw = random.Random(0)
    ours = [float(draw.random() < 0.6) for _ in range(400)]
    theirs = [value if draw.random() < 0.9 else 1.0 - value for value in ours]
    difference = paired(ours, theirs)
    apart = math.hypot(mean_score(ours).stderr, mean_score(theirs).stderr)
    assert difference["value"] == pytest.approx(mean_score(ours).value - mean_score(theirs).value)
    assert difference["stderr"] < apart / 2


@pytest.mark.parametrize(("b", "c"), [(0, 0), (3, 3), (12, 4), (0, 9), (40, 61)])
def test_mcnemar_is_the_exact_binomial_test(b: int, c: int) -> None:
    ours, theirs = [1.0] * b + [0.0] * c + [1.0, 0.0], [0.0] * b + [1.0] * c + [1.0, 0.0]
    test = paired(ours, theirs)["mcnemar"]
    assert (test["only_ours"], test["only_theirs"]) == (b, c)
    expected = binomtest(b, b + c).pvalue if b + c else 1.0
    assert test["p"] == pytest.approx(expected, rel=1e-12)


def test_one_item_has_no_error_and_shares_no_test() -> None:
    assert paired([1.0], [0.0])["stderr"] is None
    assert "mcnemar" not in paired([0.5, 1.0], [0.0, 1.0])
