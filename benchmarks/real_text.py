"""The text and the model of the benchmarks on a real model: six kinds of text as files, and held-out documents.

    python benchmarks/real_text.py DATA OUT
    python benchmarks/real_text.py --docstrings OUT

DATA holds the data sets that are named below, as their owners publish them (JSON lines, compressed). OUT gets a
training file and a held-out file of each kind; a recipe reads the training files as a mixture. With `--docstrings` the
kinds are parts of the standard library's docstrings, to try the benchmarks on a tiny model.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import lzma
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from halve.demo.corpus import documents as prose
from halve.demo.corpus import read_modules, standard_library

KINDS = ("web", "encyclopedia", "stories", "books", "instructions", "maths")
TRAIN_CHARACTERS, HELD_CHARACTERS, BOOK_CHARACTERS = 3_000_000, 350_000, 200_000
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n"
"""How the model's own chat template joins a question and its answer."""


def main() -> None:
    """Write all files."""
    parser = argparse.ArgumentParser(description="The text of the benchmarks on a real model.")
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("out", type=Path)
    parser.add_argument("--docstrings", action="store_true", help="no data sets: the standard library's docstrings")
    args = parser.parse_args()
    if (args.data is None) != args.docstrings:
        parser.error("give DATA, or --docstrings")
    args.out.mkdir(parents=True, exist_ok=True)
    for kind, (train, held) in (docstrings() if args.docstrings else texts(args.data)).items():
        for split, documents, most in (("train", train, TRAIN_CHARACTERS), ("held", held, HELD_CHARACTERS)):
            count = write(args.out / f"{kind}-{split}.jsonl", documents, most)
            print(f"{kind}, {split}: {count} documents")


def docstrings() -> dict[str, tuple[Iterable[str], Iterable[str]]]:
    """Of each kind every sixth document of the standard library."""
    modules = list(read_modules(standard_library()))
    train, held = ([row["text"] for row in prose(modules, held_out=held_out)] for held_out in (False, True))
    count = len(KINDS)
    return {kind: (train[i::count], held[i::count] or held) for i, kind in enumerate(KINDS)}


def texts(data: Path) -> dict[str, tuple[Iterable[str], Iterable[str]]]:
    """Of each kind the documents to train on and those held out."""
    web = _field(data / "c4_wiki_demo/c4_300.jsonl.gz", "text")
    with gzip.open(data / "c4_wiki_demo/wiki_demo.txt.gz", "rt", encoding="utf-8") as file:
        articles = [line for line in file.read().split("\n") if line.strip()]
    asked = [
        *_chats(data / "sft/alpaca_en_1k.jsonl.gz", _instruction("output")),
        *_chats(data / "sft/gpteacher_roleplay.jsonl.gz", _instruction("response")),
    ]
    books, maths = data / "classic_books", data / "gsm8k"
    return {
        "web": (web[:220], web[220:]),
        "encyclopedia": (articles[:24], articles[24:]),
        "stories": (
            _field(data / "tinystories/train.jsonl.gz", "text"),
            _field(data / "tinystories/valid.jsonl.gz", "text"),
        ),
        "books": (_book_parts(books / "train-0.jsonl.xz"), _book_parts(books / "valid.jsonl.xz")),
        "instructions": ([text for i, text in enumerate(asked) if i % 10], asked[::10]),
        "maths": (_chats(maths / "train.jsonl.gz", _question), _chats(maths / "test.jsonl.gz", _question)),
    }


def write(path: Path, documents: Iterable[str], most: int) -> int:
    """Write documents until so many characters are written; the number of documents."""
    lengths = itertools.accumulate((len(text) for text in documents), initial=0)
    kept = [text for text, before in zip(documents, lengths, strict=False) if before < most]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in kept), encoding="utf-8")
    return len(kept)


def held_documents(
    folder: Path, tokenizer: PreTrainedTokenizerBase, *, of_each: int, context: int, skip: int = 0
) -> list[tuple[str, Int64[Tensor, "1 tokens"]]]:
    """The beginnings of so many held-out documents of each kind, each with its kind; `skip` leaves the first out.

    Of a kind that has fewer documents, later stretches of the same documents follow.
    """
    found = []
    for kind in KINDS:
        ids = [tokenizer(row["text"])["input_ids"] for row in rows(folder / f"{kind}-held.jsonl")]
        longest = max(map(len, ids))
        pieces = (
            document[start : start + context]
            for start in range(0, longest, context)
            for document in ids
            if len(document) >= start + 64
        )
        for piece in itertools.islice(pieces, skip, skip + of_each):
            found.append((kind, torch.tensor([piece])))
    return found


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file of JSON lines, compressed or not."""
    raw = path.read_bytes()
    unpack = {".gz": gzip.decompress, ".xz": lzma.decompress}.get(path.suffix, bytes)
    for line in unpack(raw).decode("utf-8").rstrip("\n").split("\n"):
        yield json.loads(line)


def _field(path: Path, name: str) -> list[str]:
    return [row[name] for row in rows(path)]


def _chats(path: Path, said: Callable[[dict[str, Any]], tuple[str, str]]) -> list[str]:
    return [CHAT.format(*said(row)) for row in rows(path)]


def _book_parts(path: Path) -> list[str]:
    return [text[:BOOK_CHARACTERS] for text in _field(path, "text")]


def _question(row: dict[str, Any]) -> tuple[str, str]:
    return row["question"], row["answer"]


def _instruction(answer: str) -> Callable[[dict[str, Any]], tuple[str, str]]:
    return lambda row: ("\n".join(filter(None, (row["instruction"], row["input"]))), row[answer])


if __name__ == "__main__":
    main()
