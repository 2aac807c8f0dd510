"""Token files and samples: text is tokenized once, packed to fixed length, and drawn by (seed, step) alone.

recipe -> sources (text) -> Tokens (a memory-mapped file) -> Samples -> int64 [batch, context]
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Int64
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from halve.disk.files import file_sha256, read_sealed, rename, sealed, write_json
from halve.disk.rundir import HASHES
from halve.errors import CorpusError, RunError
from halve.process import fresh
from halve.process.rank import leads
from halve.progress import SILENT, Progress
from halve.recipe.schema import Boundary, Recipe
from halve.text import sources as text_sources
from halve.text import tokenize
from halve.text.batch import Batch
from halve.text.documents import positions
from halve.text.drafts import Draft, Mark, draft_of
from halve.text.identity import TOKENS_FORMAT, content_key, pinned_revision
from halve.text.rendering import CODES, Chat, encode_conversations
from halve.text.rows import Wanted
from halve.text.sources import HUB, Piece
from halve.text.tokenize import UNMARKED, Marks, Separator

_GOLDEN = 0.6180339887498949  # the fractional parts of its multiples are spread evenly between 0 and 1
MARK_BATCHES = 64  # a kill loses at most this many: about a minute of work of one process


@dataclass(frozen=True)
class Tokens:
    """A corpus as token ids in a file of `count` numbers of type `dtype`, documents one after another."""

    path: Path
    count: int
    dtype: str
    fingerprint: str
    text_bytes: int  # of UTF-8, without the tokens around documents
    marks: Marks = UNMARKED
    largest: int = 0  # of the ids
    chat: bool = False  # conversations, whose numbers say more than ids (see `rendering`)

    def __len__(self) -> int:
        return self.count

    @cached_property
    def ids(self) -> NDArray[Any]:
        """The ids, or a chat's numbers, memory-mapped and read-only."""
        return np.memmap(self.path, dtype=self.dtype, mode="r", shape=(self.count,))

    def rows(self, indices: Iterable[int], length: int, *, every: int | None = None) -> NDArray[Any]:
        """Rows of `length` ids. Row n begins at id n * `every`; by default rows do not overlap.

        Rows are read one by one: each page fault of the memory map would read hundreds of kilobytes around a row.
        """
        dtype = np.dtype(self.dtype)
        every = length if every is None else every
        raw = bytearray()
        with self.path.open("rb", buffering=0) as file:
            for index in indices:
                file.seek(index * every * dtype.itemsize)
                raw += file.read(length * dtype.itemsize)
        return np.frombuffer(raw, dtype=dtype).reshape(-1, length)


def open_split(
    recipe: Recipe,
    split: Literal["train", "valid"],
    *,
    cache: Path,
    tokenizer: PreTrainedTokenizerBase,
    progress: Progress = SILENT,
) -> Tokens:
    """The token file of a recipe's held-out text, or of all its training text. It is made in `cache` if it is missing.

    Training draws from `mixture.open_mixture` or `course.open_course`, which know a mixture's parts.
    """
    data = recipe.data
    sources = data.train_sources if split == "train" else data.valid
    return prepare(
        sources,
        tokenizer=tokenizer,
        boundary=data.boundary,
        text_field=data.text_field,
        chat=Chat.of(data),
        cache=cache,
        workers=data.workers,
        progress=progress,
    )


def prepare(
    sources: Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase,
    text_field: str,
    cache: Path,
    boundary: Boundary = "auto",
    chat: Chat | None = None,
    workers: int = 1,
    progress: Progress = SILENT,
) -> Tokens:
    """Tokenize sources into one file in `cache`, or open the file that was made from the same content before.

    The file is named after a hash of the content, the tokenizer, `text_field` and the tokens around documents, which
    `boundary` sets (see `tokenize.marks`). With `chat`, rows are conversations, and the chat template replaces both.
    Special tokens that are spelled out in the text become those tokens. Documents longer than a piece
    (`rows.PIECE_CHARS`) are tokenized piece by piece. A hub data set keeps the revision that it had when it was first
    read into `cache`.

    Memory is bounded. The result is the same for any number of `workers` processes. A killed call keeps what it has
    tokenized, and the next call resumes there. If several calls need the same file, one writes it and the others wait.

    Raises `CorpusError` as `sources.read_documents` does, and when a tokenizing process dies. Raises `DiskError`.
    Raises `RunError` in a child process that runs the calling script again.
    """
    fresh.require_guard()
    revisions = {source: pinned_revision(source, cache) for source in sources if source.startswith(HUB)}
    marks, wanted = _read_as(tokenizer, boundary, text_field, chat)
    what = {"tokenizer": tokenizer, "marks": marks, "text_field": wanted.field, "chat": chat}
    key = content_key(sources, revisions, **what, memo=cache / HASHES)
    path, note = cache / f"{key[:32]}.tokens", cache / f"{key[:32]}.json"
    if (known := reopen(note)) is not None:
        return known

    documents = 0

    def pieces() -> Iterator[Piece]:
        nonlocal documents
        for source in sources:
            for piece in text_sources.read_documents(source, wanted, revision=revisions.get(source)):
                documents += piece.last
                yield piece

    with draft_of(path) as draft:
        if (known := reopen(note)) is None:  # another process may have made it in the meantime
            dtype = tokenize.token_dtype(tokenizer) if chat is None else CODES
            how: dict[str, Any] = {"encode": _encoder(tokenizer, chat), "dtype": dtype, "workers": workers}
            written = _fill(draft, pieces(), tokenizer=tokenizer, marks=marks, progress=progress, **how)
            facts = {"dtype": dtype.name, "fingerprint": key, "sources": list(sources), "marks": asdict(marks)}
            size = {"count": written.count, "text_bytes": written.text_bytes, "largest": written.largest}
            size |= {"documents": documents} | ({} if chat is None else {"chat": True})
            kind = "conversation" if chat else "document"
            progress.say(text_sources.told(sources, documents=documents, tokens=written.count, kind=kind))
            stamp = {"format": TOKENS_FORMAT, "sha256": file_sha256(draft.path)}
            write_json(note, sealed({**stamp, **size, **facts}))  # valid only once the token file is there too
            rename(draft.path, path)
            known = reopen(note)
    assert known is not None
    return known


def known(
    sources: Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase,
    text_field: str,
    cache: Path,
    boundary: Boundary = "auto",
    chat: Chat | None = None,
) -> Tokens | None:
    """The token file that `prepare` has made from local sources, or None; makes none. Raises `RunError` as `reopen`."""
    marks, wanted = _read_as(tokenizer, boundary, text_field, chat)
    what = {"tokenizer": tokenizer, "marks": marks, "text_field": wanted.field, "chat": chat}
    return reopen(cache / f"{content_key(sources, {}, **what, memo=cache / HASHES)[:32]}.json")


def _read_as(
    tokenizer: PreTrainedTokenizerBase, boundary: Boundary, text_field: str, chat: Chat | None
) -> tuple[Marks, Wanted]:
    """The tokens around documents, and what is read of rows. The chat template writes what is around a conversation."""
    return (tokenize.marks(tokenizer, boundary), Wanted(text_field)) if chat is None else (UNMARKED, chat.wanted)


def _encoder(tokenizer: PreTrainedTokenizerBase, chat: Chat | None) -> tokenize.Encode | None:
    """What makes tokens of conversations; None for text."""
    return None if chat is None else partial(encode_conversations, tokenizer=tokenizer, chat=chat)


def _fill(
    draft: Draft,
    pieces: Iterable[Piece],
    *,
    tokenizer: PreTrainedTokenizerBase,
    marks: Marks,
    encode: tokenize.Encode | None,
    dtype: np.dtype[Any],
    workers: int,
    progress: Progress,
) -> Mark:
    """Write the missing part of a token file; returns how far it is."""
    mark, between = draft.resume(dtype.itemsize), marks.between
    if mark.count == 0 and marks.bos is not None:
        draft.file.write(np.array([marks.bos], dtype=dtype).tobytes())
        mark = Mark(0, 1, 0)
    # text that is already tokenized is only read again, which takes a small part of the time
    left = itertools.islice(tokenize.batches(pieces), mark.batches, None)
    how = {"tokenizer": tokenizer, "between": between, "dtype": dtype, "workers": workers}
    made = tokenize.encoded(left, **how, encode=encode)
    with closing(made), progress.task("tokenize", None, done=mark.count) as task:
        for encoded in made:
            draft.file.write(encoded.ids)
            num_tokens = len(encoded.ids) // dtype.itemsize
            size = mark.count + num_tokens, mark.text_bytes + encoded.text_bytes
            mark = Mark(mark.batches + 1, *size, max(mark.largest, encoded.largest))
            task.advance(num_tokens)
            if mark.batches % MARK_BATCHES == 0:
                draft.sync()
                write_json(draft.mark, sealed(asdict(mark)))
    if marks.follows is not None:  # no document follows the last one
        mark = replace(mark, count=mark.count - 1)
        draft.file.truncate(mark.count * dtype.itemsize)
    draft.sync()
    return mark


def reopen(note: Path) -> Tokens | None:
    """The token file that the JSON file `note` next to it describes; None unless both are complete."""
    path = note.with_suffix(".tokens")
    if not (note.exists() and path.exists()):
        return None
    facts = read_sealed(note)
    if facts["format"] != TOKENS_FORMAT or path.stat().st_size != facts["count"] * np.dtype(facts["dtype"]).itemsize:
        return None
    if leads() and file_sha256(path) != facts["sha256"]:
        raise RunError(
            f"{path} is not what halve wrote",
            why="its bytes have changed since the text was tokenized",
            fix="remove that file and run the same command: the text is tokenized again",
        )
    return Tokens(
        path=path,
        count=facts["count"],
        dtype=facts["dtype"],
        fingerprint=facts["fingerprint"],
        text_bytes=facts["text_bytes"],
        marks=Marks(**facts["marks"]),
        largest=facts["largest"],
        chat=facts.get("chat", False),
    )


@dataclass(frozen=True)
class Samples:
    """A token file cut into samples of `context` tokens, in an order that depends on `seed` alone.

    Every epoch is a new permutation of all samples. So the samples of step `n` are a pure function of (seed, n, batch),
    and a run can resume from its step number. Predictions stay inside a sample: `context` tokens give `context - 1` of
    them. The tokens after the last whole sample are not used.

    With BOS in front of documents (`Marks.bos`), every sample begins with BOS, even one that begins inside a document.
    It then holds `context - 1` tokens of the text, and each of them is predicted once. If a sample begins with a
    document, this BOS is already in the text, and its last token is predicted in the next sample. A BOS that follows an
    EOS is not predicted (see `Marks.follows`).

    With a `separator`, the documents of a sample are apart: batches carry positions that restart at each document.
    Texts with different `stream` have different orders.

    Raises `CorpusError` if there are fewer tokens than one sample.
    """

    tokens: Tokens
    context: int
    seed: int
    separator: Separator | None = None
    stream: int = 0

    def __post_init__(self) -> None:
        if self._step == 0:
            raise CorpusError(
                "a sample of one token holds no text",
                why="every sample begins with the BOS token",
                fix="set data.context to 2 or more, or data.boundary to eos",
            )
        if self.tokens.count < self.context:
            raise CorpusError(
                f"the corpus has fewer tokens than one sample: {self.tokens.count} of {self.context}",
                why="samples are packed to data.context tokens and none is padded",
                fix=f"give more text, or set data.context to at most {max(self.tokens.count, 1)}",
            )

    def __len__(self) -> int:
        return (self.tokens.count - self.context) // self._step + 1

    @property
    def _step(self) -> int:
        """Tokens of the text from one sample to the next."""
        return self.context if self.tokens.marks.bos is None else self.context - 1

    def batch(self, step: int, batch: int) -> Batch:
        """The `batch` samples that optimizer step `step` (from 0) sees."""
        return self.numbered(self.numbers(step, batch))

    def numbers(self, step: int, batch: int) -> tuple[int, ...]:
        """The numbers of the samples of step `step`; no token is read."""
        return tuple(self.draw(number) for number in range(step * batch, (step + 1) * batch))

    def draw(self, number: int) -> int:
        """The place in the corpus of draw number `number` (from 0)."""
        epoch, rest = divmod(number, len(self))
        return int(self._epoch(epoch)[rest])

    @cached_property
    def _epoch(self) -> Callable[[int], NDArray[np.int64]]:
        """The order of an epoch. A batch needs at most two orders, unless the corpus is smaller than a batch."""

        @lru_cache(maxsize=2)
        def order(epoch: int) -> NDArray[np.int64]:
            return np.random.default_rng((self.seed, epoch, self.stream)).permutation(len(self))

        return order

    def numbered(self, numbers: Sequence[int]) -> Batch:
        """Samples by their place in the corpus, as a batch."""
        ids_BS, counted_BT = self._read(numbers)
        places_BS = None if self.separator is None else positions(ids_BS, self.separator)
        return Batch(ids_BS, tuple(numbers), places_BS, counted_BT)

    def heldout(self, num_samples: int) -> Batch:
        """At most `num_samples` samples, spread evenly over the corpus and independent of the seed, as a batch."""
        return self.numbered(self._spread(num_samples))

    def first(self, num_samples: int) -> Int64[Tensor, "samples context"]:
        """At most `num_samples` samples, spread evenly over the corpus and independent of the seed."""
        return self.take(self._spread(num_samples))

    @property
    def calibration_length(self) -> int:
        """Tokens in a sample that `calibration` gives by itself."""
        return self.context

    def calibration(self, num_samples: int, length: int | None = None) -> Int64[Tensor, "samples length"]:
        """At most `num_samples` samples, one from each of that many equal parts of the corpus.

        The seed sets the place within the parts. Seed 0 takes the first sample of each part, as `first` does. Only the
        first `length` tokens of each sample are returned, by default all.
        """
        return self.take(spread_by_seed(len(self), num_samples, self.seed))[:, :length]

    def _spread(self, num_samples: int) -> list[int]:
        num_samples = min(num_samples, len(self))
        return [index * len(self) // num_samples for index in range(num_samples)]

    def take(self, indices: Iterable[int]) -> Int64[Tensor, "samples context"]:
        """Samples by their place in the corpus."""
        return self._read(indices)[0]

    def _read(
        self, indices: Iterable[int]
    ) -> tuple[Int64[Tensor, "samples context"], Bool[Tensor, "samples predictions"] | None]:
        """Samples by their place, and which of their tokens after the first are predicted (None means all)."""
        rows = self.tokens.rows(indices, self.context, every=self._step).astype(np.int64)
        ids_BS, marks = torch.from_numpy(rows), self.tokens.marks
        if marks.bos is None:
            return ids_BS, None
        inside_B1 = ids_BS[:, :1] != marks.bos
        moved_BS = ids_BS.roll(1, dims=1)
        moved_BS[:, 0] = marks.bos
        ids_BS = torch.where(inside_B1, moved_BS, ids_BS)
        counted_BT = torch.ones_like(ids_BS[:, 1:], dtype=torch.bool)
        counted_BT[:, -1:] = inside_B1
        if marks.follows is not None:
            counted_BT &= ids_BS[:, 1:] != marks.follows
        return ids_BS, counted_BT


def spread_by_seed(count: int, num: int, seed: int) -> list[int]:
    """One place in each of at most `num` equal parts of `count` places."""
    num, place = min(num, count), seed * _GOLDEN % 1
    edges = [index * count // num for index in range(num + 1)]
    return [a + int(place * (b - a)) for a, b in itertools.pairwise(edges)]
