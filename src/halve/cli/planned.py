"""What `halve plan` shows: shapes with their counts, costs and the runtimes that open them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halve.cli.hints import say_next
from halve.errors import PlanError
from halve.recipe.spoken import spoken_search

if TYPE_CHECKING:
    from halve.anatomy import Anatomy
    from halve.cut.plan.sizes import Candidate


def budget(
    model: str,
    bounds: Sequence[str],
    axes: Sequence[str],
    *,
    given: Sequence[str],
    most: int,
    timings: Path | None,
    json_: bool,
) -> None:
    """List shapes of the front under a budget. Axes that are not proved stay whole.

    Raises `PlanError` if sizes are given (`given`) as well, and for a budget that cannot be met.
    """
    from halve.cut.proof.prove import prove
    from halve.model.checkpoint import Checkpoint
    from halve.search.candidates import candidates_of, look
    from halve.search.latency import TimeTable, needed
    from halve.search.quantities import in_words, price

    if given or not bounds:
        raise PlanError(
            f"{given[0]} and --budget are two ways to say one thing" if given else "--axis needs a budget",
            why="--budget says what a shape may cost, and its sizes follow",
            fix=f"leave {given[0]} out, or --budget" if given else 'add --budget "total=50%"',
        )
    search = spoken_search(bounds, axes, candidates=most)
    assert search.budget is not None
    anatomy = Checkpoint.open(model).anatomy
    proof = prove(anatomy, reopen=False)
    clock = TimeTable.measured(anatomy, search, path=timings) if needed(search.budget) else None
    seen = look(anatomy, search.budget, search, clock=clock, refused=proof.refusals)
    shapes: Sequence[Candidate] = candidates_of(seen, most)
    costs: dict[str, list[float]] = {
        r.quantity: [price(anatomy, shape.arch, r.quantity, r.limits, clock) for shape in shapes] for r in seen.ranges
    }
    # the counts of parameters and FLOPs are columns of the table in any case
    shown = {
        r.quantity.replace("_", " "): [in_words(r.quantity, value) for value in costs[r.quantity]]
        for r in seen.ranges
        if r.quantity not in ("total", "non_embedding", "flops")
    }
    title = f"{len(shapes)} shapes; the front has {len(seen.front)}, of {len(seen.prices.space):,} legal ones"
    show_shapes(anatomy, shapes, title=title, json_=json_, costs=costs, shown=shown)


def show_shapes(
    anatomy: Anatomy,
    shapes: Sequence[Candidate],
    *,
    title: str,
    json_: bool,
    costs: Mapping[str, Sequence[float]] | None = None,
    shown: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Print shapes as a table or as JSON. `costs` are what a budget bounds, `shown` those of them that get a column.

    Raises `AnatomyError` if an axis that a shape cuts is not proved.
    """
    from halve.anatomy.runtimes import runtimes
    from halve.cut.proof.prove import prove
    from halve.report import tables as show

    for shape in shapes:
        prove(anatomy, reopen=False).demand(anatomy.sizes, shape.arch)
    verdicts = [[(r.name, r.opens, r.remedy) for r in runtimes(anatomy, s.arch, s.kept_layers)] for s in shapes]
    if not json_:
        show.candidates_table(anatomy, shapes, verdicts, title=title, costs=shown or {})
        say_next("put these sizes under prune: in a recipe, then halve run")
        return
    listed: list[dict[str, Any]] = [
        {
            "arch": shape.arch.sizes,
            "counts": vars(shape.counts),
            "kept_layers": shape.kept_layers,
            "costs": {quantity: values[number] for quantity, values in (costs or {}).items()},
            "runtimes": [{"name": name, "opens": opens, "remedy": remedy} for name, opens, remedy in verdict],
        }
        for number, (shape, verdict) in enumerate(zip(shapes, verdicts, strict=True))
    ]
    show.as_json({"family": anatomy.family, "teacher": anatomy.sizes.sizes, "candidates": listed})
