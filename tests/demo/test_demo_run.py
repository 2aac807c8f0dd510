from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from halve.cut.plan.sizes import target
from halve.demo import corpus as demo_corpus
from halve.demo import run as demo
from halve.errors import CorpusError
from halve.model.checkpoint import Checkpoint
from halve.preflight.check import check


def test_the_teacher_that_ships() -> None:
    assert sum(file.stat().st_size for file in demo.TEACHER.iterdir()) < 8e6
    anatomy = Checkpoint.open(demo.TEACHER).anatomy
    counts = anatomy.ledger.count(anatomy.sizes)
    assert anatomy.family == "llama"
    assert anatomy.sizes.layers == 10
    assert 1.4e6 < counts.params < 2.1e6
    record = json.loads((demo.TEACHER / "halve.json").read_text())
    assert record["tokens"] >= 20_000_000
    assert set(record["held_out"]) == set(demo_corpus.HELD_OUT)


@pytest.mark.parametrize("long", [False, True])
def test_the_recipe_keeps_about_half_and_has_nothing_to_mend(tmp_path: Path, long: bool) -> None:
    recipe = demo.make_recipe(tmp_path, long=long, corpus=None)
    anatomy = Checkpoint.open(recipe.model).anatomy
    arch, _ = target(anatomy, recipe.prune)
    kept = anatomy.ledger.count(arch).non_embedding / anatomy.ledger.count(anatomy.sizes).non_embedding
    assert 0.48 < kept < 0.52
    assert 64 <= recipe.score.samples <= 128
    assert recipe.correct is not None
    assert recipe.distill is not None
    assert {"ce", "random_init"} <= set(recipe.distill.baselines)
    assert check(recipe) == ()


def test_a_text_of_ones_own(tmp_path: Path) -> None:
    text = "".join(f"line {i} of a text with words in it\n" for i in range(5000))
    (tmp_path / "own.txt").write_text(text)
    recipe = demo.make_recipe(tmp_path / "texts", long=False, corpus=tmp_path / "own.txt")
    train, valid = (Path(source).read_text() for (source,) in (recipe.data.train_sources, recipe.data.valid))
    assert train + valid == text
    assert 0.09 < len(valid) / len(text) < 0.11
    assert recipe.evaluate.choices == ()


@pytest.mark.parametrize(("content", "message"), [(b"\xff\xfe\x00", "cannot read"), (b"one line", "cannot be divided")])
def test_a_text_that_will_not_do(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "own.txt").write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        demo.make_recipe(tmp_path / "texts", long=False, corpus=tmp_path / "own.txt")


def test_without_the_librarys_sources_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_corpus.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "nothing")})
    with pytest.raises(CorpusError, match="--corpus FILE"):
        demo.make_recipe(tmp_path / "texts", long=False, corpus=None)


def test_a_demo_where_one_stands_has_its_texts_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "text.txt").write_text("a line of text\n" * 100)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(demo.pipeline, "run", lambda recipe, out, console: out)
    assert demo.run(out=Path("."), long=False, corpus=tmp_path / "text.txt", console=Console()) == Path(".")
    assert sorted(path.name for path in (tmp_path / "here-texts").iterdir()) == ["train.txt", "valid.txt"]
