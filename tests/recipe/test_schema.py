"""The recipe: what it takes, what it refuses and how it says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from halve.errors import RecipeError
from halve.recipe import read as reading
from halve.recipe.schema import Recipe

MINIMAL: dict[str, Any] = {
    "name": "tiny",
    "model": "owner/model",
    "data": {"train": ["text.txt"], "valid": ["valid.txt"]},
    "prune": {"hidden": 48},
}


def parse(folder: Path, **changes: Any) -> Recipe:
    return reading.parse({**MINIMAL, **changes}, folder=folder, source="r.yaml")


def test_a_file_gives_the_recipe_that_its_text_says(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        """
name: half-llama
model: owner/model
data:
  train: [text.txt, "hub:owner/name:train"]
  valid: [/elsewhere/valid.jsonl]
  context: 128
correct: {tokens: 1000, lr: 2e-5, min_lr: 1e-6}
prune: {params: 4.5B}
distill: {tokens: 2000, batch: 8, micro_batch: 2, baselines: [ce, random_init]}
""",
        encoding="utf-8",
    )
    recipe = reading.load_recipe(path)
    assert recipe.name == "half-llama"
    assert recipe.data.train == (str(tmp_path / "text.txt"), "hub:owner/name:train")
    assert recipe.data.valid == ("/elsewhere/valid.jsonl",)
    assert recipe.correct is not None
    assert recipe.correct.lr == 2e-5
    assert recipe.distill is not None
    assert recipe.distill.baselines == ("ce", "random_init")
    assert recipe.distill.objective == "kl"
    assert (recipe.score.samples, recipe.score.batch_agg, recipe.score.seq_agg) == (256, "l2", "mean")
    assert recipe.prune.gain == "fitted"


def test_correction_and_distillation_are_off_unless_asked_for(tmp_path: Path) -> None:
    recipe = parse(tmp_path)
    assert recipe.correct is None
    assert recipe.distill is None


def test_a_recipe_survives_json(tmp_path: Path) -> None:
    recipe = parse(tmp_path, distill={"tokens": 5})
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_a_model_is_a_folder_beside_the_recipe_or_a_hub_name(tmp_path: Path) -> None:
    assert parse(tmp_path).model == "owner/model"
    assert parse(tmp_path, model="./later").model == str(tmp_path / "later")
    (tmp_path / "owner" / "model").mkdir(parents=True)
    assert parse(tmp_path).model == str(tmp_path / "owner" / "model")


def test_multiple_choice_files_are_relative_to_the_recipe(tmp_path: Path) -> None:
    assert parse(tmp_path, evaluate={"choices": ["a.jsonl"]}).evaluate.choices == (str(tmp_path / "a.jsonl"),)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modle": "x"}, r"unknown key modle in r\.yaml\n  why: no stage would read it\n  fix: did you mean model\?"),
        ({"zzzzzz": 1}, r"unknown key zzzzzz in r\.yaml\n.*\n  fix: known here: align, correct, data"),
        ({"prune": {"hiden": 4}}, r"unknown key prune\.hiden in r\.yaml\n.*\n  fix: did you mean hidden\?"),
        (
            {"distill": {"tokens": 1, "xyzzy": 1}},
            r"unknown key distill\.xyzzy in r\.yaml\n.*\n  fix: known here: .*\blr\b",
        ),
        ({"distill": {}}, r"r\.yaml lacks distill\.tokens\n.*\n  fix: add distill\.tokens:"),
        ({"data": {"train": ["a"]}}, r"r\.yaml lacks data\.valid"),
        ({"data": {"train": [], "valid": ["a"]}}, r"bad value for data\.train in r\.yaml"),
        ({"prune": {"hidden": 0}}, r"bad value for prune\.hidden in r\.yaml\n  why: .*greater than 0.*given: 0"),
        ({"prune": {"hidden": 4, "params": "1B"}}, "exactly one of params, non_embedding_ratio, or sizes by hand"),
        ({"prune": {}}, "exactly one of"),
        ({"prune": {"layers": 2, "drop_layers": "0"}}, "give layers or drop_layers, not both"),
        ({"prune": {"ffn": 8, "refit_tokens": 64, "refit_samples": 2}}, "give refit_tokens or refit_samples, not both"),
        ({"prune": {"ffn": 8, "layer_merge": "laco_search", "refit": "none"}}, "give layers"),
        (
            {
                "score": {"depth": "nll"},
                "prune": {"layers": 2, "layer_merge": "laco_search", "refit": "none"},
            },
            "leave out score.depth",
        ),
        ({"score": {"depth": "task"}}, "answers the multiple-choice file in depth_task: name one"),
        ({"score": {"depth": "taylor"}}, "takes the gradients of method: taylor"),
        ({"prune": {"non_embedding_ratio": 1.5}}, r"bad value for prune\.non_embedding_ratio"),
        ({"distill": {"tokens": 9, "lr": 1e-6}}, "min_lr 1e-05 is above lr 1e-06"),
        ({"distill": {"tokens": 9, "batch": 6, "micro_batch": 4}}, "batch 6 is not a multiple of micro_batch 4"),
        ({"distill": {"tokens": 9, "batch": 6, "replicas": 4}}, "batch 6 is not a multiple of replicas 4"),
        ({"distill": {"tokens": 9, "lr": float("nan")}}, r"bad value for distill\.lr"),
        (
            {"distill": {"tokens": 9, "cache": "logits", "objective": "reverse_kl"}},
            "cache: logits stores draws of the teacher, from which only kl over all tokens can be computed",
        ),
        ({"distill": {"tokens": 9, "cache": "logits", "top_k": 4}}, "cache: logits stores draws"),
        ({"distill": {"tokens": 9, "cache": "hidden", "objective": "ce"}}, "objective: ce does not use them"),
        ({"distill": {"tokens": 9, "cache": "hidden", "intermediate": {}}}, "intermediate needs a running teacher"),
        (
            {"distill": {"tokens": 9, "teacher_device": "cpu", "offload_teacher": True}},
            "teacher_device cannot be combined with offload_teacher or intermediate",
        ),
        ({"distill": {"tokens": 9, "teacher_device": "cpu", "intermediate": {}}}, "teacher_device cannot be combined"),
        ({"name": "../up"}, "bad value for name"),
        ({"device": "npx"}, r"bad value for device in r\.yaml\n.*'npx'\)\n  fix: change it there"),
        ({"device": "cda"}, r"bad value for device in r\.yaml\n.*'cda'\)\n  fix: did you mean cuda\?"),
        (
            {"evaluate": {"suites": ["minitron-bse"]}},
            r"bad value for evaluate\.suites\.0 in r\.yaml\n.*\n  fix: did you mean minitron-base\?",
        ),
        ({"seed": -1}, "bad value for seed"),
    ],
)
def test_mistakes_are_named_with_their_key(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse(tmp_path, **changes)


def test_only_activations_are_ranked_in_another_basis(tmp_path: Path) -> None:
    assert parse(tmp_path, prune={"hidden": 4}).prune.rotation == "auto"
    assert parse(tmp_path, prune={"hidden": 4}, score={"method": "random"}).prune.rotation == "none"
    asked = parse(tmp_path, prune={"hidden": 4, "rotation": "pca"}, score={"method": "random"})
    assert asked.prune.rotation == "pca"
    assert asked == Recipe.model_validate(asked.model_dump())
    later = parse(tmp_path, score={"method": "wanda"}, then=[{"prune": {"ffn": 4}}]).then
    assert [step.prune.rotation for step in later] == ["none"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"cannot read recipe .*r\.yaml\n  why: No such file"),
        ("a: [", r"recipe .*r\.yaml is not YAML"),
        ("\x00", r"recipe .*r\.yaml is not YAML"),
        ("prune: {hidden: 4}\nprune: {layers: 3}", r"is not YAML\n  why: the key 'prune' stands there twice"),
        ("seed: 2026-13-45", r"r\.yaml lacks name"),
        ("x: " + "[" * 20000, r"is not YAML\n  why: it is nested deeper"),
        ("#" * (1 << 21), r"is not YAML\n  why: it is longer"),
        ("just words", r"recipe .*r\.yaml has no keys\n  why: a recipe is a mapping, this is str"),
        ("", r"recipe .*r\.yaml has no keys\n  why: a recipe is a mapping, this is NoneType"),
    ],
)
def test_files_that_are_no_recipes(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        reading.load_recipe(tmp_path / "r.yaml")


def test_a_recipe_cannot_make_objects(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"name: !!python/object/apply:os.mkdir [{tmp_path / 'made'}]")
    with pytest.raises(RecipeError, match="is not YAML"):
        reading.load_recipe(tmp_path / "r.yaml")
    assert not (tmp_path / "made").exists()


def test_recipes_are_values(tmp_path: Path) -> None:
    recipe = parse(tmp_path)
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3  # type: ignore[misc]


def test_reading_recipes_does_not_import_torch() -> None:
    code = "import sys, halve.recipe.read, halve.pipeline.run; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": True}, "bad value for seed"),
        ({"seed": "7"}, "bad value for seed"),
        ({"seed": 2**63}, r"bad value for seed.*\n  why: a seed must be below 2\*\*63"),
        ({"prune": {"hidden": 4, "untie": "yes"}}, r"bad value for prune\.untie"),
        ({"prune": {"hidden": 10**30}}, r"bad value for prune\.hidden.*\n  why: the largest count is"),
        (
            {"prune": {"hidden": 4, "ridge": 1e-300}},
            r"bad value for prune\.ridge.*\n  why: a factor must be between 1e-9 and 1e15",
        ),
        ({"prune": {"hidden": 4, "head_merge": 1e30}}, r"bad value for prune\.head_merge"),
        ({"prune": {"params": ""}}, r"bad value for prune\.params"),
        ({"prune": {"drop_layers": ""}}, r"bad value for prune\.drop_layers"),
        ({"distill": {"tokens": 10**18}}, r"bad value for distill\.tokens.*\n  why: the largest count is"),
        ({"distill": {"tokens": 1, "betas": [1.0, 0.9]}}, r"bad value for distill\.betas\.0"),
        ({"distill": {"tokens": 1, "betas": [0.9, -0.1]}}, r"bad value for distill\.betas\.1"),
        ({"distill": {"tokens": 1, "lr": 1e30}}, r"bad value for distill\.lr"),
        ({"distill": {"tokens": 1, "temperature": 1e300}}, r"bad value for distill\.temperature"),
        ({"distill": {"tokens": 1, "temperature": 1e-9}}, r"bad value for distill\.temperature"),
        ({"distill": {"tokens": 1, "weight_decay": 1e30}}, r"bad value for distill\.weight_decay"),
        ({"distill": {"tokens": 1, "clip": 1e-300}}, r"bad value for distill\.clip"),
        ({"distill": {"tokens": 1, "objective": {}}}, r"bad value for distill\.objective"),
        ({"distill": {"tokens": 1, "objective": {"kl": 1e300}}}, r"bad value for distill\.objective"),
        ({"distill": {"tokens": 1, "intermediate": {"alpha": 1e300}}}, r"bad value for distill\.intermediate\.alpha"),
        ({"distill": {"tokens": 1, "teacher_device": "meta"}}, r"bad value for distill\.teacher_device"),
        ({"distill": {"tokens": 9, "phases": [{"from_tokens": 1, "context": 1}]}}, r"phases\.0\.context"),
        ({"evaluate": {"completion_tokens": 10**9}}, r"bad value for evaluate\.completion_tokens"),
        ({"data": {"train": ["a"], "valid": ["a"], "context": 1}}, r"bad value for data\.context"),
        ({"data": {"train": ["a"], "valid": ["a"], "text_field": ""}}, r"bad value for data\.text_field"),
        ({"data": {"train": {"a": {"sources": ["a"], "weight": 1e308}}, "valid": ["a"]}}, r"data\.train\.a\.weight"),
        ({"name": "a" * 300}, "bad value for name"),
        ({"name": "x" * 10**6 + "!"}, r"bad value for name.*\n.{,300}\n"),
    ],
)
def test_values_that_no_run_can_mean_anything_with(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse(tmp_path, **changes)


def test_a_recipe_in_a_folder_that_no_path_can_spell(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"is in a folder whose name cannot be used\n.*not UTF-8\n.*rename"):
        parse(tmp_path / os.fsdecode(b"caf\xe9"))


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("", "must not be blank"),
        ("  ", "must not be blank"),
        ("a\0b", "control characters"),
        ("a\nb", "control characters"),
        ("\ud800", "not UTF-8"),
        ("a" * 5000, "4000 bytes"),
        ("/" + "\u00e9" * 128, "255 between two slashes"),
        ("~no-such-user/x", "no user no-such-user"),
    ],
)
def test_paths_that_cannot_be(tmp_path: Path, path: str, why: str) -> None:
    places: list[dict[str, Any]] = [
        {"model": path},
        {"data": {"train": [path], "valid": ["a"]}},
        {"data": {"train": {"part": {"sources": [path], "weight": 1}}, "valid": ["a"]}},
        {"data": {"train": ["a"], "valid": [path]}},
        {"evaluate": {"choices": [path]}},
        {"score": {"depth": "task", "depth_task": path}},
    ]
    for changes in places:
        with pytest.raises(RecipeError, match=f"bad value for .*\n  why: .*{why}"):
            parse(tmp_path, **changes)


@pytest.mark.parametrize("name", ["hub:", "hub:x", "hub:a/b/c/d", "hub:../../x", "hub:a/b:c:d"])
def test_names_that_no_data_set_of_the_hub_has(tmp_path: Path, name: str) -> None:
    with pytest.raises(RecipeError, match=r"bad value for data\.train\.0"):
        parse(tmp_path, data={"train": [name], "valid": ["a"]})


def test_budgets_and_layers_may_be_written_as_numbers(tmp_path: Path) -> None:
    assert parse(tmp_path, prune={"params": 350_000_000}).prune.params == "350000000"
    assert parse(tmp_path, prune={"drop_layers": 3}).prune.drop_layers == "3"
    assert parse(tmp_path, distill={"tokens": 1e9}).distill is not None
