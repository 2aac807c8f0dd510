"""How many calibration tokens a refit gets, and what each of them is for.

A refit has as many unknowns a row as its matrix has channels, so that it needs tokens in proportion to the widest of
them. They are counted in tokens because samples differ in length. Some are held back to choose the ridges, and some
others to compare what came out with the plain cut.

docs/decisions/0023-refit-tokens.md has the measurements behind the numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from halve.anatomy import Arch
from halve.model.reference import affordable
from halve.recipe.schema import Prune

TOKENS_A_CHANNEL: Final = 32
FEWEST_TOKENS: Final = 32_768
HELD_SHARE: Final = 0.2
COMPARED_TOKENS: Final = 4_096
LEAST_COMPARED: Final = 8
"""Samples: a mean over fewer says little of its error."""
TRIED_A_CHANNEL: Final = 4
FEWEST_TRIED: Final = 2_048
"""A trial compares shapes on an eighth of the tokens: what is scarce for one is scarce for all."""
BY_HAND: Final = 8
"""Samples of a trial where `refit_samples` are given by hand."""


@dataclass(frozen=True)
class Budget:
    """Samples, one after another: those that are fitted, those that choose the ridges, those that compare."""

    fitted: int
    held: int = 0
    compared: int = 0

    @property
    def used(self) -> int:
        """Samples that the cut is made on."""
        return self.fitted + self.held


def refit_budget(prune: Prune, sizes: Arch, *, context: int, available: int | None = None) -> Budget:
    """What `prune` gives a refit of a model of these sizes, of at most so many samples of `context` tokens.

    Where there are too few, a quarter is compared at most and a fifth of the rest held; of fewer than four samples
    none is compared. `refit_samples` by hand, and a ridge by hand, hold nothing back; the former compares nothing.

    >>> sizes = Arch(layers=2, hidden=576, ffn=1536, heads=9, kv_heads=3, head_dim=64, vocab=49152)
    >>> refit_budget(Prune(hidden=1), sizes, context=512)
    Budget(fitted=77, held=19, compared=8)
    >>> refit_budget(Prune(hidden=1, refit_samples=128), sizes, context=512)
    Budget(fitted=128, held=0, compared=0)
    """
    if prune.refit_samples is not None:
        return Budget(prune.refit_samples if available is None else min(prune.refit_samples, available))
    used = max(2, -(-refit_tokens(prune, sizes) // context))
    wished = max(LEAST_COMPARED, -(-COMPARED_TOKENS // context))
    compared = affordable(wished, context, sizes.vocab) if prune.refit != "none" else 0
    if available is not None and used + compared > available:
        compared = min(compared, available // 4)
        used = min(used, available - compared)
    if prune.refit == "none" or prune.ridge != "auto" or used < 2:
        return Budget(used, 0, compared)
    held = max(1, round(HELD_SHARE * used))
    return Budget(used - held, held, compared)


def samples_needed(prune: Prune, sizes: Arch, context: int) -> int:
    """All the samples that a cut can use."""
    budget = refit_budget(prune, sizes, context=context)
    return budget.used + budget.compared


def trial_budget(prune: Prune, sizes: Arch, *, context: int, available: int) -> Budget:
    """What a trial gives each shape: on `compared` samples all shapes are measured, which none is fitted on.

    >>> sizes = Arch(layers=2, hidden=576, ffn=1536, heads=9, kv_heads=3, head_dim=64, vocab=49152)
    >>> trial_budget(Prune(hidden=1), sizes, context=512, available=1024)
    Budget(fitted=10, held=2, compared=8)
    >>> trial_budget(Prune(hidden=1, refit_samples=128), sizes, context=512, available=1024)
    Budget(fitted=8, held=0, compared=8)
    """
    if prune.refit_samples is not None:
        compared = min(BY_HAND, available // 3)
        return Budget(min(prune.refit_samples, BY_HAND, available - compared), 0, compared)
    wished = max(LEAST_COMPARED, -(-COMPARED_TOKENS // context))
    compared = min(affordable(wished, context, sizes.vocab), available // 3)
    most = refit_budget(prune, sizes, context=context).used
    tokens = max(FEWEST_TRIED, TRIED_A_CHANNEL * _widest(sizes))
    used = max(1, min(most, -(-tokens // context), available - compared))
    held = round(HELD_SHARE * used) if used > 1 and prune.refit != "none" and prune.ridge == "auto" else 0
    return Budget(used - held, held, compared)


def refit_tokens(prune: Prune, sizes: Arch) -> int:
    """Tokens that a refit is made on, held ones included."""
    if prune.refit_tokens != "auto":
        return prune.refit_tokens
    return max(FEWEST_TOKENS, TOKENS_A_CHANNEL * _widest(sizes))


def _widest(sizes: Arch) -> int:
    return max(sizes.hidden, sizes.ffn, sizes.heads * sizes.head_dim)
