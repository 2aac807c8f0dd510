"""Calibration tokens: what a recipe asks for, in samples, and what little text leaves of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halve.anatomy import Arch
from halve.cut.repair.budget import Budget, refit_budget
from halve.recipe.schema import Prune

SMALL = Arch(layers=2, hidden=64, ffn=172, heads=8, kv_heads=4, head_dim=8, vocab=512)
WIDE = Arch(layers=32, hidden=4096, ffn=14336, heads=32, kv_heads=8, head_dim=128, vocab=128256)


@pytest.mark.parametrize(("sizes", "tokens"), [(SMALL, 32_768), (WIDE, 32 * 14336)])
def test_tokens_follow_the_widest_matrix(sizes: Arch, tokens: int) -> None:
    assert refit_budget(Prune(hidden=1), sizes, context=512).used == tokens // 512


def test_the_same_tokens_are_more_samples_of_a_shorter_context() -> None:
    short, long = (refit_budget(Prune(hidden=1), SMALL, context=context) for context in (128, 1024))
    assert short.used * 128 == long.used * 1024


def test_samples_by_hand_are_all_fitted_and_nothing_is_compared() -> None:
    assert refit_budget(Prune(hidden=1, refit_samples=7), WIDE, context=512) == Budget(7)
    assert refit_budget(Prune(hidden=1, refit_samples=7), WIDE, context=512, available=5) == Budget(5)


def test_a_ridge_by_hand_holds_nothing_back_but_is_compared() -> None:
    found = refit_budget(Prune(hidden=1, ridge=0.1), SMALL, context=512)
    assert (found.held, found.compared) == (0, 8)


def test_without_a_refit_there_is_nothing_to_choose_or_to_compare() -> None:
    found = refit_budget(Prune(hidden=1, refit="none"), SMALL, context=512)
    assert found == Budget(64)


@given(tokens=st.integers(1, 10**6), context=st.integers(2, 4096), available=st.integers(2, 3000))
def test_never_more_than_there_is_and_something_is_always_fitted(tokens: int, context: int, available: int) -> None:
    found = refit_budget(Prune(hidden=1, refit_tokens=tokens), WIDE, context=context, available=available)
    assert found.used + found.compared <= available
    assert found.fitted >= 1
    assert found.held >= 1
    assert found.compared <= max(available // 4, 8, -(-8192 // context))
    assert available < 4 or found.compared >= 1
