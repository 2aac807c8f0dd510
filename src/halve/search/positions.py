"""Contexts of a budget that are longer than the model's: what cannot be, and what has to be said."""

from __future__ import annotations

from halve.anatomy import Anatomy
from halve.anatomy.configs import context_length
from halve.errors import PlanError
from halve.recipe.searching import ShapeBudget, TimeLimits


def require_positions(anatomy: Anatomy, budget: ShapeBudget) -> None:
    """Raise `PlanError` for a time at a longer context than the model's."""
    limit = context_length(anatomy.config)
    for quantity, limits in budget.bounds.items():
        if limit is not None and isinstance(limits, TimeLimits) and limits.context > limit:
            raise PlanError(
                f"{quantity} at context {limits.context} cannot be timed: this {anatomy.family} has less",
                why=f"its config allows {limit} tokens",
                fix=f"set its context to {limit} or less; in a flag, @{limits.batch}x{limit} behind the amount",
            )


def require_fillable(anatomy: Anatomy, budget: ShapeBudget) -> None:
    """Raise `PlanError` for a cache that is longer than the positions that a model has learned."""
    limit, limits = context_length(anatomy.config), budget.memory
    if limit is not None and limits is not None and limits.context > limit and _learned(anatomy, limit):
        raise PlanError(
            f"no cache of this {anatomy.family} has {limits.context:,} tokens, as the context of memory says",
            why=f"its positions are learned, each is a row of a table, and there are {limit}",
            fix=f"set its context to {limit} or less; in a flag, @{limits.batch}x{limit} behind the amount",
        )


def beyond_positions(anatomy: Anatomy, *budgets: ShapeBudget) -> tuple[str, ...]:
    """The notes on caches that are longer than the config's positions, which a stretched model may fill."""
    limit = context_length(anatomy.config)
    contexts = dict.fromkeys(budget.memory.context for budget in budgets if budget.memory is not None)
    return tuple(
        f"memory is counted at a context of {context:,}, and the config allows {limit:,} positions: the cache is as"
        " large only if the model is extended to that context"
        for context in contexts
        if limit is not None and context > limit
    )


def _learned(anatomy: Anatomy, positions: int) -> bool:
    """Whether an embedding has a row for each position: its rows are no axis."""
    rows = (anatomy.params[name][0] for name in anatomy.embeddings)
    return any(not expr.axes and expr.size({}) >= positions for expr in rows)
