"""The order of a run, what makes a stage run again and what is found before anything runs.

The stages are stand-ins that write down that they were called; the real ones run in test_resume.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import shutil
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

import halve
from halve.disk.rundir import RunDir
from halve.errors import CorpusError, HalveError, RunError
from halve.model.checkpoint import Checkpoint
from halve.pipeline import run as pipeline
from halve.preflight import samples as preflight_text
from halve.recipe.schema import Recipe
from halve.text import corpus as corpora
from halve.text import mixture, sources
from halve.train.ranks import group

MakeRecipe = Callable[..., Recipe]
CORRECT = {"tokens": 640, "batch": 4}
DISTILL = {"tokens": 640, "batch": 4}
BASELINES = ["ce", "random_init", "random_prune"]
ALL = [
    "correct",
    "score",
    "prune",
    "distill",
    "distill-ce",
    "distill-random_init",
    "prune-random",
    "distill-random_prune",
    "evaluate",
    "report",
]


def _folders(arguments: Any) -> Any:
    """Arguments with the folders of opened models instead of the models."""
    if isinstance(arguments, Checkpoint):
        return arguments.folder
    if isinstance(arguments, dict):
        return {name: _folders(value) for name, value in arguments.items()}
    return arguments


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """The calls of stages, as (stage's folder, arguments); a model by the folder that it lies in."""
    made: list[tuple[str, dict[str, Any]]] = []

    def stage(recipe: Recipe, *, out: Path, **arguments: Any) -> dict[str, Any]:
        made.append((out.name.removeprefix(".").removesuffix(".work"), _folders(arguments)))
        (out / "model").mkdir(exist_ok=True)
        (out / "model" / "weights").write_text(str(len(made)))
        return {"calls": len(made)}

    def report(run: Path, out: Path) -> None:
        made.append(("report", {"run": run}))
        (out / "report.html").touch()

    for name in ("correct", "score", "prune", "cache", "distill", "evaluate"):
        monkeypatch.setattr(importlib.import_module(f"halve.stages.{name}"), "run", stage)
    monkeypatch.setattr("halve.report.page.write_report", report)
    return made


@pytest.fixture
def full(make_recipe: MakeRecipe) -> Callable[..., Recipe]:
    def make(**changes: Any) -> Recipe:
        distill = {**DISTILL, "baselines": BASELINES, **changes.pop("distill", {})}
        return make_recipe(**{"correct": CORRECT, "distill": distill, **changes})

    return make


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


ALWAYS = {"evaluate", "report"}
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


# ---- further rounds

THEN = [
    {"prune": {"ffn": 32}, "distill": DISTILL},
    {"prune": {"hidden": 24}, "distill": {**DISTILL, "baselines": ["ce", "random_prune"]}, "teacher": "previous"},
]
ROUNDS = [
    *("correct", "score", "prune", "distill"),
    *("score-2", "prune-2", "distill-2"),
    *("score-3", "prune-3", "distill-3", "distill-3-ce", "prune-3-random", "distill-3-random_prune"),
    *("evaluate", "report"),
]


@pytest.fixture
def rounds(full: Callable[..., Recipe]) -> Callable[..., Recipe]:
    def make(**changes: Any) -> Recipe:
        return full(**{"then": THEN, "distill": {"baselines": []}, **changes})

    return make


def test_each_round_cuts_the_last_student_and_learns_from_whom_it_says(
    calls: list[tuple[str, dict[str, Any]]], rounds: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = rounds()
    run = pipeline.run(recipe, tmp_path / "run")
    assert [name for name, _ in calls] == ROUNDS
    got = dict(calls)
    made = {name: run / name / "model" for name in ROUNDS}
    whole = {n: got[n]["teacher"] for n in ROUNDS if n.startswith(("score", "prune"))}
    assert whole == {
        **dict.fromkeys(("score", "prune"), made["correct"]),
        **dict.fromkeys(("score-2", "prune-2"), made["distill"]),
        **dict.fromkeys(("score-3", "prune-3", "prune-3-random"), made["distill-2"]),
    }
    assert got["prune-2"]["scores"] == run / "score-2" / "scores.safetensors"
    assert got["prune-3"]["scores"] == run / "score-3" / "scores.safetensors"
    assert got["prune-3-random"]["scores"] is None
    pairs = {n: (got[n]["teacher"], got[n]["student"]) for n in ROUNDS if n.startswith("distill")}
    assert pairs == {
        "distill": (made["correct"], made["prune"]),
        "distill-2": (made["correct"], made["prune-2"]),
        "distill-3": (made["distill-2"], made["prune-3"]),
        "distill-3-ce": (made["distill-2"], made["prune-3"]),
        "distill-3-random_prune": (made["distill-2"], made["prune-3-random"]),
    }
    assert list(got["evaluate"]["models"].items()) == [
        ("teacher", Path(recipe.model)),
        ("corrected", made["correct"]),
        ("pruned", made["prune"]),
        ("distilled", made["distill"]),
        ("pruned-2", made["prune-2"]),
        ("distilled-2", made["distill-2"]),
        ("pruned-3", made["prune-3"]),
        ("distilled-3", made["distill-3"]),
        ("ce-3", made["distill-3-ce"]),
        ("random_prune-3", made["distill-3-random_prune"]),
    ]
    assert (got["evaluate"]["reference"], got["evaluate"]["subject"]) == ("corrected", "distilled-3")


def test_a_round_gets_its_own_sizes_and_an_uncorrected_teacher(
    calls: list[tuple[str, dict[str, Any]]], make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, tuple[int | None, int | None]] = {}

    def prune(recipe: Recipe, *, out: Path, **arguments: Any) -> dict[str, Any]:
        seen[out.name] = (recipe.prune.ffn, recipe.prune.hidden)
        (out / "model").mkdir()
        return {}

    monkeypatch.setattr(halve.stages, "prune", SimpleNamespace(run=prune))
    recipe = make_recipe(then=[{"prune": {"hidden": 24}, "distill": DISTILL}])
    pipeline.run(recipe, tmp_path / "run")
    assert seen == {".prune.work": (40, None), ".prune-2.work": (None, 24)}
    got = dict(calls)
    assert got["score-2"]["teacher"] == tmp_path / "run" / "prune" / "model", "nothing was distilled in round 1"
    assert got["distill-2"]["teacher"] == Path(recipe.model)
    assert list(got["evaluate"]["models"]) == ["teacher", "pruned", "pruned-2", "distilled-2"]


def test_students_of_one_teacher_are_cut_from_it_by_the_same_scores(
    calls: list[tuple[str, dict[str, Any]]], rounds: Callable[..., Recipe], tmp_path: Path
) -> None:
    siblings = [{"prune": {"ffn": 32}, "distill": DISTILL, "cut": "original"}, THEN[0]]
    run = pipeline.run(rounds(then=siblings), tmp_path / "run")
    got = dict(calls)
    assert "score-2" not in got
    assert (got["prune-2"]["teacher"], got["prune-2"]["scores"]) == (
        run / "correct" / "model",
        run / "score" / "scores.safetensors",
    )
    assert (got["distill-2"]["teacher"], got["distill-2"]["student"]) == (
        run / "correct" / "model",
        run / "prune-2" / "model",
    )
    assert got["score-3"]["teacher"] == got["prune-3"]["teacher"] == run / "distill-2" / "model"
    calls.clear()
    pipeline.run(rounds(then=[{**siblings[0], "prune": {"ffn": 40}}, siblings[1]]), run)
    assert "distill" not in dict(calls), "a sibling does not depend on the others"
    calls.clear()
    by_sets = rounds(then=siblings, score={"depth": "nll"})
    pipeline.run(by_sets, tmp_path / "sets")
    assert "score-2" in dict(calls), "which layers are compared depends on how many are dropped"


def test_a_finished_run_of_rounds_is_left_as_it_is(
    calls: list[tuple[str, dict[str, Any]]], rounds: Callable[..., Recipe], tmp_path: Path
) -> None:
    pipeline.run(rounds(), tmp_path / "run")
    calls.clear()
    pipeline.run(rounds(), tmp_path / "run")
    assert calls == []


SECOND = {"score-2", "prune-2", "distill-2"}
THIRD = {name for name in ROUNDS if "-3" in name}


@pytest.mark.parametrize(
    ("changes", "again"),
    [
        ({"then": [{**THEN[0], "prune": {"ffn": 24}}, THEN[1]]}, SECOND - {"score-2"} | THIRD | ALWAYS),
        ({"then": [{**THEN[0], "prune": {"layers": 2}}, THEN[1]]}, SECOND - {"score-2"} | THIRD | ALWAYS),
        ({"then": [{**THEN[0], "distill": {**DISTILL, "lr": 2e-4}}, THEN[1]]}, {"distill-2"} | THIRD | ALWAYS),
        ({"then": [THEN[0], {**THEN[1], "prune": {"hidden": 16}}]}, THIRD - {"score-3"} | ALWAYS),
        (
            {"then": [THEN[0], {**THEN[1], "teacher": "original"}]},
            {"distill-3", "distill-3-ce", "distill-3-random_prune"} | ALWAYS,
        ),
        ({"then": THEN[:1]}, ALWAYS),
        ({"prune": {"ffn": 48, "layers": 3}}, set(ROUNDS) - {"correct", "score"}),
    ],
)
def test_a_changed_round_runs_again_with_those_after_it(
    calls: list[tuple[str, dict[str, Any]]],
    rounds: Callable[..., Recipe],
    tmp_path: Path,
    changes: dict[str, Any],
    again: set[str],
) -> None:
    pipeline.run(rounds(), tmp_path / "run")
    calls.clear()
    pipeline.run(rounds(**changes), tmp_path / "run")
    assert {name for name, _ in calls} == again


@pytest.mark.parametrize(
    ("score", "prune", "again"),
    [
        ({}, {"ffn": 40, "layers": 2}, False),
        ({}, {"non_embedding_ratio": 0.5}, False),
        ({}, {"hidden": 24}, False),
        ({"depth": "angular"}, {"ffn": 40, "layers": 2}, False),  # single layers tell any number of them
        ({"depth": "angular"}, {"ffn": 40}, True),  # none goes, and none is measured
        ({"depth_pattern": "greedy"}, {"ffn": 48, "layers": 3}, False),
        ({"depth_pattern": "greedy"}, {"ffn": 40, "layers": 2}, True),
    ],
)
def test_another_size_keeps_the_scores_unless_they_depend_on_it(
    calls: list[tuple[str, dict[str, Any]]],
    make_recipe: MakeRecipe,
    tmp_path: Path,
    score: dict[str, Any],
    prune: dict[str, Any],
    again: bool,
) -> None:
    how = {"samples": 8, "micro_batch": 4, **score}
    pipeline.run(make_recipe(score=how), tmp_path / "run")
    calls.clear()
    pipeline.run(make_recipe(score=how, prune=prune), tmp_path / "run")
    assert [name for name, _ in calls] == [*(["score"] if again else []), "prune", "evaluate", "report"]


def test_the_task_of_the_depth_scores_counts_by_its_content(
    calls: list[tuple[str, dict[str, Any]]], make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    def recipe(path: Path) -> Recipe:
        return make_recipe(score={"samples": 8, "micro_batch": 4, "depth": "task", "depth_task": str(path)})

    task = tmp_path / "a.jsonl"
    line = '{"context": "The small", "choices": [" cat", " sees"], "answer": 0}\n'
    task.write_text(line)
    pipeline.run(recipe(task), tmp_path / "run")
    calls.clear()
    moved = task.rename(tmp_path / "b.jsonl")
    pipeline.run(recipe(moved), tmp_path / "run")
    assert calls == []
    moved.write_text(2 * line)
    pipeline.run(recipe(moved), tmp_path / "run")
    assert [name for name, _ in calls] == ["score", "prune", "evaluate", "report"]


def test_a_round_that_failed_goes_on_where_it_was(
    calls: list[tuple[str, dict[str, Any]]],
    rounds: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(recipe: Recipe, *, out: Path, **arguments: Any) -> dict[str, Any]:
        if out.name != ".distill-2.work":
            return whole(recipe, out=out, **arguments)
        raise KeyboardInterrupt

    whole: Callable[..., dict[str, Any]] = halve.stages.distill.run
    with monkeypatch.context() as patch:
        patch.setattr(halve.stages, "distill", SimpleNamespace(run=fails))
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(rounds(), tmp_path / "run")
    calls.clear()
    pipeline.run(rounds(), tmp_path / "run")
    assert [name for name, _ in calls] == ROUNDS[ROUNDS.index("distill-2") :]


def test_one_stage_alone_of_every_round_that_has_come_so_far(
    calls: list[tuple[str, dict[str, Any]]], rounds: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = rounds(correct=None)
    made = []
    for section in ("score", "prune", "distill", "score", "prune", "distill"):
        pipeline.run(recipe, tmp_path / "run", only=section)
        made.append([name for name, _ in calls])
        calls.clear()
    assert made == [["score"], ["prune"], ["distill"], ["score-2"], ["prune-2"], ["distill-2"]]
    with pytest.raises(RunError, match=r"evaluate needs the artifact of prune-3\n.*\n  fix: halve prune with"):
        pipeline.run(recipe, tmp_path / "run", only="evaluate")


def test_check_looks_at_every_round(rounds: Callable[..., Recipe], make_recipe: MakeRecipe) -> None:
    assert pipeline.check(rounds()) == ()
    (error,) = pipeline.check(rounds(then=[{"prune": {"ffn": 41}}]))
    assert str(error).startswith("cannot keep 41 of 40 ffn")
    (error,) = pipeline.check(make_recipe(then=[{**THEN[1], "prune": {"ffn": 32}}]))
    assert "round 2 learns from the last student, which is not trained" in str(error)


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


def test_a_mistake_is_found_before_the_first_stage(
    calls: list[tuple[str, dict[str, Any]]], make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    with pytest.raises(HalveError, match="cannot keep 65 of 64 ffn"):
        pipeline.run(make_recipe(prune={"ffn": 65}), tmp_path / "run")
    assert calls == []


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
        "a sample has 4096 tokens, the model's context has 128",
        "cannot keep 3 query heads",
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
