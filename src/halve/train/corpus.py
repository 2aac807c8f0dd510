"""Token files and samples: text is tokenized once, packed to fixed length, and drawn by (seed, step) alone.

recipe -> sources (text) -> Tokens (a memory-mapped file) -> Samples -> int64 [batch, context]
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from jaxtyping import Int64
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from halve.errors import CorpusError, RunError
from halve.files import disk_guard, file_sha256, read_sealed, remembering, sealed, sync, write_json
from halve.progress import SILENT, Progress
from halve.recipe import Recipe
from halve.rundir import HASHES
from halve.train import sources as text_sources
from halve.train import tokenize
from halve.train.batch import Batch
from halve.train.documents import positions
from halve.train.ranks import here
from halve.train.sources import HUB, Piece
from halve.train.tokenize import Border

try:
    import fcntl
except ImportError:  # not on Windows, where two processes must not tokenize the same text at once
    fcntl = None  # type: ignore[assignment]

FORMAT = 2
_GOLDEN = 0.6180339887498949  # its multiples, less their whole part, lie evenly between 0 and 1
MARK_BATCHES = 64  # a kill loses at most these: a minute's work of one process


@dataclass(frozen=True)
class Tokens:
    """A corpus as token ids in a file of `count` numbers of type `dtype`, documents one after another."""

    path: Path
    count: int
    dtype: str
    fingerprint: str
    text_bytes: int  # of UTF-8, without the separators between documents

    def __len__(self) -> int:
        return self.count

    @cached_property
    def ids(self) -> NDArray[Any]:
        """The ids, memory-mapped and read-only."""
        return np.memmap(self.path, dtype=self.dtype, mode="r", shape=(self.count,))

    def rows(self, indices: Iterable[int], length: int) -> NDArray[Any]:
        """Rows of a corpus that is cut into rows of `length` ids.

        Read one by one: a page fault of the memory map would bring in hundreds of kilobytes around each.
        """
        dtype = np.dtype(self.dtype)
        size = length * dtype.itemsize
        raw = bytearray()
        with self.path.open("rb", buffering=0) as file:
            for index in indices:
                file.seek(index * size)
                raw += file.read(size)
        return np.frombuffer(raw, dtype=dtype).reshape(-1, length)


def open_split(
    recipe: Recipe,
    split: Literal["train", "valid"],
    *,
    cache: Path,
    tokenizer: PreTrainedTokenizerBase,
    progress: Progress = SILENT,
) -> Tokens:
    """The token file of a recipe's held-out text, or of all its training text, made in `cache` if it is not there.

    Training draws from `mixture.open_mixture` or `course.open_course`, which know a mixture's parts.
    """
    data = recipe.data
    sources = data.train_sources if split == "train" else data.valid
    return prepare(
        sources,
        tokenizer=tokenizer,
        text_field=data.text_field,
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
    workers: int = 1,
    progress: Progress = SILENT,
) -> Tokens:
    """Tokenise sources into one file in `cache`, or open the file made of the same content before.

    The file's name is a hash of the content, the tokenizer and `text_field`. Each document ends with the
    end-of-sequence token; where a tokenizer has none, each begins with its beginning-of-sequence token
    instead. Special tokens spelled out in the text become those tokens. Documents longer than a piece
    (`rows.PIECE_CHARS`) are tokenized piece by piece. A data set of the hub stays at the revision it had
    when it was first read into `cache`.

    Works in bounded memory, in `workers` processes that the result does not depend on. A killed call leaves what it
    has tokenized, and the next one goes on from there; of several at once one works and the others wait for it. Raises
    `CorpusError` as `sources.read` does and when a tokenizing process dies, and `DiskError`.
    """
    revisions = {source: _pinned(source, cache) for source in sources if source.startswith(HUB)}
    key = _key(sources, revisions, tokenizer=tokenizer, text_field=text_field, memo=cache / HASHES)
    path, note = cache / f"{key[:32]}.tokens", cache / f"{key[:32]}.json"
    if (known := reopen(note)) is not None:
        return known

    documents = 0

    def pieces() -> Iterator[Piece]:
        nonlocal documents
        for source in sources:
            for piece in text_sources.read(source, text_field=text_field, revision=revisions.get(source)):
                documents += piece.last
                yield piece

    with _draft(path) as draft:
        if (known := reopen(note)) is None:  # another process may just have made it
            dtype = tokenize.token_dtype(tokenizer)
            written = _fill(draft, pieces(), tokenizer=tokenizer, dtype=dtype, workers=workers, progress=progress)
            facts = {"dtype": dtype.name, "fingerprint": key, "sources": list(sources)}
            size = {"count": written.count, "text_bytes": written.text_bytes, "documents": documents}
            progress.say(text_sources.told(sources, documents=documents, tokens=written.count))
            stamp = {"format": FORMAT, "sha256": file_sha256(draft.path)}
            write_json(note, sealed({**stamp, **size, **facts}))  # counts once the token file is there too
            os.replace(draft.path, path)
            sync(path.parent)
            known = reopen(note)
    assert known is not None
    return known


@dataclass(frozen=True)
class _Mark:
    """How far a draft is known to be on the disk."""

    batches: int = 0
    count: int = 0
    text_bytes: int = 0


@dataclass(frozen=True)
class _Draft:
    """A token file in the making, which this process alone may write."""

    path: Path
    file: IO[bytes]

    @property
    def mark(self) -> Path:
        return _mark_of(self.path)

    def resume(self, itemsize: int) -> _Mark:
        """Where an earlier call stopped; what it wrote beyond its last mark is dropped."""
        mark = _Mark()
        with suppress(RunError):  # one that cannot be read marks nothing
            mark = _Mark(**read_sealed(self.mark)) if self.mark.exists() else mark
        if os.fstat(self.file.fileno()).st_size < mark.count * itemsize:
            mark = _Mark()
        self.file.truncate(mark.count * itemsize)
        return mark

    def sync(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())


@contextmanager
def _draft(path: Path) -> Iterator[_Draft]:
    """The draft of `path`; stays for the next call where a kill or a full disk ends this one after a mark."""
    draft = path.with_name(f".{path.name}.draft")
    with disk_guard(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _locked(draft)
        try:
            yield _Draft(draft, file)
            _mark_of(draft).unlink(missing_ok=True)
        except CorpusError as error:
            if not isinstance(error, tokenize.DeadWorkerError):  # the text has to change, and its draft with it
                _mark_of(draft).unlink(missing_ok=True)
            raise
        finally:
            if not _mark_of(draft).exists():
                draft.unlink(missing_ok=True)
            file.close()


def _locked(path: Path) -> IO[bytes]:
    """Open a file for appending once no other process has it open so."""
    while True:
        file = path.open("ab")
        with suppress(OSError):  # a file system without locks, such as some network mounts
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # whoever held the lock has finished or dropped this file


def _mark_of(draft: Path) -> Path:
    return draft.with_suffix(".mark.json")


def _fill(
    draft: _Draft,
    pieces: Iterable[Piece],
    *,
    tokenizer: PreTrainedTokenizerBase,
    dtype: np.dtype[Any],
    workers: int,
    progress: Progress,
) -> _Mark:
    """Write what is missing of a token file; gives its size."""
    mark = draft.resume(dtype.itemsize)
    between = tokenize.border(tokenizer)
    if mark.count == 0 and between is not None and not between.ends:
        draft.file.write(np.array([between.token], dtype=dtype).tobytes())
        mark = _Mark(0, 1, 0)
    # text that was tokenized before is read again, which takes a hundredth of the time
    left = itertools.islice(tokenize.batches(pieces), mark.batches, None)
    made = tokenize.encoded(left, tokenizer=tokenizer, dtype=dtype, workers=workers)
    with closing(made), progress.task("tokenize", None, done=mark.count) as task:
        for one in made:
            draft.file.write(one.ids)
            num_tokens = len(one.ids) // dtype.itemsize
            mark = _Mark(mark.batches + 1, mark.count + num_tokens, mark.text_bytes + one.text_bytes)
            task.advance(num_tokens)
            if mark.batches % MARK_BATCHES == 0:
                draft.sync()
                write_json(draft.mark, sealed(asdict(mark)))
    draft.sync()
    return mark


def reopen(note: Path) -> Tokens | None:
    """The token file that the JSON file `note` beside it describes; None unless both are there and whole."""
    path = note.with_suffix(".tokens")
    if not (note.exists() and path.exists()):
        return None
    facts = read_sealed(note)
    if facts["format"] != FORMAT or path.stat().st_size != facts["count"] * np.dtype(facts["dtype"]).itemsize:
        return None
    if here().leads and file_sha256(path) != facts["sha256"]:
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
    )


@dataclass(frozen=True)
class Samples:
    """A token file cut into samples of `context` tokens, in an order that depends on `seed` alone.

    Every epoch is a fresh permutation of all samples, so that which samples step `n` sees is a pure function
    of (seed, n, batch): a run resumes from its step number. Predictions stay inside a sample: `context`
    tokens make `context - 1` of them. The tokens after the last whole sample are not used. With a `border` the
    documents of a sample are apart: batches carry positions that begin anew with each. Texts of different `stream`
    have orders of their own.

    Raises `CorpusError` if there are fewer tokens than one sample.
    """

    tokens: Tokens
    context: int
    seed: int
    border: Border | None = None
    stream: int = 0

    def __post_init__(self) -> None:
        if self.tokens.count < self.context:
            raise CorpusError(
                f"the corpus has fewer tokens than one sample: {self.tokens.count} of {self.context}",
                why="samples are packed to data.context tokens and none is padded",
                fix=f"give more text, or set data.context to at most {max(self.tokens.count, 1)}",
            )

    def __len__(self) -> int:
        return self.tokens.count // self.context

    def batch(self, step: int, batch: int) -> Batch:
        """The `batch` samples that optimizer step `step` (from 0) sees."""
        draws = range(step * batch, (step + 1) * batch)
        return self.numbered([self.draw(number) for number in draws])

    def draw(self, number: int) -> int:
        """The place in the corpus of the sample that is drawn as number `number` (from 0)."""
        epoch, rest = divmod(number, len(self))
        return int(self._epoch(epoch)[rest])

    @cached_property
    def _epoch(self) -> Callable[[int], NDArray[np.int64]]:
        """The order of an epoch; a batch touches two at most, but for corpora smaller than a batch."""

        @lru_cache(maxsize=2)
        def order(epoch: int) -> NDArray[np.int64]:
            return np.random.default_rng((self.seed, epoch, self.stream)).permutation(len(self))

        return order

    def numbered(self, numbers: Sequence[int]) -> Batch:
        """Samples by their place in the corpus, as a batch."""
        ids_BS = self.take(numbers)
        return Batch(ids_BS, tuple(numbers), None if self.border is None else positions(ids_BS, self.border))

    def heldout(self, num_samples: int) -> Batch:
        """At most `num_samples` samples, spread evenly over the corpus and independent of the seed, as a batch."""
        return self.numbered(self._spread(num_samples))

    def first(self, num_samples: int) -> Int64[Tensor, "samples context"]:
        """At most `num_samples` samples, spread evenly over the corpus and independent of the seed."""
        return self.take(self._spread(num_samples))

    def calibration(self, num_samples: int) -> Int64[Tensor, "samples context"]:
        """At most `num_samples` samples, one of each of as many equal strips of the corpus, placed by the seed.

        Seed 0 takes each strip's first, as `first` does; every seed sees the whole length of the corpus.
        """
        num_samples = min(num_samples, len(self))
        place = self.seed * _GOLDEN % 1
        edges = [index * len(self) // num_samples for index in range(num_samples + 1)]
        return self.take([a + int(place * (b - a)) for a, b in itertools.pairwise(edges)])

    def _spread(self, num_samples: int) -> list[int]:
        num_samples = min(num_samples, len(self))
        return [index * len(self) // num_samples for index in range(num_samples)]

    def take(self, indices: Iterable[int]) -> Int64[Tensor, "samples context"]:
        """Samples by their place in the corpus."""
        return torch.from_numpy(self.tokens.rows(indices, self.context).astype(np.int64))


def _key(
    sources: Sequence[str],
    revisions: dict[str, str],
    *,
    tokenizer: PreTrainedTokenizerBase,
    text_field: str,
    memo: Path,
) -> str:
    sha256 = remembering(memo)
    parts = {
        "format": FORMAT,
        "sources": [
            text_sources.fingerprint(source, revision=revisions.get(source), sha256=sha256) for source in sources
        ],
        "tokenizer": tokenize.fingerprint(tokenizer),
        "text_field": text_field,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _pinned(source: str, cache: Path) -> str:
    """The revision of a hub data set that this cache began with; the present one the first time."""
    note = cache / f"{hashlib.sha256(source.encode()).hexdigest()[:32]}.hub.json"
    if note.exists():
        return str(read_sealed(note)["revision"])
    revision = text_sources.hub_revision(source)
    write_json(note, sealed({"source": source, "revision": revision}))
    return revision
