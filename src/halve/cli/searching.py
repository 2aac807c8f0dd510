"""What `halve search` runs and shows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halve.process.rank import leads
from halve.recipe.schema import Recipe


def show_search(folder: Path, recipe: Recipe, *, json_: bool) -> None:
    """Print what the searches of a run found, and write their page. Other ranks than the first do nothing.

    As JSON: the results of the search, or for several sizes a list of them.
    """
    from halve.disk.files import read_object
    from halve.disk.rundir import read_manifest, sound
    from halve.recipe.rounds import named, rounds
    from halve.report import page, tables

    if not leads():
        return
    places = [folder / named("search", number) for number in range(1, 1 + len(rounds(recipe)))]
    manifests = [read_manifest(place) for place in places if place.exists()]
    found = [
        read_object(sound(place, manifest, "results.json")) for place, manifest in zip(places, manifests, strict=False)
    ]
    if json_:
        tables.as_json(found if recipe.search is not None and recipe.search.targets else found[0])
        return
    for results, manifest in zip(found, manifests, strict=True):
        _table(results, recipe.model_dump(mode="json"), manifest["metrics"])
    page.write_page(folder, folder / "search.html")
    print(folder / "search.html")


def _table(results: Mapping[str, Any], recipe: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
    from halve.report.searched import search_rows, search_words
    from halve.report.tables import table

    if results["method"] == "tournament" or "choice" in results:  # earlier versions did not name other choices
        measured = "sum of blocks" if results["method"] == "additive" else "KL to the teacher (± standard error)"
        table(f"{measured}; * is chosen", *search_rows(results))
        for words in search_words(results, recipe):
            print(words)
    print("chosen: " + ", ".join(f"{axis} {size}" for axis, size in metrics["sizes"].items()))
