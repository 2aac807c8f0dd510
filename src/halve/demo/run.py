"""The demo: the whole pipeline on the embedded teacher and the standard library's docstrings.

The teacher was trained on code without docstrings (see scripts/train_demo_teacher.py). The corpus is the prose of the
docstrings, so correction has something to correct. Held-out modules are in neither.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from halve.demo.corpus import read_modules, standard_library, write_prose
from halve.demo.task import build_items, write_items
from halve.disk.files import atomic_file
from halve.errors import CorpusError
from halve.pipeline import run as pipeline
from halve.recipe import strict_yaml
from halve.recipe.read import parse
from halve.recipe.schema import Recipe

HERE = Path(__file__).parent
TEACHER = HERE / "teacher"
HELD_OUT_SHARE = 0.1


def run(*, out: Path, long: bool, corpus: Path | None, console: Console) -> Path:
    """Run the demo in `out` and return the run folder. Its texts are next to it, in `OUT-texts`.

    `corpus` replaces the standard library's docstrings by a UTF-8 text file, of which the last tenth is held out. The
    line-completion task is then left out. Raises `CorpusError` if the library's sources are missing.
    """
    place = out.resolve()  # `.` has no name
    recipe = make_recipe(place.parent / f"{place.name}-texts", long=long, corpus=corpus)
    return pipeline.run(recipe, out, console=console)


def make_recipe(texts: Path, *, long: bool, corpus: Path | None) -> Recipe:
    """Write the demo's texts into `texts` and return the recipe that uses them."""
    texts.mkdir(parents=True, exist_ok=True)
    text = (HERE / ("long.yaml" if long else "demo.yaml")).read_text(encoding="utf-8")
    raw: dict[str, Any] = strict_yaml.parse_yaml(text)
    if corpus is not None:
        train, valid = _split(corpus, texts)
    else:
        modules = list(read_modules(standard_library()))
        train, valid = write_prose(texts, modules)
        items = texts / "next-line.jsonl"
        write_items(items, build_items([module for module in modules if module.held_out]))
        raw["evaluate"]["choices"] = [str(items.resolve())]
    raw["model"] = str(TEACHER)
    raw["data"] |= {"train": [str(train.resolve())], "valid": [str(valid.resolve())]}
    return parse(raw, folder=texts, source="the demo's recipe")


def _split(corpus: Path, texts: Path) -> tuple[Path, Path]:
    """The first nine tenths of a text for training, the rest held out, cut at a line's end."""
    try:
        text = corpus.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"cannot read {corpus}", why=str(error), fix="--corpus takes a UTF-8 text file") from error
    cut = text.rfind("\n", 0, int(len(text) * (1 - HELD_OUT_SHARE))) + 1
    if not cut or not text[cut:].strip():
        raise CorpusError(
            f"{corpus} cannot be divided into training and held-out text",
            why="no line ends in its first nine tenths, or nothing follows",
            fix="--corpus takes a text of many lines, half a megabyte or more",
        )
    paths = texts / "train.txt", texts / "valid.txt"
    for path, part in zip(paths, (text[:cut], text[cut:]), strict=True):
        with atomic_file(path) as draft:
            draft.write_text(part, encoding="utf-8")
    return paths
