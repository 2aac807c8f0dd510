"""Multiple choice: which of several continuations a model finds most likely.

A file is JSON lines (also .gz, .xz, .bz2 or .zst), one item per line. Other keys are ignored:

    {"context": "def area(r):\\n", "choices": ["    return 3 * r * r", "    import os"], "answer": 0}
    {"contexts": ["Ann thanked Bea because Ann", "Ann thanked Bea because Bea"], "ending": " had helped.", "answer": 1}

The first item asks which choice follows the context. The second asks after which context the ending is most likely, as
in Winogrande. Context and choice are joined without a space, so a space between the two belongs to the choice.

Shape suffixes: `N` choices of a batch, `S` tokens, `M` scored tokens, `D` hidden.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halve.disk import plain_json
from halve.disk.textfiles import DAMAGED, half_pair, open_packed, reason, require_file, shown
from halve.errors import CorpusError
from halve.model.head import Head, split
from halve.model.measure import row_chunks, token_log_probs

LONGEST_ITEM_BYTES = 1 << 24


@dataclass(frozen=True)
class Item:
    """One question: which choice follows the context, or which context its ending follows."""

    context: str | tuple[str, ...]
    """One for all choices, or one for each."""
    choices: tuple[str, ...]
    answer: int
    source: str = "item"
    """Where it came from, such as `tasks.jsonl line 3`, for errors."""

    @property
    def contexts(self) -> tuple[str, ...]:
        """The context of each choice."""
        return (self.context,) * len(self.choices) if isinstance(self.context, str) else self.context


@dataclass(frozen=True)
class Encoded:
    """An item as tokens. Each choice is a whole sequence; its tokens from `starts` on are scored.

    `after` is where lm-evaluation-harness begins to score. `num_chars` is the number that it divides by, None if the
    contexts differ.
    """

    sequences: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]
    after: tuple[int, ...]
    num_bytes: tuple[int, ...]
    num_chars: tuple[int, ...] | None
    answer: int


def load_items(path: str | Path) -> tuple[Item, ...]:
    """Read a multiple-choice file.

    Raises `CorpusError` naming the line that is not such an item, and for a file that is missing or empty.
    """
    path = Path(path)
    items: list[Item] = []
    try:
        require_file(path)
        with open_packed(path) as file:
            lines = iter(lambda: file.readline(LONGEST_ITEM_BYTES + 1), b"")
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    items.append(_parse(line, f"{path} line {number}", first=number == 1))
    except DAMAGED as error:
        raise CorpusError(
            f"cannot read multiple-choice file {shown(path)}",
            why=reason(error),
            fix="correct the recipe: evaluate.choices, score.depth_task or search.tournament.choices names it",
        ) from error
    if not items:
        raise CorpusError(
            f"multiple-choice file {path} is empty",
            why="it has no line with an item",
            fix="give JSON lines with context, choices and answer, or leave the file out of the recipe",
        )
    return tuple(items)


def json_line(item: Item) -> str:
    """An item as `load_items` reads it, without a line end."""
    if isinstance(item.context, str):
        asked: dict[str, Any] = {"context": item.context, "choices": item.choices}
    else:
        asked = {"contexts": item.context, "ending": item.choices[0]}
    return json.dumps({**asked, "answer": item.answer}, ensure_ascii=False)


class _Broken(ValueError):
    """Why a line is no item."""


def _parse(line: bytes, source: str, *, first: bool) -> Item:
    try:
        return _item(line, source, first=first)
    except _Broken as error:
        raise CorpusError(
            f"{source} is not a multiple-choice item",
            why=str(error),
            fix='write it like {"context": "2 + 2 =", "choices": [" 4", " 5"], "answer": 0}',
        ) from None


def _item(line: bytes, source: str, *, first: bool) -> Item:
    if len(line) > LONGEST_ITEM_BYTES:
        raise _Broken(f"it is longer than {LONGEST_ITEM_BYTES >> 20} MiB")
    try:
        raw: Any = plain_json.parse_json(line.decode("utf-8-sig" if first else "utf-8"))
    except UnicodeDecodeError as error:
        raise _Broken(f"it is not UTF-8: {error.reason} at byte {error.start}") from None
    except ValueError as error:
        raise _Broken(f"it is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise _Broken(f"it is a {type(raw).__name__}, not an object")
    several = "contexts" in raw and "ending" in raw
    missing = [key for key in ("context", "choices", "answer") if key not in raw and not (several and key != "answer")]
    if missing:
        raise _Broken(f"it lacks {' and '.join(missing)}")
    if several:
        contexts, ending = _texts(raw, "contexts"), raw["ending"]
        if not isinstance(ending, str) or not ending:
            raise _Broken(f"ending is not a text: {_short(ending)}")
        item = Item(contexts, (ending,) * len(contexts), _answer(raw, len(contexts)), source)
    else:
        context, choices = raw["context"], _texts(raw, "choices")
        if not isinstance(context, str):
            raise _Broken(f"context is not text: {_short(context)}")
        item = Item(context, choices, _answer(raw, len(choices)), source)
    if any(half_pair(text) is not None for text in (*item.contexts, *item.choices)):
        raise _Broken("a text in it holds half a surrogate pair, which is half a character")
    return item


def _texts(raw: dict[str, Any], key: str) -> tuple[str, ...]:
    texts = raw[key]
    if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(text, str) and text for text in texts):
        raise _Broken(f"{key} is not a list of two or more texts that are not empty")
    if len(set(texts)) < len(texts):
        raise _Broken(f"two of its {key} are the same")
    return tuple(texts)


def _answer(raw: dict[str, Any], count: int) -> int:
    answer = raw["answer"]
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < count:
        raise _Broken(f"answer {_short(answer)} is not an index into its {count} choices")
    return answer


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else text[:80] + "..."


def encode(tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], *, max_tokens: int | None) -> tuple[Encoded, ...]:
    """Turn items into tokens; `max_tokens` is the model's context, None for no limit.

    Context and choice are tokenized together, because a token may cross the boundary between them. The scored tokens
    are those after the prefix that the context and all sequences of the item share, so all choices continue the same
    tokens. (If contexts differ, each sequence is compared with its own context.) If nothing is shared, the sequences
    start with the tokenizer's BOS token, or with its EOS token if there is no BOS.

    Raises `CorpusError` naming the item that is longer than `max_tokens` or has no token before its choices.
    """
    return tuple(_encode(tokenizer, item, max_tokens) for item in items)


def _encode(tokenizer: PreTrainedTokenizerBase, item: Item, max_tokens: int | None) -> Encoded:
    texts = [context + choice for context, choice in zip(item.contexts, item.choices, strict=True)]

    def ids(text: str) -> list[int]:
        return _strip_end(tokenizer, tokenizer(text).input_ids)

    rows = [ids(text) for text in texts]
    before = {context: ids(context) for context in dict.fromkeys(item.contexts)}
    shared = [_common_prefix(before[context], row) for context, row in zip(item.contexts, rows, strict=True)]
    starts = [min(start, len(row) - 1) for start, row in zip(shared, rows, strict=True)]
    if isinstance(item.context, str):
        starts = [min(starts)] * len(rows)
    # lm-evaluation-harness: after as many tokens as the context has without the spaces at its end
    bare = [len(before[context] if context == context.rstrip() else ids(context.rstrip())) for context in item.contexts]
    after = [min(size, len(row) - 1) for size, row in zip(bare, rows, strict=True)]
    if min(starts) == 0:
        rows = [[_first_token(tokenizer, item), *row] for row in rows]
        starts, after = [start + 1 for start in starts], [start + 1 for start in after]
    longest = max(len(row) for row in rows)
    if max_tokens is not None and longest > max_tokens:
        raise CorpusError(
            f"{item.source} has {longest} tokens, the model's context has {max_tokens}",
            why="context and choice are scored as one sequence and are not cut",
            fix="shorten its context",
        )
    return Encoded(
        sequences=tuple(map(tuple, rows)),
        starts=tuple(starts),
        after=tuple(max(1, start) for start in after),
        num_bytes=tuple(len(choice.encode()) for choice in item.choices),
        num_chars=tuple(map(_num_chars, item.choices)) if isinstance(item.context, str) else None,
        answer=item.answer,
    )


def _first_token(tokenizer: PreTrainedTokenizerBase, item: Item) -> int:
    """The token in front of a text whose first token is already scored."""
    token = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if token is None:
        raise CorpusError(
            f"{item.source} has no token before its choices",
            why="its context is empty or merges with them into one token, and the tokenizer has no special tokens",
            fix="give the item a context, such as a line end, or the tokenizer a bos_token",
        )
    return int(token)


def _num_chars(choice: str) -> int:
    """Characters, without the space between the context and the choice."""
    parted = choice.startswith(" ") and not choice.startswith("  ")
    return max(1, len(choice) - parted)


def _strip_end(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Remove the EOS that a few tokenizers append: it would be scored as part of a choice."""
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))


@dataclass(frozen=True, eq=False)
class Answers:
    """Which items are answered correctly, by three rules. `halve.model.measure.proportion` turns them into accuracies.

    `right`: only the right choice has the highest log-probability per UTF-8 byte, which does not depend on the
    tokenizer.

        score(choice) = sum_t log p(token_t | context, earlier tokens) / bytes(choice)

    `acc` and `acc_norm` are the metrics of lm-evaluation-harness (0.4): the highest log-probability, and the highest
    log-probability per character. The first of several equal choices wins. The harness does not count the space between
    context and choice. It scores the tokens after the context without its trailing spaces. If contexts differ, there is
    no `acc_norm`.
    """

    right: Bool[Tensor, " items"]
    acc: Bool[Tensor, " items"]
    acc_norm: Bool[Tensor, " items"] | None


@torch.no_grad()
def answer_encoded(model: PreTrainedModel, items: Sequence[Encoded], *, batch_tokens: int = 4096) -> Answers:
    """Which items the model answers correctly.

    Sequences of similar length go through the model together. They are padded on the right, which a causal model does
    not see. The head is applied only to scored positions.
    """
    body, head = split(model)
    batches = batch_up(items, batch_tokens=batch_tokens)
    nats = [choice_nats(head, body(batch.ids.to(model.device)), batch) for batch in batches]
    return answers(items, batches, nats)


@dataclass(frozen=True, eq=False)
class PaddedBatch:
    """Sequences of similar length that go through the model together, padded on the right."""

    ids: Int64[Tensor, "choices seq"]
    owners: tuple[tuple[int, int], ...]
    """The item and the choice that each sequence is."""
    row: Int64[Tensor, " scored"]
    """The sequence that each scored token is in."""
    at: Int64[Tensor, " scored"]
    """Its place in there."""
    counts: Bool[Tensor, "scored 2"]
    """Whether it counts by halve's rule, and by that of lm-evaluation-harness."""


def batch_up(items: Sequence[Encoded], *, batch_tokens: int = 4096) -> tuple[PaddedBatch, ...]:
    """Put all choices of all items into batches of at most this many tokens with padding, shortest first.

    A longer sequence gets a batch of its own.
    """
    flat = [(i, c, row) for i, item in enumerate(items) for c, row in enumerate(item.sequences)]
    flat.sort(key=lambda entry: len(entry[2]))
    batches = []
    for group in _batches(flat, batch_tokens):
        width = len(group[-1][2])
        ids_NS = torch.tensor([[*row, *[0] * (width - len(row))] for _, _, row in group])
        begins = [(items[i].starts[c], items[i].after[c]) for i, c, _ in group]
        places = [(n, s) for n, (_, _, row) in enumerate(group) for s in range(min(begins[n]), len(row))]
        row_of, at = torch.tensor(places).T
        counts_M2 = at[:, None] >= torch.tensor(begins)[row_of]
        batches.append(PaddedBatch(ids_NS, tuple((i, c) for i, c, _ in group), row_of, at, counts_M2))
    return tuple(batches)


@torch.no_grad()
def choice_nats(
    head: Head, hidden: Float[Tensor, "choices seq hidden"], batch: PaddedBatch
) -> Float64[Tensor, "choices 2"]:
    """Log-probability of each choice of a batch from the last hidden states (CPU), by halve's and the harness's rule.

    It is summed over the tokens that count. The head is applied only to scored positions.
    """
    row_of, at, ids_NS = (tensor.to(hidden.device) for tensor in (batch.row, batch.at, batch.ids))
    counts_M2 = batch.counts.to(hidden.device)
    hidden_MD, targets_M = hidden[row_of, at - 1], ids_NS[row_of, at]
    sums_N2 = torch.zeros(len(ids_NS), 2, dtype=torch.float64, device=hidden.device)
    for rows in row_chunks(len(targets_M), head.weight.shape[0]):
        found_M = token_log_probs(head.logits(hidden_MD[rows]), targets_M[rows]).double()
        sums_N2.index_add_(0, row_of[rows], found_M[:, None].where(counts_M2[rows], 0.0))
    return sums_N2.cpu()


def answers(items: Sequence[Encoded], batches: Sequence[PaddedBatch], nats: Sequence[Tensor]) -> Answers:
    """Which items are answered correctly, from the results of `choice_nats` for every batch."""
    item_nats = [torch.empty(len(item.sequences), 2, dtype=torch.float64) for item in items]
    for batch, nats_N2 in zip(batches, nats, strict=True):
        for (i, c), nats_2 in zip(batch.owners, nats_N2, strict=True):
            item_nats[i][c] = nats_2
    right, acc, acc_norm = [], [], []
    for item, nats_C2 in zip(items, item_nats, strict=True):
        ours_C, theirs_C = nats_C2.T
        scores = (ours_C / torch.tensor(item.num_bytes)).tolist()
        right.append(all(s < scores[item.answer] for c, s in enumerate(scores) if c != item.answer))
        acc.append(_first_best(theirs_C) == item.answer)
        if item.num_chars is not None:
            acc_norm.append(_first_best(theirs_C / torch.tensor(item.num_chars)) == item.answer)
    whole = len(acc_norm) == len(items)
    return Answers(torch.tensor(right), torch.tensor(acc), torch.tensor(acc_norm) if whole else None)


def _first_best(scores: Tensor) -> int:
    values = scores.tolist()
    return int(max(range(len(values)), key=values.__getitem__))


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
