"""GGUF files in which something is wrong as a whole: cut off, in parts, without a tokenizer, without tensors."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

from fuzz import mutations
from gguf_files import write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from halve.recipe import strict_yaml

PARTS = "split.count"


def name_teacher(folder: Path, name: str) -> None:
    """Make a file of the folder the recipe's teacher."""
    recipe = folder / "recipe.yaml"
    raw = strict_yaml.parse_yaml(recipe.read_bytes())
    recipe.write_text(strict_yaml.dump({**raw, "model": name}), encoding="utf-8")


def spoil_file(folder: Path, draw: Random) -> None:
    """One of the ways in which a download or a conversion goes wrong."""
    way, name = draw.choice(_WAYS), "model.gguf"
    name_teacher(folder, way(folder / name, draw) or name)


def _cut_off(path: Path, draw: Random) -> None:
    content = path.read_bytes()
    at = draw.choice([0, 3, 8, 24, draw.randrange(len(content)), len(content) - 1, len(content) - draw.randrange(4096)])
    path.write_bytes(content[:at])


def _longer(path: Path, draw: Random) -> None:
    path.write_bytes(path.read_bytes() + draw.choice([b"\0", b"\0" * 4096, b"<html>"]))


def _other_bytes(path: Path, draw: Random) -> None:
    path.write_bytes(mutations.raw(path.read_bytes(), draw))


def _no_gguf(path: Path, draw: Random) -> None:
    page = b"<html>404</html>" * 100
    path.write_bytes(draw.choice([b"", b"GGUF", b"GGUF\x03\0\0\0", b"GGML" + page, page, b"\x93NUMPY", b"FUGG" + page]))


def _of_a_set(path: Path, draw: Random) -> str:
    """One file of several, with or without the others."""
    names = draw.choice([("model-00001-of-00002.gguf",), ("model-00001-of-00002.gguf", "model-00002-of-00002.gguf")])
    tokenizer, model = _sources(path)
    tensors = {} if len(names) == 1 else {"output_norm.weight": None}
    split: dict[str, Any] = {PARTS: draw.choice([1, 2, 0, 10**6]), "split.no": draw.choice([0, 1, 7])}
    for name in names:
        write_gguf(model, path.with_name(name), tokenizer=tokenizer, changed=split, tensors=tensors)
    return draw.choice(names)


def _no_tokenizer(path: Path, draw: Random) -> None:
    tokenizer, model = _sources(path)
    start = "tokenizer.ggml."
    names = ["model", "pre", "tokens", "token_type", "merges", "bos_token_id", "eos_token_id"]
    without: dict[str, Any] = dict.fromkeys((start + name for name in draw.sample(names, draw.randrange(1, 4))), None)
    write_gguf(model, path, tokenizer=draw.choice([None, tokenizer]), changed=without)


def _no_tensor(path: Path, draw: Random) -> None:
    tokenizer, model = _sources(path)
    names = ["blk.0.attn_q.weight", "blk.1.ffn_up.weight", "output_norm.weight", "token_embd.weight", "output.weight"]
    write_gguf(model, path, tokenizer=tokenizer, tensors=dict.fromkeys(draw.sample(names, draw.randrange(1, 3)), None))


def _other_settings(path: Path, draw: Random) -> None:
    tokenizer, model = _sources(path)
    names = ["block_count", "embedding_length", "attention.head_count", "context_length", "rope.freq_base"]
    changed = {f"llama.{name}": draw.choice([None, 0, 1, 7, 2**31, "x", [1, 2], 0.5, True]) for name in names[:2]}
    chosen = draw.choice(names)
    write_gguf(model, path, tokenizer=tokenizer, changed={f"llama.{chosen}": draw.choice([*changed.values()])})


def _sources(path: Path) -> tuple[Any, Any]:
    folder = path.parent / "model"
    return AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)


_WAYS = (_cut_off, _cut_off, _longer, _other_bytes, _no_gguf, _of_a_set, _no_tokenizer, _no_tensor, _other_settings)
