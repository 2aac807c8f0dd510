"""The run folder: what survives a kill at any moment, and who owns which file.

    run/
      run.json            whose run this is (the recipe's name and model)
      recipe.json         the recipe as it was last run
      data/               token files, keyed by content, and hashes of the inputs
      score/              a finished stage: its artifact and manifest.json
      .distill.work/      a stage at work; what it finds here from before a kill it may use
        .checkpoints/     names with a dot are scratch: dropped when the stage is committed

A stage is finished in one rename. Its manifest is written into the work folder first: from then on the
stage counts as finished, and whoever opens the run next completes a rename that a kill cut short.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from halve.errors import DiskError, RunError
from halve.recipe import Recipe

try:
    import fcntl
except ImportError:  # not on Windows, where two runs in one folder go unnoticed
    fcntl = None  # type: ignore[assignment]

FORMAT = 1
MARKER, RECIPE, MANIFEST, KEY, LOCK = "run.json", "recipe.json", "manifest.json", ".key.json", ".lock"
HASHES = "hashes.json"  # beside the token files
_FULL = {errno.ENOSPC, errno.EDQUOT}
# safetensors and shutil report the operating system's error inside their own messages
_FULL_MESSAGE = re.compile(rf"(code: |os error |\[Errno )({errno.ENOSPC}|{errno.EDQUOT})\b")


@contextmanager
def disk_guard(path: Path) -> Iterator[None]:
    """Turn "no space left" while writing to `path` into a `DiskError`; other errors pass."""
    try:
        yield
    except DiskError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if number not in _FULL and not _FULL_MESSAGE.search(str(error)):
            raise
        raise DiskError(
            f"no room left while writing {path}",
            why=os.strerror(number or errno.ENOSPC),
            fix="free some space and run the same command again, or choose another folder with --out",
        ) from error


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write to; when the block ends it becomes `path`, whole or not at all.

    The content is on the disk before the name is. A failed block leaves `path` as it was and no other file.
    Raises `DiskError` when the device is full.
    """
    path = Path(path)
    draft = path.with_name(f".{path.name}.tmp")
    try:
        with disk_guard(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield draft
            sync(draft)
            os.replace(draft, path)
            sync(path.parent)
    except BaseException:
        with suppress(OSError):
            draft.unlink()
        raise


def sync(path: Path) -> None:
    """Put a file, or a folder's list of names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """`sync` everything under a folder, and the folder."""
    for root, _, names in os.walk(folder):
        for name in names:
            sync(Path(root, name))
        sync(Path(root))


def write_json(path: Path, value: Any) -> None:
    """Write plain data as JSON in one step; numbers that are not finite become null."""
    text = json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_file(path) as draft:
        draft.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read what `write_json` wrote. Raises `RunError` naming the file."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(
            f"cannot read {path}",
            why=str(error),
            fix="if the file was changed by hand, remove the folder it is in and run the recipe again",
        ) from error


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_hashes(files: Iterable[Path], *, memo: Path) -> list[str]:
    """`file_sha256` of each file; `memo` remembers those whose size and time of change are as they were."""
    known: dict[str, Any] = read_json(memo) if memo.exists() else {}
    found: dict[str, Any] = {}
    for path in files:
        try:
            stamp = _stamp(path)
            sha256 = _noted(known, path) or file_sha256(path)
        except OSError as error:
            why = error.strerror or str(error)
            raise RunError(f"cannot read {path}", why=why, fix="correct that path in the recipe") from error
        found[str(path)] = {"stamp": stamp, "sha256": sha256}
    if any(known.get(path) != entry for path, entry in found.items()):
        write_json(memo, known | found)
    return [entry["sha256"] for entry in found.values()]


def remembering(memo: Path) -> Callable[[Path], str]:
    """`file_sha256`, or what `content_hashes` has noted of a file in `memo`; writes nothing."""
    known: dict[str, Any] = read_json(memo) if memo.exists() else {}
    return lambda path: _noted(known, path) or file_sha256(path)


def _noted(known: Mapping[str, Any], path: Path) -> str | None:
    entry = known.get(str(path), {})
    return str(entry["sha256"]) if entry.get("stamp") == _stamp(path) else None


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


class RunDir:
    """An open run folder. One process at a time; close it, or use it in a `with` block."""

    def __init__(self, path: Path, lock: IO[str]) -> None:
        """Use `RunDir.open`."""
        self.path = path
        self._lock = lock

    @classmethod
    def open(cls, folder: Path, recipe: Recipe) -> RunDir:
        """Open `folder` for `recipe`, making it if it is not there, and finish what a kill cut short.

        Raises `RunError` for a folder that holds anything but a run of this recipe's name and model, and
        for one that another process is running in.
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
            if not (folder / MARKER).exists():
                write_json(folder / MARKER, {"format": FORMAT, **_identity(recipe)})
            write_json(folder / RECIPE, recipe.model_dump(mode="json"))
            run = cls(folder, lock)
            for work in sorted(folder.glob(".*.work")):
                if (work / MANIFEST).exists():
                    run._finish(work.name[1 : -len(".work")])
        except BaseException:
            lock.close()
            raise
        return run

    @classmethod
    def follow(cls, folder: Path) -> RunDir:
        """A folder that another process of the same run has open, to work in it together."""
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
        """What a finished stage says of itself; None if it has not finished."""
        path = self.stage(name) / MANIFEST
        if not path.exists():
            return None
        manifest: dict[str, Any] = read_json(path)
        return manifest

    def work(self, name: str, key: str) -> Path:
        """The work folder of a stage. It keeps what a killed run of the same key left, and nothing else."""
        work = self._work(name)
        if not _has_key(work, key):
            _remove(work, first=KEY)
            with disk_guard(work):
                work.mkdir()
            write_json(work / KEY, {"key": key})
        return work

    def commit(
        self,
        name: str,
        key: str,
        metrics: Mapping[str, Any],
        *,
        seed: int = 0,
        inputs: Mapping[str, Any] | None = None,
    ) -> Path:
        """Declare the work folder of a stage finished and give its final place.

        The manifest holds the key, the inputs' fingerprints, versions, seed, metrics, and size and SHA-256 of
        every file. Scratch (names that begin with a dot) is dropped. A kill in here loses nothing.
        """
        work = self._work(name)
        assert _has_key(work, key), f"{work} was not made by work({name!r}, {key!r})"
        with disk_guard(work):
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
        write_json(work / MANIFEST, manifest)
        self._finish(name)
        return self.stage(name)

    def is_done(self, name: str, key: str) -> bool:
        """Whether a stage is finished with this key and its files are all there, of their sizes."""
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
        _remove(stage, first=MANIFEST)
        os.replace(work, stage)
        sync(self.path)


def check_folder(folder: Path, recipe: Recipe) -> None:
    """Raise `RunError` unless `folder` is new, empty, or a run of this recipe's name and model."""
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
    marker = read_json(folder / MARKER)
    found = {key: marker.get(key) for key in _identity(recipe)} if isinstance(marker, dict) else {}
    if found != _identity(recipe):
        raise RunError(
            f"{folder} is not a run of recipe {recipe.name} on {recipe.model}",
            why=f"it was started by recipe {found.get('recipe')} on {found.get('model')}",
            fix="choose another folder with --out, or give that recipe",
        )


def versions() -> dict[str, str]:
    """Python's and the numerical packages' versions."""
    found = {"python": platform.python_version()}
    for package in ("halve", "torch", "transformers", "safetensors", "tokenizers", "numpy"):
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _identity(recipe: Recipe) -> dict[str, str]:
    return {"recipe": recipe.name, "model": recipe.model}


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
    return (work / KEY).is_file() and read_json(work / KEY).get("key") == key


def _artifacts(work: Path) -> list[Path]:
    files = (path for path in work.rglob("*") if path.is_file())
    return sorted(
        path for path in files if not path.relative_to(work).parts[0].startswith(".") and path.name != MANIFEST
    )


def _remove(path: Path, *, first: str | None = None) -> None:
    """Remove a file or a tree; `first` is the name in it that made it count, which goes before the rest."""
    if path.is_dir() and not path.is_symlink():
        if first is not None:
            (path / first).unlink(missing_ok=True)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
