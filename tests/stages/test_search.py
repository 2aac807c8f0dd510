"""The search from recipe to cut student, as the pipeline runs it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
import yaml
from transformers import AutoModelForCausalLM

from halve.disk.files import read_json
from halve.errors import HalveError
from halve.pipeline import run as pipeline
from halve.preflight.forecast import forecast
from halve.recipe.schema import Recipe
from halve.search.choice import ChosenShape
from halve.stages import search as stage

MakeRecipe = Callable[..., Recipe]
DISTILL = {"tokens": 20 * 4 * 32, "batch": 4, "lr": 3e-3, "min_lr": 1e-3, "warmup_steps": 1, "checkpoint_every": 3}
PRUNE = {"refit_samples": 8}
STUDENTS = ("distill", "distill-2")
SEARCH: dict[str, Any] = {
    "budget": {"non_embedding": "60%"},
    "candidates": 3,
    "axes": {"hidden": "frozen"},
    "tournament": {"tokens": 6 * 4 * 32, "rungs": 2},
}


@pytest.fixture(scope="module")
def recipe(make_recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    items = [{"context": "The small cat", "choices": [" sees", " qqq"], "answer": 0} for _ in range(3)]
    path = tmp_path_factory.mktemp("items") / "next-word.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    tournament = {**SEARCH["tournament"], "choices": str(path)}
    return make_recipe(distill=DISTILL, prune=PRUNE, search={**SEARCH, "tournament": tournament})


@pytest.fixture(scope="module")
def done(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline.run(recipe, tmp_path_factory.mktemp("search") / "run", only="search", needed=True)


def test_it_runs_what_it_needs_and_nothing_else(done: Path) -> None:
    stages = {path.parent.name for path in done.glob("*/manifest.json")}
    assert stages == {"score", "cache-search", "search"}
    assert {path.name for path in (done / "search").iterdir()} == {
        "trial.jsonl", "rungs.jsonl", "results.json", "choice.json", "manifest.json",
    }  # fmt: skip


def test_what_it_finds(done: Path) -> None:
    found, lines = read_json(done / "search/results.json"), (done / "search/rungs.jsonl").read_text().splitlines()
    finalists = found["finalists"]
    assert len(finalists) == 3
    assert len({finalist["arch"]["layers"] for finalist in finalists}) >= 2
    assert len(lines) == sum(len(finalist["curve"]) for finalist in finalists)
    ends = {i: one["curve"][-1]["kl"] for i, one in enumerate(finalists) if len(one["curve"]) == 3}
    assert found["chosen"] == min(ends, key=ends.__getitem__)
    starts = [finalist["curve"][0]["kl"] for finalist in finalists]
    assert found["straight"] == starts.index(min(starts))
    assert found["tokens"] == sum(finalist["curve"][-1]["tokens"] for finalist in finalists)
    assert {int(i) for i in found["choices"]["accuracies"]} == set(ends)
    assert found["choices"]["items"] == 3
    choice = ChosenShape.load(done / "search")
    assert choice.arch.sizes == finalists[found["chosen"]]["arch"]
    assert list(choice.kept_layers) == finalists[found["chosen"]]["kept_layers"]


def test_prune_cuts_to_the_choice(done: Path, recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(done, out)
    pipeline.run(recipe, out, only="prune")
    choice, plan = ChosenShape.load(done / "search"), read_json(out / "prune/plan.json")
    assert plan["after"] == choice.arch.sizes
    assert tuple(plan["layers"]) == choice.kept_layers
    model = AutoModelForCausalLM.from_pretrained(out / "prune" / "model")
    assert model.config.num_hidden_layers == choice.arch.layers


def test_a_search_that_was_stopped_goes_on(
    done: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    shutil.copytree(done, out)
    shutil.rmtree(out / "search")
    with monkeypatch.context() as patched:
        patched.setattr(stage, "outcome", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(recipe, out, only="search")
    monkeypatch.setattr(stage.Workshop, "cut", _only_if_there)
    pipeline.run(recipe, out, only="search")
    for name in ("results.json", "choice.json", "rungs.jsonl"):
        assert (out / "search" / name).read_bytes() == (done / "search" / name).read_bytes()


def test_two_ranks_find_what_one_finds(
    done: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = ChosenShape.load

    def of_the_first(folder: Path) -> ChosenShape:
        assert os.environ.get("RANK", "0") == "0", "the first rank may have moved the folder"
        return load(folder)

    monkeypatch.setattr(ChosenShape, "load", of_the_first)
    out, path = tmp_path / "run", tmp_path / "recipe.yaml"
    shutil.copytree(done, out)
    shutil.rmtree(out / "search")
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True)))
    answers = forked.in_ranks(["search", str(path), "--out", str(out)], 2, folder=tmp_path, limit=300.0)
    assert [answer.code for answer in answers] == [0, 0], answers
    ours, theirs = (_shown(folder) for folder in (out, done))
    assert ours.keys() == theirs.keys()
    for key, kl in ours.items():
        assert kl == pytest.approx(theirs[key], rel=1e-3)
    assert ChosenShape.load(out / "search").arch == ChosenShape.load(done / "search").arch
    assert (out / "search.html").exists()
    said = [answer.out.count("chosen: ") for answer in answers]
    assert said == [1, 0]


def _shown(run: Path) -> dict[tuple[int, int], float]:
    lines = [json.loads(line) for line in (run / "search" / "rungs.jsonl").read_text().splitlines()]
    return {(line["finalist"], line["rung"]): line["kl"] for line in lines}


def _only_if_there(_: Any, finalist: Any, folder: Path, **__: Any) -> None:
    assert (folder / "config.json").exists(), finalist


@pytest.mark.parametrize("method", ["trial", "additive"])
def test_other_ways_to_choose(make_recipe: MakeRecipe, done: Path, tmp_path: Path, method: str) -> None:
    recipe = make_recipe(distill=DISTILL, prune=PRUNE, search={**SEARCH, "method": method})
    out = tmp_path / "run"
    shutil.copytree(done, out)
    pipeline.run(recipe, out, only="search", needed=True)
    choice = ChosenShape.load(out / "search")
    assert choice.metrics["method"] == method
    assert len(choice.kept_layers) == choice.arch.layers
    if method == "trial":
        tried = read_json(out / "search/results.json")["tried"]
        assert choice.arch.sizes in [one["arch"] for one in tried]


def test_several_sizes_are_searched_cut_and_distilled_from_one_teacher(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    sizes = {key: value for key, value in SEARCH.items() if key != "budget"} | {"targets": ["80%", "60%"]}
    short = {**DISTILL, "tokens": 4 * 4 * 32}
    recipe = make_recipe(distill=short, prune=PRUNE, search={**sizes, "method": "trial"})
    assert not pipeline.check(recipe)
    out = pipeline.run(recipe, tmp_path / "run")
    assert not (out / "score-2").exists()
    choices = [ChosenShape.load(out / name) for name in ("search", "search-2")]
    first, second = (read_json(out / name / "plan.json") for name in ("prune", "prune-2"))
    assert [first["after"], second["after"]] == [choice.arch.sizes for choice in choices]
    whole = AutoModelForCausalLM.from_pretrained(recipe.model).num_parameters()
    counts = [AutoModelForCausalLM.from_pretrained(out / f"{name}/model").num_parameters() for name in STUDENTS]
    assert whole > counts[0] > counts[1]
    assert first["before"] == second["before"], "both are cut from the teacher"
    models = read_json(out / "evaluate/results.json")["models"]
    assert {"distilled", "distilled-2", "pruned", "pruned-2"} <= {*models}
    planned = forecast(recipe)
    assert {"trial", "trial-2", "distill-2"} <= planned.flops.keys()
    played = make_recipe(distill=DISTILL, prune=PRUNE, search=sizes)
    names = [listed.name for listed in pipeline.stages(played)]
    assert names.count("cache-search") == 1, "one teacher's answers serve all"
    assert {"search", "search-2", "prune-2", "distill-2"} <= {*names}
    assert {"search", "search-2"} <= {*forecast(played).searches} & {*forecast(played).memory}


@pytest.mark.parametrize(
    ("tournament", "says"),
    [
        ({"tokens": 128}, "128 tokens are too few for 3 rungs of a tournament"),
        ({"train": "lora", "lora_rank": 4000}, "search.tournament.lora_rank 4000 is larger than the model's hidden"),
        ({"choices": "no-such-file.jsonl"}, "no-such-file.jsonl"),
    ],
)
def test_check_finds_what_cannot_work(make_recipe: MakeRecipe, tournament: dict[str, Any], says: str) -> None:
    recipe = make_recipe(distill=DISTILL, prune={}, search={**SEARCH, "tournament": tournament})
    found: list[HalveError] = list(pipeline.check(recipe))
    assert any(says in error.what for error in found), found


def test_without_a_training_there_is_no_number_of_tokens(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(prune=PRUNE, search={"budget": {"non_embedding": "60%"}})
    assert {error.what for error in pipeline.check(recipe)} == {"the tournament does not know how long to train"}
    with pytest.raises(HalveError, match="does not know how long to train"):
        pipeline.stages(recipe)


def test_settings_that_do_not_fit_distill(make_recipe: MakeRecipe) -> None:
    tournament = {"batch": 6, "micro_batch": 4}
    recipe = make_recipe(distill=DISTILL, prune=PRUNE, search={**SEARCH, "tournament": tournament})
    (error,) = pipeline.check(recipe)
    assert error.what == "search.tournament does not fit distill"
    assert error.why == "batch 6 is not a multiple of micro_batch 4"
