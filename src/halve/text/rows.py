"""Read rows of JSON lines, CSV and parquet, one document each, and split documents into pieces of bounded length."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from halve.disk import plain_json
from halve.disk.textfiles import extra, half_pair
from halve.errors import CorpusError
from halve.text.folders import TEXT_KEYS, delimiter

PIECE_CHARS = 1 << 16
LONGEST_LINE_BYTES = 1 << 28  # of rows, which have to be read whole


class Piece(NamedTuple):
    """A part of a document, whether it is the document's last, and the row that it is of, where that may matter."""

    text: str
    last: bool
    place: str = ""


class Wanted(NamedTuple):
    """What rows are read for: a field that must be there, others that may, and what is made of a row.

    `key` is the recipe's key that names the field, empty for a field whose name is fixed. `make` is a function like
    `pieces`; None is `pieces`. `listed` is the key that names the sources.
    """

    field: str
    key: str = "data.text_field"
    also: tuple[str, ...] = ()
    make: Callable[..., Iterator[Piece]] | None = None
    listed: str = TEXT_KEYS

    def made(self, row: Any, place: str) -> Iterator[Piece]:
        """The documents of a row, whose place names it in errors."""
        return (self.make or pieces)(row, place=place, text_field=self.field)


def plain_text(path: Path, file: io.BufferedIOBase) -> Iterator[Piece]:
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


def json_lines(path: Path, file: io.BufferedIOBase, *, wanted: Wanted) -> Iterator[Piece]:
    """The documents of JSON lines, one for each line that is not empty."""
    for number, line in _lines(path, file):
        place = f"{path}, line {number}"
        try:
            row = plain_json.parse_json(line) if line.strip() else None
        except ValueError as error:
            raise _no_json(path, number, line, why=str(error)) from error
        if row is None:
            continue
        if isinstance(row, list) and number == 1:
            raise _no_json(path, number, line, why="it is a list")
        yield from wanted.made(row, place)


def csv_documents(path: Path, file: io.BufferedIOBase, *, text_field: str) -> Iterator[Piece]:
    """The documents of a CSV file, one for each row. The first row names the columns."""
    lines = (line for _, line in _lines(path, file))
    header = next(lines, "")
    between = delimiter(header.strip(), text_field) or ("\t" if ".tsv" in path.suffixes else ",")
    csv.field_size_limit(LONGEST_LINE_BYTES)
    rows = csv.reader(_chain(header, lines), delimiter=between, strict=True)
    names: list[str] = []
    try:
        for row in filter(None, rows):
            if not names:
                names = row
                if text_field not in names:
                    raise no_field(f"{path}, line 1", text_field, names)
                continue
            place = f"{path}, line {rows.line_num}"
            if len(row) != len(names):
                raise _no_row(place, f"it has {len(row)} columns and the first line {len(names)}")
            yield from pieces({text_field: row[names.index(text_field)]}, place=place, text_field=text_field)
    except csv.Error as error:
        raise _no_row(f"{path}, line {rows.line_num}", str(error)) from error


def parquet_rows(path: Path, *, wanted: Wanted) -> Iterator[Piece]:
    """The documents of a parquet file, one for each row."""
    parquet = extra("pyarrow.parquet", path)
    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if wanted.field not in names:
            raise no_field(str(path), wanted.field, names, key=wanted.key)
        columns = [wanted.field, *(name for name in wanted.also if name in names)]
        number = 0
        for batch in file.iter_batches(batch_size=64, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield from wanted.made(without_filling(row), f"{path}, row {number}")
    except ValueError as error:  # includes pyarrow.ArrowInvalid
        raise CorpusError(f"cannot read {path}", why=str(error), fix="check that it is a whole parquet file") from error


def without_filling(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of typed columns without the nulls inside its values: such columns fill up what an object does not have.

    >>> without_filling({"said": [{"role": "user", "name": None}], "none": None})
    {'said': [{'role': 'user'}], 'none': None}
    """
    return {field: _without_null(value) for field, value in row.items()}


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_null(inner) for key, inner in value.items() if inner is not None}
    return [_without_null(inner) for inner in value] if isinstance(value, list) else value


def pieces(row: Any, *, place: str, text_field: str) -> Iterator[Piece]:
    """The document of one row; `place` names it in errors."""
    if not isinstance(row, dict):
        raise CorpusError(
            f"{place} is not an object",
            why=f"each line is a JSON object with a field {text_field!r}; this is {type(row).__name__}",
            fix="write lines such as {" + json.dumps(text_field) + ': "..."}',
        )
    if text_field not in row:
        raise no_field(place, text_field, row)
    text = row[text_field]
    if text is not None and not isinstance(text, str):
        raise CorpusError(
            f"{place}: field {text_field!r} is not text",
            why=f"it holds {type(text).__name__}",
            fix="set data.text_field to the field that holds the text",
        )
    if text and (at := half_pair(text)) is not None:
        raise CorpusError(
            f"{place}: field {text_field!r} holds half a character",
            why=f"character {at} is {ascii(text[at])[1:-1]}, half of a surrogate pair, which no text can hold",
            fix="correct or drop that line; it was most often cut in the middle of an emoji",
        )
    while text:
        cut = _cut(text) if len(text) > PIECE_CHARS else len(text)
        yield Piece(text[:cut], last=cut == len(text))
        text = text[cut:]


def no_field(place: str, field: str, fields: Iterable[str], *, key: str = "data.text_field") -> CorpusError:
    """The error of a row without the field that a key of the recipe names."""
    held = "text" if key == "data.text_field" else "conversation"
    return CorpusError(
        f"{place} has no field {field!r}",
        why=f"its fields are {', '.join(map(str, fields)) or 'none at all'}",
        fix=f"set {key} to the field that holds the {held}" if key else f"rename the field that holds it to {field}",
    )


def _no_json(path: Path, number: int, line: str, *, why: str) -> CorpusError:
    fix = "write one JSON object a line, or name the file .txt"
    if number == 1 and line.lstrip().startswith("["):
        fix = f"write one JSON object a line, for example with jq -c '.[]' {path.name}"
    return CorpusError(f"{path}, line {number} is not JSON", why=why, fix=fix)


def _no_row(place: str, why: str) -> CorpusError:
    return CorpusError(
        f"{place} is no row of a CSV file",
        why=why,
        fix="put text with commas, quotes or line ends in quotes, and double the quotes in it; or name the file .txt",
    )


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _lines(path: Path, file: io.BufferedIOBase) -> Iterator[tuple[int, str]]:
    """The lines of a file of rows in UTF-8, with their numbers and ends."""
    number = offset = 0
    while raw := file.readline(LONGEST_LINE_BYTES + 1):
        number += 1
        if len(raw) > LONGEST_LINE_BYTES:
            raise CorpusError(
                f"{path}, line {number} is too long",
                why=f"a line is read whole, and this one is longer than {LONGEST_LINE_BYTES >> 20} MiB",
                fix="split the text into several lines, or give it as a plain text file",
            )
        _refuse_nul(path, raw, offset=offset, line=number)
        try:
            yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise _badly_encoded(path, offset=offset + error.start, line=number, error=error) from error
        offset += len(raw)


def _decode(path: Path, file: io.BufferedIOBase) -> Iterator[str]:
    """UTF-8 text, chunk by chunk. It counts lines and bytes, so that an error can name the place."""
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
    """Where to end the first piece of a longer text: after a line, otherwise a word, otherwise at the limit."""
    for end in ("\n", " "):
        cut = text.rfind(end, 0, PIECE_CHARS) + 1
        if cut > PIECE_CHARS // 2:
            return cut
    return PIECE_CHARS


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
