"""The run folder: whole or not at all, whose it is, and when a stage counts as finished."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halve.disk import files, rundir
from halve.disk.files import content_hashes, read_json
from halve.disk.rundir import RunDir
from halve.errors import RunError
from halve.recipe.schema import Recipe

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def recipe(make_recipe: MakeRecipe) -> Recipe:
    return make_recipe()


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# --- whose folder it is


def test_a_new_or_empty_folder_becomes_a_run(tmp_path: Path, recipe: Recipe) -> None:
    for folder in (tmp_path / "deep" / "run", tmp_path / "empty"):
        if folder.name == "empty":
            folder.mkdir()
        RunDir.open(folder, recipe).close()
        assert read_json(folder / "run.json")["recipe"] == "tiny"
        assert read_json(folder / "recipe.json")["prune"]["ffn"] == 40
        RunDir.open(folder, recipe).close()


def test_a_folder_that_is_not_a_run_is_left_alone(tmp_path: Path, recipe: Recipe) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RunError, match=r"is not a run folder\n  why: it holds thesis\.tex and no run\.json"):
        RunDir.open(tmp_path, recipe)
    assert names(tmp_path) == ["thesis.tex"]
    with pytest.raises(RunError, match="is not a folder"):
        RunDir.open(tmp_path / "thesis.tex", recipe)


def begin(folder: Path, recipe: Recipe) -> None:
    """A run that was killed in its first stage."""
    with RunDir.open(folder, recipe) as run:
        run.work("score", "k")


def test_a_run_of_another_recipe_or_model_is_refused(tmp_path: Path, recipe: Recipe, make_recipe: MakeRecipe) -> None:
    begin(tmp_path, recipe)
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path) if (tmp_path / name).is_file()}
    with pytest.raises(RunError, match="is not a run of recipe other on"):
        RunDir.open(tmp_path, make_recipe(name="other", seed=7))
    with pytest.raises(RunError, match="is not a run of recipe tiny on another/model"):
        RunDir.open(tmp_path, make_recipe(model="another/model"))
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    RunDir.open(tmp_path, make_recipe(seed=7)).close()


def test_a_folder_in_which_no_stage_has_begun_is_anyones(
    tmp_path: Path, recipe: Recipe, make_recipe: MakeRecipe
) -> None:
    RunDir.open(tmp_path, recipe).close()
    assert rundir.equal_run(make_recipe(name="other"), tmp_path.parent) is None, "there is nothing to resume"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tokens").touch()
    for other in (make_recipe(model="another/model"), make_recipe(name="other", seed=7)):
        RunDir.open(tmp_path, other).close()
        marker = read_json(tmp_path / "run.json")
        assert (marker["recipe"], marker["model"]) == (other.name, other.model)
        assert read_json(tmp_path / "recipe.json") == other.model_dump(mode="json")
    assert (tmp_path / "data" / "tokens").exists()
    begin(tmp_path, other)
    with pytest.raises(RunError, match="is not a run of recipe tiny on"):
        RunDir.open(tmp_path, recipe)


def test_a_new_name_alone_goes_on_with_the_run(tmp_path: Path, recipe: Recipe, make_recipe: MakeRecipe) -> None:
    other = make_recipe(name="other")
    begin(tmp_path / "tiny", recipe)
    assert rundir.equal_run(other, tmp_path) == tmp_path / "tiny"
    assert rundir.equal_run(recipe, tmp_path) is None
    assert rundir.equal_run(make_recipe(name="other", seed=1), tmp_path) is None
    RunDir.open(tmp_path / "tiny", other).close()
    assert read_json(tmp_path / "tiny" / "run.json")["recipe"] == "other"
    assert read_json(tmp_path / "tiny" / "recipe.json")["name"] == "other"
    RunDir.open(tmp_path / "tiny", make_recipe(name="other", seed=7)).close()
    (tmp_path / "tiny" / "recipe.json").write_text("{")
    assert rundir.equal_run(recipe, tmp_path) is None
    with pytest.raises(RunError, match="is not a run of recipe tiny on"):
        RunDir.open(tmp_path / "tiny", recipe)


GARBAGE = ["", "{", "[]", "null", '"x"', "5", "{}", '{"format": 99}', '{"files": 5}', "[" * 5000, "\0" * 50]


@pytest.mark.parametrize("text", GARBAGE)
def test_a_marker_that_is_no_marker_is_refused(tmp_path: Path, recipe: Recipe, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(RunError, match=r"run\.json|is not a run") as found:
        RunDir.open(tmp_path, recipe)
    assert "--out" in found.value.fix


@pytest.mark.parametrize("text", GARBAGE)
@pytest.mark.parametrize("file", ["score/manifest.json", ".prune.work/.key.json", "recipe.json", "data/hashes.json"])
def test_whatever_a_file_of_the_run_holds_is_an_error_or_is_ignored(
    tmp_path: Path, recipe: Recipe, file: str, text: str
) -> None:
    source = tmp_path / "text"
    source.write_text("words")
    with RunDir.open(tmp_path / "run", recipe) as run:
        (run.work("score", "k") / "file").write_text("abc")
        run.commit("score", "k", {})
        (run.work("prune", "k") / "half").write_text("done")
        content_hashes([source], memo=run.path / "data/hashes.json")
    (tmp_path / "run" / file).write_text(text)
    with RunDir.open(tmp_path / "run", recipe) as run:
        if "manifest" in file:
            with pytest.raises(RunError, match=r"manifest\.json"):
                run.is_done("score", "k")
        else:
            assert run.is_done("score", "k")
        assert (run.work("prune", "k") / "half").exists() == ("key" not in file)
        assert content_hashes([source], memo=run.path / "data/hashes.json") == [files.file_sha256(source)]


def test_bytes_that_changed_behind_halves_back_are_seen(tmp_path: Path, recipe: Recipe) -> None:
    with RunDir.open(tmp_path, recipe) as run:
        (run.work("prune", "k") / "model").mkdir()
        (run.work("prune", "k") / "model" / "weights").write_bytes(bytes(1000))
        path = run.commit("prune", "k", {}) / "model" / "weights"
        assert run.verify("prune") == 1
        before = path.stat()
        with path.open("r+b") as file:
            file.seek(500)
            file.write(b"\1")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert run.is_done("prune", "k"), "sizes tell nothing"
        with pytest.raises(RunError, match=r"weights is not what halve wrote\n  why: its bytes have changed"):
            run.verify("prune")
        path.unlink()
        with pytest.raises(RunError, match="No such file"):
            run.verify("prune")


def test_a_process_reads_a_file_once_for_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    digest = files.hashlib.file_digest

    def counted(file: Any, kind: str) -> Any:
        read.append(Path(file.name).name)
        return digest(file, kind)

    monkeypatch.setattr(files.hashlib, "file_digest", counted)
    (tmp_path / "work").mkdir()
    weights = tmp_path / "work" / "weights"
    weights.write_bytes(bytes(100))
    first = files.file_sha256(weights)
    (tmp_path / "work").rename(tmp_path / "stage")
    weights = tmp_path / "stage" / "weights"
    assert files.file_sha256(weights) == first
    assert content_hashes([weights], memo=tmp_path / "memo") == [first]
    assert read == ["weights"]


def test_a_folder_that_cannot_be_made(tmp_path: Path, recipe: Recipe) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot make run folder"):
        RunDir.open(tmp_path / "file" / "run", recipe)


def test_two_processes_do_not_run_in_one_folder(tmp_path: Path, recipe: Recipe) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from halve.recipe.schema import Recipe; from halve.disk.rundir import RunDir\n"
        "RunDir.open(Path(sys.argv[1]), Recipe.model_validate_json(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, tmp_path / "run", recipe.model_dump_json()]
    with RunDir.open(tmp_path / "run", recipe):
        refused = subprocess.run(command, capture_output=True, text=True)
        assert "is in use\n  why: another process" in refused.stderr
    assert subprocess.run(command, capture_output=True).returncode == 0


# --- stages


def test_a_stage_is_finished_in_one_step(tmp_path: Path, recipe: Recipe) -> None:
    with RunDir.open(tmp_path, recipe) as run:
        assert not run.is_done("score", "k1")
        assert run.manifest("score") is None
        work = run.work("score", "k1")
        (work / "model").mkdir()
        (work / "model" / "weights").write_text("abc")
        (work / ".checkpoints").mkdir()
        (work / ".checkpoints" / "step").write_text("scratch")
        assert not run.stage("score").exists()
        stage = run.commit("score", "k1", {"loss": 2.0}, seed=3, inputs={"correct": "k0"})
        assert names(stage) == ["manifest.json", "model", "model/weights"]
        assert not work.exists()
        manifest = run.manifest("score")
        assert manifest is not None
        assert (manifest["key"], manifest["seed"], manifest["metrics"]) == ("k1", 3, {"loss": 2.0})
        assert manifest["inputs"] == {"correct": "k0"}
        assert set(manifest["versions"]) >= {"python", "torch", "transformers", "halve"}
        assert manifest["files"]["model/weights"]["size"] == 3
        sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        assert manifest["files"]["model/weights"]["sha256"] == sha256
        assert run.is_done("score", "k1")
        assert not run.is_done("score", "k2")


@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_a_stage_with_damaged_files_is_not_done(tmp_path: Path, recipe: Recipe, damage: str) -> None:
    with RunDir.open(tmp_path, recipe) as run:
        (run.work("score", "k") / "file").write_text("abc")
        path = run.commit("score", "k", {}) / "file"
        path.unlink()
        if damage == "truncate":
            path.write_text("ab")
        assert not run.is_done("score", "k")


def test_work_survives_for_its_key_alone(tmp_path: Path, recipe: Recipe) -> None:
    with RunDir.open(tmp_path, recipe) as run:
        (run.work("distill", "k1") / "half").write_text("done")
    with RunDir.open(tmp_path, recipe) as run:
        assert (run.work("distill", "k1") / "half").read_text() == "done"
        assert not (run.work("distill", "k2") / "half").exists()
        assert not (run.work("distill", "k1") / "half").exists()


def test_a_stage_can_be_replaced(tmp_path: Path, recipe: Recipe) -> None:
    with RunDir.open(tmp_path, recipe) as run:
        for key in ("k1", "k2"):
            (run.work("score", key) / f"file-{key}").touch()
            run.commit("score", key, {})
        assert names(run.stage("score")) == ["file-k2", "manifest.json"]
        assert run.is_done("score", "k2")


class Killed(BaseException):
    """Stands for a kill: nothing but the test catches it."""


def count_or_kill(monkeypatch: pytest.MonkeyPatch, at: int | None) -> list[str]:
    """Count every call that changes the disk, and die at the `at`-th, before or after it has its effect."""
    calls: list[str] = []

    def wrap(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            for moment in ("before", "after"):
                calls.append(f"{moment} {name}")
                if at is not None and len(calls) > at:
                    raise Killed
                if moment == "before":
                    result = original(*args, **kwargs)
            return result

        monkeypatch.setattr(owner, name, call)

    for owner, name in ((os, "replace"), (os, "fsync"), (os, "unlink"), (os, "rmdir"), (os, "mkdir")):
        wrap(owner, name)
    for name in ("unlink", "mkdir", "write_text"):
        wrap(Path, name)
    wrap(shutil, "rmtree")
    return calls


def replace_stage(folder: Path, recipe: Recipe) -> None:
    """What the pipeline does with a stage whose recipe changed."""
    with RunDir.open(folder, recipe) as run:
        if run.is_done("score", "new"):
            return
        work = run.work("score", "new")
        (work / ".checkpoints").mkdir(exist_ok=True)
        (work / ".checkpoints" / "state").write_text("scratch")
        (work / "file").write_text("new")
        run.commit("score", "new", {"loss": 1.0})


def test_a_kill_at_any_change_of_the_disk_is_made_good(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage is replaced by a newer one and dies before and after every single call that changes the disk."""

    def old_run(folder: Path) -> Path:
        with RunDir.open(folder, recipe) as run:
            (run.work("score", "old") / "file").write_text("old")
            run.commit("score", "old", {})
        return folder

    whole = old_run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        calls = count_or_kill(patch, None)
        replace_stage(whole, recipe)
    assert len(calls) > 40
    expected = {name: (whole / name).read_bytes() for name in names(whole) if (whole / name).is_file()}
    assert json.loads(expected["score/manifest.json"])["key"] == "new"
    for at in range(len(calls)):
        folder = old_run(tmp_path / f"killed-{at}")
        with monkeypatch.context() as patch:
            made = count_or_kill(patch, at)
            with pytest.raises(Killed):
                replace_stage(folder, recipe)
            assert made[: at + 1] == calls[: at + 1]
        replace_stage(folder, recipe)
        found = {name: (folder / name).read_bytes() for name in names(folder) if (folder / name).is_file()}
        assert found == expected, calls[at]


def test_a_finished_commit_is_not_done_again(tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the manifest is written the stage counts, even if the kill comes before the rename."""
    with RunDir.open(tmp_path, recipe) as run:
        (run.work("distill", "k") / "weights").write_text("precious")
        with monkeypatch.context() as patch:

            def killed(self: RunDir, name: str) -> None:
                raise Killed

            patch.setattr(RunDir, "_finish", killed)
            with pytest.raises(Killed):
                run.commit("distill", "k", {})
        assert not run.is_done("distill", "k")
    with RunDir.open(tmp_path, recipe) as run:
        assert run.is_done("distill", "k")
        assert (run.stage("distill") / "weights").read_text() == "precious"
