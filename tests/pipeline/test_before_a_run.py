"""What is found before the first stage, by a run and by `halve check`."""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from stand_ins import MakeRecipe

from halve.errors import CheckpointError, CorpusError, HalveError, PlanError, RunError
from halve.pipeline import run as pipeline
from halve.preflight import samples as preflight_text
from halve.recipe.schema import Recipe
from halve.text import corpus as corpora
from halve.text import mixture, sources
from halve.train.ranks import group


def test_a_mistake_is_found_before_the_first_stage(
    calls: list[tuple[str, dict[str, Any]]], make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    with pytest.raises(HalveError, match="cannot keep 65 of 64 ffn"):
        pipeline.run(make_recipe(prune={"ffn": 65}), tmp_path / "run")
    assert calls == []


SMALL = {"search": {"budget": {"total": "1k"}, "method": "trial"}, "prune": {}}


@pytest.mark.parametrize(
    ("changes", "only", "why"),
    [
        ({"prune": {"ffn": 65}}, None, "cannot keep 65 of 64 ffn"),
        (SMALL, None, "no legal shape has total about 1k"),
        (SMALL, "search", "no legal shape has total about 1k"),
        ({"model": "no/such/folder/here"}, None, "there is no model"),
        ({"data": {"train": ["none.txt"], "valid": ["none.txt"], "context": 32}}, None, "there is no corpus"),
        ({}, "prune", "prune needs the artifact of score"),
        ({}, "search", "there is nothing to search"),
    ],
)
def test_a_new_run_that_is_refused_leaves_no_folder(
    make_recipe: MakeRecipe, tmp_path: Path, changes: dict[str, Any], only: str | None, why: str
) -> None:
    with pytest.raises(HalveError, match=why):
        pipeline.run(make_recipe(**changes), tmp_path / "deep" / "run", only=only, needed=only == "search")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("changes", [SMALL, {"prune": {"params": "1k"}}], ids=["search", "prune"])
def test_a_budget_is_refused_before_weights_are_read(
    make_recipe: MakeRecipe, tiny_llama: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[:-1000])
    recipe = make_recipe(model=str(model), **changes)
    assert [type(error) for error in pipeline.check(recipe)] == [PlanError, CheckpointError]
    with pytest.raises(PlanError):
        pipeline.run(recipe, tmp_path / "run")


def test_a_run_that_its_text_refuses_does_not_keep_the_folder(
    calls: list[tuple[str, dict[str, Any]]], make_recipe: MakeRecipe, corpus: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    """Whole text is read once the run has a folder, where its tokens are kept."""
    text, model = tmp_path / "valid.txt", tmp_path / "model"
    text.write_text("The small cat sees the dog.\n" * 50000 + "\0")
    shutil.copytree(tiny_llama, model)
    data = {"train": [str(corpus / "train.txt")], "valid": [str(text)], "context": 32}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sources, "PROBED_CHARS", 1000)
        patched.setattr(preflight_text, "_SHORT_CHARS", 1000)
        with pytest.raises(CorpusError, match="is binary"):
            pipeline.run(make_recipe(data=data), tmp_path / "run")
    assert calls == []
    pipeline.run(make_recipe(name="other", model=str(model)), tmp_path / "run", only="score")
    assert [name for name, _ in calls] == ["score"]


def test_a_process_that_runs_the_script_again_runs_no_recipe(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(RunError, match="this script starts itself again"):
        pipeline.run(make_recipe(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_first_rank_reads_the_text_that_ranks_train_on_together(
    calls: list[tuple[str, dict[str, Any]]],
    full: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    led = 0

    class Watched(group.Ranks):
        def lead(self, act: Callable[[], Any]) -> Any:
            nonlocal led
            led += 1
            try:
                return act()
            finally:
                led -= 1

    prepared: list[tuple[Any, bool]] = []

    def prepare(asked: Any, **how: Any) -> corpora.Tokens:
        prepared.append((asked, led > 0))
        return original(asked, **how)

    original = corpora.prepare
    monkeypatch.setattr(group, "_here", [Watched()])
    for where in (corpora, mixture):
        monkeypatch.setattr(where, "prepare", prepare)
    recipe = full()
    monkeypatch.setattr(pipeline.preflight, "check", lambda *_, **__: ())
    pipeline.run(recipe, tmp_path / "run", only="correct")
    assert [name for name, _ in calls] == ["correct"]
    assert prepared == [(recipe.data.valid, True), (recipe.data.train, True)]


def test_held_out_text_is_read_to_its_end_before_the_first_stage(
    calls: list[tuple[str, dict[str, Any]]],
    make_recipe: MakeRecipe,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = tmp_path / "valid.txt"
    text.write_text("The small cat sees the dog.\n" * 5000 + "\0")
    recipe = make_recipe(data={"train": [str(corpus / "train.txt")], "valid": [str(text)], "context": 32})
    (found,) = pipeline.check(recipe)
    assert "is binary" in str(found)
    monkeypatch.setattr(sources, "PROBED_CHARS", 1000)
    monkeypatch.setattr(preflight_text, "_SHORT_CHARS", 1000)
    assert pipeline.check(recipe) == ()
    with pytest.raises(CorpusError, match="is binary"):
        pipeline.run(recipe, tmp_path / "run")
    assert calls == []


def test_check_finds_nothing_wrong_with_a_good_recipe(full: Callable[..., Recipe], tmp_path: Path) -> None:
    assert pipeline.check(full(), tmp_path / "run") == ()
    assert not (tmp_path / "run").exists()


def test_check_reports_every_mistake_at_once(
    make_recipe: MakeRecipe, tiny_llama: Path, corpus: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "choices.jsonl").write_text("{}")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    data = {"train": [str(tmp_path / "empty.txt")], "valid": [str(tmp_path / "none.txt")], "context": 4096}
    evaluate = {"choices": [str(tmp_path / "choices.jsonl")]}
    recipe = make_recipe(data=data, prune={"heads": 3}, evaluate=evaluate)
    found = [str(error) for error in pipeline.check(recipe, tmp_path / "out")]
    expected = [
        "is not a run folder",
        "cannot keep 3 query heads",
        "a sample has 4096 tokens, the model's context has 128",
        "choices.jsonl",
        "empty.txt is empty",
        "there is no corpus",
    ]
    assert len(found) == len(expected), found
    for message, error in zip(expected, found, strict=True):
        assert message in error


def test_check_looks_at_the_room_on_the_disk(
    full: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    (error,) = pipeline.check(full(), tmp_path / "run")
    assert " MB\n  why: 100.0 kB are free there" in str(error)


@pytest.mark.parametrize(("kind", "each"), [("hidden", 32 * 4), ("logits", 16 * 2 + 1 + 4)])
def test_check_counts_a_cache_before_it_is_written(
    kind: str, each: int, full: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"tokens": 1_000_000, "cache": kind}
    for spare, found in ((0.9, 1), (2.0, 0)):
        free = int(each * keys["tokens"] * spare)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        assert len(pipeline.check(full(distill=keys), tmp_path / "run")) == found


def test_check_looks_for_the_teachers_device(full: Callable[..., Recipe]) -> None:
    assert pipeline.check(full(distill={"teacher_device": "cpu"})) == ()
    (error,) = pipeline.check(full(distill={"teacher_device": "cuda:99"}))
    assert str(error).startswith("distill.teacher_device cuda:99 is not there")
