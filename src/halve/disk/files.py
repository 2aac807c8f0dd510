"""Files that are written completely or not at all, JSON data in them, and hashes of their content."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from halve.disk import plain_json
from halve.errors import DiskError, RunError
from halve.process.waits import bytes_in_words, wait

try:
    import fcntl
except ImportError:  # not on Windows, where two processes must not write the same files at once
    fcntl = None  # type: ignore[assignment]

CHANGED = "remove the folder it is in and run the same command: what was there is made again"
_FULL = {errno.ENOSPC, errno.EDQUOT}
# safetensors and shutil report the operating system's error inside their own messages
_FULL_MESSAGE = re.compile(rf"(code: |os error |\[Errno )({errno.ENOSPC}|{errno.EDQUOT})\b")


@contextmanager
def disk_guard(path: Path) -> Iterator[None]:
    """Turn "no space left" while writing to `path` into a `DiskError`. Other errors pass through."""
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
    """Yield a temporary path to write to. When the block ends, the file is renamed to `path`.

    The content is on disk before the name. A block that fails leaves `path` unchanged and no other file. Processes that
    write the same file take turns. Raises `DiskError` when the device is full.
    """
    path = Path(path)
    draft = path.with_name(f".{path.name}.tmp")
    with disk_guard(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = locked(draft)
        try:
            yield draft
            sync(draft)
            os.replace(draft, path)
            sync(path.parent)
        except BaseException:
            with suppress(OSError):
                draft.unlink()
            raise
        finally:
            lock.close()


def locked(path: Path) -> IO[bytes]:
    """Open a file for appending; wait until no other process has it open for that. Closing it lets the next one in."""
    while True:
        file = path.open("ab")
        with suppress(OSError):  # a file system without locks, such as some network mounts
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # the process that held the lock has finished, renamed or dropped this file


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """In this context, no other process is in a context of the same `path`, a lock file that is removed at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = locked(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.close()


def sync(path: Path) -> None:
    """Flush a file, or the list of names in a folder, to the disk."""
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
    """Write plain data as JSON, completely or not at all. Numbers that are not finite become null."""
    text = json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_file(path) as draft:
        # half a surrogate pair, as Python reads a file name that is not UTF-8, is written as JSON's own escape
        draft.write_text(text, encoding="utf-8", errors="backslashreplace")


def read_json(path: Path) -> Any:
    """Read what `write_json` wrote. Raises `RunError` naming the file."""
    try:
        return plain_json.parse_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"cannot read {path}", why=str(error), fix=CHANGED) from error


def read_object(path: Path) -> dict[str, Any]:
    """`read_json` for a file that must hold an object. Raises `RunError` naming the file."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise RunError(f"cannot read {path}", why=f"it holds no JSON object but a {type(value).__name__}", fix=CHANGED)
    return value


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """Data with a digest of itself, by which `read_sealed` sees whether it was changed."""
    return {**value, "digest": _digest(value)}


def read_sealed(path: Path) -> dict[str, Any]:
    """Read data that was `sealed` and written. Raises `RunError` if it was changed."""
    value = read_object(path)
    if value.pop("digest", None) != _digest(value):
        why = "it was changed, or another version wrote it: it lacks the digest of its content"
        raise RunError(f"{path} is not what this halve wrote", why=why, fix=CHANGED)
    return value


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain(value), sort_keys=True).encode()).hexdigest()


def plain(value: Any) -> Any:
    """Data in the form of JSON: keys are strings, sequences are lists, and numbers that are not finite are null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


_hashes: dict[tuple[int, ...], str] = {}  # hashes that this process has computed of files that have not changed


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, as hexadecimal digits.

    A process reads each file only once for this. The system's time of the last change (ctime), which programs cannot
    set, shows whether a file is unchanged.
    """
    known = _identity(path)
    if known not in _hashes:
        with wait(f"hashing {path.name} ({bytes_in_words(path.stat().st_size)})"), open(path, "rb") as file:
            _hashes[known] = hashlib.file_digest(file, "sha256").hexdigest()
    return _hashes[known]


def rename(source: Path, target: Path) -> None:
    """Rename a file and keep its known hash.

    A rename changes the time of the last change, so `file_sha256` would otherwise read the file again.
    """
    known = _hashes.get(_identity(source))
    os.replace(source, target)
    sync(target.parent)
    if known is not None:
        _hashes[_identity(target)] = known


def content_hashes(files: Iterable[Path], *, memo: Path) -> list[str]:
    """`file_sha256` of each file, also of one that is listed twice.

    `memo` stores hashes for files whose size and time of change stay the same. For inputs that a run reads and never
    writes. A memo that cannot be read counts as empty.
    """
    files, known, entries = list(files), _remembered(memo), {}
    for path in files:
        try:
            stamp = _stamp(path)
            sha256 = _noted(known, path) or file_sha256(path)
        except OSError as error:
            why = error.strerror or str(error)
            raise RunError(f"cannot read {path}", why=why, fix="correct that path in the recipe") from error
        entries[str(path)] = {"stamp": stamp, "sha256": sha256}
        _hashes.setdefault(_identity(path), sha256)
    if any(known.get(path) != entry for path, entry in entries.items()):
        write_json(memo, known | entries)
    return [str(entries[str(path)]["sha256"]) for path in files]


def remembering(memo: Path) -> Callable[[Path], str]:
    """`file_sha256`, or the hash that `content_hashes` has stored in `memo`. Writes nothing."""
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
