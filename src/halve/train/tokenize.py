"""Text to token ids, in this process or in several: the same ids in the same order either way.

This file is what a tokenizing process imports, so it does without torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing import connection, parent_process
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from halve import fresh
from halve.errors import CorpusError
from halve.train.sources import Piece

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_CHARS = 1 << 19  # tokenized together; bounds memory
_BATCH_PIECES = 1024
_AHEAD = 2  # batches a process that are read before they are needed


@dataclass(frozen=True)
class Border:
    """The token that stands between documents: the last of each (`ends`) or, lacking such a token, the first."""

    token: int
    ends: bool


class DeadWorkerError(CorpusError):
    """A tokenizing process that was ended from outside; what the others made stays good."""


class Encoded(NamedTuple):
    """The ids of a batch of pieces as they stand in a token file, and the UTF-8 bytes of its text."""

    ids: bytes
    text_bytes: int


def border(tokenizer: PreTrainedTokenizerBase) -> Border | None:
    """The end-of-sequence token; where a tokenizer has none, its beginning-of-sequence token; else None."""
    if tokenizer.eos_token_id is not None:
        return Border(int(tokenizer.eos_token_id), ends=True)
    if tokenizer.bos_token_id is not None:
        return Border(int(tokenizer.bos_token_id), ends=False)
    return None


def batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces in groups that are tokenized together; a group's size depends on the pieces alone."""
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
    work: Iterable[list[Piece]], *, tokenizer: PreTrainedTokenizerBase, dtype: np.dtype[Any], workers: int
) -> Generator[Encoded, None, None]:
    """The batches of `work` as token ids, in their order.

    With `workers` above one that many processes are started, unless there is less than a batch for each; at most two
    batches for each of them are read ahead. Raises `DeadWorkerError` when one of them dies.
    """
    work = iter(work)
    first = list(islice(work, workers))
    work = chain(first, work)
    if workers == 1 or len(first) < workers:
        for batch in work:
            yield encode(batch, tokenizer=tokenizer, dtype=dtype)
        return
    waiting: deque[Future[Encoded]] = deque()
    with ExitStack() as stack:
        pool = fresh.pool(workers, _begin, tokenizer, dtype)
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        try:
            for batch in work:
                waiting.append(pool.submit(_encode_here, batch))
                if len(waiting) >= _AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise DeadWorkerError(
                "a tokenizing process died",
                why="the system ended it, most often because memory ran out",
                fix=f"set data.workers below {workers}; what is tokenized is kept",
            ) from error


def encode(batch: list[Piece], *, tokenizer: PreTrainedTokenizerBase, dtype: np.dtype[Any]) -> Encoded:
    """Tokenize pieces; the border's token follows each that is a document's last."""
    texts, between = [piece.text for piece in batch], border(tokenizer)
    rows = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    ids: list[int] = []
    for row, piece in zip(rows, batch, strict=True):
        ids.extend(row)
        if piece.last and between is not None:
            ids.append(between.token)
    return Encoded(np.array(ids, dtype=dtype).tobytes(), sum(len(text.encode()) for text in texts))


def token_dtype(tokenizer: PreTrainedTokenizerBase) -> np.dtype[Any]:
    """The smallest type that holds every id."""
    largest = int(max(tokenizer.get_vocab().values()))
    return np.dtype(np.uint16 if largest < 1 << 16 else np.uint32)


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A SHA-256 that changes with what a tokenizer makes of text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    what: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else dict(tokenizer.get_vocab())
    for state in ("truncation", "padding"):  # left behind by whoever called the tokenizer last
        what.pop(state, None)
    what = {"model": what, "eos": tokenizer.eos_token_id, "bos": tokenizer.bos_token_id}
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


# ---- inside a tokenizing process -----------------------------------------------------------------------------

_own: dict[str, Any] = {}


def _begin(tokenizer: PreTrainedTokenizerBase, dtype: np.dtype[Any]) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # this process is one of several already
    _own.update(tokenizer=tokenizer, dtype=dtype)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent closes no pipe that its children share: they would wait for work for ever."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _encode_here(batch: list[Piece]) -> Encoded:
    return encode(batch, tokenizer=_own["tokenizer"], dtype=_own["dtype"])
