"""A budget and axes as flags say them: `memory<=8GB@8192`, `total=4.5B`, `ffn=frozen`. Does not import torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, get_args

from pydantic import ValidationError

from halve.errors import RecipeError
from halve.recipe.searching import Quantity, Search, SearchedAxis, StoredAs

_KEYS = {"<=": "max", ">=": "min", "=": "about", "<": "max", ">": "min"}
_WHOLE = re.compile(r"\s*[0-9]{1,18}\s*")
_BUDGET = re.compile(
    r"\s*(?P<quantity>\w+)\s*(?P<sign><=|>=|=|<|>)\s*(?P<amount>[^@]*?)\s*"
    r"(?:@\s*(?:(?P<batch>[0-9]{1,12})\s*x\s*)?(?P<context>[0-9]{1,12})\s*(?P<dtype>\w+)?\s*)?"
)


def spoken_search(budget: Sequence[str], axes: Sequence[str], *, candidates: int) -> Search:
    """The section `search` that such flags stand for. Two flags of one quantity give a range.

    After `@` comes the context, before it perhaps the batch (`@4x8192`), behind it perhaps a type (`@8192 float32`).
    A flag without them takes those of the other flag of its quantity. Raises `RecipeError`.

    >>> search = spoken_search(["memory<=8GB@4x8192", "total=50%"], ["hidden=64", "ffn=frozen"], candidates=8)
    >>> search.budget.memory.max, search.budget.memory.batch, search.budget.total.about, search.axes
    ('8GB', 4, '50%', {'hidden': 64, 'ffn': 'frozen'})
    """
    sections = {"budget": _budget(budget), "axes": _freedoms(axes), "candidates": candidates}
    try:
        return Search.model_validate(sections)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if "[" not in str(part))
        unknown = first["type"] == "extra_forbidden"
        raise RecipeError(
            f"these flags make no search: {place}",
            why="this quantity has no such condition" if unknown else first["msg"].removeprefix("Value error, "),
            fix="halve plan MODEL --budget 'memory<=8GB@4x8192 bfloat16' --axis hidden=64;"
            f" types are {', '.join(get_args(StoredAs))}",
        ) from None


def _budget(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Bounds and conditions by quantity."""
    bounds: dict[str, dict[str, str]] = {}
    conditions: dict[str, dict[str, Any]] = {}
    for text in texts:
        match = _BUDGET.fullmatch(text)
        if match is None or match["quantity"] not in get_args(Quantity):
            raise RecipeError(
                f"cannot read --budget {text[:80]!r}",
                why=f"a budget is a quantity ({', '.join(get_args(Quantity))}), a sign (<=, >= or =) and an amount",
                fix='write --budget "memory<=8GB@8192" or --budget "total=4.5B"',
            )
        quantity, key, said = match["quantity"], _KEYS[match["sign"]], bounds.setdefault(match["quantity"], {})
        if key in said:
            raise RecipeError(
                f"--budget bounds {quantity} twice",
                why=f"{said[key][:40]!r} and {match['amount'][:40]!r} are two bounds of one kind ({key})",
                fix="leave out one of them",
            )
        said[key] = match["amount"]
        here: dict[str, Any] = {name: int(match[name]) for name in ("batch", "context") if match[name]}
        here |= {"dtype": match["dtype"]} if match["dtype"] else {}
        if here and conditions.setdefault(quantity, here) != here:
            raise RecipeError(
                f"--budget gives {quantity} under two different conditions",
                why="both bounds of a quantity hold at one batch, one context and one type",
                fix="write the same after @ in both, or leave it out in one",
            )
    return {quantity: {**said, **conditions.get(quantity, {})} for quantity, said in bounds.items()}


def _freedoms(texts: Sequence[str]) -> dict[str, Any]:
    """How each axis may change."""
    freedoms: dict[str, Any] = {}
    for axis, freedom in map(_axis, texts):
        if axis in freedoms:
            raise RecipeError(
                f"--axis names {axis} twice",
                why=f"an axis changes in one way, and {freedoms[axis]!r:.40} and {freedom!r:.40} are two",
                fix="leave out one of them, or list sizes with commas, such as --axis layers=12,16,20",
            )
        freedoms[axis] = freedom
    return freedoms


def _axis(text: str) -> tuple[str, Any]:
    axis, sign, freedom = (part.strip() for part in text.partition("="))
    if not sign or axis not in get_args(SearchedAxis):
        raise RecipeError(
            f"cannot read --axis {text[:80]!r}",
            why=f"an axis is one of {', '.join(get_args(SearchedAxis))}, then = and how it may change",
            fix="write --axis hidden=64, --axis ffn=frozen or --axis layers=12,16,20",
        )
    if "," in freedom:
        return axis, tuple(_whole(part) for part in freedom.split(","))
    return axis, _whole(freedom)


def _whole(text: str) -> int | str:
    """The number that a text is, or the text, which pydantic refuses where a number is due."""
    return int(text) if _WHOLE.fullmatch(text) else text
