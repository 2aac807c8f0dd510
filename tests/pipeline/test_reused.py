"""A run folder's finished stages that have changed are found by `check`, which writes nothing there."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from halve.pipeline import run as pipeline
from halve.recipe.schema import Recipe

MakeRecipe = Callable[..., Recipe]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("finished") / "run"


@pytest.fixture
def run(make_recipe: MakeRecipe, finished: Path, tmp_path: Path) -> tuple[Recipe, Path]:
    """A recipe and its finished run, made once."""
    recipe = make_recipe()
    if not finished.exists():
        pipeline.run(recipe, finished)
    return recipe, Path(shutil.copytree(finished, tmp_path / "run"))


def spoil(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 0x55
    path.write_bytes(data)


def listing(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("again", "changed"),
    [
        (("prune", "evaluate", "report"), "score/scores.safetensors"),
        (("prune", "evaluate", "report"), "score/manifest.json"),
        (("evaluate", "report"), "prune/model/model.safetensors"),
        (("report",), "prune/plan.json"),
        (("report",), "evaluate/results.json"),
        ((), "evaluate/results.json"),
        ((), "evaluate/manifest.json"),
    ],
)
def test_what_a_run_would_go_on_from(run: tuple[Recipe, Path], again: tuple[str, ...], changed: str) -> None:
    recipe, folder = run
    for stage in again:
        shutil.rmtree(folder / stage)
    assert pipeline.check(recipe, folder) == ()
    spoil(folder / changed)
    before = listing(folder)
    (error,) = pipeline.check(recipe, folder)
    assert str(folder / changed) in error.what
    assert listing(folder) == before


def test_what_no_stage_takes_any_more_may_change(run: tuple[Recipe, Path]) -> None:
    recipe, folder = run
    spoil(folder / "score/scores.safetensors")
    spoil(folder / "prune/model/model.safetensors")
    assert pipeline.check(recipe, folder) == ()
    (folder / "data" / "hashes.json").write_text("{")
    before = listing(folder)
    assert pipeline.check(recipe, folder) == ()
    assert listing(folder) == before


@pytest.mark.parametrize("name", [".lock", "run.json", "recipe.json", "data"])
def test_a_file_where_a_folder_belongs_and_a_folder_where_a_file_does(run: tuple[Recipe, Path], name: str) -> None:
    recipe, folder = run
    if name == "data":
        shutil.rmtree(folder / name)
        (folder / name).write_text("")
    else:
        (folder / name).unlink()
        (folder / name).mkdir()
    assert any(str(folder / name) in str(error) for error in pipeline.check(recipe, folder))
