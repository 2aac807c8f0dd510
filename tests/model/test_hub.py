"""Models by their name on a hub, and sources that are not there."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from folders import CHAT
from huggingface_hub.utils import filter_repo_objects

from halve.disk import soundness
from halve.errors import CheckpointError
from halve.model.checkpoint import Checkpoint


def test_sources_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="there is no model /no/such/folder"):
        Checkpoint.open("/no/such/folder").load()
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is not a folder"):
        Checkpoint.open(tmp_path / "file").load()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        Checkpoint.open(tmp_path).load()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The snapshot of own/er in a hub's cache, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--own--er"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    (repository / "snapshots" / ("a" * 40)).mkdir(parents=True)
    return repository / "snapshots" / ("a" * 40)


def fail(error: Exception) -> Callable[..., Any]:
    def failing(*args: Any, **kwargs: Any) -> Any:
        raise error

    return failing


PARTIAL = (
    r"^the download of own/er is incomplete\n  why: only a part of it is in the hub's cache here, and %s"
    r"\n  fix: run this once with a network and without HF_HUB_OFFLINE, or: hf download own/er$"
)


def test_a_download_that_is_not_all_there_is_told_as_such(
    tiny_llama: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = PARTIAL % "HF_HUB_OFFLINE forbids to ask the hub"
    with pytest.raises(CheckpointError, match=partial):
        assert Checkpoint.open("own/er").config
    shutil.copy(tiny_llama / "config.json", cache)
    opened = Checkpoint.open("own/er")
    assert opened.config.hidden_size == 32
    for needs in (opened.require_weights, opened.require_tokenizer):
        with pytest.raises(CheckpointError, match=partial):
            needs()
    index = {"weight_map": {"nothing": "model-1.safetensors"}}
    (cache / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=partial):
        opened.require_weights()
    monkeypatch.setattr(soundness, "snapshot_download", fail(ConnectionError("Got: no way\nmore")))
    with pytest.raises(CheckpointError, match=PARTIAL % "the hub cannot be reached: Got: no way"):
        Checkpoint("own/er", cache).require_weights()


WHOLE = PARTIAL % "the download did not end"


@pytest.mark.parametrize(
    ("listed", "no_weights", "no_tokenizer", "no_config"),
    [
        (["config.json", "model.safetensors", "tokenizer.json"], WHOLE, WHOLE, WHOLE),
        (
            ["pytorch_model.bin"],
            r"own/er has no safetensors weights\n  why: .*pickle.*\n  fix: .* convert it",
            r"own/er has no tokenizer\n  why: .* is in its repository\n  fix: hf download own/er",
            r"own/er has no config\.json\n  why: its repository has none",
        ),
    ],
)
def test_what_a_repository_lacks_is_told_from_half_a_download(
    tiny_llama: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    listed: list[str],
    no_weights: str,
    no_tokenizer: str,
    no_config: str,
) -> None:
    files = [SimpleNamespace(rfilename=name) for name in listed]
    monkeypatch.setattr(soundness, "snapshot_download", lambda *args, **keys: str(cache))
    monkeypatch.setattr(soundness.HfApi, "model_info", lambda api, name: SimpleNamespace(siblings=files))
    with pytest.raises(CheckpointError, match=no_config):
        assert Checkpoint.open("own/er").config
    shutil.copy(tiny_llama / "config.json", cache)
    opened = Checkpoint.open("own/er")
    with pytest.raises(CheckpointError, match=no_weights):
        opened.require_weights()
    with pytest.raises(CheckpointError, match=no_tokenizer):
        opened.require_tokenizer()


def status(number: int) -> Exception:
    answer = SimpleNamespace(status_code=number, headers={}, request=None)
    return soundness.errors.HfHubHTTPError(f"{number} for url", response=answer)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "why", "fix"),
    [
        (None, "the hub's cache has none, and HF_HUB_OFFLINE forbids", "check the spelling; .*hf download ow/ner"),
        (ConnectionError("no way\nmore"), "has none, and the hub cannot be reached: no way$", "check the spelling"),
        (RuntimeError("a proxy's"), "the hub cannot be reached: a proxy's$", "check the spelling"),
        (status(401), "the hub does not show such a model without permission", "for a private or gated model"),
        (status(503), "the hub cannot be reached: 503 for url", "check the spelling"),
    ],
)
def test_names_that_the_hub_does_not_give(
    cache: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None, why: str, fix: str
) -> None:
    if error is not None:
        monkeypatch.setattr(soundness, "snapshot_download", fail(error))
    with pytest.raises(
        CheckpointError, match=r"^cannot get model ow/ner( from the hub)?\n  why: there is no such folder"
    ) as caught:
        Checkpoint.open("ow/ner")
    assert re.search(why, caught.value.why)
    assert re.search(fix, caught.value.fix)


def test_a_hub_name_asks_for_safetensors_and_json_alone(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def download(name: str, **patterns: Any) -> str:
        asked.append({"name": name, **patterns})
        return str(tiny_llama)

    monkeypatch.setattr(soundness, "snapshot_download", download)
    assert Checkpoint.open("own/er").config.model_type == "llama"
    Checkpoint.open("own/er").load()
    assert asked[0]["allow_patterns"] == ["config.json"]
    wanted = ["config.json", "model-1.safetensors", "tokenizer.model", "LICENSE", "README.md", "tekken.json"]
    others = [
        "pytorch_model.bin",
        "modeling.py",
        "LICENSE.py",
        "consolidated.safetensors",
        "original/params.json",
        "a/b.txt",
    ]
    assert filtered([*wanted, *others, CHAT], asked[-1]) == [*wanted, CHAT]


def filtered(names: list[str], asked: dict[str, Any]) -> list[str]:
    """What the hub's client takes of a repository."""
    allowed, ignored = asked["allow_patterns"], asked["ignore_patterns"]
    return list(filter_repo_objects(names, allow_patterns=allowed, ignore_patterns=ignored))
