"""Further rounds: which student is cut, who teaches, and what makes a round run again.

The stages are stand-ins that write down that they were called.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from stand_ins import ALWAYS, DISTILL, THEN, MakeRecipe

import halve
from halve.errors import RunError
from halve.pipeline import run as pipeline
from halve.recipe.schema import Recipe

ROUNDS = [
    *("correct", "score", "prune", "distill"),
    *("score-2", "prune-2", "distill-2"),
    *("score-3", "prune-3", "distill-3", "distill-3-ce", "prune-3-random", "distill-3-random_prune"),
    *("evaluate", "report"),
]


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
