"""The score stage: any method, which layers stay, and corpora that say nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halve.cut.layers.depth import DepthChoice
from halve.cut.score.scores import Scores
from halve.errors import CorpusError, PlanError, RecipeError
from halve.model.checkpoint import Checkpoint
from halve.recipe.schema import Recipe
from halve.stages import score

Make = Callable[..., Recipe]


def run(recipe: Recipe, teacher: Path, folder: Path) -> dict[str, Any]:
    return score.run(recipe, teacher=Checkpoint.open(teacher), cache=folder / "data", out=folder)


def chosen(folder: Path) -> DepthChoice:
    return DepthChoice.from_json(json.loads((folder / "depth.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize("method", ["random", "magnitude", "wanda", "taylor", "fluctuation"])
def test_any_method(make_recipe: Make, tiny_llama: Path, tmp_path: Path, method: str) -> None:
    recipe = make_recipe(score={"samples": 4, "micro_batch": 3, "method": method}, prune={"ffn": 40})
    metrics = run(recipe, tiny_llama, tmp_path)
    found = Scores.load(tmp_path / "scores.safetensors", model=Checkpoint.open(tiny_llama).fingerprint)
    assert found.method == metrics["method"] == method
    assert set(found.by_axis()) == {"hidden", "ffn", "heads", "kv_heads", "layers"}
    assert not (tmp_path / "depth.json").exists()
    assert "depth" not in metrics


def test_by_default_scores_are_those_of_any_number_of_layers(
    make_recipe: Make, tiny_llama: Path, tmp_path: Path
) -> None:
    metrics = run(make_recipe(prune={"layers": 2}), tiny_llama, tmp_path)
    assert not (tmp_path / "depth.json").exists()
    assert len(metrics["block_importance"]) == 4


@pytest.mark.parametrize(
    ("criterion", "pattern", "compared"), [("nll", "block", 3), ("angular", "single", 4), ("logit_mse", "greedy", 7)]
)
def test_layers_by_criterion_and_pattern(
    make_recipe: Make, tiny_llama: Path, tmp_path: Path, criterion: str, pattern: str, compared: int
) -> None:
    about = {"samples": 4, "depth": criterion, "depth_pattern": pattern, "depth_samples": 2}
    run(make_recipe(score=about, prune={"layers": 2}), tiny_llama, tmp_path)
    choice = chosen(tmp_path).of(2)
    assert (choice.criterion, choice.pattern, len(choice.kept)) == (criterion, pattern, 2)
    assert len(choice.removals) == compared


def test_layers_by_gradients_and_by_a_task(make_recipe: Make, tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="takes the gradients of method: taylor"):
        run(make_recipe(score={"samples": 4, "depth": "taylor"}), tiny_llama, tmp_path)
    run(make_recipe(score={"samples": 4, "depth": "taylor", "method": "taylor"}), tiny_llama, tmp_path)
    scores = Scores.load(tmp_path / "scores.safetensors")
    assert scores.layer_scores is not None
    assert chosen(tmp_path).kept == tuple(i for i in range(4) if i != int(scores.layer_scores.argmin()))
    items = [{"context": "The cat", "choices": [" sees the dog.", " dog the"], "answer": 0}] * 3
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, items)), encoding="utf-8")
    task = {"samples": 4, "depth": "task", "depth_task": str(tmp_path / "items.jsonl")}
    run(make_recipe(score=task), tiny_llama, tmp_path)
    assert chosen(tmp_path).criterion == "task"


def test_layers_named_by_hand_are_not_chosen(make_recipe: Make, tiny_llama: Path, tmp_path: Path) -> None:
    run(make_recipe(prune={"drop_layers": "1"}), tiny_llama, tmp_path)
    assert not (tmp_path / "depth.json").exists()


def test_the_first_matrix_as_the_point(make_recipe: Make, tiny_llama: Path, tmp_path: Path) -> None:
    folders = {point: tmp_path / point for point in ("down_input", "up_output")}
    found = {}
    for point, folder in folders.items():
        folder.mkdir()
        run(make_recipe(score={"samples": 4, "ffn_point": point}), tiny_llama, folder)
        found[point] = Scores.load(folder / "scores.safetensors")
        assert found[point].statistics.ffn_point == point  # type: ignore[union-attr]
    assert not found["down_input"].ffn.equal(found["up_output"].ffn)  # type: ignore[union-attr,arg-type]


@pytest.mark.parametrize(
    ("text", "what"),
    [("z" * 40, "1 calibration samples are too few"), ("z" * 4000, "calibration samples are constant")],
)
def test_a_corpus_that_says_nothing_is_refused(
    make_recipe: Make, tiny_llama: Path, tmp_path: Path, text: str, what: str
) -> None:
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    data = {"train": [str(tmp_path / "text.txt")], "valid": [str(tmp_path / "text.txt")], "context": 32}
    with pytest.raises(CorpusError, match=what):
        run(make_recipe(data=data), tiny_llama, tmp_path)
    assert not (tmp_path / "scores.safetensors").exists()


def test_sizes_that_are_not_legal_are_refused_before_weights_are_read(
    make_recipe: Make, tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match="cannot keep 9 of 4 layers"):
        run(make_recipe(prune={"layers": 9}), tiny_llama, tmp_path)
