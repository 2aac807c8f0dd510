"""Ways to correct the teacher, from folder to folder and through the pipeline."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from halve.errors import RecipeError, RunError
from halve.model.checkpoint import Checkpoint
from halve.pipeline import run as pipeline
from halve.preflight import check as preflight
from halve.preflight.forecast import forecast
from halve.recipe.schema import Recipe
from halve.stages import correct
from halve.train.loop import adapters

STEPS = {"tokens": 6 * 8 * 32, "batch": 8, "lr": 3e-3, "min_lr": 1e-3, "warmup_steps": 1, "eval_samples": 4}
SOME = {"tokens": 4 * 8 * 32, "lr": 3e-3, "min_lr": 1e-3, "warmup_steps": 1}
MakeRecipe = Callable[..., Recipe]


def changed(before: Path, after: Path) -> set[str]:
    old, new = (load_file(folder / "model.safetensors") for folder in (before, after))
    assert {k: (v.shape, v.dtype) for k, v in old.items()} == {k: (v.shape, v.dtype) for k, v in new.items()}
    return {name for name in old if not torch.equal(old[name], new[name])}


def journal(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", ["lora", "norms"])
def test_a_teacher_that_is_corrected_lightly_is_an_ordinary_model(
    method: str, make_recipe: MakeRecipe, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart: list[Tensor] = []
    merge, ids = adapters.merge, torch.arange(24)[None]

    def heard(model: Any) -> None:
        with torch.no_grad():
            apart.append(model(ids, use_cache=False).logits)
        merge(model)

    monkeypatch.setattr(adapters, "merge", heard)
    recipe = make_recipe(correct=STEPS | {"method": method, "lora_rank": 4, "lr": 1e-2})
    correct.run(recipe, teacher=Checkpoint.open(tiny_llama), cache=tmp_path / "data", out=tmp_path)
    names = changed(tiny_llama, tmp_path / "model")
    assert names
    assert all(("norm" in name) == (method == "norms") for name in names)
    assert all(name.endswith("weight") and "embed" not in name for name in names)
    held = [line["heldout"]["ce"] for line in journal(tmp_path) if "heldout" in line]
    assert held[-1] < held[0]
    with torch.no_grad():
        written = AutoModelForCausalLM.from_pretrained(tmp_path / "model")(ids, use_cache=False).logits
    torch.testing.assert_close(written, apart[0], rtol=1e-5, atol=1e-5)  # merging rounds in float32


def test_a_run_that_corrects_beside(make_recipe: MakeRecipe, tiny_llama: Path, tmp_path: Path) -> None:
    evaluate = {"samples": 4, "speed": False}
    beside = {"correct": SOME | {"when": "beside"}, "distill": STEPS | {"baselines": ["ce"]}, "evaluate": evaluate}
    recipe = make_recipe(**beside)
    assert not preflight.check(recipe, tmp_path / "run")
    names = [stage.name for stage in pipeline.stages(recipe)]
    assert names == ["score", "prune", "distill", "distill-ce", "evaluate", "report"]
    out = pipeline.run(recipe, tmp_path / "run")
    lines = journal(out / "distill")[1:]
    assert [line["step"] for line in lines if "teacher_loss" in line] == [1, 2, 3, 4]
    assert all("teacher_loss" not in line for line in journal(out / "distill-ce"))
    held = [line["heldout"]["teacher_ce"] for line in journal(out / "distill") if "heldout" in line]
    assert held[-1] < held[0]
    assert changed(tiny_llama, out / "distill" / "teacher")
    AutoTokenizer.from_pretrained(out / "distill" / "teacher")
    record = json.loads((out / "distill" / "teacher" / "halve.json").read_text())
    assert (record["stage"], record["training"]["when"]) == ("correct", "beside")
    assert not (out / "distill-ce" / "teacher").exists()
    results = json.loads((out / "evaluate" / "results.json").read_text())
    assert results["reference"] == "teacher"  # the one that was cut
    assert list(results["models"]) == ["teacher", "corrected", "pruned", "distilled", "ce"]
    assert results["models"]["corrected"]["nll"] != results["models"]["teacher"]["nll"]
    assert results["differences"]["subject"] == "distilled"


def test_a_correction_beside_is_no_stage_of_its_own(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(correct=SOME | {"when": "beside"}, distill=STEPS)
    with pytest.raises(RunError, match="there is nothing to correct") as caught:
        pipeline.run(recipe, tmp_path / "run", only="correct")
    assert caught.value.why == "recipe tiny has no correct.when: before"


def test_what_a_correction_beside_changes_runs_again(make_recipe: MakeRecipe) -> None:
    def reads(**correct: Any) -> dict[str, tuple[str, ...]]:
        recipe = make_recipe(correct=SOME | correct, distill=STEPS | {"baselines": ["ce", "random_init"]})
        return {stage.name: stage.reads for stage in pipeline.stages(recipe)}

    beside, before = reads(when="beside"), reads()
    assert {name for name, fields in beside.items() if "correct" in fields} == {"distill", "distill-random_init"}
    assert {name for name, fields in before.items() if "correct" in fields} == {"correct"}


@pytest.mark.parametrize(
    ("correction", "distill", "why"),
    [
        ({}, None, "add distill"),
        ({}, {"cache": "hidden"}, "would be stale"),
        ({}, {"cache": "logits"}, "would be stale"),
        ({}, {"objective": "ce"}, "needs no teacher"),
        ({}, {"teacher_device": "cpu"}, "leave out teacher_device"),
        ({}, {"offload_teacher": True}, "leave out teacher_device"),
        ({}, {"shard_teacher": False}, "leave out teacher_device"),
        ({"batch": 4}, {}, "correct.batch differs from distill.batch"),
        ({"eval_every": 3}, {}, "correct.eval_every differs from"),
        ({"precision": "bfloat16"}, {"precision": "float32"}, "correct.precision differs from"),
    ],
)
def test_what_does_not_go_with_a_correction_beside_is_refused(
    correction: dict[str, Any], distill: dict[str, Any] | None, why: str, make_recipe: MakeRecipe
) -> None:
    parts = {} if distill is None else {"distill": STEPS | distill}
    with pytest.raises(RecipeError) as caught:
        make_recipe(correct=SOME | correction | {"when": "beside"}, **parts)
    assert why in caught.value.why
    make_recipe(correct=SOME | correction, **parts)


def test_a_recipe_that_was_read_back_is_still_one(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(correct=SOME | {"when": "beside", "batch": 8}, distill=STEPS)
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


def test_the_plan_counts_what_the_teacher_learns(make_recipe: MakeRecipe) -> None:
    distill = STEPS | {"baselines": ["ce", "random_init"]}
    alone = forecast(make_recipe(distill=distill))
    beside = forecast(make_recipe(correct=SOME | {"when": "beside"}, distill=distill))
    before = forecast(make_recipe(correct=SOME, distill=distill))
    assert "correct" not in beside.flops
    for name in ("distill", "distill (random_init)"):
        assert beside.flops[name] == alone.flops[name] + before.flops["correct"]
    assert beside.flops["distill (ce)"] == alone.flops["distill (ce)"]
    held = {name: plan.memory["distill"].teacher_bytes for name, plan in {"alone": alone, "beside": beside}.items()}
    assert held["beside"] == 12 * beside.teacher_counts.params  # masters and two moments
    light = forecast(make_recipe(correct=SOME | {"when": "beside", "method": "norms"}, distill=distill))
    assert held["alone"] <= light.memory["distill"].teacher_bytes < held["beside"]
    assert beside.disk.total_bytes > before.disk.total_bytes > alone.disk.total_bytes


def test_the_missing_package_is_told_before_anything_runs(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(correct=SOME | {"method": "lora"})
    assert not preflight.check(recipe)
    monkeypatch.setattr(adapters.importlib.util, "find_spec", lambda name: None)
    (error,) = preflight.check(recipe)
    assert error.what == "correct.method: lora needs the package peft"
