"""The run folder: what survives a kill at any moment, and which process owns which file.

    run/
      run.json            the name and model of the recipe that owns this run, once a stage has begun
      recipe.json         the recipe of the last run in this folder
      data/               token files, keyed by content, and hashes of the inputs
      score/              a finished stage: its artifact and manifest.json
      .distill.work/      an unfinished stage; after a kill it may use what it finds here
        .checkpoints/     names with a dot are scratch and are dropped when the stage is committed

A stage is finished by one rename. Before that, its manifest is written into the work folder. From then on the stage
counts as finished, and the next process that opens the run completes a rename that a kill has interrupted
(`disk.folders`).

A manifest holds the SHA-256 of every file, and a digest of itself. Code that reads a file of a finished stage gets it
from `sound` or has called `RunDir.verify`. So a file that was changed by something else is an error, not an input.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from halve.disk.files import disk_guard, file_sha256, read_object, read_sealed, sealed, sync_tree, write_json
from halve.disk.folders import finish_folder, replace_folder
from halve.errors import RunError
from halve.process.waits import wait
from halve.recipe.schema import Recipe

try:
    import fcntl
except ImportError:  # not on Windows, where two runs in one folder go unnoticed
    fcntl = None  # type: ignore[assignment]

MARKER_FORMAT, FORMAT = 1, 2
MARKER, RECIPE, MANIFEST, KEY, LOCK = "run.json", "recipe.json", "manifest.json", ".key.json", ".lock"
HASHES = "hashes.json"  # beside the token files
_BEFORE_STAGES = (LOCK, MARKER, RECIPE, f".{MARKER}.tmp", f".{RECIPE}.tmp", "data")


class RunDir:
    """An open run folder. One process at a time; close it, or use it in a `with` block."""

    def __init__(self, path: Path, lock: IO[str]) -> None:
        """Use `RunDir.open`."""
        self.path = path
        self._lock = lock

    @classmethod
    def open(cls, folder: Path, recipe: Recipe) -> RunDir:
        """Open `folder` for `recipe`. Create it if necessary, and complete what a kill has interrupted.

        Raises `RunError` unless the folder is empty, a run in which no stage has begun, a run of this recipe's name and
        model, or of this recipe under another name. Raises `RunError` also if another process is running in it.
        """
        check_folder(folder, recipe)
        try:
            with disk_guard(folder):
                folder.mkdir(parents=True, exist_ok=True)
                lock = _lock(folder)
        except OSError as error:
            why = error.strerror or str(error)
            raise RunError(f"cannot make run folder {folder}", why=why, fix="choose another --out") from error
        try:
            if not (folder / MARKER).exists() or _owner(read_object(folder / MARKER)) != _identity(recipe):
                write_json(folder / MARKER, {"format": MARKER_FORMAT, **_identity(recipe)})
            write_json(folder / RECIPE, recipe.model_dump(mode="json"))
            run = cls(folder, lock)
            for stage in folder.iterdir():
                finish_folder(stage, last=MANIFEST)
            for work in sorted(folder.glob(".*.work")):
                if (work / MANIFEST).exists():
                    run._finish(work.name[1 : -len(".work")])
        except BaseException:
            lock.close()
            raise
        return run

    @classmethod
    def follow(cls, folder: Path) -> RunDir:
        """Join a run folder that another process of the same run has opened."""
        return cls(folder, open(os.devnull, "w"))

    def close(self) -> None:
        """Let others open the folder."""
        self._lock.close()

    def __enter__(self) -> RunDir:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def stage(self, name: str) -> Path:
        """The folder of a finished stage."""
        return self.path / name

    def manifest(self, name: str) -> dict[str, Any] | None:
        """The manifest of a finished stage; None if it has not finished. Raises `RunError` if it was changed."""
        return read_manifest(self.stage(name)) if (self.stage(name) / MANIFEST).exists() else None

    def verify(self, *names: str) -> int:
        """Check the files of finished stages, and return how many there are.

        Raises `RunError` unless every file has the bytes with which its stage was finished. A process hashes each file
        only once, when it first reads or writes the file.
        """
        manifests = {name: read_manifest(self.stage(name)) for name in names}
        paths = [
            sound(self.stage(name), manifest, file)
            for name, manifest in manifests.items()
            for file in manifest["files"]
        ]
        return len(paths)

    def work(self, name: str, key: str) -> Path:
        """The work folder of a stage. It keeps what a killed run with the same key has left, and nothing else."""
        work = self._work(name)
        if not _has_key(work, key):
            _remove(work, first=KEY)
            with disk_guard(work):
                work.mkdir()
            write_json(work / KEY, {"key": key})
        return work

    def left(self, name: str, key: str) -> Path | None:
        """The work folder that a killed run with the same key has left. None if there is none."""
        work = self._work(name)
        return work if _has_key(work, key) else None

    def commit(
        self,
        name: str,
        key: str,
        metrics: Mapping[str, Any],
        *,
        seed: int = 0,
        inputs: Mapping[str, Any] | None = None,
    ) -> Path:
        """Finish a stage: move its work folder to its final place, and return this place.

        The manifest holds the key, the fingerprints of the inputs, versions, seed, metrics, and the size and SHA-256 of
        every file. Scratch (names that begin with a dot) is dropped. A kill during this loses nothing.
        """
        work = self._work(name)
        assert _has_key(work, key), f"{work} was not made by work({name!r}, {key!r})"
        with disk_guard(work), wait(f"waiting for the disk to keep {name}"):
            sync_tree(work)
        manifest = {
            "format": FORMAT,
            "stage": name,
            "key": key,
            "inputs": dict(inputs or {}),
            "versions": versions(),
            "seed": seed,
            "metrics": metrics,
            "files": {
                path.relative_to(work).as_posix(): {"size": path.stat().st_size, "sha256": file_sha256(path)}
                for path in _artifacts(work)
            },
        }
        write_json(work / MANIFEST, sealed(manifest))
        self._finish(name)
        return self.stage(name)

    def is_done(self, name: str, key: str) -> bool:
        """Whether a stage is finished with this key, and all its files are there with their sizes."""
        manifest = self.manifest(name)
        if manifest is None or manifest["key"] != key:
            return False
        folder = self.stage(name)
        return all(
            (folder / file).is_file() and (folder / file).stat().st_size == entry["size"]
            for file, entry in manifest["files"].items()
        )

    def _work(self, name: str) -> Path:
        return self.path / f".{name}.work"

    def _finish(self, name: str) -> None:
        work, stage = self._work(name), self.stage(name)
        for scratch in work.glob(".*"):
            _remove(scratch)
        if not stage.is_dir() or stage.is_symlink():
            stage.unlink(missing_ok=True)
        replace_folder(work, stage, last=MANIFEST)


def read_manifest(stage: Path) -> dict[str, Any]:
    """The manifest of a finished stage. Raises `RunError` if it was changed."""
    return read_sealed(stage / MANIFEST)


def sound(stage: Path, manifest: Mapping[str, Any], file: str) -> Path:
    """The path of a finished stage's file. Raises `RunError` unless its bytes are those of the manifest."""
    path, entry = stage / file, manifest["files"].get(file, {})
    try:
        if file_sha256(path) == entry.get("sha256"):
            return path
        why = f"its bytes have changed since {stage.name} was finished"
    except OSError as error:
        why = error.strerror or str(error)
    raise RunError(
        f"{path} is not what halve wrote",
        why=why,
        fix=f"remove {stage} and run the same command: what was there is made again",
    )


def equal_run(recipe: Recipe, folders: Path) -> Path | None:
    """A begun run in `folders` of the same recipe under another name, if the recipe's own folder is not there."""
    for marker in () if (folders / recipe.name).exists() else sorted(folders.glob(f"*/{MARKER}")):
        run = marker.parent
        if run.name != recipe.name and has_begun(run) and _differs_in_name_alone(run, recipe):
            return run
    return None


def has_begun(folder: Path) -> bool:
    """Whether `folder` is a run in which a stage has begun, so that the folder belongs to one recipe.

    Until then it holds only what every run may use, such as token files that are keyed by content.
    """
    return (folder / MARKER).exists() and any(entry.name not in _BEFORE_STAGES for entry in folder.iterdir())


def check_folder(folder: Path, recipe: Recipe) -> None:
    """Raise `RunError` unless `folder` is new, empty, or a run of this recipe's name and model.

    A run of the same recipe under another name is this recipe's run, too, and so is one in which no stage has begun.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise RunError(f"{folder} is not a folder", why="a run is a folder", fix="choose another --out")
    if not (folder / MARKER).exists():
        strangers = [entry.name for entry in folder.iterdir() if entry.name not in (LOCK, f".{MARKER}.tmp")]
        if strangers:
            raise RunError(
                f"{folder} is not a run folder",
                why=f"it holds {sorted(strangers)[0]} and no {MARKER}",
                fix="choose a new or empty folder with --out",
            )
        return
    marker = _marker(folder, recipe)
    identity = _owner(marker)
    if identity == _identity(recipe) or not has_begun(folder):
        return
    if identity["model"] == recipe.model and _differs_in_name_alone(folder, recipe):
        return
    raise RunError(
        f"{folder} is not a run of recipe {recipe.name} on {recipe.model}",
        why=f"it was started by recipe {identity['recipe']} on {identity['model']}",
        fix="choose another folder with --out, or give that recipe",
    )


def versions() -> dict[str, str]:
    """Python's and the numerical packages' versions."""
    installed = {"python": platform.python_version()}
    for package in ("halve", "torch", "transformers", "safetensors", "tokenizers", "numpy"):
        with suppress(metadata.PackageNotFoundError):
            installed[package] = metadata.version(package)
    return installed


def _identity(recipe: Recipe) -> dict[str, str]:
    return {"recipe": recipe.name, "model": recipe.model}


def _owner(marker: Mapping[str, Any]) -> dict[str, Any]:
    return {key: marker.get(key) for key in ("recipe", "model")}


def _marker(folder: Path, recipe: Recipe) -> dict[str, Any]:
    try:
        marker = read_object(folder / MARKER)
    except RunError as error:
        whole = json.dumps({"format": MARKER_FORMAT, **_identity(recipe)})
        raise RunError(
            error.what,
            why=error.why,
            fix=f"choose another folder with --out, or, if this is that recipe's run, write {whole} into that file",
        ) from error
    if marker.get("format") != MARKER_FORMAT:
        raise RunError(
            f"{folder} is not a run folder of this halve",
            why=f"the format of {MARKER} is {marker.get('format')!r}, this halve reads {MARKER_FORMAT}",
            fix="choose another folder with --out, or the halve that made it",
        )
    return marker


def _differs_in_name_alone(folder: Path, recipe: Recipe) -> bool:
    """Whether a run's last recipe differs from this one only in its name."""
    try:
        known = read_object(folder / RECIPE)
    except RunError:
        return False
    return {**known, "name": recipe.name} == recipe.model_dump(mode="json")


def _lock(folder: Path) -> IO[str]:
    lock = open(folder / LOCK, "w")  # noqa: SIM115 (held until the run is closed)
    if fcntl is not None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise RunError(
                f"{folder} is in use",
                why="another process is running a recipe in it",
                fix="wait for that run to end, or choose another --out",
            ) from None
        except OSError:
            pass  # a file system without locks, such as some network mounts
    return lock


def _has_key(work: Path, key: str) -> bool:
    """Whether a work folder was started with this key. A folder whose key cannot be read was not."""
    with suppress(RunError):
        return (work / KEY).is_file() and read_object(work / KEY).get("key") == key
    return False


def _artifacts(work: Path) -> list[Path]:
    files = (path for path in work.rglob("*") if path.is_file())
    return sorted(
        path for path in files if not path.relative_to(work).parts[0].startswith(".") and path.name != MANIFEST
    )


def _remove(path: Path, *, first: str | None = None) -> None:
    """Remove a file or a tree. `first` is the name that makes it valid, so it is removed before the rest."""
    if path.is_dir() and not path.is_symlink():
        if first is not None:
            (path / first).unlink(missing_ok=True)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
