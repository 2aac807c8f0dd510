"""From text to token ids, in this process or in several: the ids and their order are the same either way.

Tokenizing processes import this file, so it does not import torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from multiprocessing import connection, parent_process
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from halve.errors import CorpusError, TokenizerError
from halve.process import fresh
from halve.recipe.schema import Boundary
from halve.text.sources import Piece

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_CHARS = 1 << 19  # tokenized together; bounds memory
_BATCH_PIECES = 1024
_AHEAD = 2  # batches a process that are read before they are needed


@dataclass(frozen=True)
class Separator:
    """The token that separates documents: the last token of each (`ends`), or the first."""

    token: int
    ends: bool


@dataclass(frozen=True)
class Marks:
    """The tokens around documents: `bos` in front of every document and sample, `eos` after every document; or None.

    If both are the same id, it appears once between two documents.
    """

    bos: int | None = None
    eos: int | None = None

    @property
    def between(self) -> tuple[int, ...]:
        """The tokens between two documents.

        >>> Marks(bos=1, eos=2).between, Marks(bos=1).between, Marks(bos=0, eos=0).between, Marks().between
        ((2, 1), (1,), (0,), ())
        """
        return tuple(dict.fromkeys(token for token in (self.eos, self.bos) if token is not None))

    @property
    def separator(self) -> Separator | None:
        """The token that separates documents: BOS if there is one, so that each document is read after its own BOS."""
        if self.bos is not None:
            return Separator(self.bos, ends=False)
        return None if self.eos is None else Separator(self.eos, ends=True)

    @property
    def follows(self) -> int | None:
        """The BOS that always follows an EOS. It is certain, and so it is not predicted."""
        return self.bos if len(self.between) > 1 else None


UNMARKED = Marks()


class DeadWorkerError(CorpusError):
    """A tokenizing process was ended from outside. What the others have made remains valid."""


class EncodedPieces(NamedTuple):
    """The ids of a batch of pieces as they stand in a token file, the UTF-8 bytes of its text, and the largest id."""

    ids: bytes
    text_bytes: int
    largest: int


Encode = Callable[[list[Piece]], EncodedPieces]


def marks(tokenizer: PreTrainedTokenizerBase, boundary: Boundary) -> Marks:
    """The tokens that a recipe's `data.boundary` puts around documents.

    With `auto`, BOS is used if the tokenizer puts it in front of text by itself, and EOS if the tokenizer has one. If
    that gives neither, BOS is used if there is one. Raises `TokenizerError` for a token that the tokenizer lacks.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if boundary == "auto":
        return Marks(bos if eos is None or _puts_in_front(tokenizer, bos) else None, eos)
    for token, kind, wanted in ((bos, "beginning", ("bos", "both")), (eos, "end", ("eos", "both"))):
        if boundary in wanted and token is None:
            raise TokenizerError(
                f"data.boundary {boundary} needs a token that the tokenizer does not have",
                why=f"it has no {kind}-of-sequence token",
                fix="set data.boundary to auto, which takes what there is",
            )
    return Marks(bos if boundary in ("bos", "both") else None, eos if boundary in ("eos", "both") else None)


def separator(tokenizer: PreTrainedTokenizerBase, boundary: Boundary = "auto") -> Separator | None:
    """The token that separates documents, or None."""
    return marks(tokenizer, boundary).separator


def batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces in batches that are tokenized together. The size of a batch depends only on the pieces."""
    batch: list[Piece] = []
    chars = 0
    for piece in pieces:
        batch.append(piece)
        chars += len(piece.text)
        if chars >= BATCH_CHARS or len(batch) >= _BATCH_PIECES:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def encoded(
    work: Iterable[list[Piece]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    dtype: np.dtype[Any],
    workers: int,
    between: Sequence[int] = (),
    encode: Encode | None = None,
) -> Generator[EncodedPieces, None, None]:
    """The batches of `work` as token ids, in order. The tokens `between` follow each document.

    `encode` replaces `encode_pieces`, also in other processes. If `workers` is above one, that many processes are
    started, unless there is less than one batch for each. At most two batches per process are read ahead. Raises
    `DeadWorkerError` if one of them dies.
    """
    work = iter(work)
    first = list(islice(work, workers))
    work = chain(first, work)
    how = {"tokenizer": tokenizer, "between": between, "dtype": dtype}
    if workers == 1 or len(first) < workers:
        for batch in work:
            yield encode(batch) if encode is not None else encode_pieces(batch, **how)
        return
    waiting: deque[Future[EncodedPieces]] = deque()
    with ExitStack() as stack:
        pool = fresh.pool(workers, _begin, encode or partial(encode_pieces, **how))
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        try:
            for batch in work:
                waiting.append(pool.submit(_encode_here, batch))
                if len(waiting) >= _AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            if pool.failed():
                raise DeadWorkerError(
                    "the tokenizing processes failed as they began",
                    why="each of them runs the calling script again; see its own message",
                    fix=f"{fresh.GUARD}, or set data.workers to 1",
                ) from error
            raise DeadWorkerError(
                "a tokenizing process died",
                why="the system ended it, most often because memory ran out",
                fix=f"set data.workers below {workers}; what is tokenized is kept",
            ) from error


def encode_pieces(
    batch: list[Piece], *, tokenizer: PreTrainedTokenizerBase, dtype: np.dtype[Any], between: Sequence[int] = ()
) -> EncodedPieces:
    """Tokenize pieces. The tokens `between` follow the last piece of each document."""
    texts = [piece.text for piece in batch]
    rows = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    ids: list[int] = []
    for row, piece in zip(rows, batch, strict=True):
        ids.extend(row)
        if piece.last:
            ids.extend(between)
    text_bytes = sum(len(text.encode()) for text in texts)
    return EncodedPieces(np.array(ids, dtype=dtype).tobytes(), text_bytes, max(ids, default=0))


def token_dtype(tokenizer: PreTrainedTokenizerBase) -> np.dtype[Any]:
    """The smallest type that holds every id."""
    largest = int(max(tokenizer.get_vocab().values()))
    return np.dtype(np.uint16 if largest < 1 << 16 else np.uint32)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A SHA-256 that changes whenever the tokenizer would tokenize differently."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    what: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else dict(tokenizer.get_vocab())
    for state in ("truncation", "padding"):  # left behind by whoever called the tokenizer last
        what.pop(state, None)
    what = {"model": what, "eos": tokenizer.eos_token_id, "bos": tokenizer.bos_token_id}
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _puts_in_front(tokenizer: PreTrainedTokenizerBase, bos: int | None) -> bool:
    """Whether text that a tokenizer is given comes back with the beginning-of-sequence token in front."""
    dressed, plain = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    return bos is not None and dressed[:1] == [bos] and plain[:1] != [bos]


# ---- inside a tokenizing process -----------------------------------------------------------------------------

_own: list[Encode] = []


def _begin(encode: Encode) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # this process is one of several already
    _own.append(encode)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End when the parent process is gone. A killed parent closes no shared pipe, and children would wait for ever."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _encode_here(batch: list[Piece]) -> EncodedPieces:
    return _own[0](batch)
