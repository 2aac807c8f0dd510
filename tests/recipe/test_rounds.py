"""Two rounds on a tiny llama, with the real stages: what comes out, and what the report says of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from halve.errors import RunError
from halve.model.checkpoint import Checkpoint
from halve.pipeline import run as pipeline
from halve.pipeline.export import export
from halve.preflight.sizes import planned_rounds
from halve.recipe.rounds import cuts_original, rounds, scored_in, trainings
from halve.recipe.schema import Recipe

MakeRecipe = Callable[..., Recipe]
DISTILL = {"tokens": 512, "batch": 4, "eval_every": 2, "eval_samples": 2, "warmup_steps": 1}


@pytest.fixture(scope="module")
def recipe(make_recipe: Callable[..., Recipe]) -> Recipe:
    then = [{"prune": {"hidden": 24}, "distill": {**DISTILL, "baselines": ["ce"]}, "teacher": "previous"}]
    return make_recipe(distill=DISTILL, then=then)


@pytest.fixture(scope="module")
def run(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline.run(recipe, tmp_path_factory.mktemp("rounds") / "run")


def test_each_round_reads_like_a_recipe_of_its_own(recipe: Recipe) -> None:
    first, second = rounds(recipe)
    assert first == recipe.model_copy(update={"then": ()})
    assert (second.prune.hidden, second.prune.ffn, second.name, second.seed) == (24, None, "tiny", 0)
    assert rounds(first) == (first,)


@pytest.mark.parametrize(("when", "names"), [("before", ["correct"]), ("beside", [])])
def test_every_training_that_runs_for_itself_is_listed(make_recipe: MakeRecipe, when: str, names: list[str]) -> None:
    correct, then = {"tokens": 640, "batch": 4, "when": when}, [{"prune": {"ffn": 24}}, {"prune": {"ffn": 16}}]
    then[1]["distill"] = {**DISTILL, "tokens": 1024}
    asked = make_recipe(correct=correct, distill=DISTILL, then=then)
    found = trainings(asked)
    assert list(found) == [*names, "distill", "distill of round 3"]
    assert found["distill"] == asked.distill
    assert found["distill of round 3"].tokens == 1024
    assert names == [name for name in found if found[name] == asked.correct]
    assert trainings(make_recipe()) == {}


def test_the_sizes_of_a_round_follow_from_those_before(recipe: Recipe) -> None:
    first, second = planned_rounds(recipe, Checkpoint.open(recipe.model))
    assert (first.before.sizes.ffn, first.after.ffn, first.after.layers) == (64, 40, 3)
    assert second.before.sizes == first.after
    assert second.after == first.after.at(hidden=24)


def test_the_sizes_of_siblings_follow_from_the_teacher(make_recipe: MakeRecipe) -> None:
    then = [{"prune": {"hidden": 24}, "distill": DISTILL, "cut": "original"}, {"prune": {"ffn": 16}}]
    asked = make_recipe(distill=DISTILL, then=then)
    first, second, third = planned_rounds(asked, Checkpoint.open(asked.model))
    assert second.before.sizes == first.before.sizes
    assert second.after == first.before.sizes.at(hidden=24)
    assert third.before.sizes == second.after
    assert [cuts_original(asked, number) for number in (1, 2, 3)] == [True, True, False]
    assert [scored_in(asked, number) for number in (1, 2, 3)] == [1, 1, 3]


def test_the_last_student_is_what_two_rounds_leave(run: Path) -> None:
    config = AutoModelForCausalLM.from_pretrained(run / "distill-2" / "model").config
    assert (config.num_hidden_layers, config.intermediate_size, config.hidden_size) == (3, 40, 24)
    plan = json.loads((run / "prune-2" / "plan.json").read_text())
    assert (plan["before"]["hidden"], plan["after"]["hidden"]) == (32, 24)
    results = json.loads((run / "evaluate" / "results.json").read_text())
    assert list(results["models"]) == ["teacher", "pruned", "distilled", "pruned-2", "distilled-2", "ce-2"]
    assert results["differences"]["subject"] == "distilled-2"
    params = {name: one["params"] for name, one in results["models"].items()}
    assert params["distilled-2"] < params["distilled"] < params["teacher"]


def test_each_student_can_be_exported_by_its_name(run: Path, tmp_path: Path) -> None:
    sizes = {}
    for student in ("distilled", "distilled-2", None):
        config = AutoModelForCausalLM.from_pretrained(export(run, tmp_path / str(student), student=student)).config
        sizes[student] = config.hidden_size
    assert sizes == {"distilled": 32, "distilled-2": 24, None: 24}
    with pytest.raises(RunError, match="it trains distilled, distilled-2"):
        export(run, tmp_path / "other", student="distilled-3")


def test_a_student_beside_the_last_one_does_not_learn_from_it(make_recipe: MakeRecipe) -> None:
    step = {"prune": {"hidden": 24}, "distill": DISTILL, "cut": "original"}
    (error,) = pipeline.check(make_recipe(distill=DISTILL, then=[{**step, "teacher": "previous"}]))
    assert (error.what, error.fix) == (
        "round 2 learns from the last student and cuts the run's teacher",
        "teacher: original or cut: previous in round 2",
    )


def test_the_report_shows_every_round(run: Path) -> None:
    page = (run / "report" / "report.html").read_text()
    text = " ".join(re.sub(r"<[^>]+>", " ", page).split())
    for words in ("Distilled student 2", "Pruned, untrained 2", "Trained with CE 2", "Importance, round 2"):
        assert words in text
    cuts = r"Round 1: Dropped layer \d, counted from 0\. Trimmed ffn\. The .+? Round 2: Trimmed hidden\."
    assert re.search(cuts, text), "between them stands how the first student was made"
    assert "hidden 32 32 24 75 %" in text
    assert "ffn 64 40 40 62 %" in text
    assert 'class="swatch distilled"' in page
    assert "distilled-2" not in re.sub(r"<details>.*", "", page.split("</style>")[1], flags=re.S)
    results = json.loads((run / "evaluate" / "results.json").read_text())
    assert f"{results['models']['distilled-2']['params']:,}" in text
    assert text.count("the same cut, trained with cross-entropy on the text") == 1
    card = (run / "report" / "README.md").read_text()
    assert "| hidden | 32 | 32 | 24 | 75 % |" in card
    assert "then:" in card
