"""Every shipped study is read, its arms are legal recipes on the demo's teacher, and mistakes are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from halve.cut.plan.sizes import target
from halve.demo.run import TEACHER
from halve.errors import RecipeError
from halve.model.checkpoint import Checkpoint
from halve.preflight.sizes import planned_rounds
from halve.studies import declare
from halve.studies.arms import Setting, cell, correction_recipe, layered

ANATOMY = Checkpoint.open(TEACHER).anatomy
SETTING = Setting("demo", str(TEACHER), ("a.txt",), ("b.txt",), ("select.jsonl", "test.jsonl"), {})
HALF = {"controls", "width-depth", "aggregators", "baselines", "depth-sets", "iterative-importance"}
ARMS = [(name, arm) for name in declare.names() for arm, it in declare.load_study(name).arms.items() if it.of is None]


def recipe(study: str, arm: str, setting: Setting = SETTING, *, seed: int = 0) -> Any:
    loaded = declare.load_study(study)
    return cell(loaded, loaded.arms[arm], setting, seed=seed, sizes=ANATOMY.sizes, teacher=str(TEACHER))


def test_the_list_is_the_catalog() -> None:
    assert sorted(declare.names()) == sorted(path.stem for path in (declare._HERE / "catalog").glob("*.yaml"))


@pytest.mark.parametrize("name", declare.names())
def test_a_shipped_study_is_read(name: str) -> None:
    study = declare.load_study(name)
    assert study.name == name
    assert study.claims
    assert all(len(arm.label) <= 20 for arm in study.arms.values()), "longer ones run into the plot"
    assert len({arm.label for arm in study.arms.values()}) == len(study.arms)
    assert any(arm.teacher == "corrected" for arm in study.arms.values())


@pytest.mark.parametrize(("study", "arm"), ARMS)
def test_an_arm_is_a_recipe_that_can_be_planned(study: str, arm: str) -> None:
    made = recipe(study, arm)
    kept = [ANATOMY.ledger.count(shape.after).non_embedding for shape in planned_rounds(made, Checkpoint.open(TEACHER))]
    share = kept[-1] / ANATOMY.ledger.count(ANATOMY.sizes).non_embedding
    assert made.distill is not None
    tokens = made.distill.tokens + sum(step.distill.tokens for step in made.then)
    assert made.corrects_beside == ((study, arm) == ("correction", "beside"))
    assert not made.corrects_before
    assert not made.evaluate.speed
    if study in HALF:
        assert share == pytest.approx(0.5, abs=0.005)
        assert tokens == 131_072
    if study == "two-steps":
        assert share == pytest.approx(0.3034, abs=1e-3)
        assert tokens == 262_144
    if study == "head-merge":
        assert (made.prune.heads, made.prune.hidden) == (2, None)


@pytest.mark.parametrize("name", declare.names())
def test_arms_differ(name: str) -> None:
    study = declare.load_study(name)
    made = [(recipe(name, arm).name, it.teacher) for arm, it in study.arms.items() if it.of is None]
    assert len(set(made)) == len(made)


def test_the_same_arm_in_two_studies_is_one_run() -> None:
    assert recipe("width-depth", "width").name == recipe("losses", "kl").name == recipe("baselines", "minitron").name
    assert recipe("losses", "kl").name != recipe("losses", "kl", seed=1).name


def test_the_plain_cut_is_the_papers() -> None:
    made = recipe("baselines", "minitron")
    assert (made.score.batch_agg, made.score.seq_agg, made.score.method) == ("l2", "mean", "activation")
    assert (made.prune.gain, made.prune.rotation, made.prune.refit, made.prune.steps) == ("none", "none", "none", 1)
    assert target(ANATOMY, made.prune)[0] == ANATOMY.sizes.at(hidden=64, ffn=204)


def test_settings_change_what_is_shared() -> None:
    distill = {"tokens": 1000, "batch": 4, "micro_batch": 4}
    changed = Setting("demo", str(TEACHER), ("a.txt",), ("b.txt",), None, {"distill": distill})
    one, two = recipe("two-steps", "one", changed), recipe("two-steps", "two-previous", changed)
    assert one.distill.tokens == 2000
    assert [two.distill.tokens, two.then[0].distill.tokens] == [1000, 1000]
    assert (two.then[0].distill.batch, two.then[0].distill.lr) == (4, two.distill.lr)
    assert two.then[0].teacher == "previous"
    assert two.then[0].prune.gain == "none"


def test_items_are_told_apart() -> None:
    made = recipe("depth-sets", "block-task")
    assert Path(made.score.depth_task).name == "select.jsonl"
    assert [Path(path).name for path in made.evaluate.choices] == ["test.jsonl"]
    without = Setting("demo", str(TEACHER), ("a.txt",), ("b.txt",), None, {})
    with pytest.raises(RecipeError, match="this study needs multiple-choice items"):
        recipe("depth-sets", "block-task", without)


def test_the_correction_is_one_for_all_studies_of_a_seed() -> None:
    made = correction_recipe(SETTING, seed=2)
    assert made.correct is not None
    assert (made.correct.tokens, made.seed, made.model) == (262_144, 2, str(TEACHER))
    longer = Setting("demo", str(TEACHER), ("a.txt",), ("b.txt",), None, {"distill": {"tokens": 1000}})
    assert correction_recipe(longer, seed=2).name == made.name
    assert correction_recipe(SETTING, seed=1).name != made.name


def test_sizes_replace_each_other_and_other_keys_stay() -> None:
    below = {"prune": {"hidden": 8, "ffn": 16, "gain": "none"}, "score": {"samples": 4}}
    assert layered(below, {"prune": {"layers": 2}, "score": {"depth": "nll"}}) == {
        "prune": {"gain": "none", "layers": 2},
        "score": {"samples": 4, "depth": "nll"},
    }
    assert layered(below, {"prune": {"gain": "fitted"}})["prune"] == {"hidden": 8, "ffn": 16, "gain": "fitted"}
    assert below["prune"] == {"hidden": 8, "ffn": 16, "gain": "none"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"claims": [{"text": "t", "better": "a", "worse": "c", "metric": "kl_after"}]}, "a claim names arm c"),
        ({"metrics": ["kl_before"], "plot": ["kl_before"]}, "which is not among the metrics"),
        ({"plot": ["accuracy_after"]}, "what is plotted"),
        ({"arms": {"a": {"label": "A"}, "b": {"label": "B", "of": "z"}}}, "names an arm with a run"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_study_with_a_mistake_is_refused(change: dict[str, Any], message: str) -> None:
    raw: dict[str, Any] = {
        "name": "tiny",
        "title": "Tiny",
        "source": "none",
        "question": "What?",
        "arms": {"a": {"label": "A"}, "b": {"label": "B"}},
        "claims": [{"text": "t", "better": "a", "worse": "b", "metric": "kl_after"}],
    }
    assert declare.read_study(yaml.safe_dump(raw), source="tiny").name == "tiny"
    with pytest.raises(RecipeError, match=message):
        declare.read_study(yaml.safe_dump({**raw, **change}), source="tiny")


def test_an_unknown_study_is_told() -> None:
    with pytest.raises(RecipeError, match="there is no study agregators\n  why: known: controls"):
        declare.load_study("agregators")


def test_a_study_says_nothing_twice() -> None:
    text = yaml.safe_dump(declare.load_study("losses").model_dump(mode="json"))
    with pytest.raises(RecipeError, match="the key 'title' stands there twice"):
        declare.read_study(text + "title: another\n", source="twice")
