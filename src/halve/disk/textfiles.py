"""Users' files, opened with care: they may be compressed, damaged, or not what their name says."""

from __future__ import annotations

import bz2
import errno
import gzip
import importlib
import io
import lzma
import os
import stat
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

from halve.errors import CorpusError

PACKED = (".gz", ".xz", ".bz2", ".zst")
DAMAGED = (EOFError, OSError, lzma.LZMAError, zlib.error)
"""The errors of reading a file that cannot be opened, or whose compressed content is incomplete."""

_CHUNK_BYTES, _BEGINNING_BYTES = 1 << 16, 1 << 20
_SHOWN_CHARS = 120


def status(path: Path) -> os.stat_result:
    """`path.stat()`, which also raises `OSError` for an impossible path, such as one with a NUL."""
    try:
        return path.stat()
    except ValueError as error:
        raise OSError(errno.EINVAL, f"it is no path: {error}") from error


def reason(error: BaseException) -> str:
    """Why a file cannot be read, in the system's words if there are any."""
    return getattr(error, "strerror", None) or str(error) or f"the file ends too early ({type(error).__name__})"


def shown(path: object) -> str:
    """A path for error messages. A path that is long or not printable is shortened and quoted.

    >>> shown("a/b.txt"), shown("a\\0b")
    ('a/b.txt', "'a\\\\x00b'")
    """
    text = str(path)
    if len(text) <= _SHOWN_CHARS * 4 and text.isprintable():
        return text
    return ascii(text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "...")


def require_file(path: Path) -> None:
    """Raise `OSError` unless `path` is a regular file, because reading a pipe or a device may never end."""
    mode = status(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is a device or a pipe, not a file")


def ending(path: Path) -> str:
    """The last suffix in lower case, without a suffix of compression.

    >>> ending(Path("a.JSONL.gz")), ending(Path("wiki_00.bz2"))
    ('.jsonl', '')
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def open_packed(path: Path) -> io.BufferedIOBase:
    """Open a file for reading, and decompress it by its last suffix. Raises `CorpusError` if a package is missing."""
    match path.suffix.lower():
        case ".gz":
            return gzip.open(path)
        case ".xz":
            return lzma.open(path)
        case ".bz2":
            return bz2.open(path)
        case ".zst":
            return io.BufferedReader(_ZstdFile(path, extra("zstandard", path)), _CHUNK_BYTES)
        case _:
            return path.open("rb")


def unpacked_bytes(path: Path) -> int:
    """About how many bytes of text a file holds, from its size and its beginning. Raises what reading it raises.

    Of a compressed file the beginning is compressed again, densely, so that the estimate is rather too high. Parquet
    says how much its columns are.
    """
    size: int = status(path).st_size
    if path.suffix.lower() == ".parquet":
        about = extra("pyarrow.parquet", path).ParquetFile(path).metadata
        return max(size, sum(int(about.row_group(i).total_byte_size) for i in range(about.num_row_groups)))
    if path.suffix.lower() not in PACKED:
        return size
    with open_packed(path) as file:
        begin = file.read(_BEGINNING_BYTES)
    if len(begin) < _BEGINNING_BYTES:
        return len(begin)
    return round(size * max(1.0, len(begin) / len(bz2.compress(begin))))


def half_pair(text: str) -> int | None:
    """The place of half a surrogate pair, which UTF-8, and so a tokenizer, cannot represent.

    JSON can contain one:

    >>> half_pair("a\\ud83d b"), half_pair("a😀 b")
    (1, None)
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def extra(module: str, wanted_by: object) -> ModuleType:
    """Import a package that reads a kind of file. Raises `CorpusError` saying how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise CorpusError(
            f"cannot read {wanted_by}",
            why=f"the Python package {module.partition('.')[0]} is not installed",
            fix='pip install "halve[data]"',
        ) from error


class _ZstdFile(io.RawIOBase):
    """The decompressed bytes of a .zst file. The package's own reader accepts a truncated file."""

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
