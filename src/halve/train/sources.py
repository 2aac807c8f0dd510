"""Reading text: files, folders and hub data sets become one stream of documents in bounded memory.

A source is what a recipe names: a text file, JSON lines, parquet (the first two also `.gz`, `.xz`, `.zst`), a
folder of such files, or `hub:owner/name`, `hub:owner/name/config`, each also with `:split`.

A document is one text file, one JSON line or one row. It comes in pieces of bounded length, cut after a line
end where there is one, so that a file of any size, with or without line ends, is read in the memory of a few
pieces.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import hashlib
import importlib
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from halve.errors import CorpusError
from halve.rundir import file_sha256

PIECE_CHARS = 1 << 16
LONGEST_LINE_BYTES = 1 << 28  # of JSON lines, which have to be read whole
HUB = "hub:"

_PACKED = {".gz", ".xz", ".bz2", ".zst"}
_JSON_LINES = {".jsonl", ".ndjson", ".json"}
_PARQUET = {".parquet"}
_TEXT = {".txt", ".text", ".md", ".rst"}
_DAMAGED = (EOFError, OSError, lzma.LZMAError, zlib.error)


class Piece(NamedTuple):
    """A part of a document, and whether it is the document's last."""

    text: str
    last: bool


def read(source: str, *, text_field: str, revision: str | None = None) -> Iterator[Piece]:
    """The documents of one source, in a fixed order; empty ones are passed over.

    `text_field` is the field of JSON lines and rows that holds the text. `revision` pins a hub data set.
    Raises `CorpusError` for a source that is missing, empty, binary, damaged or badly encoded, and for rows
    without that field; it names the file and the line or byte.
    """
    if source.startswith(HUB):
        documents = _hub_rows(source, text_field=text_field, revision=revision)
    else:
        documents = (piece for path in files(source) for piece in _read_file(path, text_field=text_field))
    empty = True
    for piece in documents:
        empty = empty and not piece.text.strip()
        yield piece
    if empty:
        raise CorpusError(f"{source} is empty", why="it holds no text at all", fix="give a source with some text")


def files(source: str) -> list[Path]:
    """The files of a local source: itself, or those of a known kind in the folder, sorted by path."""
    path = Path(source)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise CorpusError(
            f"there is no corpus {source}",
            why="neither a file nor a folder of that name exists",
            fix="correct data.train or data.valid; write hub:owner/name for a data set of the hub",
        )
    known = _TEXT | _JSON_LINES | _PARQUET
    found = sorted(file for file in path.rglob("*") if file.is_file() and _kind(file) in known)
    if not found:
        raise CorpusError(
            f"folder {source} holds no corpus file",
            why=f"of a folder's files those ending in {', '.join(sorted(known))} are read",
            fix="rename the files, or name them one by one",
        )
    return found


def fingerprint(source: str, *, revision: str | None = None, sha256: Callable[[Path], str] = file_sha256) -> str:
    """A SHA-256 that changes with the content of a source, and with nothing else; `sha256` gives that of a file."""
    digest = hashlib.sha256()
    if source.startswith(HUB):
        digest.update(f"{source}@{revision}".encode())
        return digest.hexdigest()
    for path in files(source):
        with _readable(path):
            digest.update(f"{_kind(path)} {sha256(path)}\n".encode())
    return digest.hexdigest()


def hub_revision(source: str) -> str:
    """The commit that a hub data set is at now. Raises `CorpusError` if the hub does not answer."""
    from huggingface_hub import HfApi

    repository, _, _ = _hub_name(source)
    try:
        return str(HfApi().dataset_info(repository).sha)
    except Exception as error:
        raise _hub_failed(source, error) from error


def _kind(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _PACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _read_file(path: Path, *, text_field: str) -> Iterator[Piece]:
    with _readable(path):
        if _kind(path) in _PARQUET:
            yield from _parquet_rows(path, text_field=text_field)
        else:
            with _open(path) as file:
                if _kind(path) in _JSON_LINES:
                    yield from _json_lines(path, file, text_field=text_field)
                else:
                    yield from _text(path, file)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except _DAMAGED as error:
        raise CorpusError(
            f"cannot read {path}",
            why=str(error) or f"the file ends too early ({type(error).__name__})",
            fix="check that the file is whole and that you may read it",
        ) from error


def _open(path: Path) -> io.BufferedIOBase:
    match path.suffix.lower():
        case ".gz":
            return gzip.open(path)
        case ".xz":
            return lzma.open(path)
        case ".bz2":
            return bz2.open(path)
        case ".zst":
            return io.BufferedReader(_ZstdFile(path, _extra("zstandard", path)), PIECE_CHARS)
        case _:
            return path.open("rb")


class _ZstdFile(io.RawIOBase):
    """The unpacked bytes of a .zst file; the package's own reader takes a file cut short for a whole one."""

    def __init__(self, path: Path, zstandard: ModuleType) -> None:
        self._file = path.open("rb")
        self._zstandard = zstandard
        self._frame: Any = None
        self._packed = self._unpacked = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._unpacked:
            packed = self._packed or self._file.read(4096)
            if not packed:
                if self._frame is not None:
                    raise EOFError("the compressed file ends too early")
                return 0
            self._frame = self._frame or self._zstandard.ZstdDecompressor().decompressobj()
            try:
                self._unpacked = self._frame.decompress(packed)
            except self._zstandard.ZstdError as error:
                raise OSError(str(error)) from error
            self._packed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        size = min(len(buffer), len(self._unpacked))
        buffer[:size], self._unpacked = self._unpacked[:size], self._unpacked[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


def _text(path: Path, file: io.BufferedIOBase) -> Iterator[Piece]:
    """A text file as one document."""
    held = ""
    for text in _decode(path, file):
        held += text
        while len(held) > PIECE_CHARS:
            cut = _cut(held)
            yield Piece(held[:cut], last=False)
            held = held[cut:]
    if held:
        yield Piece(held, last=True)


def _decode(path: Path, file: io.BufferedIOBase) -> Iterator[str]:
    """UTF-8 text chunk by chunk; keeps count, so that an error can say where it is."""
    held, offset, line = b"", 0, 1
    while True:
        raw = file.read(PIECE_CHARS)
        data = held + raw
        _refuse_nul(path, data, offset=offset, line=line)
        try:
            text, used = codecs.utf_8_decode(data, "strict", not raw)
        except UnicodeDecodeError as error:
            line += data.count(b"\n", 0, error.start)
            raise _badly_encoded(path, offset=offset + error.start, line=line, error=error) from error
        yield text.removeprefix("\ufeff") if offset == 0 else text
        held, offset, line = data[used:], offset + used, line + text.count("\n")
        if not raw:
            return


def _cut(text: str) -> int:
    """Where to end the first piece of a longer text: after a line, else a word, else where it is full."""
    for end in ("\n", " "):
        cut = text.rfind(end, 0, PIECE_CHARS) + 1
        if cut > PIECE_CHARS // 2:
            return cut
    return PIECE_CHARS


def _json_lines(path: Path, file: io.BufferedIOBase, *, text_field: str) -> Iterator[Piece]:
    line = offset = 0
    while raw := file.readline(LONGEST_LINE_BYTES + 1):
        line += 1
        place = f"{path}, line {line}"
        if len(raw) > LONGEST_LINE_BYTES:
            raise CorpusError(
                f"{place} is too long",
                why=f"a JSON line is read whole, and this one is longer than {LONGEST_LINE_BYTES >> 20} MiB",
                fix="split the text into several lines, or give it as a plain text file",
            )
        _refuse_nul(path, raw, offset=offset, line=line)
        try:
            text = raw.decode("utf-8-sig" if line == 1 else "utf-8")
            row = json.loads(text) if text.strip() else None
        except UnicodeDecodeError as error:
            raise _badly_encoded(path, offset=offset + error.start, line=line, error=error) from error
        except ValueError as error:
            raise CorpusError(
                f"{place} is not JSON",
                why=str(error),
                fix="write one JSON object a line, or name the file .txt",
            ) from error
        offset += len(raw)
        if row is not None:
            yield from _row(row, place=place, text_field=text_field)


def _parquet_rows(path: Path, *, text_field: str) -> Iterator[Piece]:
    parquet = _extra("pyarrow.parquet", path)
    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if text_field not in names:
            raise _no_field(str(path), text_field, names)
        number = 0
        for batch in file.iter_batches(batch_size=64, columns=[text_field]):
            for value in batch.column(0).to_pylist():
                number += 1
                yield from _row({text_field: value}, place=f"{path}, row {number}", text_field=text_field)
    except ValueError as error:  # pyarrow.ArrowInvalid among them
        raise CorpusError(f"cannot read {path}", why=str(error), fix="check that it is a whole parquet file") from error


def _hub_rows(source: str, *, text_field: str, revision: str | None) -> Iterator[Piece]:
    datasets = _extra("datasets", source)
    repository, config, split = _hub_name(source)
    try:
        rows = datasets.load_dataset(repository, config, split=split, revision=revision, streaming=True)
        for number, row in enumerate(rows, 1):
            yield from _row(row, place=f"{source}, row {number}", text_field=text_field)
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


def _row(row: Any, *, place: str, text_field: str) -> Iterator[Piece]:
    if not isinstance(row, dict):
        raise CorpusError(
            f"{place} is not an object",
            why=f"each line is a JSON object with a field {text_field!r}; this is {type(row).__name__}",
            fix="write lines such as {" + json.dumps(text_field) + ': "..."}',
        )
    if text_field not in row:
        raise _no_field(place, text_field, row)
    text = row[text_field]
    if text is not None and not isinstance(text, str):
        raise CorpusError(
            f"{place}: field {text_field!r} is not text",
            why=f"it holds {type(text).__name__}",
            fix="set data.text_field to the field that holds the text",
        )
    while text:
        cut = _cut(text) if len(text) > PIECE_CHARS else len(text)
        yield Piece(text[:cut], last=cut == len(text))
        text = text[cut:]


def _no_field(place: str, text_field: str, fields: Iterable[str]) -> CorpusError:
    return CorpusError(
        f"{place} has no field {text_field!r}",
        why=f"its fields are {', '.join(map(str, fields)) or 'none at all'}",
        fix="set data.text_field to the field that holds the text",
    )


def _refuse_nul(path: Path, data: bytes, *, offset: int, line: int) -> None:
    at = data.find(b"\0")
    if at >= 0:
        raise CorpusError(
            f"{path} is binary",
            why=f"there is a NUL byte in line {line + data.count(bytes([10]), 0, at)}, at byte {offset + at}",
            fix="give text in UTF-8; UTF-16 can be converted with iconv -f utf-16 -t utf-8",
        )


def _badly_encoded(path: Path, *, offset: int, line: int, error: UnicodeDecodeError) -> CorpusError:
    return CorpusError(
        f"{path}, line {line} is not UTF-8",
        why=f"byte {offset} is 0x{error.object[error.start]:02x}: {error.reason}",
        fix="convert the file to UTF-8, for example with iconv -f latin1 -t utf-8",
    )


def _hub_failed(source: str, error: Exception) -> CorpusError:
    return CorpusError(
        f"cannot read {source}",
        why=f"{type(error).__name__}: {error}",
        fix="check the name, the split and the network; a gated data set needs hf auth login",
    )


def _extra(module: str, wanted_by: object) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise CorpusError(
            f"cannot read {wanted_by}",
            why=f"the Python package {module.partition('.')[0]} is not installed",
            fix='pip install "halve[data]"',
        ) from error
