"""Is this a sound GGUF file? Answered from its header, without torch and without the package gguf.

A GGUF file holds a model that was quantized for llama.cpp: settings, a vocabulary and tensors. `read_header` looks at
the settings and at the list of tensors and raises `CheckpointError` for whatever would be read wrongly: another format,
one file of several, a header that does not end, the same name twice.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halve.errors import CheckpointError
from halve.process.fresh import distrust

SUFFIX = ".gguf"
TOKENS = "tokenizer.ggml.tokens"
DEQUANTIZED_BYTES = 2
"""Of a number in the folder that is made of a file: bfloat16."""
_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_ALIGNMENT = 32
_MAX_BYTES, _MAX_DIMENSIONS = 256 << 20, 4
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
_AGAIN = "copy or download the file again"


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies in the file, and how it is stored."""

    shape: tuple[int, ...]
    """In torch's order: the last dimension is the one whose entries lie side by side."""
    kind: int
    """The number of the quantization."""
    offset: int
    """From the start of the data."""


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says of itself before its data."""

    path: Path
    values: Mapping[str, Any]
    """The settings; of an array of strings, such as the vocabulary, only how many there are."""
    tensors: Mapping[str, GgufTensor]
    data_start: int
    size: int
    """Bytes of the whole file."""

    @property
    def architecture(self) -> str:
        """What llama.cpp calls the kind of model."""
        return str(self.values["general.architecture"])

    def setting(self, name: str) -> Any:
        """A setting of the architecture, such as `block_count`; None where the file does not say."""
        return self.values.get(f"{self.architecture}.{name}")


def is_gguf(source: str | Path) -> bool:
    """Whether a name is that of a GGUF file: it ends so, and is not a folder.

    >>> is_gguf("smollm2.gguf"), is_gguf("owner/smollm2-GGUF")
    (True, False)
    """
    path = Path(source).expanduser()
    return path.suffix.lower() == SUFFIX and not path.is_dir()


def begins_as_gguf(path: Path) -> bool:
    """Whether a file's content is that of a GGUF file, whatever its name, such as in the store of another program."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def locate_gguf(source: str | Path) -> Path:
    """The file's path. Raises `CheckpointError` where there is none."""
    path = Path(source).expanduser()
    if not path.is_file():
        raise CheckpointError(
            f"there is no model {source}",
            why="no such file, and names of the hub do not end so",
            fix="give an existing GGUF file; one of the hub must be downloaded first: hf download OWNER/NAME FILE",
        )
    distrust(path.parent)
    return path


def read_header(path: Path) -> GgufHeader:
    """The header of a GGUF file. Raises `CheckpointError` for one that is none, or is one part of several."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        if file.read(4) != _MAGIC or size < 24:
            raise CheckpointError(
                f"{path} is not a GGUF file", why="it does not begin as one, or ends at once", fix=_AGAIN
            )
        with mmap.mmap(file.fileno(), min(size, _MAX_BYTES), access=mmap.ACCESS_READ) as data:
            try:
                header = _parse(path, _Cursor(data, 4), size)
            except (struct.error, UnicodeDecodeError, _Unreadable) as error:
                raise CheckpointError(
                    f"the header of {path} cannot be read",
                    why=str(error) or "it ends too early",
                    fix=_AGAIN,
                ) from error
    _refuse_part(header)
    return header


class _Unreadable(Exception):
    """What a header says makes no sense."""


class _Cursor:
    """Reads values one after another; running over the end is a `struct.error`."""

    def __init__(self, data: mmap.mmap, place: int) -> None:
        self.data, self.place = data, place

    def take(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{form}", self.data, self.place)
        self.place += struct.calcsize(f"<{form}")
        return values

    def skip(self) -> bytes:
        (length,) = self.take("Q")
        if length > len(self.data) - self.place:
            raise struct.error("a text in it is longer than the file")
        self.place += length
        return self.data[self.place - length : self.place]

    def text(self) -> str:
        return self.skip().decode()

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.take(_SCALARS[kind])[0]
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise _Unreadable(f"it holds a value of the unknown kind {kind}")
        inner, count = self.take("IQ")
        if inner in _SCALARS and count <= len(self.data):
            return list(self.take(f"{count}{_SCALARS[inner]}"))
        if inner != _STRING:
            raise _Unreadable(f"it holds a list of {count} values of kind {inner}")
        for _ in range(count):
            self.skip()
        return count


def _parse(path: Path, cursor: _Cursor, size: int) -> GgufHeader:
    version, num_tensors, num_values = cursor.take("IQQ")
    if version not in _VERSIONS:
        raise _Unreadable(f"its version is {version}, and versions 2 and 3 are read")
    values: dict[str, Any] = {}
    for _ in range(num_values):
        name = cursor.text()
        (kind,) = cursor.take("I")
        _once(name, values)
        values[name] = cursor.value(kind)
    tensors: dict[str, GgufTensor] = {}
    for _ in range(num_tensors):
        name = cursor.text()
        (dimensions,) = cursor.take("I")
        if dimensions > _MAX_DIMENSIONS:
            raise _Unreadable(f"{name} has {dimensions} dimensions")
        shape = cursor.take(f"{dimensions}Q")
        _once(name, tensors)
        tensors[name] = GgufTensor(tuple(reversed(shape)), *cursor.take("IQ"))
    if not isinstance(values.get("general.architecture"), str):
        raise _Unreadable("it names no general.architecture")
    alignment = values.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise _Unreadable(f"general.alignment is {alignment}")
    return GgufHeader(path, values, tensors, -(-cursor.place // alignment) * alignment, size)


def _once(name: str, known: Mapping[str, Any]) -> None:
    if name in known:
        raise _Unreadable(f"{name} is in it twice")


def _refuse_part(header: GgufHeader) -> None:
    parts = header.values.get("split.count", 1)
    if parts == 1 and not _PART.search(header.path.name):
        return
    raise CheckpointError(
        f"{header.path} is one part of a model that was split",
        why=f"its header counts {parts} files" if parts != 1 else "its name counts several files",
        fix="join the parts with llama.cpp: llama-gguf-split --merge FIRST_PART.gguf WHOLE.gguf, and give that",
    )
