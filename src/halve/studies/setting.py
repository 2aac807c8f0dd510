"""The setting of studies: the demo's teacher and texts, or the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from halve.demo import run as demo
from halve.disk.files import atomic_file
from halve.errors import RecipeError
from halve.model.card import name_of
from halve.studies.arms import Setting


def of_demo(texts: Path, *, changes: dict[str, Any]) -> Setting:
    """The embedded teacher, the standard library's prose and the demo's items. Writes the texts into `texts`.

    Raises `CorpusError` if the library's sources are missing.
    """
    recipe = demo.make_recipe(texts, long=False, corpus=None)
    items = split_items(Path(recipe.evaluate.choices[0]), texts)
    return Setting("the demo's", recipe.model, recipe.data.train_sources, recipe.data.valid, items, changes)


def of_ones_own(
    model: str,
    *,
    train: Sequence[str],
    valid: Sequence[str],
    choices: Path | None,
    texts: Path,
    changes: dict[str, Any],
) -> Setting:
    """The user's own teacher and texts. Relative paths become absolute. Raises `RecipeError` without texts."""
    if not train or not valid:
        raise RecipeError(
            f"a study of {model} needs texts",
            why="the demo's texts fit only the demo's teacher",
            fix="--train FILE --valid FILE, each as in a recipe's data section",
        )
    items = None if choices is None else split_items(choices, texts)
    folder = Path(model)
    named = str(folder.resolve()) if folder.exists() else model
    return Setting(name_of(model), named, _absolute(train), _absolute(valid), items, changes)


def _absolute(sources: Sequence[str]) -> tuple[str, ...]:
    return tuple(source if source.startswith("hub:") else str(Path(source).resolve()) for source in sources)


def split_items(path: Path, texts: Path) -> tuple[str, str]:
    """Split items into two files in `texts`: every second item for choosing, the others for measuring.

    Raises `CorpusError` for a file that does not hold multiple-choice items.
    """
    from halve.model.choices import json_line, load_items

    lines = [json_line(item) for item in load_items(path)]
    made = []
    for name, part in (("select", lines[::2]), ("test", lines[1::2])):
        file = texts / f"{path.name.split('.')[0]}-{name}.jsonl"
        with atomic_file(file) as draft:
            draft.write_text("".join(line + "\n" for line in part), encoding="utf-8")
        made.append(str(file.resolve()))
    return made[0], made[1]
