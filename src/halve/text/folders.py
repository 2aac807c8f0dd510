"""Which files of a source are text, and in which format they are read. Content decides as well as the name.

In a folder, these files are left out because they are not its text:

- files and folders whose names begin with a dot or an underscore, and run folders of halve;
- license files, and the metadata files that the `datasets` library writes;
- `README` files next to anything but Markdown and reStructuredText, and data cards next to rows (JSON lines, CSV,
  parquet), because they describe the data;
- files with an ending that is not listed here, unless their content is JSON lines or parquet, and `.json` files
  without rows, such as settings.

Links to folders are followed, and each folder is read once. A link to a folder around the source is left out.

A file that the recipe names directly is always read.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final, Literal

from halve.disk import plain_json
from halve.disk.rundir import MARKER
from halve.disk.textfiles import DAMAGED, ending, open_packed, reason, shown, status
from halve.errors import CorpusError

FileKind = Literal["text", "JSON lines", "CSV", "parquet"]

MOST_LEFT_OUT = 20_000  # this many more skipped files than read ones mean a disk and not a corpus
HEAD_BYTES = 1 << 16

_BY_ENDING: dict[str, FileKind] = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json", ".jsonlines", ".jl"), "JSON lines"),
    **dict.fromkeys((".csv", ".tsv"), "CSV"),
    ".parquet": "parquet",
}
_PROSE = (".txt", ".text", ".md", ".rst")
_MARKUP = (".md", ".rst")
_CARD = re.compile(r"(?i:((data|dataset|model)[-_ ]?)?card)\.(?i:md|rst)")
_LICENSES = re.compile(
    r"(?i:license|licence|copying|notice|citation)(\.(?i:txt|md|rst|cff))?|(LICEN[SC]E|COPYING|NOTICE)[-_.].*"
)
_NOTES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")

TEXT_KEYS: Final = "data.train or data.valid"

_ARRAY = re.compile(rb"\s*\[\s*\{\s*\"")
_OBJECT = re.compile(rb"\s*\{\s*\"")


@dataclass(frozen=True)
class SourceFiles:
    """The files of a source: those that are read, in the order of their paths, and those that are left out."""

    read: tuple[Path, ...]
    left_out: tuple[Path, ...]

    @property
    def told(self) -> str:
        """What is left out, in words; empty if nothing is."""
        if not self.left_out:
            return ""
        names = ", ".join(shown(path.name) for path in self.left_out[:3])
        more = len(self.left_out) - 3
        return f"left out {names}" + (f" and {more:,} more" if more > 0 else "")


def find(source: str, key: str = TEXT_KEYS) -> SourceFiles:
    """The files of a local source: itself, or those of the folder. `key` is the recipe's key that names it.

    Raises `CorpusError` for a source that is not there or cannot be read, and for a folder without text or with so
    much else that it must be a mistake.
    """
    path = Path(source)
    try:
        mode = status(path).st_mode
    except OSError as error:
        raise CorpusError(
            f"there is no corpus {shown(source)}",
            why="neither a file nor a folder of that name exists"
            if isinstance(error, FileNotFoundError)
            else reason(error),
            fix=f"correct {key}; write hub:owner/name for a data set of the hub",
        ) from error
    if stat.S_ISREG(mode):
        return SourceFiles((path,), ())
    if not stat.S_ISDIR(mode):
        raise CorpusError(
            f"{shown(source)} is neither a file nor a folder",
            why="text is read more than once, and a device or a pipe cannot be",
            fix="write what comes out of it to a file, and name that",
        )
    files = _in_folder(path)
    if not files.read:
        raise CorpusError(
            f"folder {source} holds no corpus file",
            why=f"read are files ending in {', '.join(sorted((*_PROSE, *_BY_ENDING)))}, and JSON lines and parquet"
            f" of any name; {files.told or 'it has no file at all'}",
            fix="rename the files, or name them one by one",
        )
    return files


def file_kind(path: Path, *, text_field: str) -> FileKind:
    """How a file is read. Raises what opening it raises."""
    suffix = ending(path)
    if suffix in _BY_ENDING:
        return _BY_ENDING[suffix]
    now = status(path)
    return _by_content(path, now.st_size, now.st_mtime_ns) or ("text" if suffix in _PROSE else _table(path, text_field))


@lru_cache(maxsize=1 << 16)
def _by_content(path: Path, size: int, changed: int) -> FileKind | None:
    """The format that a file's beginning shows; None for text and others. `size` and `changed` identify the content."""
    if size == 0:  # like files of /proc, some of which never end
        return None
    with open_packed(path) as file:
        head = file.read(HEAD_BYTES)
    if head.startswith(b"PAR1"):
        return "parquet"
    return "JSON lines" if b"\0" not in head and _holds_rows(head.removeprefix(b"\xef\xbb\xbf")) else None


def _table(path: Path, text_field: str) -> FileKind:
    """CSV if the first line has a column `text_field` and others, otherwise text."""
    with open_packed(path) as file:
        line = file.readline(HEAD_BYTES).decode("utf-8-sig", "replace").strip()
    return "CSV" if delimiter(line, text_field) else "text"


def delimiter(header: str, text_field: str) -> str | None:
    """The delimiter of a table whose header has the column `text_field` and others.

    >>> delimiter("id;text", "text")
    ';'
    """
    for between in (",", "\t", ";", "|"):
        columns = [column.strip('"') for column in header.split(between)]
        if len(columns) > 1 and text_field in columns:
            return between
    return None


def _holds_rows(head: bytes) -> bool:
    """Whether more than half of the lines in a file's beginning are JSON objects, or it is an array of objects."""
    *lines, last = head.split(b"\n")
    if len(head) < HEAD_BYTES:
        lines.append(last)
    lines = [line for line in lines if line.strip()]
    if not lines:  # no line ends within the beginning
        return bool(_OBJECT.match(head))
    return bool(_ARRAY.match(head)) or 2 * sum(map(_is_object, lines)) > len(lines)


def _is_object(line: bytes) -> bool:
    if not _OBJECT.match(line):
        return False
    try:
        return isinstance(plain_json.parse_json(line.decode()), dict)
    except ValueError:
        return False


def _in_folder(folder: Path) -> SourceFiles:
    if folder.resolve() == Path(folder.resolve().anchor):
        raise CorpusError(
            f"{folder} is the whole disk",
            why="a source is a folder of texts",
            fix="name the folder or the files that hold the text",
        )
    kinds: dict[Path, FileKind] = {}
    left_out: list[Path] = []
    for path in _walk(folder, left_out.append):
        kind = None if _is_note(path) else _kind_in_folder(path)
        if kind is None:
            left_out.append(path)
        else:
            kinds[path] = kind
        if len(left_out) - len(kinds) > MOST_LEFT_OUT:
            raise CorpusError(
                f"folder {folder} holds too much that is not text",
                why=f"of its files {len(left_out):,} are left out and {len(kinds):,} are text, and more follow",
                fix="name the folder or the files that hold the text",
            )
    about = _about(kinds, alone=all(map(_is_note, left_out)))
    return SourceFiles(tuple(sorted(path for path in kinds if path not in about)), tuple(sorted((*left_out, *about))))


def _walk(folder: Path, leave_out: Callable[[Path], None]) -> Iterator[Path]:
    """The files of a folder and its subfolders, and then of linked folders. Each real folder is visited once."""
    root = folder.resolve()
    holding = {_identity(path) for path in root.parents}  # a link to one of these would lead out of the source
    seen: set[tuple[int, int]] = set()
    waiting = [folder]
    while waiting:
        links: list[Path] = []
        for start in waiting:
            if _identity(start) in seen | holding:
                leave_out(start)
            else:
                yield from _walk_one(start, seen, links.append, leave_out, source=folder)
        waiting = sorted(links)


def _walk_one(
    start: Path,
    seen: set[tuple[int, int]],
    follow_later: Callable[[Path], None],
    leave_out: Callable[[Path], None],
    *,
    source: Path,
) -> Iterator[Path]:
    """The files of a folder and its subfolders that are not yet `seen`. Links to folders go to `follow_later`."""

    def failed(error: OSError) -> None:
        raise CorpusError(
            f"cannot read folder {shown(error.filename or start)}",
            why=reason(error),
            fix="make it readable, or name the files that hold the text",
        ) from error

    for here, folders, names in os.walk(start, onerror=failed):
        inside = Path(here)
        if (known := _identity(inside)) in seen or (MARKER in names and inside != source):
            leave_out(inside)
            folders.clear()
            continue
        seen.add(known)
        hidden = [name for name in (*folders, *names) if name.startswith((".", "_"))]
        for name in hidden:
            leave_out(inside / name)
        folders[:] = sorted({*folders}.difference(hidden))
        for name in folders:
            if os.path.islink(inside / name):
                follow_later(inside / name)
        for name in sorted({*names}.difference(hidden)):
            if os.path.isfile(inside / name):
                yield inside / name
            else:  # a pipe or a broken link
                leave_out(inside / name)


def _identity(folder: Path) -> tuple[int, int]:
    """The identity of a folder, which does not depend on the path to it."""
    inode = folder.stat()
    return inode.st_dev, inode.st_ino


def _kind_in_folder(path: Path) -> FileKind | None:
    """The format in which a file of a folder is read; None if it is left out."""
    suffix = ending(path)
    if suffix in _BY_ENDING and suffix != ".json":
        return _BY_ENDING[suffix]
    try:
        now = status(path)
        kind = _by_content(path, now.st_size, now.st_mtime_ns)
    except (*DAMAGED, CorpusError):
        kind = _BY_ENDING.get(suffix)  # reading it reports the error
    return kind or ("text" if suffix in _PROSE else None)


def _is_note(path: Path) -> bool:
    """Whether a file is a license, or metadata of the `datasets` library."""
    return path.name in _NOTES or bool(_LICENSES.fullmatch(path.name))


def _about(kinds: dict[Path, FileKind], *, alone: bool) -> set[Path]:
    """The files that describe the text next to them. `alone`: there is nothing else in the folder."""
    text = {path for path, kind in kinds.items() if kind == "text"}
    readme = {path for path in text if path.name.lower().startswith("readme")}
    if len(text) < len(kinds):
        return readme | {path for path in text if _CARD.fullmatch(path.name)}
    return set() if alone and all(ending(path) in _MARKUP for path in text - readme) else readme
