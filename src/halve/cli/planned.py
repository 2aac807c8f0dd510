"""What `halve plan` shows: shapes with their counts, costs and the runtimes that open them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halve.cli.hints import say_next, say_note
from halve.errors import PlanError
from halve.recipe.read import load_recipe
from halve.recipe.schema import Device, Recipe, Search
from halve.recipe.searching import FlopsLimits, Limits, ShapeBudget
from halve.recipe.spoken import spoken_search

if TYPE_CHECKING:
    from halve.anatomy import Anatomy
    from halve.cut.plan.sizes import Candidate

RECIPE_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Listing:
    """Shapes to show, and what a budget bounds of each of them."""

    title: str
    shapes: Sequence[Candidate]
    costs: Mapping[str, Sequence[float]] = field(default_factory=dict)
    shown: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """The costs that are a column of their own, in words."""


def spoken(
    model: str,
    bounds: Sequence[str],
    axes: Sequence[str],
    *,
    given: Sequence[str],
    most: int,
    context: int,
    timings: Path | None,
    json_: bool,
) -> None:
    """List shapes under the budget that flags or a recipe (`model` is its file) give, with counts at `context`.

    Raises `PlanError` if sizes are given (`given`) as well, for a recipe without a search, and for a budget that cannot
    be met.
    """
    from halve.model.checkpoint import Checkpoint
    from halve.search.positions import beyond_positions
    from halve.search.searched import removable_search, searched_anatomy

    device: Device = "auto"
    if model.endswith(RECIPE_SUFFIXES):
        recipe = load_recipe(model)
        if bounds or axes or given or recipe.search is None:
            raise _not_of_a_recipe(recipe, [*given, *["--budget"] * bool(bounds), *["--axis"] * bool(axes)])
        anatomy, device = Checkpoint.open(recipe.model).anatomy, recipe.device
        search = removable_search(recipe, searched_anatomy(recipe, anatomy))
    else:
        if given or not bounds:
            raise PlanError(
                f"{given[0]} and --budget are two ways to say one thing" if given else "--axis needs a budget",
                why="--budget says what a shape may cost, and its sizes follow",
                fix=f"leave {given[0]} out, or --budget" if given else 'add --budget "total=50%"',
            )
        search = spoken_search(bounds, axes, candidates=most)
        anatomy = Checkpoint.open(model).anatomy
    budgets = list(filter(None, (search.budget, *search.targets)))
    listings = [
        _listed(anatomy, budget, search, most, timings=timings, device=device, context=context) for budget in budgets
    ]
    show_shapes(anatomy, listings, json_=json_)
    for note in beyond_positions(anatomy, *budgets):
        say_note(note)


def _not_of_a_recipe(recipe: Recipe, flags: Sequence[str]) -> PlanError:
    if recipe.search is None:
        return PlanError(
            f"recipe {recipe.name} has no budget to list shapes for",
            why="it has no section search, and halve plan reads no other one",
            fix=f'add search: or halve plan {recipe.model} --budget "total=50%"',
        )
    return PlanError(
        f"{flags[0]} is not combined with a recipe",
        why="the recipe's section search says what a shape may cost",
        fix=f"leave {flags[0]} out, or halve plan {recipe.model} with it",
    )


def _listed(
    anatomy: Anatomy,
    budget: ShapeBudget,
    search: Search,
    most: int,
    *,
    timings: Path | None,
    device: Device,
    context: int,
) -> Listing:
    """Shapes spread over the front under one budget. Axes that are not proved stay whole."""
    from halve.cut.proof.prove import prove
    from halve.search.candidates import candidates_of, look
    from halve.search.latency import TimeTable, needed
    from halve.search.quantities import in_words, price

    clock = TimeTable.measured(anatomy, search, path=timings, device=device) if needed(budget) else None
    seen = look(anatomy, budget, search, clock=clock, refused=prove(anatomy, reopen=False).refusals)
    order, count = seen.prices.space.order, partial(anatomy.ledger.count, context=context)
    shapes = [
        replace(shape, counts=count(shape.arch, kept_layers=order[: shape.arch.layers]))
        for shape in candidates_of(seen, most)
    ]
    costs: dict[str, list[float]] = {
        r.quantity: [
            price(anatomy, shape.arch, r.quantity, r.limits, clock, kept_layers=search.layers.keep) for shape in shapes
        ]
        for r in seen.ranges
    }
    # the table has columns of both counts of parameters, and of the FLOPs at `context`
    shown = {
        _title(r.quantity, r.limits): [in_words(r.quantity, value) for value in costs[r.quantity]]
        for r in seen.ranges
        if r.quantity not in ("total", "non_embedding")
        and not (isinstance(r.limits, FlopsLimits) and r.limits.context == context)
    }
    listed = f"{len(shapes)} shape{'s' * (len(shapes) != 1)}"
    title = f"{listed}; the front has {len(seen.front)}, of {len(seen.prices.space):,} legal ones"
    return Listing(title, shapes, costs, shown)


def _title(quantity: str, limits: Limits) -> str:
    """The title of a quantity's column. FLOPs name their context, which is not that of the column of counts."""
    return f"FLOPs at {limits.context}" if isinstance(limits, FlopsLimits) else quantity.replace("_", " ")


def show_shapes(anatomy: Anatomy, listings: Sequence[Listing], *, json_: bool) -> None:
    """Print tables of shapes, or JSON: an object, or a list of objects for several budgets.

    Raises `AnatomyError` if an axis that a shape cuts is not proved.
    """
    from halve.anatomy.runtimes import runtimes
    from halve.cut.proof.prove import prove
    from halve.report import tables as show

    printed: list[dict[str, Any]] = []
    for listing in listings:
        for shape in listing.shapes:
            prove(anatomy, reopen=False).demand(anatomy.sizes, shape.arch)
        verdicts = [
            [(r.name, r.opens, r.remedy) for r in runtimes(anatomy, shape.arch, shape.kept_layers)]
            for shape in listing.shapes
        ]
        if not json_:
            show.candidates_table(anatomy, listing.shapes, verdicts, title=listing.title, costs=listing.shown)
        shapes = [
            {
                "arch": shape.arch.sizes,
                "counts": vars(shape.counts),
                "kept_layers": shape.kept_layers,
                "costs": {quantity: values[number] for quantity, values in listing.costs.items()},
                "runtimes": [{"name": name, "opens": opens, "remedy": remedy} for name, opens, remedy in verdict],
            }
            for number, (shape, verdict) in enumerate(zip(listing.shapes, verdicts, strict=True))
        ]
        printed.append({"family": anatomy.family, "teacher": anatomy.sizes.sizes, "candidates": shapes})
    if json_:
        show.as_json(printed[0] if len(printed) == 1 else printed)
    else:
        say_next("put these sizes under prune: in a recipe, then halve run")
