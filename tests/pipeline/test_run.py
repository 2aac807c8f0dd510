"""The order of a run, what makes a stage run again and what is found before anything runs.

The stages are stand-ins that write down that they were called; the real ones run in test_resume.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from stand_ins import ALL, ALWAYS, CORRECT, MakeRecipe

import halve
from halve.disk.rundir import RunDir
from halve.errors import RunError
from halve.model.checkpoint import Checkpoint
from halve.pipeline import run as pipeline
from halve.recipe.schema import Recipe


def test_stages_run_in_order_and_get_what_they_need(
    calls: list[tuple[str, dict[str, Any]]], full: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = full()
    assert pipeline.run(recipe, tmp_path / "run") == tmp_path / "run"
    assert [name for name, _ in calls] == ALL
    got = dict(calls)
    run = tmp_path / "run"
    corrected, cut = run / "correct" / "model", run / "prune" / "model"
    assert all(arguments["cache"] == run / "data" for name, arguments in calls if name != "report")
    assert got["correct"]["teacher"] == Path(recipe.model)
    assert got["score"]["teacher"] == got["prune"]["teacher"] == got["distill"]["teacher"] == corrected
    assert got["prune"]["scores"] == run / "score" / "scores.safetensors"
    assert got["prune-random"]["scores"] is None
    variants = {name: (got[name]["variant"], got[name]["student"]) for name in got if name.startswith("distill")}
    assert variants == {
        "distill": ("student", cut),
        "distill-ce": ("ce", cut),
        "distill-random_init": ("random_init", cut),
        "distill-random_prune": ("random_prune", run / "prune-random" / "model"),
    }
    assert got["evaluate"]["reference"] == "corrected"
    assert got["evaluate"]["models"] == {
        "teacher": Path(recipe.model),
        "corrected": corrected,
        "pruned": cut,
        "distilled": run / "distill" / "model",
        "ce": run / "distill-ce" / "model",
        "random_init": run / "distill-random_init" / "model",
        "random_prune": run / "distill-random_prune" / "model",
    }
    assert list(got["evaluate"]["models"])[:4] == ["teacher", "corrected", "pruned", "distilled"]


def test_a_short_recipe_has_few_stages(
    calls: list[tuple[str, dict[str, Any]]], make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe = make_recipe()
    pipeline.run(recipe, tmp_path / "run")
    assert [name for name, _ in calls] == ["score", "prune", "evaluate", "report"]
    got = dict(calls)
    assert got["score"]["teacher"] == got["prune"]["teacher"] == Path(recipe.model)
    assert got["evaluate"]["reference"] == "teacher"
    assert list(got["evaluate"]["models"]) == ["teacher", "pruned"]


def test_a_finished_run_is_left_as_it_is(
    calls: list[tuple[str, dict[str, Any]]],
    full: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipeline.run(full(), tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("*/**/*")}
    calls.clear()

    def needless(*args: Any) -> None:
        raise AssertionError("nothing is left to check")

    monkeypatch.setattr(pipeline, "check", needless)
    said = StringIO()
    pipeline.run(full(), tmp_path / "run", console=Console(file=said))
    assert calls == []
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("*/**/*")} == before
    assert said.getvalue().splitlines() == [f"{name}: done before" for name in ALL]


STUDENTS = {"distill", "distill-ce", "distill-random_init", "distill-random_prune"}


@pytest.mark.parametrize(
    ("changes", "again"),
    [
        ({"seed": 1}, set(ALL)),
        ({"dtype": "float32"}, set(ALL)),
        ({"correct": {**CORRECT, "lr": 2e-4}}, set(ALL)),
        ({"correct": {**CORRECT, "checkpoint_every": 3}}, set()),
        ({"score": {"samples": 9, "micro_batch": 4}}, set(ALL) - {"correct"}),
        ({"score": {"samples": 8, "micro_batch": 4, "seq_agg": "l2"}}, set(ALL) - {"correct", "score"}),
        ({"prune": {"ffn": 48, "layers": 3}}, set(ALL) - {"correct", "score"}),
        ({"distill": {"lr": 2e-4}}, STUDENTS | ALWAYS),
        ({"distill": {"temperature": 2.0}}, STUDENTS - {"distill-ce"} | ALWAYS),
        ({"distill": {"checkpoint_every": 3}}, set()),
        ({"distill": {"baselines": ["ce"]}}, ALWAYS),
        ({"evaluate": {"samples": 5, "speed": False}}, ALWAYS),
    ],
)
def test_a_changed_recipe_runs_what_it_affects_again(
    calls: list[tuple[str, dict[str, Any]]],
    full: Callable[..., Recipe],
    tmp_path: Path,
    changes: dict[str, Any],
    again: set[str],
) -> None:
    pipeline.run(full(), tmp_path / "run")
    calls.clear()
    pipeline.run(full(**changes), tmp_path / "run")
    assert {name for name, _ in calls} == again


@pytest.mark.parametrize("changed", ["score", "prune", "distill", "correct"])
def test_a_stage_takes_no_input_that_was_changed(
    calls: list[tuple[str, dict[str, Any]]], full: Callable[..., Recipe], tmp_path: Path, changed: str
) -> None:
    run = pipeline.run(full(), tmp_path / "run")
    path = run / changed / "model" / "weights"
    before = path.stat()
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    calls.clear()
    pipeline.run(full(), run)
    assert calls == [], "a finished run reads nothing"
    for made in ("evaluate", {"score": "prune", "prune": "distill"}.get(changed, "distill-ce")):
        shutil.rmtree(run / made)
    with pytest.raises(RunError, match=f"{changed}/model/weights is not what halve wrote"):
        pipeline.run(full(), run)
    shutil.rmtree(run / changed)
    pipeline.run(full(), run)
    assert "evaluate" in [name for name, _ in calls]


def test_a_new_name_changes_labels_alone(
    calls: list[tuple[str, dict[str, Any]]], full: Callable[..., Recipe], tmp_path: Path
) -> None:
    pipeline.run(full(), tmp_path / "run")
    calls.clear()
    pipeline.run(full(name="other"), tmp_path / "run")
    assert [name for name, _ in calls] == ["report"]


def test_inputs_count_by_their_content(
    calls: list[tuple[str, dict[str, Any]]],
    make_recipe: MakeRecipe,
    corpus: Path,
    tiny_llama: Path,
    tmp_path: Path,
) -> None:
    def recipe(train: Path, valid: Path) -> Recipe:
        return make_recipe(data={"train": [str(train)], "valid": [str(valid)], "context": 32})

    train, valid = tmp_path / "a.txt", tmp_path / "v.txt"
    shutil.copy(corpus / "train.txt", train)
    shutil.copy(corpus / "valid.txt", valid)
    pipeline.run(recipe(train, valid), tmp_path / "run")
    calls.clear()
    moved = train.rename(tmp_path / "b.txt")
    pipeline.run(recipe(moved, valid), tmp_path / "run")
    assert calls == []
    with valid.open("a") as file:
        file.write(" More.")
    pipeline.run(recipe(moved, valid), tmp_path / "run")
    assert [name for name, _ in calls] == ["prune", "evaluate", "report"]
    calls.clear()
    with moved.open("a") as file:
        file.write(" More.")
    pipeline.run(recipe(moved, valid), tmp_path / "run")
    assert [name for name, _ in calls] == ["score", "prune", "evaluate", "report"]


def test_a_changed_teacher_is_noticed(
    calls: list[tuple[str, dict[str, Any]]], make_recipe: MakeRecipe, tiny_llama: Path, tmp_path: Path
) -> None:
    teacher = Path(shutil.copytree(tiny_llama, tmp_path / "teacher"))
    pipeline.run(make_recipe(model=str(teacher)), tmp_path / "run")
    calls.clear()
    (teacher / "README.md").write_text("hello")
    (teacher / "consolidated.safetensors").write_bytes(b"in another layout")
    pipeline.run(make_recipe(model=str(teacher)), tmp_path / "run")
    assert calls == []
    config = (teacher / "config.json").read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05')
    (teacher / "config.json").write_text(config)
    pipeline.run(make_recipe(model=str(teacher)), tmp_path / "run")
    assert [name for name, _ in calls] == ["score", "prune", "evaluate", "report"]


def test_a_damaged_artifact_is_made_again(
    calls: list[tuple[str, dict[str, Any]]], make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    pipeline.run(make_recipe(), tmp_path / "run")
    calls.clear()
    (tmp_path / "run" / "prune" / "model" / "weights").unlink()
    pipeline.run(make_recipe(), tmp_path / "run")
    assert [name for name, _ in calls] == ["prune"]


def test_a_failed_stage_goes_on_where_it_was_and_starts_anew_for_another_recipe(
    calls: list[tuple[str, dict[str, Any]]],
    make_recipe: MakeRecipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: list[bool] = []

    def fails(recipe: Recipe, *, out: Path, **arguments: Any) -> dict[str, Any]:
        found.append((out / ".checkpoints").exists())
        (out / ".checkpoints").mkdir(exist_ok=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(halve.stages, "prune", SimpleNamespace(run=fails))
        for recipe in (make_recipe(), make_recipe(), make_recipe(prune={"ffn": 48})):
            with pytest.raises(KeyboardInterrupt):
                pipeline.run(recipe, tmp_path / "run")
    assert found == [False, True, False]
    assert not (tmp_path / "run" / "prune").exists()
    calls.clear()
    pipeline.run(make_recipe(prune={"ffn": 48}), tmp_path / "run")
    assert [name for name, _ in calls] == ["prune", "evaluate", "report"]


def test_one_stage_alone(calls: list[tuple[str, dict[str, Any]]], full: Callable[..., Recipe], tmp_path: Path) -> None:
    with pytest.raises(RunError, match="score needs the artifact of correct\n  why: correct has not finished"):
        pipeline.run(full(), tmp_path / "run", only="score")
    assert calls == []
    recipe = full(distill={"cache": "hidden"})
    asked = {stage.section for stage in pipeline.stages(recipe)}
    for section in (name for name in pipeline.SECTIONS if name in asked):
        pipeline.run(recipe, tmp_path / "run", only=section)
    assert [name for name, _ in calls] == [
        "correct",
        "score",
        "prune",
        "prune-random",
        "cache",
        *(name for name in ALL if name.startswith("distill")),
        "evaluate",
        "report",
    ]
    calls.clear()
    pipeline.run(recipe, tmp_path / "run")
    assert calls == []
    with pytest.raises(RunError, match=r"needs the artifact of prune\n.*\n  fix: halve prune with the same recipe"):
        pipeline.run(full(prune={"ffn": 48}), tmp_path / "run", only="evaluate")


def test_a_section_that_the_recipe_lacks_cannot_run(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="there is nothing to distill\n  why: recipe tiny has no section distill"):
        pipeline.run(make_recipe(), tmp_path / "run", only="distill")
    assert not (tmp_path / "run").exists()


def test_a_cache_is_made_once_for_all_students(
    calls: list[tuple[str, dict[str, Any]]], full: Callable[..., Recipe], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    pipeline.run(full(distill={"cache": "hidden"}), out)
    names = [name for name, _ in calls]
    assert [name for name in names if name != "cache"] == ALL
    assert names.index("prune") < names.index("cache") < names.index("distill")
    assert dict(calls)["cache"]["teacher"] == out / "correct" / "model"
    students = {name: got for name, got in calls if name.startswith("distill")}
    assert {got["answers_in"] for got in students.values()} == {out / "cache"}
    calls.clear()
    pipeline.run(full(distill={"cache": "hidden"}, prune={"ffn": 44, "layers": 3}), out)  # another student
    assert "prune" in dict(calls)
    assert "distill" in dict(calls)
    assert "cache" not in dict(calls)


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ({"objective": {"kl": 1.0, "ce": 1.0}}, False),
        ({"lr": 2e-4, "micro_batch": 2}, False),
        ({"cache": "hidden"}, True),
        ({"cache_samples": 8}, True),
        ({"temperature": 2.0}, True),
        ({"tokens": 1280}, True),
        ({"batch": 2}, True),
        ({"eval_samples": 3}, True),
        ({"precision": "bfloat16"}, True),
    ],
)
def test_a_cache_is_made_again_for_what_it_depends_on(
    change: dict[str, Any],
    again: bool,
    calls: list[tuple[str, dict[str, Any]]],
    full: Callable[..., Recipe],
    tmp_path: Path,
) -> None:
    keys = {"cache": "logits", "baselines": []}
    pipeline.run(full(distill=keys), tmp_path / "run")
    calls.clear()
    pipeline.run(full(distill={**keys, **change}), tmp_path / "run")
    assert ("cache" in dict(calls)) is again
    assert "distill" in dict(calls)


def test_a_cache_is_made_alone(
    calls: list[tuple[str, dict[str, Any]]], full: Callable[..., Recipe], tmp_path: Path
) -> None:
    with pytest.raises(RunError, match=r"there is nothing to cache\n  why: recipe tiny has no distill\.cache"):
        pipeline.run(full(), tmp_path / "run", only="cache")
    recipe = full(distill={"cache": "logits"}, correct=None)
    pipeline.run(recipe, tmp_path / "other", only="cache")
    assert [name for name, _ in calls] == ["cache"]
    assert calls[0][1]["teacher"] == Path(recipe.model)


def test_several_ranks_cannot_align(full: Callable[..., Recipe], tmp_path: Path) -> None:
    """They may do everything before; a step of alignment trains in one process."""
    recipe = full(align=[{"kind": "sft", "data": [str(tmp_path / "a.jsonl")]}])
    listed, teacher = pipeline.stages(recipe), Checkpoint.open(recipe.model)
    with pytest.MonkeyPatch.context() as patch, RunDir.open(tmp_path / "run", recipe) as folder:
        patch.setattr("halve.preflight.check.check", lambda *_, **__: ())
        patch.setattr("halve.pipeline.keys._texts", lambda *_: [])

        def ask(only: str | None) -> list[str]:
            return pipeline._what_to_do(recipe, teacher, folder, listed, only, tmp_path, needed=False, ranks=2)[0]

        assert ask("correct") == ["correct"]
        with pytest.raises(RunError, match=r"2 ranks cannot align\n.*\n  fix: torchrun ... halve distill"):
            ask(None)
