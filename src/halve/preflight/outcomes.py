"""What becomes of a recipe with each of the shapes that its trials and its search may choose.

A plan shows one shape for each round. Another may be chosen hours later, and what follows has to fit it as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from halve.anatomy import Anatomy, Arch
from halve.errors import HalveError
from halve.model.checkpoint import Checkpoint
from halve.preflight.sizes import PlannedRound, planned_rounds
from halve.preflight.work import trials
from halve.recipe.rounds import rounds
from halve.recipe.schema import Recipe
from halve.search.searched import shapes_to_try

SMALLEST_ALONG = ("layers", "hidden", "ffn", "heads", "kv_heads")


def require_every_outcome(
    recipe: Recipe,
    teacher: Checkpoint,
    require: Callable[[Sequence[PlannedRound]], None],
    *,
    axes: Sequence[str] = SMALLEST_ALONG,
) -> None:
    """Raise what planning the rounds or `require` raises, for the plan or for a shape that may be chosen instead.

    Of all shapes the smallest along each of `axes` are planned, because what does not fit is larger than what it is cut
    from. With heads among the axes, so is one of each choice of heads and groups, which have to divide each other.
    Shapes that are known only once times are measured are left out.
    """
    found = planned_rounds(recipe, teacher)
    require(found)
    for number, (part, shape, tried) in enumerate(zip(rounds(recipe), found, trials(recipe, found), strict=True), 1):
        if part.search is not None and part.search.method == "additive":
            tried = tuple(candidate.arch for candidate in shapes_to_try(part, shape.before))
        for arch in _telling(shape.student, tried, axes):
            try:
                require(planned_rounds(recipe, teacher, chosen={number: arch}))
            except HalveError as error:
                raise type(error)(
                    f"{error.what}, if the {'trial' if part.search is None else 'search'} chooses {arch}",
                    why=error.why,
                    fix=f"{error.fix}; or {_narrowed(part, number)}",
                ) from error


def _narrowed(part: Recipe, number: int) -> str:
    if part.search is not None:
        return "narrow search.axes and search.layers, so that every candidate fits"
    return f"set prune.shape: width{f' in round {number}' if number > 1 else ''}, by which the sizes are known"


def _telling(anatomy: Anatomy, shapes: Sequence[Arch], axes: Iterable[str]) -> list[Arch]:
    """The shapes that tell of all others, each once."""
    if not shapes:
        return []
    by_size = sorted(shapes, key=lambda arch: anatomy.ledger.count(arch).params)
    found = dict.fromkeys(min(by_size, key=lambda arch: getattr(arch, axis)) for axis in axes)
    if "heads" in axes:
        found |= dict.fromkeys({(arch.heads, arch.kv_heads): arch for arch in reversed(by_size)}.values())
        found[by_size[0]] = None
    return list(found)
