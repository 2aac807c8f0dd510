"""Multiple choice: which of several continuations a model finds most likely.

A file is JSON lines (also .gz or .xz), one item a line; other keys are ignored:

    {"context": "def area(r):\\n", "choices": ["    return 3 * r * r", "    import os"], "answer": 0}

A choice follows its context as it stands: a space between the two belongs to the choice.

Shape suffixes: `N` choices of a batch, `S` tokens, `M` scored tokens, `D` hidden.
"""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halve import plain_json
from halve.errors import CorpusError
from halve.head import Head, split
from halve.measure import context_length, row_chunks, token_log_probs

_OPENERS: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".xz": lzma.open}


@dataclass(frozen=True)
class Item:
    """One question: a context, its possible continuations and the index of the right one."""

    context: str
    choices: tuple[str, ...]
    answer: int
    source: str = "item"
    """Where it came from, such as `tasks.jsonl line 3`, for errors."""


@dataclass(frozen=True)
class Encoded:
    """An item as tokens: each choice is a whole sequence, of which the tokens from `start` on are scored."""

    sequences: tuple[tuple[int, ...], ...]
    start: int
    num_bytes: tuple[int, ...]
    answer: int


def load_items(path: str | Path) -> tuple[Item, ...]:
    """Read a multiple-choice file.

    Raises `CorpusError` naming the line that is not such an item, and for a file that is missing or empty.
    """
    path = Path(path)
    items: list[Item] = []
    number = 0
    try:
        with _OPENERS.get(path.suffix, _open)(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    items.append(_parse(line, f"{path} line {number}"))
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise CorpusError(
            f"cannot read multiple-choice file {path}",
            why=getattr(error, "strerror", None) or str(error),
            fix="correct the recipe: evaluate.choices or score.depth_task names it",
        ) from error
    if not items:
        raise CorpusError(
            f"multiple-choice file {path} is empty",
            why="it has no line with an item",
            fix="give JSON lines with context, choices and answer, or leave the file out of the recipe",
        )
    return tuple(items)


def _open(path: Path) -> BinaryIO:
    return path.open("rb")


def _parse(line: bytes, source: str) -> Item:
    def broken(why: str) -> CorpusError:
        return CorpusError(
            f"{source} is not a multiple-choice item",
            why=why,
            fix='write it like {"context": "2 + 2 =", "choices": [" 4", " 5"], "answer": 0}',
        )

    try:
        raw: Any = plain_json.parse(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise broken(f"it is not UTF-8: {error.reason} at byte {error.start}") from None
    except ValueError as error:
        raise broken(f"it is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise broken(f"it is a {type(raw).__name__}, not an object")
    missing = [key for key in ("context", "choices", "answer") if key not in raw]
    if missing:
        raise broken(f"it lacks {' and '.join(missing)}")
    context, choices, answer = raw["context"], raw["choices"], raw["answer"]
    if not isinstance(context, str):
        raise broken(f"context is not text: {context!r}")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise broken("choices is not a list of two or more texts that are not empty")
    if len(set(choices)) < len(choices):
        raise broken("two of its choices are the same")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise broken(f"answer {answer!r} is not an index into its {len(choices)} choices")
    return Item(context, tuple(choices), answer, source)


def encode(tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], *, max_tokens: int | None) -> tuple[Encoded, ...]:
    """Turn items into tokens; `max_tokens` is the model's context, None for no limit.

    Context and choice are tokenized together, since a token may cross the border between them. Scored are the
    tokens after the prefix that the context and every sequence of the item share: all choices are then
    continuations of the same tokens. Where nothing is shared, the sequences start with the tokenizer's
    beginning-of-text token, or with its end-of-text token if there is no other.

    Raises `CorpusError` naming the item that is longer than `max_tokens`.
    """
    return tuple(_encode(tokenizer, item, max_tokens) for item in items)


def _encode(tokenizer: PreTrainedTokenizerBase, item: Item, max_tokens: int | None) -> Encoded:
    texts = [item.context, *(item.context + choice for choice in item.choices)]
    rows = [_strip_end(tokenizer, tokenizer(text).input_ids) for text in texts]
    start = min(_common_prefix(rows[0], row) for row in rows[1:])
    start = min(start, *(len(row) - 1 for row in rows[1:]))
    if start == 0:
        begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        assert begin is not None, "a tokenizer with neither a first nor a last token"
        rows, start = [[begin, *row] for row in rows], 1
    longest = max(len(row) for row in rows)
    if max_tokens is not None and longest > max_tokens:
        raise CorpusError(
            f"{item.source} has {longest} tokens, the model's context has {max_tokens}",
            why="context and choice are scored as one sequence and are not cut",
            fix="shorten its context",
        )
    sizes = tuple(len(choice.encode("utf-8", errors="replace")) for choice in item.choices)
    return Encoded(tuple(tuple(row) for row in rows[1:]), start, sizes, item.answer)


def _strip_end(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Without the end-of-text token that a few tokenizers append: it would be scored as part of a choice."""
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))


def multiple_choice(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    *,
    batch_tokens: int = 4096,
) -> Bool[Tensor, " items"]:
    """Which items a model answers rightly; `halve.measure.proportion` makes the accuracy of it."""
    return answer_encoded(
        model, encode(tokenizer, items, max_tokens=context_length(model.config)), batch_tokens=batch_tokens
    )


@torch.no_grad()
def answer_encoded(
    model: PreTrainedModel, items: Sequence[Encoded], *, batch_tokens: int = 4096
) -> Bool[Tensor, " items"]:
    """Which items the model answers rightly: the right choice alone has the highest score.

        score(choice) = sum_t log p(token_t | context, earlier tokens) / bytes(choice)

    Dividing by UTF-8 bytes, not tokens, keeps the score independent of how a tokenizer cuts the text.
    Sequences of like length go through the model together, padded on the right, where a causal model cannot
    see; the head is applied to scored positions alone.
    """
    body, head = split(model)
    batches = batch_up(items, batch_tokens=batch_tokens)
    nats = [choice_nats(head, body(batch.ids.to(model.device)), batch) for batch in batches]
    return right_answers(items, batches, nats)


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences of like length that go through the model together, padded on the right."""

    ids: Int64[Tensor, "choices seq"]
    owners: tuple[tuple[int, int], ...]
    """The item and the choice that each sequence is."""
    row: Int64[Tensor, " scored"]
    """The sequence that each scored token is in."""
    at: Int64[Tensor, " scored"]
    """Its place in there."""


def batch_up(items: Sequence[Encoded], *, batch_tokens: int = 4096) -> tuple[Batch, ...]:
    """Put all choices of all items into batches of at most so many tokens, padding included, shortest first.

    One sequence that is longer has a batch of its own.
    """
    flat = [(i, c, row) for i, item in enumerate(items) for c, row in enumerate(item.sequences)]
    flat.sort(key=lambda entry: len(entry[2]))
    batches = []
    for group in _batches(flat, batch_tokens):
        width = len(group[-1][2])
        ids_NS = torch.tensor([[*row, *[0] * (width - len(row))] for _, _, row in group])
        places = [(n, s) for n, (i, _, row) in enumerate(group) for s in range(items[i].start, len(row))]
        row_of, at = torch.tensor(places).T
        batches.append(Batch(ids_NS, tuple((i, c) for i, c, _ in group), row_of, at))
    return tuple(batches)


@torch.no_grad()
def choice_nats(head: Head, hidden: Float[Tensor, "choices seq hidden"], batch: Batch) -> Float64[Tensor, " choices"]:
    """Log-probability of each choice of a batch, summed over its scored tokens, from the last hidden states (CPU).

    The head is applied to scored positions alone.
    """
    row_of, at, ids_NS = (tensor.to(hidden.device) for tensor in (batch.row, batch.at, batch.ids))
    hidden_MD, targets_M = hidden[row_of, at - 1], ids_NS[row_of, at]
    sums_N = torch.zeros(len(ids_NS), dtype=torch.float64, device=hidden.device)
    for rows in row_chunks(len(targets_M), head.weight.shape[0]):
        sums_N.index_add_(0, row_of[rows], token_log_probs(head.logits(hidden_MD[rows]), targets_M[rows]).double())
    return sums_N.cpu()


def right_answers(items: Sequence[Encoded], batches: Sequence[Batch], nats: Sequence[Tensor]) -> Bool[Tensor, " items"]:
    """Which items are answered rightly, from what `choice_nats` gives of every batch."""
    scores = [[0.0] * len(item.sequences) for item in items]
    for batch, nats_N in zip(batches, nats, strict=True):
        for (i, c), total in zip(batch.owners, nats_N.tolist(), strict=True):
            scores[i][c] = total / items[i].num_bytes[c]
    right = [
        all(score < row[item.answer] for c, score in enumerate(row) if c != item.answer)
        for item, row in zip(items, scores, strict=True)
    ]
    return torch.tensor(right)


def _batches(
    flat: list[tuple[int, int, tuple[int, ...]]], batch_tokens: int
) -> list[list[tuple[int, int, tuple[int, ...]]]]:
    """Cut sequences sorted by length into batches of at most this many tokens, padding included."""
    batches: list[list[tuple[int, int, tuple[int, ...]]]] = []
    for entry in flat:
        if not batches or (len(batches[-1]) + 1) * len(entry[2]) > batch_tokens:
            batches.append([])
        batches[-1].append(entry)
    return batches
