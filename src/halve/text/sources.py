"""Reading text: files, folders and hub data sets as one stream of documents, in bounded memory.

A source is what a recipe names: a file, a folder of files, or `hub:owner/name`, `hub:owner/name/config`, each also
with `:split`. A file is plain text, JSON lines, CSV or parquet; all but the last also `.gz`, `.xz`, `.bz2`, `.zst`.
`folders` says which files of a folder are read, and as what.

A document is one text file or one row. It comes in pieces of bounded length, cut after a line end where there is
one, so that a file of any size, with or without line ends, is read in the memory of a few pieces.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from halve.disk.files import file_sha256
from halve.disk.textfiles import DAMAGED, ending, extra, open_packed, reason, shown
from halve.errors import CorpusError
from halve.text import folders
from halve.text.folders import TEXT_KEYS
from halve.text.rows import Piece as Piece
from halve.text.rows import Wanted, csv_documents, json_lines, parquet_rows, plain_text, without_filling

HUB = "hub:"
PROBED_CHARS = 1 << 21  # of each file, by `probe`
PROBED_IN_ALL = 1 << 26


def read_documents(source: str, wanted: Wanted, *, revision: str | None = None) -> Iterator[Piece]:
    """The documents of one source, in a fixed order; empty ones are passed over.

    `wanted` says what is read of rows. A plain text file is one document. `revision` pins a hub data set. Raises
    `CorpusError` for a source that is missing, empty, binary, damaged or badly encoded, and for unsuitable rows. The
    error names the file and the line or byte.
    """
    if source.startswith(HUB):
        documents = _hub_rows(source, wanted, revision=revision)
    else:
        documents = (piece for path in files(source, wanted.listed) for piece in _read_file(path, wanted))
    empty = True
    for piece in documents:
        empty = empty and not piece.text.strip()
        yield piece
    if empty:
        raise _is_empty(source)


def probe(source: str, wanted: Wanted) -> None:
    """Read the beginning of every file of a local source as `read_documents` does, and raise what it would."""
    for _ in beginnings(source, wanted):
        pass


def beginnings(source: str, wanted: Wanted) -> Iterator[Piece]:
    """The beginning of every file: two million characters, of all files together sixty-four million.

    An error further on is found when the text is tokenized.
    """
    words, left = False, PROBED_IN_ALL
    for path in files(source, wanted.listed):
        seen = 0
        for piece in _read_file(path, wanted):
            yield piece
            seen += len(piece.text)
            words = words or bool(piece.text.strip())
            if words and seen >= min(PROBED_CHARS, left):
                break
        left -= seen
        if words and left <= 0:
            return
    if not words:
        raise _is_empty(source)


def files(source: str, key: str = TEXT_KEYS) -> list[Path]:
    """The files of a local source that are read: itself, or those of the folder, sorted by path.

    `key` is the recipe's key that names the source.
    """
    return list(folders.find(source, key).read)


def require_distinct(listed: Sequence[str], key: str) -> None:
    """Raise `CorpusError` for a file or a hub data set that is read twice: by itself, by a link, or in a folder.

    Held-out documents that count twice make standard errors too small.
    """
    local = [path for source in listed if not source.startswith(HUB) for path in files(source)]
    read = [*map(Path.resolve, local), *(source for source in listed if source.startswith(HUB))]
    twice = next((one for one, times in Counter(read).items() if times > 1), None)
    if twice is not None:
        raise CorpusError(
            f"{key} reads {twice} twice",
            why="its documents would count as different ones, and standard errors would be too small",
            fix="list it once; a folder reads the files in it",
        )


def told(sources: Sequence[str], *, documents: int, tokens: int, kind: str = "document") -> str:
    """What was read, in words: the numbers of files, documents and tokens, and what was left out of folders."""
    names = [source if source.startswith(HUB) else Path(source).name for source in sources]
    local = [folders.find(source) for source in sources if not source.startswith(HUB)]
    counts = [_many(sum(len(source_files.read) for source_files in local), "file")] if local else []
    counts += [_many(documents, kind), _many(tokens, "token")]
    left_out = [source_files.told for source_files in local if source_files.left_out]
    return f"text of {', '.join(names)}: {', '.join((*counts, *left_out))}"


def left_out(sources: Sequence[str]) -> tuple[str, ...]:
    """What is left out of local folders, in words: one line for each folder with something left out."""
    local = {source: folders.find(source) for source in dict.fromkeys(sources) if not source.startswith(HUB)}
    return tuple(
        f"{shown(source)}: {source_files.told}" for source, source_files in local.items() if source_files.left_out
    )


def fingerprint(source: str, *, revision: str | None = None, sha256: Callable[[Path], str] = file_sha256) -> str:
    """A SHA-256 that changes with the content of a source, and with nothing else; `sha256` gives that of a file."""
    digest = hashlib.sha256()
    if source.startswith(HUB):
        digest.update(f"{source}@{revision}".encode())
        return digest.hexdigest()
    for path in files(source):
        with _readable(path):  # content and ending say how it is read
            digest.update(os.fsencode(f"{ending(path)} {sha256(path)}\n"))
    return digest.hexdigest()


def hub_revision(source: str) -> str:
    """The commit that a hub data set is at now. Raises `CorpusError` if the hub does not answer."""
    from huggingface_hub import HfApi

    repository, _, _ = _hub_name(source)
    try:
        return str(HfApi().dataset_info(repository).sha)
    except Exception as error:
        raise _hub_failed(source, error) from error


def _read_file(path: Path, wanted: Wanted) -> Iterator[Piece]:
    with _readable(path):
        kind = folders.file_kind(path, text_field=wanted.field)
        if kind == "parquet":
            yield from parquet_rows(path, wanted=wanted)
            return
        if wanted.make is not None and kind != "JSON lines":
            raise CorpusError(
                f"{shown(path)} holds no {'conversations' if wanted.key else 'pairs of answers'}",
                why=f"it is {'a table' if kind == 'CSV' else 'plain text'}, and "
                + (f"{wanted.key} names a field of rows" if wanted.key else "a pair is a row with prompt and answers"),
                fix="give JSON lines or parquet"
                + ("; in a mixture, set plain: true for a part of plain text" if wanted.listed == TEXT_KEYS else ""),
            )
        with open_packed(path) as file:
            if kind == "JSON lines":
                yield from json_lines(path, file, wanted=wanted)
            elif kind == "CSV":
                yield from csv_documents(path, file, text_field=wanted.field)
            else:
                yield from plain_text(path, file)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except DAMAGED as error:
        raise CorpusError(
            f"cannot read {shown(path)}",
            why=reason(error),
            fix="check that the file is whole and that you may read it",
        ) from error


def _hub_rows(source: str, wanted: Wanted, *, revision: str | None) -> Iterator[Piece]:
    datasets = extra("datasets", source)
    repository, config, split = _hub_name(source)
    try:
        rows = datasets.load_dataset(repository, config, split=split, revision=revision, streaming=True)
        for number, row in enumerate(rows, 1):
            yield from wanted.made(without_filling(row), f"{source}, row {number}")
    except CorpusError:
        raise
    except Exception as error:
        raise _hub_failed(source, error) from error


def _hub_name(source: str) -> tuple[str, str | None, str]:
    name, _, split = source.removeprefix(HUB).partition(":")
    parts = name.split("/")
    if not all(parts) or len(parts) not in (2, 3):
        raise CorpusError(
            f"{source} names no data set",
            why="a data set of the hub has an owner and a name",
            fix="write hub:owner/name, hub:owner/name:split or hub:owner/name/config:split",
        )
    return "/".join(parts[:2]), parts[2] if len(parts) == 3 else None, split or "train"


def _is_empty(source: str) -> CorpusError:
    return CorpusError(f"{source} is empty", why="it holds no text at all", fix="give a source with some text")


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}" + "s" * (count != 1)


def _hub_failed(source: str, error: Exception) -> CorpusError:
    return CorpusError(
        f"cannot read {source}",
        why=f"{type(error).__name__}: {error}",
        fix="check the name, the split and the network; a gated data set needs hf auth login",
    )
