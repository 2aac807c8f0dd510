"""A folder that halve can work on in a second, and the areas of it in which something can be wrong."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from fuzz import conversations, ggufs, mutations, names
from gguf_files import write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from halve.disk.gguf_header import read_header
from halve.recipe import strict_yaml
from halve.recipe.schema import Recipe

ITEM = {"context": "The old cat", "choices": [" sees the small dog.", " dog the sees old."], "answer": 0}
NOTES = (".lock",)


def recipe(folder: Path) -> dict[str, Any]:
    """Every key of a recipe with the value that it has, so that each can be changed."""
    asked: dict[str, Any] = {
        "name": "fuzz",
        "model": "model",
        "device": "cpu",
        "data": {"train": ["train.jsonl"], "valid": ["valid.txt"], "context": 32},
        "score": {"samples": 8, "micro_batch": 4},
        "prune": {"ffn": 40, "layers": 3, "refit_samples": 8},
        "distill": {"tokens": 256, "batch": 4, "warmup_steps": 1, "eval_samples": 2, "checkpoint_every": 1},
        "evaluate": {
            "samples": 4,
            "speed": False,
            "prompts": ["The old"],
            "completion_tokens": 4,
            "choices": ["items.jsonl"],
        },
    }
    whole = Recipe.model_validate(asked).model_dump(mode="json", exclude_none=True)
    return {key: {**value, **asked[key]} if isinstance(asked.get(key), dict) else value for key, value in whole.items()}


def build(folder: Path, *, model: Path, corpus: Path) -> None:
    """Write the sound world: a model, texts, multiple-choice items and `recipe.yaml`."""
    shutil.copytree(model, folder / "model")
    documents = (corpus / "train.txt").read_text(encoding="utf-8").split("\n\n")[:60]
    lines = [json.dumps({"text": document, "number": n}) for n, document in enumerate(documents)]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    shutil.copyfile(corpus / "valid.txt", folder / "valid.txt")
    tokenizer, loaded = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    write_gguf(loaded, folder / "model.gguf", tokenizer=tokenizer)
    (folder / "items.jsonl").write_text(f"{json.dumps(ITEM)}\n" * 3, encoding="utf-8")
    (folder / "recipe.yaml").write_text(strict_yaml.dump(recipe(folder)), encoding="utf-8")


@dataclass(frozen=True)
class Area:
    """One kind of input: `spoil` makes something wrong in a world."""

    spoil: Callable[[Path, Random], None]
    finished: bool = False
    """Whether a run of this recipe lies in the folder `run` already."""


def _file(name: str, change: Callable[[bytes, Random], bytes]) -> Area:
    def spoil(folder: Path, draw: Random) -> None:
        path = folder / name
        path.write_bytes(change(path.read_bytes(), draw))

    return Area(spoil)


def _tree(content: bytes, draw: Random) -> bytes:
    return mutations.as_json(mutations.data(json.loads(content), draw)).encode()


def _rows(content: bytes, draw: Random) -> bytes:
    """A few rows of JSON lines changed, each in itself."""
    lines = content.split(b"\n")
    chosen = [draw.randrange(len(lines) - 1) for _ in range(draw.choice([1, 2, 5]))]
    for at in dict.fromkeys(chosen):  # once each: what was changed may be too deep to be changed again
        lines[at] = _tree(lines[at], draw)
    return b"\n".join(lines)


def _recipe(content: bytes, draw: Random) -> bytes:
    return mutations.as_json(mutations.data(strict_yaml.parse_yaml(content), draw)).encode()


def _lines(content: bytes, draw: Random) -> bytes:
    return mutations.text(content.decode(), draw).encode()


def _header(content: bytes, draw: Random) -> bytes:
    """The header of a safetensors file changed as data, its length kept right."""
    length = struct.unpack("<Q", content[:8])[0]
    header = _tree(content[8 : 8 + length], draw)
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def _gguf(change: Callable[[bytes, Random], bytes]) -> Area:
    """The header of a GGUF file changed, and the file the teacher."""

    def spoil(folder: Path, draw: Random) -> None:
        path = folder / "model.gguf"
        content, start = path.read_bytes(), read_header(path).data_start
        path.write_bytes(change(content[:start], draw) + content[start:])
        ggufs.name_teacher(folder, path.name)

    return Area(spoil)


def _numbers(content: bytes, draw: Random) -> bytes:
    """A few bytes of numbers: counts, kinds, sizes, places."""
    changed = bytearray(content)
    places = [at for at, byte in enumerate(content) if byte < 32 and content[at + 1 : at + 4] == b"\0\0\0"]
    for _ in range(draw.choice([1, 1, 2])):
        changed[draw.choice(places)] = draw.choice([0, 1, 2, 3, 8, 9, 30, 31, 64, 255])
    return bytes(changed)


def _run_folder(change: Callable[[bytes, Random], bytes], suffixes: tuple[str, ...]) -> Area:
    def spoil(folder: Path, draw: Random) -> None:
        found = [path for path in sorted((folder / "run").rglob("*")) if path.is_file() and path.suffix in suffixes]
        path = draw.choice([path for path in found if path.name not in NOTES])
        path.write_bytes(change(path.read_bytes(), draw))
        stages = ["report", "evaluate", "distill", "prune", "score"]
        for stage in stages[: draw.randrange(len(stages))]:  # what is to be made anew from what was changed
            shutil.rmtree(folder / "run" / stage)

    return Area(spoil, finished=True)


AREAS = {
    "recipe": _file("recipe.yaml", _recipe),
    "yaml": _file("recipe.yaml", _lines),
    "yaml-bytes": _file("recipe.yaml", mutations.raw),
    "config": _file("model/config.json", _tree),
    "config-bytes": _file("model/config.json", mutations.raw),
    "header": _file("model/model.safetensors", _header),
    "weights-bytes": _file("model/model.safetensors", mutations.raw),
    "tokenizer": _file("model/tokenizer.json", _tree),
    "tokenizer-bytes": _file("model/tokenizer.json", mutations.raw),
    "tokenizer-config": _file("model/tokenizer_config.json", _tree),
    "generation": _file("model/generation_config.json", _tree),
    "text-rows": _file("train.jsonl", _rows),
    "text-bytes": _file("train.jsonl", mutations.raw),
    "valid-bytes": _file("valid.txt", mutations.raw),
    "names": Area(names.spoil),
    "items": _file("items.jsonl", _rows),
    "items-bytes": _file("items.jsonl", mutations.raw),
    "gguf-numbers": _gguf(_numbers),
    "gguf-bytes": _gguf(mutations.raw),
    "gguf-file": Area(ggufs.spoil_file),
    "chat-rows": Area(conversations.spoil_rows),
    "chat-data": Area(conversations.spoil_data),
    "chat-template": Area(conversations.spoil_template),
    "run-data": _run_folder(_tree, (".json",)),
    "run-bytes": _run_folder(mutations.raw, (".json", ".jsonl", ".safetensors", ".tokens")),
}
