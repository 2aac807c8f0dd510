"""The types of values in a recipe, with bounds outside of which a run makes no sense."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

MOST = 10**15
"""The upper bound of every count: a hundred times the tokens of the largest corpora."""


class Section(BaseModel):
    """A part of the recipe: immutable, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _number(given: Any) -> Any:
    """Accept only numbers: pydantic would also read true as 1 and '7' as 7."""
    if isinstance(given, bool | str):
        raise ValueError("Input should be a number")
    return given


def _written(given: Any) -> Any:
    """Turn numbers into text for keys that hold text: params: 350000000, drop_layers: 3."""
    return str(given) if isinstance(given, int | float) and not isinstance(given, bool) else given


def _countable(count: int) -> int:
    if count > MOST:
        raise ValueError(f"the largest count is {MOST:.0e}")
    return count


def _moderate(factor: float) -> float:
    if not 1e-9 <= factor <= 1e15:
        raise ValueError("a factor must be between 1e-9 and 1e15, so that single precision can hold it")
    return factor


def _seed(seed: int) -> int:
    if seed >= 2**63:
        raise ValueError("a seed must be below 2**63")
    return seed


Whole = Annotated[int, BeforeValidator(_number)]
Real = Annotated[float, BeforeValidator(_number)]
Switch = Annotated[bool, Field(strict=True)]
Count = Annotated[Whole, Field(gt=0), AfterValidator(_countable)]
CountFromZero = Annotated[Whole, Field(ge=0), AfterValidator(_countable)]
Context = Annotated[Whole, Field(ge=2), AfterValidator(_countable)]
"""Tokens in a sample: at least two, because a single token predicts nothing."""
Scale = Annotated[Real, Field(gt=0), AfterValidator(_moderate)]
"""A weight or a scale, far from the limits of single precision."""
Seed = Annotated[Whole, Field(ge=0), AfterValidator(_seed)]
Rate = Annotated[Real, Field(gt=0, le=10)]
"""A learning rate."""
Written = Annotated[str, BeforeValidator(_written), Field(min_length=1, max_length=10_000)]


def path_or_name(text: str) -> str:
    """Return the text if it is a possible path or hub name. Raises `ValueError`."""
    if not text.strip():
        raise ValueError("a path or name must not be blank")
    if re.search(r"[\0-\x1f\x7f\ud800-\udfff]", text):
        raise ValueError("a path or name must not contain control characters or bytes that are not UTF-8")
    if len(os.fsencode(text)) > 4000 or any(len(os.fsencode(part)) > 255 for part in text.split("/")):
        raise ValueError("a path has at most 4000 bytes, 255 between two slashes")
    if text.startswith("~"):
        try:
            Path(text).expanduser()
        except RuntimeError:
            raise ValueError(f"there is no user {text.partition('/')[0][1:]}, whose home the path begins in") from None
    return text


def _source(text: str) -> str:
    """A path, or a data set of the hub."""
    if text.startswith("hub:") and not re.fullmatch(r"hub:[\w.-]+/[\w.-]+(/[\w.-]+)?(:[^:]+)?", text):
        raise ValueError("a data set of the hub is hub:owner/name, hub:owner/name:split or hub:owner/name/config:split")
    if text.startswith("hub:") and ".." in text:
        raise ValueError("names of the hub hold no two dots in a row")
    return text


PathOrName = Annotated[str, AfterValidator(path_or_name)]
TextSource = Annotated[PathOrName, AfterValidator(_source)]
