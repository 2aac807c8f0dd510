"""What the dry run and `check` say of the time that a cut takes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from published import published

from halve.cli.app import main
from halve.cut.cost import Work
from halve.preflight.device import MEMORY_SHARE, PlannedDevice, card
from halve.preflight.forecast import forecast
from halve.preflight.times import hours_by_stage
from halve.recipe.read import parse
from halve.recipe.schema import Recipe
from halve.report.times import duration
from halve.train.loop import watch

MakeRecipe = Callable[..., Recipe]


def test_a_kind_of_work_takes_its_own_time() -> None:
    """Products of models, sums in full precision, and updates that wait for memory, one after another."""
    device = PlannedDevice("a card", True, 80e9, 100.0, 0.5, 20.0, 8.0)
    work = Work(1, flops=100 + 30 + 7, full=30, thin=7, moved_bytes=400)
    assert device.hours(work) == pytest.approx((100 / 50 + 30 / 10 + 400 / 8) / 3600)
    assert device.hours(work, ranks=2) == pytest.approx((100 / 50 + 30 / 10 + 400 / 8) / 3600 / 2)
    assert (work + work) == Work(2, 274, 60, 14, 800)


def test_ranks_share_trainings_alone() -> None:
    work = {name: Work(1, 1e15) for name in ("correct", "trial", "refit-2", "distill-2 (ce)", "cache")}
    one, four = (hours_by_stage(work, card(), ranks=ranks) for ranks in (1, 4))
    shared = {name for name in work if four[name] != one[name]}
    assert shared == {"correct", "distill-2 (ce)"}


def test_the_minutes_of_a_cut_at_8b_stand_in_the_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    published("meta-llama/Llama-3.1-8B").save_pretrained(tmp_path / "teacher")
    path = tmp_path / "r.yaml"
    path.write_text(
        "{name: r, model: teacher, data: {train: [a.txt], valid: [b.txt]}, prune: {non_embedding_ratio: 0.7}}",
        encoding="utf-8",
    )
    assert main(["run", str(path), "--dry-run", "--card", "80"]) == 0
    page = capsys.readouterr().out
    for row in ("trial, at most", "selection, at most", "refit"):
        assert re.search(rf"│ {row} +│ +[\d,]+ │ +[\d.e+]+ │ +[\d.]+ (minutes|hours) │", page), row
    assert "on an H100" in page


def test_the_selection_at_an_ffn_of_14336_waits_for_memory(tmp_path: Path) -> None:
    """By hand: every removal reads and writes what is left of both matrices; the dry run is within 5 % of it."""
    published("meta-llama/Llama-3.1-8B").save_pretrained(tmp_path / "teacher")
    raw = {"name": "r", "model": "teacher", "data": {"train": ["a.txt"], "valid": ["b.txt"]}, "prune": {"ffn": 9216}}
    found = forecast(parse(raw, folder=tmp_path, source="test"), device=card())
    moved = sum(8 * (4 * (n * n + 4096 * n) + 3 * 4096 * n) for n in range(9216, 14336)) * 32
    memory = moved / (MEMORY_SHARE * 3.35e12)
    tokens = 32 * 14336
    sums = (tokens * 2 * 14336**2 + 14336**3) * 32 / (67e12 * 0.4)
    once = tokens * found.teacher_counts.flops_per_token / (989e12 * 0.4)
    hours = found.gpu_hours_by_stage["selection"]
    assert hours * 3600 == pytest.approx(memory + sums + once, rel=0.05)
    assert memory > 2 * sums, "FLOPs alone would say far too little"
    assert "minutes" in duration(hours)


def test_check_says_the_time_of_the_cut(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(watch, "matrix_rate", lambda device, half: 50e9)
    recipe = make_recipe(prune={"non_embedding_ratio": 0.5}, score={"samples": 64, "micro_batch": 16})
    path = tmp_path / "r.yaml"
    path.write_text(recipe.model_dump_json(exclude_none=True), encoding="utf-8")
    assert main(["check", str(path), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    planned = forecast(recipe)
    for name, row in (("trial, at most", "trial"), ("selection, at most", "selection"), ("refit", "refit")):
        on_card = duration(planned.gpu_hours_by_stage[row])
        assert re.search(rf"^{name}: \S+ (seconds|minutes) on this CPU, {re.escape(on_card)} on an H100$", said, re.M)
    monkeypatch.setattr("halve.preflight.work.planned_work", lambda *_: [][0])
    assert main(["check", str(path), "--out", str(tmp_path / "out")]) == 0
    assert "no times are known: IndexError: list index out of range\n" in capsys.readouterr().out
