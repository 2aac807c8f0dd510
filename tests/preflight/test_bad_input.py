"""Every mistake of a user ends in three lines and exit code 2, and leaves nothing half-written behind."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from halve.cli import app as cli
from halve.recipe.schema import Recipe

MakeRecipe = Callable[..., Recipe]
Refused = Callable[..., None]
THREE_LINES = re.compile(r"\Aerror: [^\n]+\n  why: [^\n]+\n  fix: [^\n]+\n\Z")


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.fixture
def refused(make_recipe: MakeRecipe, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """`refused(message, **changes)`: `halve run` of the changed recipe ends in this error and leaves nothing."""

    def assert_refused(message: str, *, unchecked: dict[str, Any] | None = None, **changes: Any) -> None:
        recipe = make_recipe(**{"model": str(model), **changes}).model_dump(mode="json", exclude_none=True)
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({**recipe, **(unchecked or {})}))
        code = cli.main(["run", str(path), "--out", str(tmp_path / "run"), "--quiet"])
        said = capsys.readouterr()
        assert THREE_LINES.match(said.err), said.err
        assert re.search(message, said.err), said.err
        assert code == 2
        assert said.out == ""
        assert artifacts(tmp_path / "run") == []

    return assert_refused


def artifacts(run: Path) -> list[str]:
    """What a run made, beyond its own notes and whole token files."""
    notes = {"run.json", "recipe.json", ".lock", "hashes.json", ".key.json"}
    made = (path for path in run.rglob("*") if path.is_file() and path.name not in notes)
    tokens = {path for path in run.glob("data/*") if path.with_suffix(".tokens").exists()}
    return sorted(path.relative_to(run).as_posix() for path in made if path not in tokens)


def edit_config(model: Path, **changes: Any) -> None:
    raw = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**raw, **changes}))


def edit_weights(model: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


# --- models


def test_missing_weights(refused: Refused, model: Path) -> None:
    (model / "model.safetensors").unlink()
    refused("has no weights\n  why: neither model.safetensors nor")


def test_truncated_weights(refused: Refused, model: Path) -> None:
    os.truncate(model / "model.safetensors", (model / "model.safetensors").stat().st_size - 1)
    refused(r"model\.safetensors is truncated\n  why: it has \d+ bytes and its header promises \d+")


def test_nan_weights(refused: Refused, model: Path) -> None:
    edit_weights(model, lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    refused(r"model\.norm\.weight of .* is not finite")


def test_zero_weights(refused: Refused, model: Path) -> None:
    edit_weights(model, lambda tensors: [tensor.zero_() for tensor in tensors.values()])
    refused(r"the weights of .* are all zero")


def test_a_pickle(refused: Refused, model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    refused(r"pytorch_model\.bin is a pickle checkpoint\n.*only safetensors are read")


def test_an_unknown_config(refused: Refused, model: Path) -> None:
    edit_config(model, model_type="frobnicator")
    refused("unknown model_type 'frobnicator'")


def test_a_tokenizer_of_another_model(refused: Refused, model: Path) -> None:
    edit_config(model, vocab_size=300)
    edit_weights(model, lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"][:300].clone()}))
    refused(r"the tokenizer of .* is not the model's\n  why: its largest id is 319, .* has 300 entries")


def test_no_model(refused: Refused, tmp_path: Path) -> None:
    refused(r"there is no model .*/nowhere", model=str(tmp_path / "nowhere"))


# --- sizes


def test_a_budget_that_cannot_be_met(refused: Refused) -> None:
    refused(r"(?s)error: .*\n  why: .*\n  fix: .*\d", prune={"params": "900"})


def test_head_counts_that_do_not_divide(refused: Refused) -> None:
    refused("cannot keep 3 query heads in 2", prune={"heads": 3})


# --- text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"there is no corpus .*text\.txt"),
        (b"", r"text\.txt is empty"),
        (b" \n\n ", r"text\.txt is empty"),
        (b"some text\0more", r"text\.txt is binary\n  why: there is a NUL byte in line 1"),
        (b"line one\nna\xefve", r"text\.txt, line 2 is not UTF-8\n  why: byte \d+ is 0xef"),
        (
            b'{"text": "a"}\n{"text": "\\ud83d"}\n{"text": "b"}',
            r"text\.txt, line 2: field 'text' holds half a character",
        ),
        (b'{"text": "a"}\n' * 2 + b"[" * 99_999, r"text\.txt, line 3 is not JSON\n  why: it is nested deeper"),
    ],
)
@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_corpus_that_is_no_text(
    refused: Refused, corpus: Path, tmp_path: Path, split: str, content: bytes | None, message: str
) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    data = {"train": [str(corpus / "train.txt")], "valid": [str(corpus / "valid.txt")], "context": 32}
    refused(message, data={**data, split: [str(path)]})


@pytest.mark.parametrize("second", ["valid.txt", "./valid.txt", ".", "link.txt"])
def test_held_out_text_that_is_read_twice(refused: Refused, corpus: Path, tmp_path: Path, second: str) -> None:
    held = tmp_path / "held"
    held.mkdir()
    shutil.copy(corpus / "valid.txt", held)
    if second == "link.txt":
        (held / second).symlink_to(held / "valid.txt")
    valid = [str(held / "valid.txt"), f"{held}/{second}"]
    data = {"train": [str(corpus / "train.txt")], "valid": valid, "context": 32}
    refused(r"data\.valid reads .*valid\.txt twice", data=data)


def test_a_sample_longer_than_the_context(refused: Refused, corpus: Path) -> None:
    data = {"train": [str(corpus / "train.txt")], "valid": [str(corpus / "valid.txt")], "context": 129}
    refused("a sample has 129 tokens, the model's context has 128", data=data)


# --- recipes and folders


def test_an_unknown_key(refused: Refused) -> None:
    refused(r"unknown key scor in .*\n.*\n  fix: did you mean score\?", unchecked={"scor": {}})


def test_a_folder_that_is_not_a_run(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.json").touch()
    refused(r"is not a run folder\n  why: it holds recipe\.json and no run\.json")


def test_a_run_of_another_recipe(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({"format": 1, "recipe": "other", "model": "m"}))
    (tmp_path / "run" / "score").mkdir()
    refused(r"is not a run of recipe tiny on .*\n  why: it was started by recipe other on m")


def test_a_disk_with_too_little_room(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    refused(r"needs about .* kB\n  why: 1\.0 kB are free there\n")


@pytest.mark.parametrize("at", range(0, 20, 3))
def test_a_disk_that_fills_up(
    make_recipe: MakeRecipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    at: int,
) -> None:
    """The first `at` files and folders are put on the disk, the next finds no room; nothing is left by half."""
    calls, fsync = 0, os.fsync

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    path, run = tmp_path / "recipe.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(make_recipe().model_dump(mode="json", exclude_none=True)))
    monkeypatch.setattr(os, "fsync", full)
    code = cli.main(["run", str(path), "--out", str(run), "--quiet"])
    said = capsys.readouterr().err
    assert code == 2
    assert THREE_LINES.match(said), said
    assert re.search("no room left while writing .*\n  why: No space left on device\n  fix: free some space", said)
    assert [p for p in run.rglob("*") if p.name.endswith(".tmp")] == []
    for path in run.rglob("*.json"):
        json.loads(path.read_text())
    assert all((stage.parent / "scores.safetensors").exists() for stage in run.glob("*/manifest.json"))
