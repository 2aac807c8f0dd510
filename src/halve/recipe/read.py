"""Read a recipe file into a `Recipe`, or raise an error that names the key. Does not import torch.

Relative paths are relative to the recipe's own folder.
"""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import BaseModel, ValidationError

from halve.errors import RecipeError
from halve.process.fresh import distrust
from halve.recipe import strict_yaml
from halve.recipe.schema import Recipe
from halve.recipe.searching import CROSSED
from halve.recipe.values import path_or_name

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe file; relative paths in it become absolute.

    Raises `RecipeError` naming the key and, for an unknown key, the nearest known one.
    """
    path = Path(path)
    distrust(path.parent)
    try:
        with path.open("rb") as file:
            raw = strict_yaml.parse_yaml(file.read(strict_yaml.MAX_BYTES + 1))
    except yaml.YAMLError as error:
        raise RecipeError(
            f"recipe {path} is not YAML", why=str(error), fix="compare it with a file in recipes/"
        ) from error
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"cannot read recipe {path}",
            why=getattr(error, "strerror", None) or str(error),
            fix="give the path of a YAML file",
        ) from error
    return parse(raw, folder=path.parent, source=str(path))


def parse(raw: Any, *, folder: Path, source: str) -> Recipe:
    """Check a recipe given as plain data; `folder` anchors relative paths, `source` names it in errors."""
    if not isinstance(raw, dict):
        raise RecipeError(
            f"recipe {source} has no keys",
            why=f"a recipe is a mapping, this is {type(raw).__name__}",
            fix="start with name:, model:, data:, prune:",
        )
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        raise _explain(error, source) from None
    try:
        path_or_name(str(folder.resolve()))
    except ValueError as error:
        raise RecipeError(
            f"recipe {source} is in a folder whose name cannot be used", why=str(error), fix="rename that folder"
        ) from None
    return _anchor(recipe, folder.resolve())


def _explain(error: ValidationError, source: str) -> RecipeError:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if "[" not in str(part))  # a union's kinds have one
    if first["type"] == "extra_forbidden":
        known = _known_keys(first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(sorted(known))}"
        return RecipeError(f"unknown key {place} in {source}", why="no stage would read it", fix=hint)
    if first["type"] == "missing":
        return RecipeError(f"{source} lacks {place}", why="it has no default", fix=f"add {place}:")
    value = "" if isinstance(first["input"], dict | BaseModel) else f" (given: {_short.repr(first['input'])})"
    message = first["msg"].removeprefix("Value error, ")
    return RecipeError(
        f"bad value for {place or 'the recipe'} in {source}", why=message + value, fix=_mended(first, place)
    )


def _mended(error: ErrorDetails, place: str) -> str:
    if error["type"] == CROSSED:
        least, most = error["ctx"]["min"], error["ctx"]["max"]
        return f"lower {place}.min, now {least}, or raise {place}.max, now {most}"
    near = _near_words(error)
    return f"did you mean {near[0]}?" if near else "change it there"


def _near_words(error: ErrorDetails) -> list[str]:
    """The word nearest to a mistyped one, where only certain words may stand."""
    if error["type"] != "literal_error" or not isinstance(error["input"], str):
        return []
    known = re.findall(r"'([^']*)'", error.get("ctx", {}).get("expected", ""))
    return difflib.get_close_matches(error["input"], known, n=1, cutoff=0.6)


def _known_keys(path: tuple[int | str, ...]) -> list[str]:
    section: type[BaseModel] = Recipe
    for part in path:
        field = section.model_fields.get(str(part))
        section = section if field is None else next(_sections(field.annotation), section)
    return list(section.model_fields)


def _sections(kind: Any) -> Iterator[type[BaseModel]]:
    """The sections that a type is or holds."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
    for inner in getattr(kind, "__args__", ()):
        yield from _sections(inner)


def _anchor(recipe: Recipe, folder: Path) -> Recipe:
    """Make paths absolute, so that a run does not depend on where it was started."""

    def absolute(text: str) -> str:
        local = folder / Path(text).expanduser()
        return str(local) if local.exists() or text.startswith((".", "/", "~")) else text

    def anchored(sources: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(s if s.startswith("hub:") else str(folder / Path(s).expanduser()) for s in sources)

    train = recipe.data.train
    if isinstance(train, dict):
        parts = {k: v.model_copy(update={"sources": anchored(v.sources)}) for k, v in train.items()}
        splits: dict[str, Any] = {"train": parts, "valid": anchored(recipe.data.valid)}
    else:
        splits = {"train": anchored(train), "valid": anchored(recipe.data.valid)}
    data = recipe.data.model_copy(update=splits)
    local = {task: str(folder / Path(path).expanduser()) for task, path in recipe.evaluate.data.items()}
    files = [entry.model_copy(update={"file": anchored((entry.file,))[0]}) for entry in recipe.evaluate.imported]
    evaluated = {"choices": anchored(recipe.evaluate.choices), "data": local, "imported": tuple(files)}
    evaluate = recipe.evaluate.model_copy(update=evaluated)
    task = None if recipe.score.depth_task is None else anchored((recipe.score.depth_task,))[0]
    score = recipe.score.model_copy(update={"depth_task": task})
    update: dict[str, Any] = {"model": absolute(recipe.model), "data": data, "score": score, "evaluate": evaluate}
    if recipe.search is not None and recipe.search.tournament.choices is not None:
        (choices,) = anchored((recipe.search.tournament.choices,))
        tournament = recipe.search.tournament.model_copy(update={"choices": choices})
        update["search"] = recipe.search.model_copy(update={"tournament": tournament})
    update["align"] = tuple(
        step.model_copy(
            update={"data": anchored(step.data), "reward_model": step.reward_model and absolute(step.reward_model)}
        )
        for step in recipe.align
    )
    return recipe.model_copy(update=update)


def on_spikes(recipe: Recipe, policy: Literal["stop", "skip", "rewind"]) -> Recipe:
    """Return the recipe with the same reaction to spikes in all its trainings."""
    raw = recipe.model_dump(mode="python", exclude_unset=True)
    for part in (raw, *raw.get("then", ())):
        for name in ("correct", "distill"):
            if part.get(name) is not None:
                part[name]["on_spike"] = policy
    if raw.get("search") is not None:
        raw["search"]["tournament"] = {**raw["search"].get("tournament", {}), "on_spike": policy}
    return Recipe.model_validate(raw)
