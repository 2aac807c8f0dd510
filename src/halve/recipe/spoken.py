"""A budget and axes as flags say them: `memory<=8GB@8192`, `total=4.5B`, `ffn=frozen`. Does not import torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

from pydantic import ValidationError

from halve.errors import RecipeError
from halve.recipe.amounts import parse_amount
from halve.recipe.searching import CROSSED, Limits, Quantity, Search, SearchedAxis, ShapeBudget, StoredAs

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

_KEYS = {"<=": "max", ">=": "min", "=": "about", "<": "max", ">": "min"}
_SIGNS = {"max": "<=", "min": ">=", "about": "="}
_CONDITIONS = ("batch", "context", "dtype")
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
    sections: dict[str, Any] = {"budget": _budget(budget), "axes": _freedoms(axes), "candidates": candidates}
    try:
        return Search.model_validate(sections)
    except ValidationError as error:
        raise _refusal(error.errors()[0], budget, sections["budget"]) from None


def _refusal(error: ErrorDetails, budget: Sequence[str], bounds: Mapping[str, Mapping[str, Any]]) -> RecipeError:
    """What to say where flags can be read and make no search."""
    section, name, key = [*(str(part) for part in error["loc"] if "[" not in str(part)), "", "", ""][:3]
    why = error["msg"].removeprefix("Value error, ")
    if section == "axes":
        fix = f"write --axis {name}=64 (steps), {name}=frozen or {name}=12,16,20"
        return RecipeError(f"cannot read --axis {name}", why=why, fix=fix)
    if name not in get_args(Quantity):
        return RecipeError("these flags make no search", why=why, fix='write --budget "total=50%"')
    flags = " and ".join(f'--budget "{text[:80]}"' for text in budget if _quantity(text) == name)
    fix = f"write {_mended(name, bounds[name])}"
    if error["type"] == CROSSED:
        least, most = (f'"{name}{sign}{error["ctx"][bound]}"' for bound, sign in (("min", ">="), ("max", "<=")))
        return RecipeError(f"{flags} contradict each other", why=why, fix=f"lower {least} or raise {most}")
    if error["type"] == "extra_forbidden":
        has = " and ".join(_conditions(name))
        why = f"{name} has no {key}, only {has}" if has else f"{name} has no {key}, and nothing else behind @"
    elif key in _CONDITIONS:
        fix = f"give another {key} behind @" + f"; types are {', '.join(get_args(StoredAs))}" * (key == "dtype")
    elif "about" in bounds[name] and len(bounds[name]) > 1:
        fix = f'leave out "{name}={bounds[name]["about"]}" or the others'
    elif not all(bounds[name].get(bound, "-") for bound in _SIGNS):
        why = "there is no amount behind the sign"
    return RecipeError(f"{flags}: no such budget", why=why, fix=fix)


def _quantity(text: str) -> str:
    match = _BUDGET.fullmatch(text)
    return match["quantity"] if match else ""


def _limits(quantity: str) -> type[Limits]:
    kinds = get_args(ShapeBudget.model_fields[quantity].annotation)
    return next(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Limits))


def _conditions(quantity: str) -> list[str]:
    """What may stand behind @ for a quantity: nothing without a context."""
    fields = _limits(quantity).model_fields
    return [name for name in _CONDITIONS if name in fields] if "context" in fields else []


def _mended(quantity: str, said: Mapping[str, Any]) -> str:
    """The flags of a quantity without what it cannot have, and 70% in the place of amounts that cannot be read."""
    given = {name: said[name] for name in _conditions(quantity) if name in said}
    flags = []
    for key in (key for key in said if key in _SIGNS):
        amount, _, rest = said[key].partition(" ")
        if rest.strip() in get_args(StoredAs) and "dtype" in _conditions(quantity):
            given = {"context": 4096, **given, "dtype": rest.strip()}
        try:
            parse_amount(amount, _limits(quantity).unit)
        except ValueError:
            amount = "70%"
        flags.append(f'--budget "{quantity}{_SIGNS[key]}{amount}{_behind(given)}"')
    return " ".join(flags)


def _behind(given: Mapping[str, Any]) -> str:
    """
    >>> _behind({"batch": 4, "context": 8192, "dtype": "float32"}), _behind({"context": 512}), _behind({})
    ('@4x8192 float32', '@512', '')
    """
    if "context" not in given:
        return ""
    batch = f"{given['batch']}x" if "batch" in given else ""
    return f"@{batch}{given['context']}" + (f" {given['dtype']}" if "dtype" in given else "")


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
