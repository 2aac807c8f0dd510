"""Memory at contexts that are longer than the model's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from budgeted import anatomy
from transformers import GPT2Config

from halve.cli.app import main
from halve.model.checkpoint import Checkpoint
from halve.preflight.check import check
from halve.preflight.searches import long_caches
from halve.recipe.schema import Recipe

NOTE = "memory is counted at a context of 2,049, and the config allows 2,048 positions"


def test_plan_notes_a_cache_beyond_the_positions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    anatomy().config.save_pretrained(tmp_path)
    words = ["plan", str(tmp_path), "--most", "1", "--budget"]
    assert main([*words, "memory<=60%@2049"]) == 0
    assert f"note: {NOTE}" in capsys.readouterr().err
    assert main([*words, "memory<=60%@2048"]) == 0
    assert "note:" not in capsys.readouterr().err


def test_learned_positions_cannot_be_extended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    GPT2Config(vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=4).save_pretrained(tmp_path)
    words = ["plan", str(tmp_path), "--most", "1", "--budget"]
    assert main([*words, "memory<=90%@2x65"]) == 2
    said = capsys.readouterr().err
    assert "no cache of this gpt2 has 65 tokens, as the context of memory says\n" in said
    assert "why: its positions are learned, each is a row of a table, and there are 64\n" in said
    assert "fix: set its context to 64 or less; in a flag, @2x64 behind the amount\n" in said
    assert main([*words, "memory<=90%@2x64"]) == 0


def test_check_notes_each_context_once(
    make_recipe: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    budgets = [{"memory": {"max": most, "context": 129}} for most in ("80%", "60%")]
    recipe = make_recipe(prune={}, search={"targets": budgets, "method": "trial"})
    assert check(recipe) == ()
    (note,) = long_caches(recipe, Checkpoint.open(recipe.model))
    assert note.startswith("memory is counted at a context of 129, and the config allows 128 positions")
    (tmp_path / "recipe.yaml").write_text(recipe.model_dump_json(exclude_unset=True), encoding="utf-8")
    assert main(["check", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run")]) == 0
    assert note in capsys.readouterr().out
