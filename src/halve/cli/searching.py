"""What `halve search` runs and shows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halve.process.rank import leads
from halve.recipe.schema import Recipe


def show_search(folder: Path, recipe: Recipe, *, json_: bool) -> None:
    """Print what the search of a run found, and write its page. Other ranks than the first do nothing."""
    from halve.disk.files import read_object
    from halve.disk.rundir import read_manifest, sound
    from halve.report import page, tables

    if not leads():
        return
    manifest = read_manifest(folder / "search")
    results = read_object(sound(folder / "search", manifest, "results.json"))
    if json_:
        tables.as_json(results)
        return
    _table(results, recipe.model_dump(mode="json"), manifest["metrics"])
    page.write_page(folder, folder / "search.html")
    print(folder / "search.html")


def _table(results: Mapping[str, Any], recipe: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
    from halve.report.searched import search_rows, search_words
    from halve.report.tables import table

    if results["method"] == "tournament":
        table("KL to the teacher (± standard error); * is chosen", *search_rows(results))
        for words in search_words(results, recipe):
            print(words)
    print("chosen: " + ", ".join(f"{axis} {size}" for axis, size in metrics["sizes"].items()))
