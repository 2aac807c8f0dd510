"""The recipes for models that people use: planned from their published sizes alone, by the default cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from published import published

from halve.cli.app import main
from halve.recipe.read import load_recipe
from halve.recipe.schema import Prune, Score

RECIPES = Path(__file__).parents[2] / "recipes"
PARAMS = {
    "smollm2-135m-70": (134_515_008, 106_203_456),
    "llama-3.2-1b-70": (1_235_814_400, 973_146_112),
    "qwen3-0.6b-70": (596_049_920, 440_467_456),
    "gemma-3-1b-70": (999_885_952, 697_896_064),
}
"""Published numbers of parameters: all, and without embeddings."""


@pytest.mark.parametrize("name", PARAMS)
def test_a_real_model_is_planned_from_its_config_alone(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, hub_name = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8"), load_recipe(RECIPES / f"{name}.yaml").model
    published(hub_name).save_pretrained(tmp_path / "teacher")
    recipe = tmp_path / f"{name}.yaml"
    text = text.replace(f"model: {hub_name}", "model: teacher")
    recipe.write_text(text.replace("micro_batch: 4", "micro_batch: 1"), encoding="utf-8")  # a quick memory plan
    assert main(["run", str(recipe), "--dry-run", "--card", "80", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    teacher = found["teacher_counts"]
    assert (teacher["params"], teacher["non_embedding"]) == PARAMS[name]
    assert found["student_counts"]["non_embedding"] == pytest.approx(0.7 * teacher["non_embedding"], rel=0.01)
    depths = {shape["layers"] for shape in found["trial"][0]}
    assert len(depths) > 3, "the trial chooses between depth and width"
    assert {"score", "trial", "refit", "distill"} <= found["flops"].keys()
    assert {opens for _, opens, _ in found["runtimes"]} == {"yes"}
    assert found["fits"] is True


@pytest.mark.parametrize("name", PARAMS)
def test_a_real_model_is_cut_by_the_defaults(name: str) -> None:
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    assert recipe.prune == Prune(non_embedding_ratio=0.7)
    assert recipe.score == Score()
    assert recipe.distill is not None
    steps = recipe.distill.tokens / recipe.distill.batch / recipe.data.context
    assert steps > 5 * recipe.distill.warmup_steps, "warm-up is a small part of the training"


def test_a_recipe_goes_on_to_an_aligned_and_evaluated_model() -> None:
    """The same cut and distillation, then the papers' order: instructions, rewards of the data, its own answers."""
    whole, plain = (load_recipe(RECIPES / f"smollm2-135m-70{end}.yaml") for end in ("-aligned", ""))
    assert [(step.kind, step.rewards, step.answers) for step in whole.align] == [
        ("sft", "data", None),
        ("rpo", "data", None),
        ("rpo", "gsm8k", 4),
    ]
    assert whole.evaluate.suites == ("minitron-instruct",)
    parts = {"name": plain.name, "align": (), "evaluate": plain.evaluate}
    assert whole.model_copy(update=parts) == plain
