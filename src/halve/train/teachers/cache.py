"""A teacher's answers on the disk: hidden states, or tokens drawn from its distribution, sample by sample.

    cache/
      index.json                  what the answers belong to (see `Bound`), and facts of the teacher's head
      samples.safetensors         the samples' numbers: training samples in the order of first draws, held-out samples
      head.safetensors            the teacher's output matrix, in the precision of its computation
      train-000000.safetensors    shards of several samples; a sample's tensors are named by its number
      heldout-000000.safetensors  always hidden states: held-out metrics need the whole distribution

A shard is written completely or not at all, and says what it belongs to. So a killed writer resumes with the next
shard. The index is written last. Nothing here depends on a student.

Shapes: N tokens (those that a sample predicts), D hidden, V vocab, K draws.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from halve.disk.files import atomic_file, read_sealed, sealed, write_json
from halve.errors import TrainError
from halve.model.head import Head
from halve.recipe.schema import Cache
from halve.text.batch import Batch
from halve.train.losses.divergences import Sampled
from halve.train.teachers import draws
from halve.train.teachers.draws import Packed
from halve.train.teachers.live import Hidden

CACHE_FORMAT = 1
INDEX, SAMPLES, HEAD = "index.json", "samples.safetensors", "head.safetensors"
TRAIN, HELDOUT = "train", "heldout"
SHARD_BYTES = 2**28  # a kill loses at most one shard
_OPEN_SHARDS = 64

Answer = Mapping[str, Tensor]
"""The stored tensors of one sample: `hidden` [N, D], or the parts of `draws.Packed`."""


@dataclass(frozen=True)
class Bound:
    """What the answers belong to: the teacher, the text and the kind of answers.

    `teacher`, `tokenizer`, `corpus` and `heldout` are SHA-256 of contents. `corpus` identifies the text behind the
    sample numbers (see `course.Course`). `vocab` is the number of tokens in the teacher's distribution. `draws` and
    `temperature` are those of drawn logits.
    """

    teacher: str
    tokenizer: str
    corpus: str
    heldout: str
    context: int
    documents: str
    kind: Cache
    vocab: int
    draws: int | None = None
    temperature: float | None = None


@dataclass(frozen=True)
class CacheFacts:
    """Other facts: the teacher's held-out cross-entropy, its head, and the training whose samples were answered."""

    ce: float
    scale: float
    softcap: float | None
    drawn: str


# ---- writing -------------------------------------------------------------------------------------------------


def write_shards(
    folder: Path,
    group: str,
    numbers: Sequence[int],
    make: Callable[[Sequence[int]], Iterable[Answer]],
    *,
    bound: Bound,
    each: int,
) -> None:
    """Write the answers for samples in shards of `each` samples. Shards of an earlier call are kept.

    `make` returns each sample's tensors, in order. Raises `DiskError` when the device is full; finished shards stay
    valid.
    """
    for place, first in enumerate(range(0, len(numbers), each)):
        some = numbers[first : first + each]
        path, stamp = _shard(folder, group, place), _stamp(bound, some)
        if not _is_written(path, stamp):
            made = zip(some, make(some), strict=True)
            tensors = {_name(n, part): value.cpu() for n, parts in made for part, value in parts.items()}
            _save(tensors, path, stamp=stamp)


def write_index(
    folder: Path, bound: Bound, head: Head, *, ce: float, drawn: str, each: int, numbers: Mapping[str, Sequence[int]]
) -> None:
    """Write everything except the shards, which completes the cache. `drawn` identifies the training of the samples."""
    weights = {"weight": head.weight.detach()} | ({} if head.bias is None else {"bias": head.bias.detach()})
    _save({name: value.cpu().contiguous() for name, value in weights.items()}, folder / HEAD)
    _save({name: torch.tensor(listed, dtype=torch.int64) for name, listed in numbers.items()}, folder / SAMPLES)
    facts = asdict(CacheFacts(ce, head.scale, head.softcap, drawn))
    write_json(folder / INDEX, sealed({"format": CACHE_FORMAT, "bound": asdict(bound), "each": each, "facts": facts}))


def cache_bytes(folder: Path) -> int:
    """The bytes of a cache's answers for training samples."""
    return sum(path.stat().st_size for path in folder.glob(f"{TRAIN}-*.safetensors"))


# ---- reading -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Store:
    """An open cache. Any number of students may read it at once."""

    folder: Path
    bound: Bound
    facts: CacheFacts
    each: int

    @classmethod
    def open(cls, folder: Path) -> Store:
        """Open a complete cache. Raises `TrainError`."""
        if not (folder / INDEX).is_file():
            raise TrainError(f"there is no cache in {folder}", why=f"it has no {INDEX}", fix=_AGAIN)
        index = read_sealed(folder / INDEX)
        if index.get("format") != CACHE_FORMAT:
            why = f"its format is {index.get('format')}, this halve reads {CACHE_FORMAT}"
            raise TrainError(f"cannot read the cache in {folder}", why=why, fix=_AGAIN)
        return cls(folder, Bound(**index["bound"]), CacheFacts(**index["facts"]), index["each"])

    def require(self, bound: Bound) -> None:
        """Raise `TrainError` naming the first difference between what these answers belong to and what is needed."""
        for key, wanted in asdict(bound).items():
            stored = asdict(self.bound)[key]
            if stored != wanted:
                raise TrainError(
                    f"the cache in {self.folder} is of another {_WORDS.get(key, key)}",
                    why=f"it was made for {_short(stored)}, this training has {_short(wanted)}",
                    fix=_AGAIN,
                )

    def require_vocab(self, vocab: int) -> None:
        """Raise `TrainError` if draws are over another vocabulary than the `vocab` tokens shared with the student."""
        if self.bound.kind == "logits" and vocab != self.bound.vocab:
            raise TrainError(
                f"the cache in {self.folder} is over another vocabulary",
                why=f"its draws are of {self.bound.vocab} tokens, teacher and student share {vocab}",
                fix="use cache: hidden, which works for any part of the vocabulary",
            )

    def require_samples(self, numbers: Iterable[int], *, group: str = TRAIN) -> None:
        """Raise `TrainError` naming a sample that the cache does not have."""
        for number in numbers:
            self._place(number, group)

    def head(self, device: str) -> Head:
        """The teacher's head, on a device."""
        with self._reading():
            weights = load_file(self.folder / HEAD, device=device)
        return Head(weights["weight"], weights.get("bias"), self.facts.scale, self.facts.softcap)

    def answers(self, number: int, group: str) -> dict[str, Tensor]:
        """The tensors of one sample."""
        file = self._opened(_shard(self.folder, group, self._place(number, group) // self.each))
        parts = ("hidden",) if group == HELDOUT or self.bound.kind == "hidden" else Packed._fields
        with self._reading():
            return {part: file.get_tensor(_name(number, part)) for part in parts}

    def _place(self, number: int, group: str) -> int:
        place = self._places[group].get(number)
        if place is None:
            raise TrainError(
                f"the cache in {self.folder} has no answer for sample {number}",
                why=f"it holds {len(self._places[group])} other samples of the same text",
                fix=_AGAIN,
            )
        return place

    @cached_property
    def _places(self) -> dict[str, dict[int, int]]:
        with self._reading():
            listed = load_file(self.folder / SAMPLES)
        return {group: {n: i for i, n in enumerate(numbers.tolist())} for group, numbers in listed.items()}

    @cached_property
    def _opened(self) -> Callable[[Path], Any]:
        @lru_cache(maxsize=_OPEN_SHARDS)
        def opened(path: Path) -> Any:
            with self._reading():
                return safe_open(path, "pt")

        return opened

    def _reading(self) -> _Reading:
        return _Reading(self.folder)


@dataclass(frozen=True)
class CachedHidden:
    """A teacher whose hidden states are read. With its head, the whole distribution is known."""

    store: Store
    own_head: Head
    group: str = TRAIN

    def answer(self, batch: Batch) -> Hidden:
        """Read the states of the batch's samples. Raises `TrainError` for one that is missing."""
        states_ND = torch.cat([self.store.answers(number, self.group)["hidden"] for number in batch.numbers])
        assert len(states_ND) == batch.labels().numel()
        return Hidden(states_ND.to(batch.ids.device), self.own_head)


@dataclass(frozen=True)
class CachedDraws:
    """A teacher whose draws are read."""

    store: Store

    def answer(self, batch: Batch) -> Sampled:
        """Read the draws of the batch's samples. Raises `TrainError` for one that is missing."""
        assert self.store.bound.draws is not None
        packed = [Packed(**self.store.answers(number, TRAIN)) for number in batch.numbers]
        sampled = draws.unpack(Packed(*map(torch.cat, zip(*packed, strict=True))), draws=self.store.bound.draws)
        assert len(sampled.entropy) == batch.labels().numel()
        return Sampled(*(part.to(batch.ids.device) for part in sampled))


_AGAIN = "run halve cache with this recipe again, or set distill.cache to none"
_WORDS = {
    "corpus": "text, or of samples cut otherwise",
    "heldout": "held-out text",
    "documents": "setting of data.documents",
    "kind": "kind",
    "vocab": "vocabulary",
    "draws": "number of draws",
}


@dataclass(frozen=True)
class _Reading:
    """Turn an error in a file of the cache into a `TrainError`."""

    folder: Path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError | SafetensorError | KeyError):
            why = str(error).splitlines()[0]
            raise TrainError(f"cannot read the cache in {self.folder}", why=why, fix=_AGAIN) from error


def _shard(folder: Path, group: str, place: int) -> Path:
    return folder / f"{group}-{place:06d}.safetensors"


def _name(number: int, part: str) -> str:
    return f"{number}.{part}"


def _stamp(bound: Bound, numbers: Sequence[int]) -> str:
    what = {"format": CACHE_FORMAT, "bound": asdict(bound), "numbers": list(numbers)}
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _is_written(path: Path, stamp: str) -> bool:
    if not path.is_file():
        return False
    try:
        with safe_open(path, "pt") as file:
            return bool((file.metadata() or {}).get("of") == stamp)
    except SafetensorError:  # truncated by something other than a kill of this process
        return False


def _save(tensors: dict[str, Tensor], path: Path, *, stamp: str = "") -> None:
    with atomic_file(path) as draft:
        draft.touch()
        mode = draft.stat().st_mode
        save_file(tensors, draft, metadata={"of": stamp})
        draft.chmod(mode)  # safetensors writes files that other users cannot read


def _short(value: Any) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else str(value)
