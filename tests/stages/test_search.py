"""The search from recipe to cut student, as the pipeline runs it."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import forked
import pytest
import torch
import yaml
from families import config
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from halve.anatomy import Anatomy, Arch
from halve.cut.plan.sizes import Candidate
from halve.cut.trial import Tried, best
from halve.disk.files import read_json, write_json
from halve.errors import HalveError
from halve.model.checkpoint import Checkpoint
from halve.pipeline import run as pipeline
from halve.pipeline.keys import keys_of
from halve.preflight.forecast import forecast
from halve.recipe.read import on_spikes
from halve.recipe.schema import Recipe
from halve.recipe.searching import MemoryLimits
from halve.recipe.tournaments import tournament_training
from halve.search import latency
from halve.search.choice import ChosenShape
from halve.search.quantities import price
from halve.search.searched import shapes_to_try
from halve.search.settled import is_cut
from halve.search.timing import BlockTimes
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
def of_two_kinds(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose first two layers attend to a window and whose last two attend to everything."""
    place = tmp_path_factory.mktemp("kinds") / "model"
    shutil.copytree(tiny_llama, place, ignore=shutil.ignore_patterns("*.safetensors"))
    vocab = AutoTokenizer.from_pretrained(tiny_llama).vocab_size
    kinds = ["sliding_attention"] * 2 + ["full_attention"] * 2
    torch.manual_seed(0)
    shape = {"vocab_size": vocab, "num_hidden_layers": 4, "layer_types": kinds, "sliding_window": 8}
    AutoModelForCausalLM.from_config(config("gemma3_text", **shape)).save_pretrained(place)
    return place


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
    tried = [Tried.from_json(json.loads(line)) for line in (done / "search/trial.jsonl").read_text().splitlines()]
    listed = [finalist["arch"] for finalist in finalists]
    pick = best(tried).arch.sizes  # the deepest of those that are equal, which need not be a finalist
    assert found["trial"] == (listed.index(pick) if pick in listed else None)
    assert found["tokens"] == sum(finalist["curve"][-1]["tokens"] for finalist in finalists)
    assert {int(i) for i in found["choices"]["accuracies"]} == {0, 1, 2}
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


def stopped(done: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: tuple[Any, str]) -> Path:
    """A run whose search is stopped where it calls this function of a module or a class."""
    out = tmp_path / "run"
    shutil.copytree(done, out)
    shutil.rmtree(out / "search")
    with monkeypatch.context() as patched:
        patched.setattr(*at, Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(recipe, out, only="search")
    return out


def test_a_search_that_was_stopped_goes_on(
    done: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = stopped(done, recipe, tmp_path, monkeypatch, (stage, "outcome"))
    refused = Mock(side_effect=AssertionError("all finalists are there"))
    monkeypatch.setattr(stage.Workshop, "open", refused)
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


def timed(monkeypatch: pytest.MonkeyPatch, of_ffn: float) -> None:
    """Let the machine be one on which an ffn takes so much time."""

    def measured(anatomy: Anatomy, archs: Sequence[Arch], pace: Any) -> dict[Arch, BlockTimes]:
        seconds = {arch: 1e-3 * (20 + of_ffn * arch.ffn + arch.heads + arch.kv_heads) for arch in archs}
        return {arch: BlockTimes(block, 1e-3, block, 5e-3) for arch, block in seconds.items()}

    monkeypatch.setattr(latency, "machine_key", lambda *_: f"an ffn takes {of_ffn}")
    monkeypatch.setattr(latency, "time_blocks", measured)
    monkeypatch.setattr(latency, "Pace", Mock())


TIMED: dict[str, Any] = {**SEARCH, "budget": {"decode_latency": {"max": "60%", "context": 64}}}


@pytest.mark.parametrize("method", ["tournament", "trial"])
def test_a_search_that_goes_on_under_other_times_keeps_its_shapes(
    make_recipe: MakeRecipe, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    recipe = make_recipe(distill=DISTILL, prune=PRUNE, search={**TIMED, "method": method})
    out, work = tmp_path / "run", tmp_path / "run/.search.work"
    shutil.copytree(done, out)
    shutil.rmtree(out / "search")
    timed(monkeypatch, 1.0)
    last = "outcome" if method == "tournament" else "best"
    with monkeypatch.context() as patched:
        patched.setattr(stage, last, Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(recipe, out, only="search")
    tried = {str(json.loads(line)["arch"]) for line in (work / "trial.jsonl").read_text().splitlines()}
    cuts = [read_json(path)["plan"] for path in sorted(work.glob(".finalists/*/model/halve.json"))]
    timed(monkeypatch, 4.0)
    teacher = Checkpoint.open(recipe.model).anatomy
    others = shapes_to_try(recipe, teacher, times=tmp_path / "times.json")
    assert {str(one.arch.sizes) for one in others} != tried, "the other machine has other candidates"
    pipeline.run(recipe, out, only="search")
    found = read_json(out / "search/results.json")
    if method == "trial":
        assert {str(one["arch"]) for one in found["tried"]} == tried
    else:
        assert len(cuts) == 3
        shapes = [(one["arch"], one["kept_layers"]) for one in found["finalists"]]
        assert shapes == [(plan["after"], plan["layers"]) for plan in cuts]


def test_a_killed_trial_compares_no_layers_again(
    recipe: Recipe, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = stopped(done, recipe, tmp_path, monkeypatch, (stage.Workshop, "tried"))
    monkeypatch.setattr(stage.Workshop, "layers", Mock(side_effect=AssertionError("they are known")))
    pipeline.run(recipe, out, only="search")
    assert (out / "search/results.json").read_bytes() == (done / "search/results.json").read_bytes()


def test_a_finalists_folder_of_another_shape_is_refused(tmp_path: Path) -> None:
    arch = Arch(layers=2, hidden=8, ffn=8, heads=2, kv_heads=2, head_dim=4, vocab=9)
    finalist, folder = Tried(arch, (0, 3), 1.0), tmp_path / ".search.work/.finalists/0/model"
    assert not is_cut(finalist, folder)
    write_json(folder / "config.json", {})
    write_json(folder / "halve.json", {"plan": {"after": arch.sizes, "layers": [0, 3]}})
    assert is_cut(finalist, folder)
    for other in (Tried(arch.at(ffn=4), (0, 3), 1.0), Tried(arch, (0, 2), 1.0)):
        with pytest.raises(HalveError, match=r"does not hold the finalist of its number\n.*\n.*remove .*search\.work "):
            is_cut(other, folder)


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


def test_a_choice_meets_the_budget_with_its_own_layers(
    make_recipe: MakeRecipe, of_two_kinds: Path, tmp_path: Path
) -> None:
    """Layers with a window come first, and the layers that stay attend to everything."""
    memory = {"max": "70%", "batch": 64, "context": 512}
    axes = {"hidden": "frozen", "ffn": "frozen", "kv_heads": "frozen"}
    asked = {"budget": {"memory": memory}, "candidates": 3, "axes": axes, "method": "trial"}
    recipe = make_recipe(model=str(of_two_kinds), prune=PRUNE, search={**asked, "layers": {"max": 3, "keep": [2]}})
    out = pipeline.run(recipe, tmp_path / "run", only="search", needed=True)
    choice, anatomy = ChosenShape.load(out / "search"), Checkpoint.open(of_two_kinds).anatomy
    limits = MemoryLimits.model_validate(memory)
    cost = price(anatomy, choice.arch, "memory", limits, kept_layers=choice.kept_layers)
    assert 2 in choice.kept_layers
    assert cost <= 0.7 * price(anatomy, anatomy.sizes, "memory", limits)
    assert choice.metrics["params"] == anatomy.ledger.count(choice.arch, kept_layers=choice.kept_layers).params


def test_candidates_that_break_the_budget_with_their_layers_are_named(
    make_recipe: MakeRecipe, of_two_kinds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = {"max": "70%", "batch": 64, "context": 512}
    axes = {"hidden": "frozen", "ffn": "frozen", "kv_heads": "frozen", "layers": [3, 2]}
    asked = {"budget": {"memory": memory}, "candidates": 3, "axes": axes, "method": "trial"}
    recipe = make_recipe(model=str(of_two_kinds), prune=PRUNE, search=asked)
    monkeypatch.setattr(stage.Workshop, "layers", lambda *_: {3: (1, 2, 3), 2: (2, 3)})
    with pytest.raises(HalveError, match=r"no candidate has memory <= .* with the layers that it keeps"):
        pipeline.run(recipe, tmp_path / "none", only="search", needed=True)
    whole = Checkpoint.open(recipe.model).anatomy
    archs = [whole.sizes.at(layers=3), whole.sizes.at(layers=2)]
    both = tuple(Candidate(arch, whole.ledger.count(arch)) for arch in archs)
    monkeypatch.setattr("halve.search.searched.shapes_of", lambda *_: both)
    monkeypatch.setattr(stage.Workshop, "layers", lambda *_: {3: (1, 2, 3), 2: (0, 3)})
    said = io.StringIO()
    out = pipeline.run(recipe, tmp_path / "one", only="search", needed=True, console=Console(file=said, width=500))
    assert ChosenShape.load(out / "search").kept_layers == (0, 3)
    left_out = "1 of 2 candidates are left out: with the layers that they keep they do not have memory <= "
    assert left_out in said.getvalue()


def test_a_round_after_a_search_cuts_what_it_chose(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    short = {**DISTILL, "tokens": 4 * 4 * 32}
    asked = {**SEARCH, "method": "trial"}
    then = [{"prune": {"ffn": 8}, "distill": short}]
    recipe = make_recipe(distill=short, prune=PRUNE, search=asked, then=then)
    assert not pipeline.check(recipe)
    out = pipeline.run(recipe, tmp_path / "run")
    first, second = (read_json(out / name / "plan.json") for name in ("prune", "prune-2"))
    assert first["after"] == ChosenShape.load(out / "search").arch.sizes
    assert second["before"] == first["after"]
    assert second["after"] == {**first["after"], "ffn": 8}


def test_check_tries_later_rounds_on_every_candidate(make_recipe: MakeRecipe) -> None:
    whole = make_recipe(distill=DISTILL, prune=PRUNE, search={**SEARCH, "method": "trial"})
    layers = {one.arch.layers for one in shapes_to_try(whole, Checkpoint.open(whole.model).anatomy)}
    assert len(layers) > 1
    then = [{"prune": {"layers": max(layers)}, "distill": DISTILL}]
    recipe = make_recipe(distill=DISTILL, prune=PRUNE, search={**SEARCH, "method": "trial"}, then=then)
    (error,) = pipeline.check(recipe)
    assert "if the search chooses layers" in error.what
    assert "so that every candidate fits" in error.fix


def test_a_head_that_some_shapes_would_untie_is_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    asked = {key: value for key, value in SEARCH.items() if key != "axes"} | {"method": "trial"}
    recipe = make_recipe(distill=DISTILL, prune={**PRUNE, "untie": True}, search=asked)
    tied = tmp_path / "tied"
    shutil.copytree(recipe.model, tied)
    config = read_json(tied / "config.json")
    (tied / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    found = {error.what for error in pipeline.check(recipe.model_copy(update={"model": str(tied)}))}
    assert "prune.untie is not combined with search" in found


def test_check_reads_the_items_of_a_tournament(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    item = {"context": "The cat " * 4000, "choices": [" sees", " qqq"], "answer": 0}
    (tmp_path / "long.jsonl").write_text(json.dumps(item) + "\n")
    tournament = {**SEARCH["tournament"], "choices": str(tmp_path / "long.jsonl")}
    (error,) = pipeline.check(make_recipe(distill=DISTILL, prune=PRUNE, search={**SEARCH, "tournament": tournament}))
    assert "long.jsonl line 1 has" in error.what


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


@pytest.mark.parametrize("distill", [DISTILL, None])
def test_a_search_goes_on_under_another_reaction_to_spikes(
    make_recipe: MakeRecipe, distill: dict[str, Any] | None, tmp_path: Path
) -> None:
    recipe = make_recipe(distill=distill, prune=PRUNE, search=SEARCH)
    skipping = on_spikes(recipe, "skip")
    assert tournament_training(recipe).on_spike == "stop"
    assert tournament_training(skipping).on_spike == "skip"
    teacher = Checkpoint.open(recipe.model)
    keys = [keys_of(one, teacher, pipeline.stages(one), memo=tmp_path / "hashes") for one in (recipe, skipping)]
    names = ("cache-search", "search")
    assert [keys[0][name] for name in names] == [keys[1][name] for name in names]


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
