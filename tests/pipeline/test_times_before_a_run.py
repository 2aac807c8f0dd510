"""Times that bound a search are measured before the first stage, once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml
from stand_ins import MakeRecipe

from halve.anatomy import Anatomy, Arch
from halve.cli.app import main
from halve.errors import PlanError
from halve.pipeline import run as pipeline
from halve.recipe.schema import Recipe
from halve.search import latency
from halve.search.timing import BlockTimes
from halve.stages import score

CORRECT = {"tokens": 2 * 4 * 32, "batch": 4, "warmup_steps": 1}


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of widths that are timed, one entry for each time."""
    found: list[int] = []

    def measured(anatomy: Anatomy, archs: Sequence[Arch], pace: Any) -> dict[Arch, BlockTimes]:
        found.append(len(archs))
        seconds = {arch: 1e-5 * (arch.ffn + arch.heads + arch.kv_heads) for arch in archs}
        return {arch: BlockTimes(block, 1e-4, block, 1e-4) for arch, block in seconds.items()}

    monkeypatch.setattr(latency, "time_blocks", measured)
    monkeypatch.setattr(latency, "Pace", Mock())
    return found


def searching(make_recipe: MakeRecipe, *budgets: dict[str, Any], **changes: Any) -> Recipe:
    budget = {"budget": budgets[0]} if len(budgets) == 1 else {"targets": list(budgets)}
    search = {**budget, "candidates": 2, "axes": {"hidden": "frozen"}, "method": "trial"}
    return make_recipe(prune={"refit_samples": 8}, search=search, **changes)


def decoding(context: int = 64, **bounds: str) -> dict[str, Any]:
    return {"decode_latency": {**bounds, "context": context}}


@pytest.mark.parametrize("only", [None, "search"])
@pytest.mark.parametrize(
    ("budgets", "why"),
    [
        ([decoding(max="0.5us")], "no legal shape has decode_latency <= 0.0005 ms"),
        ([decoding(min="50%", max="1us")], "min 50% is above max 1us"),
        ([decoding(max="60%"), decoding(max="0.5us")], "no legal shape has decode_latency"),
    ],
)
def test_times_that_no_shape_meets_are_refused_before_the_first_stage(
    calls: list[tuple[str, dict[str, Any]]],
    timed: list[int],
    make_recipe: MakeRecipe,
    tmp_path: Path,
    only: str | None,
    budgets: list[dict[str, Any]],
    why: str,
) -> None:
    recipe = searching(make_recipe, *budgets, correct=CORRECT)
    assert pipeline.check(recipe) == ()
    assert timed == []
    with pytest.raises(PlanError, match=why):
        pipeline.run(recipe, tmp_path / "run", only=only, needed=only is not None)
    assert calls == []
    other = searching(make_recipe, decoding(max="60%"), name="other")
    pipeline.run(other, tmp_path / "run", only="score")  # the folder is still free
    assert len(timed) == 1
    assert [name for name, _ in calls] == ["score"]


def test_the_command_says_it_in_three_lines(
    timed: list[int],
    make_recipe: MakeRecipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(score, "run", Mock(side_effect=AssertionError("too late")))
    path = tmp_path / "recipe.yaml"
    recipe = searching(make_recipe, decoding(max="0.5us"))
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True)))
    for verb in ("search", "run"):
        assert main([verb, str(path), "--out", str(tmp_path / "run"), "--quiet"]) == 2
        what, why, fix = capsys.readouterr().err.splitlines()
        assert what.startswith("error: no legal shape has decode_latency <= 0.0005 ms (batch 1, context 64)")
        assert why.startswith("  why: decode_latency of legal shapes is between")
        assert fix.startswith("  fix: nearest: decode_latency ")
    assert len(timed) == 1, "the second start reads the times of the first"


def test_times_are_measured_once_before_a_correction_and_read_by_the_search(
    timed: list[int], make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = searching(make_recipe, decoding(max="60%"), correct=CORRECT), tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(score, "run", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(recipe, out, only="search", needed=True)
    assert len(timed) == 1
    pipeline.run(recipe, out, only="search", needed=True)
    assert (out / "correct" / "manifest.json").exists()
    assert (out / "search" / "choice.json").exists()
    assert len(timed) == 1


def test_a_search_that_has_settled_its_candidates_is_not_timed_on_another_machine(
    timed: list[int], make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = searching(make_recipe, decoding(max="60%")), tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr("halve.stages.search.best", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(recipe, out, only="search", needed=True)
    monkeypatch.setattr(latency, "machine_key", lambda *_: "another machine")
    pipeline.run(recipe, out, only="search", needed=True)
    assert len(timed) == 1
    pipeline.run(recipe, out, only="search", needed=True)
    assert len(timed) == 1


def test_stages_that_need_no_search_measure_nothing(
    calls: list[tuple[str, dict[str, Any]]], timed: list[int], make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    pipeline.run(searching(make_recipe, decoding(max="60%")), tmp_path / "run", only="score")
    assert timed == []
