"""A small study on a tiny llama from end to end: runs that are shared, figures, verdicts, resumption, pages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from scripted import script

from halve.cli.app import main
from halve.pipeline import run as pipeline
from halve.recipe.schema import Recipe
from halve.studies import declare, engine, page
from halve.studies.arms import Setting
from halve.studies.setting import of_ones_own, split_items

STUDY = declare.read_study(
    """
    name: tiny
    title: A tiny study
    source: nothing
    question: Is cross-entropy worse?
    base: {prune: {ffn: 50%}}
    arms:
      kl: {label: KL, recipe: {distill: {baselines: [ce]}}, paper: {loss: "2.1"}}
      ce: {label: CE, of: kl, before: null, after: ce}
      raw: {label: Uncorrected, teacher: original, recipe: {then: [{prune: {ffn: 25%}}]}}
    claims:
      - {text: KL beats CE, better: kl, worse: ce, metric: kl_after, paper: 2.1 against 2.2}
      - {text: Smaller is better, better: raw, worse: kl, metric: perplexity_before, tie: nobody knows}
    """,
    source="the test",
)
DISTILL = {"tokens": 256, "batch": 4, "micro_batch": 4, "eval_every": 9, "eval_samples": 2, "warmup_steps": 1}
CHANGES: dict[str, Any] = {
    "device": "cpu",
    "data": {"context": 32},
    "correct": DISTILL,
    "score": {"samples": 8, "micro_batch": 4},
    "distill": DISTILL,
    "evaluate": {"samples": 4, "speed": False},
}
COMMAND = "halve study tiny --seeds 2"


@pytest.fixture(scope="module")
def setting(tiny_llama: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return of_ones_own(
        str(tiny_llama),
        train=[str(corpus / "train.txt")],
        valid=[str(corpus / "valid.txt")],
        choices=None,
        texts=tmp_path_factory.mktemp("texts"),
        changes=CHANGES,
    )


@pytest.fixture(scope="module")
def finished(setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[str]]:
    out, lines = tmp_path_factory.mktemp("study"), []
    results = engine.run(STUDY, setting, seeds=(0, 1), out=out, command=COMMAND, say=lines.append)
    return out, results, lines


def measured(out: Path) -> dict[int, list[dict[str, Any]]]:
    """What the runs measured, by seed."""
    found: dict[int, list[dict[str, Any]]] = {0: [], 1: []}
    for path in sorted(out.glob("runs/*/evaluate/results.json")):
        found[int(path.parts[-3].split("-")[1])].append(json.loads(path.read_text()))
    return found


def test_figures_are_those_of_the_runs(finished: tuple[Path, dict[str, Any], list[str]]) -> None:
    out, results, _ = finished
    arms = {arm["name"]: arm for arm in results["arms"]}
    runs = measured(out)
    assert {seed: len(each) for seed, each in runs.items()} == {0: 2, 1: 2}
    pairs = [next(one["models"] for one in runs[seed] if "ce" in one["models"]) for seed in (0, 1)]
    kl = [models["distilled"]["kl"]["value"] for models in pairs]
    ce = [models["ce"]["kl"]["value"] for models in pairs]
    assert arms["kl"]["metrics"]["kl_after"]["values"] == kl
    assert arms["ce"]["metrics"]["kl_after"]["values"] == ce
    assert arms["kl"]["metrics"]["kl_after"]["mean"] == pytest.approx((kl[0] + kl[1]) / 2)
    assert arms["kl"]["metrics"]["kl_after"]["stderr"] == pytest.approx(abs(kl[0] - kl[1]) / 2)
    assert arms["ce"]["metrics"]["kl_before"] is None
    effect = results["claims"][0]["effect"]
    assert effect["values"] == pytest.approx([ce[0] - kl[0], ce[1] - kl[1]])
    two = [next(one["models"] for one in runs[seed] if "ce" not in one["models"]) for seed in (0, 1)]
    rounds = [models["pruned-2"]["perplexity"]["value"] for models in two]
    assert arms["raw"]["metrics"]["perplexity_before"]["values"] == rounds
    assert arms["raw"]["kept"] < arms["kl"]["kept"] < 1
    assert len({kl[0], kl[1]}) == 2, "seeds differ"


def test_each_seed_corrects_its_teacher_once_and_arms_take_it(
    finished: tuple[Path, dict[str, Any], list[str]], tiny_llama: Path
) -> None:
    out, _, lines = finished
    corrected = {path.parents[1].resolve() for path in out.glob("runs/*/correct/model/config.json")}
    assert len(corrected) == 2
    recipes = [Recipe.model_validate_json(path.read_text()) for path in out.glob("runs/*/recipe.json")]
    taught = [Path(recipe.model) for recipe in recipes if recipe.correct is None]
    assert sorted(taught) == sorted([tiny_llama, tiny_llama, *(folder / "model" for folder in corrected)])
    assert [line.startswith("correct the teacher") for line in lines].count(True) == 2
    assert lines[-1].startswith("tiny 4/4: raw, seed 1: kl before ")
    assert not list(out.glob("runs/*/data")), "one folder holds the tokens of all"


def test_a_finished_study_changes_nothing(
    finished: tuple[Path, dict[str, Any], list[str]], setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, results, _ = finished
    text = (out / "tiny" / "results.json").read_bytes()
    before = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*/**/*")}
    monkeypatch.setattr(pipeline, "check", lambda *_: pytest.fail("nothing is left to run"))
    again = engine.run(STUDY, setting, seeds=(0, 1), out=out, command=COMMAND, say=lambda _: None)
    assert json.dumps(again) == json.dumps(results)
    assert (out / "tiny" / "results.json").read_bytes() == text
    assert {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*/**/*")} == before


def test_a_study_that_was_stopped_goes_on(
    finished: tuple[Path, dict[str, Any], list[str]], setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, results, _ = finished
    shutil.rmtree(next(out.glob("runs/seed-1-*/distill-ce")))
    shutil.rmtree(out / "tiny")
    made: list[str] = []
    work = pipeline.RunDir.work

    def noted(self: Any, name: str, key: str) -> Path:
        made.append(name)
        return work(self, name, key)

    monkeypatch.setattr(pipeline.RunDir, "work", noted)
    again = engine.run(STUDY, setting, seeds=(0, 1), out=out, command=COMMAND, say=lambda _: None)
    assert made == ["distill-ce"], "its result is the same bits, so what follows stands"
    assert again["arms"] == results["arms"]
    assert (out / "tiny" / "results.json").exists()


def test_the_page_says_it_all(finished: tuple[Path, dict[str, Any], list[str]]) -> None:
    out, results, _ = finished
    text = (out / "tiny" / "table.md").read_text()
    assert text == page.markdown(results, plot="plot.svg")
    for words in (
        "# A tiny study",
        "Source: arXiv nothing.",
        f"```sh\n{COMMAND}\n```",
        "Seeds: 0, 1.",
        "| paper: loss |",
        "![A",
    ):
        assert words in text
    assert f"**{results['claims'][0]['verdict']}**" in text
    assert "| CE |" in text
    assert str(out) not in json.dumps(results)
    assert "/" not in results["teacher"]["name"]
    svg = (out / "tiny" / "plot.svg").read_text()
    assert svg.count("<svg") == 3, "a sheet with two panels"
    assert svg.count("<circle") == 2 + 3, "CE has no figure before retraining"


def test_pages_are_made_of_committed_results(finished: tuple[Path, dict[str, Any], list[str]], tmp_path: Path) -> None:
    _, results, _ = finished
    losses = {**results, "name": "losses"}
    said = ("held", "inconclusive")
    losses["claims"] = [{**one, "verdict": verdict} for one, verdict in zip(results["claims"], said, strict=True)]
    (tmp_path / "losses.json").write_text(json.dumps(losses))
    pages = script("make_docs").study_pages(tmp_path)
    assert {path.name for path in pages} == {"README.md", "losses.md", "losses.svg"}
    index = pages[tmp_path / "README.md"]
    source = declare.load_study("losses").source
    row = f"| [Loss functions for retraining](losses.md) | {source} | {losses['date']} | 1 | 0 | 1 |"
    assert row in index
    assert index.count("not run yet") == len(declare.names()) - 1
    text = pages[tmp_path / "losses.md"]
    assert "![A tiny study](losses.svg)" in text
    assert "- Smaller is better: nobody knows." in text
    assert pages[tmp_path / "losses.svg"] == page.plot(losses)


# ---- the command


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "--list", "--json"]) == 0
    assert [one["name"] for one in json.loads(capsys.readouterr().out)] == list(declare.names())
    assert main(["study"]) == 0
    assert "Aggregators of width importance" in capsys.readouterr().out


def test_the_command_hands_on_what_it_was_given(
    finished: tuple[Path, dict[str, Any], list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[tuple[str, Setting, dict[str, Any]]] = []

    def run(study: declare.Study, setting: Setting, **options: Any) -> dict[str, Any]:
        asked.append((study.name, setting, options))
        return finished[1]

    monkeypatch.setattr(engine, "run", run)
    own = ["--model", "owner/name", "--train", "hub:owner/text", "--valid", "v.txt", "--out", str(tmp_path)]
    assert main(["study", "losses", *own, "--seeds", "5", "--tokens", "1000", "--context", "64", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "A tiny study"
    ((name, setting, options),) = asked
    assert (name, setting.model, setting.train) == ("losses", "owner/name", ("hub:owner/text",))
    assert setting.changes == {"distill": {"tokens": 1000}, "data": {"context": 64}}
    assert list(options["seeds"]) == [0, 1, 2, 3, 4]
    assert options["command"] == "halve study losses --model name --seeds 5 --tokens 1000 --context 64"
    asked.clear()
    assert main(["study", "all", *own]) == 0
    assert [name for name, _, _ in asked] == list(declare.names())
    assert "KL beats CE" in capsys.readouterr().out


def test_mistakes_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "agregators"]) == 2
    assert main(["study", "losses", "--model", "owner/name", "--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "there is no study agregators" in err
    assert "a study of owner/name needs texts" in err


def test_one_study_that_fails_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from halve.errors import PlanError

    asked: list[str] = []

    def run(study: declare.Study, setting: Setting, **options: Any) -> dict[str, Any]:
        asked.append(study.name)
        raise PlanError("cannot", why="so", fix="not")

    monkeypatch.setattr(engine, "run", run)
    own = ["--model", "owner/name", "--train", "t.txt", "--valid", "v.txt", "--out", str(tmp_path)]
    assert main(["study", "all", *own]) == 2
    assert asked == list(declare.names())
    assert "error: head-merge: cannot" in capsys.readouterr().err


def test_items_are_dealt_in_turn(tmp_path: Path) -> None:
    items = tmp_path / "nouns.jsonl"
    lines = [json.dumps({"context": "", "choices": ["a\u2028", "b", "c", "d", "e"], "answer": i}) for i in range(5)]
    items.write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    select, test = (Path(path) for path in split_items(items, tmp_path / "texts"))
    assert [json.loads(line)["answer"] for line in select.read_text("utf-8").split("\n") if line] == [0, 2, 4]
    assert [json.loads(line)["answer"] for line in test.read_text("utf-8").split("\n") if line] == [1, 3]
    assert (select.name, test.name) == ("nouns-select.jsonl", "nouns-test.jsonl")
