"""Token files and samples: text is tokenized once, packed to fixed length, and drawn by (seed, step) alone.

recipe -> sources (text) -> Tokens (a memory-mapped file) -> Samples -> int64 [batch, context]
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int64
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from halve.errors import CorpusError
from halve.progress import SILENT, Progress
from halve.recipe import Recipe
from halve.rundir import atomic_file, read_json, write_json
from halve.train import sources as text_sources
from halve.train.batch import Batch
from halve.train.sources import HUB, Piece

FORMAT = 1
_GOLDEN = 0.6180339887498949  # its multiples, less their whole part, lie evenly between 0 and 1
_BATCH_CHARS = 1 << 19  # tokenized together; bounds memory


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


def open_split(
    recipe: Recipe,
    split: Literal["train", "valid"],
    *,
    cache: Path,
    tokenizer: PreTrainedTokenizerBase,
    progress: Progress = SILENT,
) -> Tokens:
    """The token file of a recipe's training or held-out text, made in `cache` if it is not there."""
    data = recipe.data
    sources = data.train_sources if split == "train" else data.valid
    return prepare(sources, tokenizer=tokenizer, text_field=data.text_field, cache=cache, progress=progress)


def prepare(
    sources: Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase,
    text_field: str,
    cache: Path,
    progress: Progress = SILENT,
) -> Tokens:
    """Tokenise sources into one file in `cache`, or open the file made of the same content before.

    The file's name is a hash of the content, the tokenizer and `text_field`. Each document ends with the
    end-of-sequence token; where a tokenizer has none, each begins with its beginning-of-sequence token
    instead. Special tokens spelled out in the text become those tokens. Documents longer than a piece
    (`sources.PIECE_CHARS`) are tokenized piece by piece. A data set of the hub stays at the revision it had
    when it was first read into `cache`.

    Works in bounded memory; a kill leaves nothing that counts. Raises `CorpusError` as `sources.read` does.
    """
    revisions = {source: _pinned(source, cache) for source in sources if source.startswith(HUB)}
    key = _key(sources, revisions, tokenizer=tokenizer, text_field=text_field)
    path, note = cache / f"{key[:32]}.tokens", cache / f"{key[:32]}.json"
    if (known := reopen(note)) is not None:
        return known
    dtype = np.dtype(np.uint16 if _vocab_size(tokenizer) <= 1 << 16 else np.uint32)
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    separator = bos if eos is None else eos
    start = [] if eos is not None or bos is None else [bos]
    count, text_bytes = len(start), 0
    with atomic_file(path) as draft, draft.open("wb") as file, progress.task("tokenize", None) as task:
        pieces = (
            piece
            for source in sources
            for piece in text_sources.read(source, text_field=text_field, revision=revisions.get(source))
        )
        file.write(np.array(start, dtype=dtype).tobytes())
        for batch in _batches(pieces):
            ids = _encode(batch, tokenizer, separator=separator)
            file.write(np.array(ids, dtype=dtype).tobytes())
            count += len(ids)
            text_bytes += sum(len(piece.text.encode()) for piece in batch)
            task.advance(len(ids))
    facts = {
        "format": FORMAT,
        "count": count,
        "dtype": dtype.name,
        "fingerprint": key,
        "text_bytes": text_bytes,
        "sources": list(sources),
    }
    write_json(note, facts)  # last: a token file counts once its note is there
    opened = reopen(note)
    assert opened is not None
    return opened


def reopen(note: Path) -> Tokens | None:
    """The token file that the JSON file `note` beside it describes; None unless both are there and whole."""
    path = note.with_suffix(".tokens")
    if not (note.exists() and path.exists()):
        return None
    facts = read_json(note)
    if facts.get("format") != FORMAT or path.stat().st_size != facts["count"] * np.dtype(facts["dtype"]).itemsize:
        return None
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
    tokens make `context - 1` of them. The tokens after the last whole sample are not used.

    Raises `CorpusError` if there are fewer tokens than one sample.
    """

    tokens: Tokens
    context: int
    seed: int

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
        return int(_epoch(self.seed, epoch, len(self))[rest])

    def numbered(self, numbers: Sequence[int]) -> Batch:
        """Samples by their place in the corpus, as a batch."""
        return Batch(self.take(numbers), tuple(numbers))

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
        rows = [self.tokens.ids[index * self.context : (index + 1) * self.context] for index in indices]
        return torch.from_numpy(np.stack(rows).astype(np.int64))


@lru_cache(maxsize=2)  # a batch touches two epochs at most, but for corpora smaller than a batch
def _epoch(seed: int, epoch: int, num_samples: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(num_samples)


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    chars = 0
    for piece in pieces:
        batch.append(piece)
        chars += len(piece.text)
        if chars >= _BATCH_CHARS or len(batch) >= 1024:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _encode(batch: list[Piece], tokenizer: PreTrainedTokenizerBase, *, separator: int | None) -> list[int]:
    texts = [piece.text for piece in batch]
    rows = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    ids: list[int] = []
    for row, piece in zip(rows, batch, strict=True):
        ids.extend(row)
        if piece.last and separator is not None:
            ids.append(separator)
    return ids


def _key(
    sources: Sequence[str],
    revisions: dict[str, str],
    *,
    tokenizer: PreTrainedTokenizerBase,
    text_field: str,
) -> str:
    parts = {
        "format": FORMAT,
        "sources": [text_sources.fingerprint(source, revision=revisions.get(source)) for source in sources],
        "tokenizer": _tokenizer_fingerprint(tokenizer),
        "text_field": text_field,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    what: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else dict(tokenizer.get_vocab())
    for state in ("truncation", "padding"):  # left behind by whoever called the tokenizer last
        what.pop(state, None)
    what = {"model": what, "eos": tokenizer.eos_token_id, "bos": tokenizer.bos_token_id}
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _vocab_size(tokenizer: PreTrainedTokenizerBase) -> int:
    return 1 + int(max(tokenizer.get_vocab().values()))


def _pinned(source: str, cache: Path) -> str:
    """The revision of a hub data set that this cache began with; the present one the first time."""
    note = cache / f"{hashlib.sha256(source.encode()).hexdigest()[:32]}.hub.json"
    if note.exists():
        return str(read_json(note)["revision"])
    revision = text_sources.hub_revision(source)
    write_json(note, {"source": source, "revision": revision})
    return revision
