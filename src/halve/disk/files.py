"""Files that are whole or not there, plain data in them, and hashes of what they hold."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from halve.disk import plain_json
from halve.errors import DiskError, RunError
from halve.process.waits import bytes_in_words, wait

CHANGED = "remove the folder it is in and run the same command: what was there is made again"
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


@contextmanager
def atomic_folder(path: Path, *, last: str) -> Iterator[Path]:
    """Give a new folder to write to; when the block ends, what it holds is what `path` holds, and nothing else.

    A folder that is there stays, with other content: somebody may stand in it, or nothing may be made beside it. Of
    its content the file `last` goes first and comes last, so that half a folder is never taken for a whole one. A
    failed block leaves `path` as it was. Raises `DiskError` when the device is full.
    """
    folder = Path(path).resolve()
    there = folder.is_dir()
    draft = folder / ".draft.tmp" if there else folder.with_name(f".{folder.name}.tmp")
    try:
        with disk_guard(path):
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            yield draft
            sync_tree(draft)
            if there:
                _refill(folder, draft, last=last)
            else:
                os.replace(draft, folder)
            sync(folder.parent)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _refill(folder: Path, draft: Path, *, last: str) -> None:
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name != last):
        if entry.is_dir() and not entry.is_symlink():
            if entry != draft:
                shutil.rmtree(entry)
        else:
            entry.unlink()
    for entry in sorted(draft.iterdir(), key=lambda entry: entry.name == last):
        os.replace(entry, folder / entry.name)
    draft.rmdir()
    sync(folder)


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
    text = json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_file(path) as draft:
        draft.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read what `write_json` wrote. Raises `RunError` naming the file."""
    try:
        return plain_json.parse_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"cannot read {path}", why=str(error), fix=CHANGED) from error


def read_object(path: Path) -> dict[str, Any]:
    """`read_json` of what has to be an object. Raises `RunError` naming the file."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise RunError(f"cannot read {path}", why=f"it holds no JSON object but a {type(value).__name__}", fix=CHANGED)
    return value


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """Data with a digest of itself, which tells `read_sealed` that nobody has changed it."""
    return {**value, "digest": _digest(value)}


def read_sealed(path: Path) -> dict[str, Any]:
    """Read what was `sealed` and written. Raises `RunError` if that is not what the file holds."""
    value = read_object(path)
    if value.pop("digest", None) != _digest(value):
        why = "it was changed, or another version wrote it: it lacks the digest of its content"
        raise RunError(f"{path} is not what this halve wrote", why=why, fix=CHANGED)
    return value


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain(value), sort_keys=True).encode()).hexdigest()


def plain(value: Any) -> Any:
    """Data as JSON has it: keys are strings, sequences lists, and numbers that are not finite are null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


_hashes: dict[tuple[int, ...], str] = {}  # what this process has read of files that are as they were


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, as hexadecimal digits.

    A process reads a file for it once. The system's own time of the last change, which nobody sets, tells that a file
    is as it was.
    """
    known = _identity(path)
    if known not in _hashes:
        with wait(f"hashing {path.name} ({bytes_in_words(path.stat().st_size)})"), open(path, "rb") as file:
            _hashes[known] = hashlib.file_digest(file, "sha256").hexdigest()
    return _hashes[known]


def rename(source: Path, target: Path) -> None:
    """Rename a file for good; what this process has read of it stays known.

    A rename moves the time of the last change, for which `file_sha256` would read the file again.
    """
    known = _hashes.get(_identity(source))
    os.replace(source, target)
    sync(target.parent)
    if known is not None:
        _hashes[_identity(target)] = known


def content_hashes(files: Iterable[Path], *, memo: Path) -> list[str]:
    """`file_sha256` of each file; `memo` remembers those whose size and time of change are as they were.

    For what a run takes from outside and never writes. A memo that cannot be read remembers nothing.
    """
    known, found = _remembered(memo), {}
    for path in files:
        try:
            stamp = _stamp(path)
            sha256 = _noted(known, path) or file_sha256(path)
        except OSError as error:
            why = error.strerror or str(error)
            raise RunError(f"cannot read {path}", why=why, fix="correct that path in the recipe") from error
        found[str(path)] = {"stamp": stamp, "sha256": sha256}
        _hashes.setdefault(_identity(path), sha256)
    if any(known.get(path) != entry for path, entry in found.items()):
        write_json(memo, known | found)
    return [str(entry["sha256"]) for entry in found.values()]


def remembering(memo: Path) -> Callable[[Path], str]:
    """`file_sha256`, or what `content_hashes` has noted of a file in `memo`; writes nothing."""
    known = _remembered(memo)
    return lambda path: _noted(known, path) or file_sha256(path)


def _remembered(memo: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError, RecursionError):
        known = plain_json.parse_json(memo.read_text(encoding="utf-8"))
        return known if isinstance(known, dict) else {}
    return {}


def _noted(known: Mapping[str, Any], path: Path) -> str | None:
    entry = known.get(str(path))
    if not isinstance(entry, dict) or entry.get("stamp") != _stamp(path):
        return None
    sha256 = entry.get("sha256")
    return sha256 if isinstance(sha256, str) else None


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _identity(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
