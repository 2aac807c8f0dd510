"""The verb `halve cost`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halve.cli import flags
from halve.cli.flags import AsJson
from halve.cli.hints import say_next
from halve.errors import PlanError
from halve.recipe.read import load_recipe

if TYPE_CHECKING:
    from halve.preflight.family_cost import FamilyCost


def cost(
    recipe: Annotated[
        Path | None,
        typer.Argument(
            metavar="RECIPE", help="A YAML recipe. Without one, give --sizes and --tokens.", callback=flags.place
        ),
    ] = None,
    *,
    scratch: Annotated[str, typer.Option(help="Tokens that training from scratch takes for each size, such as 8T.")],
    sizes: Annotated[
        str | None, typer.Option(help="Without a recipe: parameters, largest first, such as 15.6B,8.3B,4.2B.")
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Without a recipe: training tokens of each smaller size, such as 94B.")
    ] = None,
    device: Annotated[str, typer.Option(help="The GPU, such as H100, A100 or B200.")] = "H100",
    mfu: Annotated[
        float, typer.Option(min=0.01, max=1.0, callback=flags.finite, help="Share of its peak FLOP/s.")
    ] = 0.4,
    price: Annotated[
        float | None,
        typer.Option(min=0.0, callback=flags.finite, help="Price of an hour of one such GPU, in any currency."),
    ] = None,
    json_: AsJson = False,
) -> None:
    """Compare what a family costs with training from scratch.

    The family is the teacher of a recipe and all its students, or a list of sizes. No weights are read.
    """
    from halve.cut.plan.sizes import parse_count
    from halve.preflight.device import gpu
    from halve.report.costs import cost_tables
    from halve.report.tables import as_json

    family = _family(recipe, sizes, tokens)
    scratch_tokens = parse_count(scratch, given_as="--scratch", of="token")
    costs = family(scratch_tokens=scratch_tokens, device=gpu(device, mfu), price=price)
    if json_:
        as_json(costs.to_json())
        return
    cost_tables(costs)
    if recipe is not None:
        say_next(f"halve run {recipe} --dry-run")


def _family(recipe: Path | None, sizes: str | None, tokens: str | None) -> Callable[..., FamilyCost]:
    """The family that is meant, for which only the circumstances are missing."""
    from halve.cut.plan.sizes import parse_count
    from halve.model.checkpoint import Checkpoint
    from halve.preflight.family_cost import cost_of_recipe, cost_of_sizes

    if recipe is not None:
        if sizes is not None or tokens is not None:
            raise _unclear("a recipe has its own sizes and tokens", "leave out --sizes and --tokens")
        loaded = load_recipe(recipe)
        return partial(cost_of_recipe, loaded, Checkpoint.open(loaded.model))
    counts = [parse_count(size.strip(), given_as="--sizes") for size in (sizes or "").split(",") if size.strip()]
    if len(counts) < 2 or tokens is None:
        raise _unclear(
            "without a recipe it takes at least two sizes, and the tokens of the smaller ones",
            "halve cost --sizes 15.6B,8.3B,4.2B --tokens 94B --scratch 3.8T",
        )
    if counts != sorted(counts, reverse=True):
        raise _unclear("the teacher, which is the largest, comes first", "order --sizes from large to small")
    return partial(cost_of_sizes, counts, tokens=parse_count(tokens, given_as="--tokens", of="token"))


def _unclear(why: str, fix: str) -> PlanError:
    return PlanError("cannot tell the family that is meant", why=why, fix=fix)
