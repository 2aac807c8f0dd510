"""Waits that last are told of, each in a line; short ones are not."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from halve.cut.proof import prove as proof
from halve.disk import files
from halve.disk.files import file_sha256
from halve.model.checkpoint import Checkpoint
from halve.pipeline import run as pipeline
from halve.preflight import rehearsal
from halve.preflight.forecast import forecast
from halve.process import waits
from halve.process.waits import heard, wait
from halve.progress import Task
from halve.recipe.schema import Recipe

MakeRecipe = Callable[..., Recipe]


class Recording:
    """A progress that keeps what it is told."""

    def __init__(self, *_: object) -> None:
        self.said: list[str] = []
        self.tasks: list[str] = []

    @contextmanager
    def task(self, name: str, total_tokens: int | None, *, done: int = 0) -> Iterator[Task]:
        self.tasks.append(name)

        class Idle:
            def advance(self, tokens: int, **metrics: float) -> None:
                return None

        yield Idle()

    def say(self, line: str) -> None:
        self.said.append(line)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every wait counts as long."""

    class Impatient:
        def __init__(self, seconds: float, say: Callable[[str], object], args: tuple[str]) -> None:
            self.say, self.args = say, args

        def start(self) -> None:
            self.say(*self.args)

        def cancel(self) -> None:
            return None

    monkeypatch.setattr(waits, "Timer", Impatient)


def test_a_wait_is_told_of_when_it_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    with heard(said.append):
        with wait("short"):
            pass
        monkeypatch.setattr(waits, "AFTER_S", 0.01)
        with wait("long"):
            deadline = time.monotonic() + 30
            while not said and time.monotonic() < deadline:
                time.sleep(0.01)
        with heard(None), wait("to nobody"):
            time.sleep(0.05)
    with wait("after"):
        time.sleep(0.05)
    assert said == ["long"]


def test_a_failed_wait_is_told_of_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(waits, "AFTER_S", 0.05)
    with heard(said.append):
        with pytest.raises(ValueError, match="no"), wait("failing"):
            raise ValueError("no")
        time.sleep(0.1)
    assert said == []


def test_a_run_tells_what_it_waits_for(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: None
) -> None:
    recording = Recording()
    monkeypatch.setattr(pipeline, "RichProgress", lambda _: recording)
    monkeypatch.setattr(files, "_hashes", {})
    monkeypatch.setattr(proof, "_proofs", {})
    monkeypatch.setattr(proof, "_on_one_thread", lambda anatomy, **_: proof.Proof(anatomy.family, (), {}))
    monkeypatch.setattr("halve.process.fresh.python", lambda *_: "not opened")
    recipe = make_recipe(prune={"hidden": 24, "ffn": 40})
    with pytest.raises(Exception, match="does not reopen"):
        pipeline.run(recipe, tmp_path / "run", console=object())  # type: ignore[arg-type]
    said = "\n".join(recording.said)
    for words in (
        f"loading {recipe.model} (",
        "hashing train.txt (",
        "proving the axes of llama on random twins",
        "opening the student in a fresh process",
        "rotating the weights",
        "waiting for the disk to keep score",
        f"writing {tmp_path}",
    ):
        assert words in said, said
    assert "score" in recording.tasks


def test_reading_a_file_for_its_hash_is_a_wait(tmp_path: Path, at_once: None) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"x" * 2_100_000)
    said: list[str] = []
    with heard(said.append):
        file_sha256(path)
        file_sha256(path)
    assert said == ["hashing weights.bin (2.1 MB)"], "each file is read once"


def test_a_dry_run_tells_of_its_rehearsal(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, at_once: None
) -> None:
    monkeypatch.setattr(rehearsal, "_rehearsed", {})
    recipe = make_recipe(distill={"tokens": 4096, "batch": 4})
    said: list[str] = []
    with heard(said.append):
        forecast(recipe, Checkpoint.open(recipe.model))
    assert "running a step on tensors without contents, for the memory plan" in said
