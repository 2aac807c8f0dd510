"""Pruning from folder to folder, and the checks on what came out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from halve.cut.layers.layer_merge import Collapse, apply_merges, laco_search
from halve.cut.plan.plan import Plan
from halve.cut.score.scores import Scores
from halve.errors import AnatomyError, CheckpointError, PlanError, RunError
from halve.model import saving
from halve.model.card import made_in_words
from halve.model.checkpoint import Checkpoint
from halve.recipe.schema import Recipe
from halve.stages import prune, score

MakeRecipe = Callable[..., Recipe]
SIZES = {"hidden": 24, "ffn": 40, "heads": 2, "layers": 3}


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory, make_recipe: MakeRecipe, tiny_llama: Path) -> Path:
    out = tmp_path_factory.mktemp("score")
    score.run(make_recipe(), teacher=Checkpoint.open(tiny_llama), cache=out / "data", out=out)
    return out / "scores.safetensors"


@pytest.fixture(scope="module")
def pruned(
    tmp_path_factory: pytest.TempPathFactory, make_recipe: MakeRecipe, tiny_llama: Path, scores: Path
) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("prune")
    recipe = make_recipe(prune={**SIZES, "rotation": "none", "refit": "none"})
    return out, prune.run(recipe, teacher=Checkpoint.open(tiny_llama), scores=scores, cache=out / "data", out=out)


def _by_hand(plan: Plan) -> dict[str, Any]:
    before, after = plan.before.sizes, plan.after.sizes
    return {
        axis: after[axis] for axis in ("hidden", "ffn", "heads", "kv_heads", "layers") if after[axis] != before[axis]
    }


def test_the_result_is_an_ordinary_folder(pruned: tuple[Path, dict[str, Any]], tiny_llama: Path) -> None:
    out, metrics = pruned
    student = AutoModelForCausalLM.from_pretrained(out / "model")
    assert sum(p.numel() for p in student.parameters()) == metrics["params"]
    config = json.loads((out / "model" / "config.json").read_text())
    assert (config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]) == (24, 40, 3)
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (2, 2, 8)
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["dtype"] == config["torch_dtype"]
    for name in ("chat_template.jinja", "generation_config.json", "tokenizer.json", "README.md"):
        assert (out / "model" / name).exists(), name
    ids = AutoTokenizer.from_pretrained(out / "model")("The old cat", return_tensors="pt")
    assert student.generate(**ids, max_new_tokens=5).shape[1] > 5


def test_provenance(pruned: tuple[Path, dict[str, Any]], tiny_llama: Path, scores: Path) -> None:
    out, metrics = pruned
    record = json.loads((out / "model" / "halve.json").read_text())
    plan = Plan.load(out / "plan.json")
    assert Plan.from_json(record["plan"]) == plan
    assert record["teacher"] == Checkpoint.open(tiny_llama).fingerprint
    assert record["base_model"] == "tiny-llama"
    assert str(tiny_llama.parent) not in (out / "model" / "halve.json").read_text()
    # one factor a norm, fitted by default: more than one, at most that of dead channels
    assert len(record["gains"]) == 9
    assert all(0.9 < gain < (32 / 24) ** 0.5 + 1e-6 for gain in record["gains"].values())
    used, measured = Scores.load(out / "scores.safetensors"), Scores.load(scores)
    assert used.hidden is not None
    assert torch.equal(used.hidden, measured.hidden)  # type: ignore[arg-type]
    assert metrics["perplexity"]["value"] > metrics["teacher_perplexity"]["value"]


def test_the_best_entries_stay(pruned: tuple[Path, dict[str, Any]], scores: Path) -> None:
    plan, measured = Plan.load(pruned[0] / "plan.json"), Scores.load(scores)
    assert measured.hidden is not None
    gone = sorted(set(range(32)) - set(plan.hidden))
    assert measured.hidden[list(plan.hidden)].min() >= measured.hidden[gone].max()


def test_random_numbers_cut_elsewhere(
    pruned: tuple[Path, dict[str, Any]], make_recipe: MakeRecipe, tiny_llama: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(prune={**SIZES, "gain": "none"})
    prune.run(recipe, teacher=Checkpoint.open(tiny_llama), scores=None, cache=tmp_path / "data", out=tmp_path)
    plan = Plan.load(tmp_path / "plan.json")
    assert plan.after == Plan.load(pruned[0] / "plan.json").after
    assert plan.hidden != Plan.load(pruned[0] / "plan.json").hidden


def test_the_default_chooses_a_shape_and_the_control_takes_its_sizes(
    make_recipe: MakeRecipe, tiny_llama: Path, scores: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(prune={"non_embedding_ratio": 0.5}, score={"samples": 64, "micro_batch": 16})
    made = prune.run(recipe, teacher=Checkpoint.open(tiny_llama), scores=scores, cache=tmp_path / "data", out=tmp_path)
    plan = Plan.load(tmp_path / "plan.json")
    tried = {tuple(shape["arch"].values()): shape["kl"] for shape in made["shapes"]}
    assert len(tried) == len(made["shapes"]) > 1
    how = json.loads((tmp_path / "plan.json").read_text())["made"]
    assert how["cut"] == made["kept"]
    assert how["compared"].items() <= made.items()
    kls = {key: kl for key, kl in how["compared"].items() if key.endswith("_kl")}
    closest = min(kls, key=lambda key: kls[key])
    assert how["cut"] == ("plain" if closest == "plain_kl" else "refit")
    assert ("unrotated_kl" in kls) == (plan.after.hidden < plan.before.hidden)
    assert (how["rotation"] == "pca") == (closest == "refit_kl" and plan.after.hidden < plan.before.hidden)
    assert json.loads((tmp_path / "model" / "halve.json").read_text())["plan"]["made"] == how
    assert made_in_words(how) in (tmp_path / "model" / "README.md").read_text()
    assert tried[tuple(asdict(plan.after).values())] <= 1.1 * min(tried.values())
    plain = make_recipe(prune={**_by_hand(plan), "rotation": "none", "refit": "none"})
    (tmp_path / "plain").mkdir()
    worse = prune.run(
        plain, teacher=Checkpoint.open(tiny_llama), scores=scores, cache=tmp_path / "data", out=tmp_path / "plain"
    )
    assert worse["params"] == made["params"]
    assert made["perplexity"]["value"] < worse["perplexity"]["value"]
    (tmp_path / "random").mkdir()
    control = prune.run(
        recipe,
        teacher=Checkpoint.open(tiny_llama),
        scores=None,
        cache=tmp_path / "data",
        out=tmp_path / "random",
        like=tmp_path / "plan.json",
    )
    assert control["params"] == made["params"]
    assert control["shapes"] == []
    assert json.loads((tmp_path / "random" / "model" / "halve.json").read_text())["prune"]["refit"] == "none"


def test_layers_that_the_trial_takes_out_go_by_the_recipe_s_criterion(
    make_recipe: MakeRecipe, tiny_llama: Path, scores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prune, "best", lambda tried: min(tried, key=lambda one: one.arch.layers))
    few = {"samples": 64, "micro_batch": 16}
    recipe = make_recipe(prune={"non_embedding_ratio": 0.5}, score={**few, "depth": "nll", "depth_pattern": "greedy"})
    prune.run(recipe, teacher=Checkpoint.open(tiny_llama), scores=scores, cache=tmp_path / "data", out=tmp_path)
    choice = json.loads((tmp_path / "depth.json").read_text())
    assert (choice["criterion"], choice["pattern"]) == ("nll", "greedy")
    assert tuple(choice["kept"]) == Plan.load(tmp_path / "plan.json").layers


@pytest.mark.parametrize("criterion", ["bi", "angular"])
def test_one_score_of_single_layers_is_good_for_any_number_of_them(
    make_recipe: MakeRecipe, tiny_llama: Path, tmp_path: Path, criterion: str
) -> None:
    teacher = Checkpoint.open(tiny_llama)
    few = {"samples": 8, "micro_batch": 4, "depth": criterion, "depth_samples": 4}
    score.run(make_recipe(score=few), teacher=teacher, cache=tmp_path / "data", out=tmp_path)
    kept = {}
    for layers in (3, 2):
        out = tmp_path / str(layers)
        out.mkdir()
        recipe = make_recipe(score=few, prune={"layers": layers})
        prune.run(recipe, teacher=teacher, scores=tmp_path / "scores.safetensors", cache=tmp_path / "data", out=out)
        choice = json.loads((out / "depth.json").read_text())
        kept[layers] = Plan.load(out / "plan.json").layers
        assert (choice["criterion"], tuple(choice["kept"])) == (criterion, kept[layers])
        hurt = {one["layers"][0]: one["value"] for one in choice["removals"]}
        assert set(kept[layers]) == set(sorted(hurt, key=lambda layer: hurt[layer])[-layers:])
    assert set(kept[2]) < set(kept[3])


def test_laco_s_search_says_which_layers_merge(
    make_recipe: MakeRecipe, tiny_llama: Path, scores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student is the teacher with the search's merges made, less the layers that they took in."""
    found = []

    def search(*args: Any, **kwargs: Any) -> Collapse:
        found.append(laco_search(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(prune, "laco_search", search)
    teacher = Checkpoint.open(tiny_llama)
    recipe = make_recipe(prune={"layers": 2, "layer_merge": "laco_search", "refit": "none"})
    prune.run(recipe, teacher=teacher, scores=scores, cache=tmp_path / "data", out=tmp_path)
    (collapse,) = found
    assert Plan.load(tmp_path / "plan.json").layers == collapse.kept
    assert max(len(merge.layers) for merge in collapse.merges) == 2, "three layers become one"
    merged = apply_merges(teacher.load(dtype="float32", device="cpu"), teacher.anatomy, collapse.merges)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="float32")
    for layer, old in zip(student.model.layers, collapse.kept, strict=True):
        for name, value in layer.state_dict().items():
            torch.testing.assert_close(value, merged.model.layers[old].state_dict()[name])


def test_layers_stay_where_no_score_tells_them_apart(make_recipe: MakeRecipe, tiny_llama: Path, tmp_path: Path) -> None:
    recipe = make_recipe(prune={"non_embedding_ratio": 0.5}, score={"samples": 64, "method": "magnitude"})
    score.run(recipe, teacher=Checkpoint.open(tiny_llama), cache=tmp_path / "data", out=tmp_path)
    made = prune.run(
        recipe,
        teacher=Checkpoint.open(tiny_llama),
        scores=tmp_path / "scores.safetensors",
        cache=tmp_path / "data",
        out=tmp_path,
    )
    assert {shape["arch"]["layers"] for shape in made["shapes"]} == {Plan.load(tmp_path / "plan.json").before.layers}


def test_scores_of_another_model_are_refused(
    make_recipe: MakeRecipe, tiny_llama: Path, scores: Path, tmp_path: Path
) -> None:
    other = Checkpoint.open(tiny_llama).load()
    with torch.no_grad():
        other.get_input_embeddings().weight.add_(0.01)
    saving.save_model(other, tmp_path / "other", extra_from=tiny_llama, record=None)
    with pytest.raises(RunError, match="scores of another model"):
        prune.run(
            make_recipe(),
            teacher=Checkpoint.open(tmp_path / "other"),
            scores=scores,
            cache=tmp_path / "data",
            out=tmp_path,
        )


def test_an_axis_that_is_not_proved_is_not_cut(
    make_recipe: MakeRecipe, tiny_llama: Path, scores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = prune.prove

    def doubtful(anatomy: Any) -> Any:
        proof = real(anatomy, reopen=False)
        return type(proof)(proof.family, proof.checks, {**proof.refusals, "ffn": "the proof failed: made up"})

    monkeypatch.setattr(prune, "prove", doubtful)
    with pytest.raises(AnatomyError, match="will not cut ffn of llama"):
        prune.run(
            make_recipe(), teacher=Checkpoint.open(tiny_llama), scores=scores, cache=tmp_path / "data", out=tmp_path
        )
    assert not (tmp_path / "model").exists()


# ---- the checks can fail ----


def test_a_wrong_count_is_noticed(pruned: tuple[Path, dict[str, Any]]) -> None:
    student = Checkpoint.open(pruned[0] / "model").load()
    ids = torch.arange(1, 17)[None]
    with pytest.raises(PlanError, match="parameters, its plan"):
        prune._check(student, 7, pruned[0] / "model", ids, torch.zeros(1, dtype=torch.float64))


def test_a_perplexity_that_is_not_finite_is_noticed(pruned: tuple[Path, dict[str, Any]]) -> None:
    student = Checkpoint.open(pruned[0] / "model").load()
    nll = torch.tensor([float("nan")], dtype=torch.float64)
    with pytest.raises(CheckpointError, match="perplexity is not finite"):
        prune._check(student, pruned[1]["params"], pruned[0] / "model", torch.arange(1, 17)[None], nll)


def test_a_cache_that_lies_is_noticed(pruned: tuple[Path, dict[str, Any]]) -> None:
    student = Checkpoint.open(pruned[0] / "model").load()
    ids = torch.arange(1, 17)[None]
    prune._check_cache(student, ids)
    for layer in student.model.layers:  # two layers that share a number write over each other's keys
        layer.self_attn.layer_idx = 0
    with pytest.raises(CheckpointError, match="with the key-value cache than without"):
        prune._check_cache(student, ids)


def test_a_folder_with_other_weights_is_noticed(pruned: tuple[Path, dict[str, Any]]) -> None:
    student = Checkpoint.open(pruned[0] / "model").load()
    ids = torch.arange(1, 17)[None]
    prune._check_reopens(student, pruned[0] / "model", ids)
    with torch.no_grad():
        student.model.norm.weight.mul_(1.5)
    with pytest.raises(CheckpointError, match=r"does not reopen in plain transformers\n  why: its logits differ"):
        prune._check_reopens(student, pruned[0] / "model", ids)
    assert sorted(load_file(pruned[0] / "model" / "model.safetensors"))
    assert not list((pruned[0]).glob("*.safetensors.tmp"))


def test_a_folder_that_transformers_cannot_open_is_noticed(pruned: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    student = Checkpoint.open(pruned[0] / "model").load()
    (tmp_path / "model").mkdir()
    with pytest.raises(CheckpointError, match="does not reopen in plain transformers"):
        prune._check_reopens(student, tmp_path / "model", torch.arange(1, 9)[None])
