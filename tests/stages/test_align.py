"""Alignment in a run: a stage a step, from the recipe to the page, and what is made again after a change."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from talking import ENDED_CHAT, conversations, preferences, with_chat, with_turn_end, write_lines
from transformers import AutoModelForCausalLM, AutoTokenizer

from halve.align import trainers
from halve.disk.rundir import RunDir
from halve.errors import CorpusError, RunError
from halve.model.checkpoint import Checkpoint
from halve.pipeline import run as pipeline
from halve.pipeline.export import export
from halve.pipeline.keys import keys_of
from halve.pipeline.order import StageContext, stages
from halve.preflight.check import check
from halve.progress import SILENT
from halve.recipe.schema import Recipe
from halve.stages import align

COMMON: dict[str, Any] = {"batch": 8, "lr": 3e-3, "warmup_steps": 2, "context": 64}
NAMES = ["align-sft", "align-2-rpo", "align-3-rpo"]
MakeRecipe = Callable[..., Recipe]


def vowels(row: dict[str, Any], text: str) -> float:
    """Stands for a verifier: the tiny model writes no numbers."""
    return float(text.count("e") > text.count("s"))


@pytest.fixture(scope="module")
def chat_model(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_chat(tiny_llama, tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="module")
def aligned(make_recipe: MakeRecipe, chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeRecipe:
    """`aligned(steps, **sections)`: a recipe that aligns a student of half the neurons."""
    folder = tmp_path_factory.mktemp("aligned")
    talks = conversations(folder / "talks.jsonl")
    rows = preferences(60)
    pairs = write_lines(folder / "pairs.jsonl", rows)
    usual = (
        {"kind": "sft", "data": [str(talks)], "epochs": 1},
        {"kind": "rpo", "data": [str(pairs)], "epochs": 2},
        # the second round, in which the current student answers
        {"kind": "rpo", "data": [str(pairs)], "epochs": 1, "answers": 6, "answer_tokens": 5, "rewards": "gsm8k"},
    )

    def made(steps: Any = usual, **sections: Any) -> Recipe:
        listed = [{**COMMON, **step} for step in steps]
        measured = {"samples": 4, "speed": False, "completion_tokens": 2}
        cut = {"ffn": 32, "rotation": "none", "refit": "none"}
        short = {"evaluate": measured, "prune": cut, "distill": {"tokens": 512, "batch": 4}}
        return make_recipe(**{"model": str(chat_model), **short, "align": listed, **sections})

    return made


@pytest.fixture(scope="module")
def finished(aligned: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """A recipe with three steps, and its finished run."""
    recipe = aligned()
    run = tmp_path_factory.mktemp("run") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("halve.align.rewards.by_last_number", vowels)
        pipeline.run(recipe, run)
    return recipe, run


def metrics(run: Path, stage: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / stage / "manifest.json").read_text())["metrics"]
    return found


# ---- a run


def test_every_step_starts_from_the_one_before(finished: tuple[Recipe, Path]) -> None:
    recipe, run = finished
    assert [stage.name for stage in stages(recipe) if stage.section == "align"] == NAMES
    before = "distill"
    for name in NAMES:
        record = json.loads((run / name / "model" / "halve.json").read_text())
        assert record["stage"] == "align"
        assert record["student"] == Checkpoint.open(run / before / "model").fingerprint
        assert "/" not in record["alignment"]["data"][0]
        was, now = (load_file(run / stage / "model" / "model.safetensors") for stage in (before, name))
        assert now.keys() == was.keys()
        assert all(now[key].dtype == was[key].dtype for key in now)
        assert not any(torch.equal(now[key], was[key]) for key in now if key.endswith("proj.weight"))
        before = name


def test_the_students_folder_opens_and_keeps_its_settings(finished: tuple[Recipe, Path]) -> None:
    _, run = finished
    first, last = run / "distill" / "model", run / NAMES[-1] / "model"
    AutoModelForCausalLM.from_pretrained(last)
    assert AutoTokenizer.from_pretrained(last).chat_template == AutoTokenizer.from_pretrained(first).chat_template
    for file in ("config.json", "generation_config.json"):
        assert (last / file).read_bytes() == (first / file).read_bytes()
    assert not (last / "training_args.bin").exists()
    assert "and aligned" in (last / "README.md").read_text()


def test_metrics_say_what_was_learned(finished: tuple[Recipe, Path]) -> None:
    _, run = finished
    sft, rpo, again = (metrics(run, name) for name in NAMES)
    assert (sft["kind"], sft["examples"], sft["heldout"]) == ("sft", 55, 5)  # some of the 60 are equal
    assert sft["nats_gain"]["value"] < -2 * sft["nats_gain"]["stderr"]
    assert sft["nats_after"]["value"] - sft["nats_before"]["value"] == pytest.approx(sft["nats_gain"]["value"])
    assert (rpo["steps"], rpo["heldout"]) == (14, 6)
    assert rpo["accuracy"]["value"] > 0.9
    assert 0 < again["examples"] < 60
    for name, told in zip(NAMES, (sft, rpo, again), strict=True):
        log = [json.loads(line) for line in (run / name / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in log] == list(range(1, told["steps"] + 1))
        assert log[-1]["tokens"] == told["tokens"]


def test_every_model_is_evaluated_and_the_last_one_is_the_subject(finished: tuple[Recipe, Path]) -> None:
    _, run = finished
    results = json.loads((run / "evaluate" / "results.json").read_text())
    models = [*results["models"]]
    assert models == ["teacher", "pruned", "distilled", "aligned-sft", "aligned-2-rpo", "aligned-3-rpo"]
    assert results["differences"]["subject"] == "aligned-3-rpo"
    befores = [(step["before"], name) for name, step in results["steps"].items()]
    assert befores == [*pairwise(models[2:])]
    assert all(results["models"][name]["kl"]["value"] > 0 for name in models[1:])


def test_page_and_card_show_each_step_beside_the_teacher(finished: tuple[Recipe, Path]) -> None:
    recipe, run = finished
    results = json.loads((run / "evaluate" / "results.json").read_text())
    page = (run / "report" / "report.html").read_text()
    card = (run / "report" / "README.md").read_text()
    assert "then distilled from its teacher, then aligned" in card
    (table,) = (part for part in card.split("## ") if part.startswith("Alignment"))
    lines = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")]
    assert [line[0].strip("| *") for line in lines] == [
        *("model", "Distilled student", "Aligned, SFT", "Aligned 2, RPO", "Aligned 3, RPO")
    ]
    shown = [line[lines[0].index("KL to teacher")].split()[0] for line in lines[1:]]
    for text, name in zip(shown, ("distilled", "aligned-sft", "aligned-2-rpo", "aligned-3-rpo"), strict=True):
        kl = results["models"][name]["kl"]
        assert float(text) == pytest.approx(kl["value"], abs=kl["stderr"])
    assert "Training loss, Aligned 2, RPO" in page
    assert "aligned student minus each other model" in page
    for path in (recipe.model, *recipe.align[0].data):
        assert str(Path(path).parent) not in page + card


def test_the_first_step_is_compared_with_the_student_and_not_with_a_baseline(
    aligned: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = aligned(distill={"tokens": 512, "batch": 4, "baselines": ["ce"]})
    told: dict[str, Any] = {}
    monkeypatch.setattr("halve.stages.evaluate.run", lambda recipe, **how: told.update(how) or {})
    (evaluation,) = (stage for stage in stages(recipe) if stage.name == "evaluate")
    teacher = Checkpoint.open(recipe.model)
    made = dict.fromkeys(evaluation.after, teacher)
    with RunDir.open(tmp_path / "run", recipe) as folder:
        evaluation.act(StageContext(folder, tmp_path, SILENT, teacher, made), recipe, tmp_path)
    assert list(told["models"])[:5] == ["teacher", "pruned", "distilled", "ce", "aligned-sft"]
    assert told["chain"] == ("distilled", "aligned-sft", "aligned-2-rpo", "aligned-3-rpo")


def test_export_gives_the_aligned_student(finished: tuple[Recipe, Path], tmp_path: Path) -> None:
    _, run = finished
    export(run, tmp_path / "out")
    assert Checkpoint.open(tmp_path / "out").fingerprint == Checkpoint.open(run / NAMES[-1] / "model").fingerprint


# ---- again


def test_a_finished_run_changes_nothing(finished: tuple[Recipe, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, run = finished
    monkeypatch.setattr("halve.stages.align.run", None)
    stamps = {path: path.stat().st_mtime_ns for path in run.glob("align*/**/*")}
    pipeline.run(recipe, run)
    assert {path: path.stat().st_mtime_ns for path in run.glob("align*/**/*")} == stamps


def changed(recipe: Recipe, number: int, **values: Any) -> Recipe:
    steps = [step.model_copy(update=values) if i == number else step for i, step in enumerate(recipe.align, 1)]
    return recipe.model_copy(update={"align": tuple(steps)})


def test_a_steps_key_is_of_what_it_reads(aligned: MakeRecipe, tmp_path: Path) -> None:
    recipe = aligned()
    teacher = Checkpoint.open(recipe.model)

    def keys(of: Recipe) -> list[str]:
        found = keys_of(of, teacher, stages(of), memo=tmp_path / "memo.json")
        return [found[name] for name in ("distill", *NAMES)]

    want = keys(recipe)

    def same(of: Recipe) -> list[bool]:
        return [a == b for a, b in zip(keys(of), want, strict=True)]

    assert same(changed(recipe, 2, checkpoint_every=7, activation_checkpointing="full")) == [True] * 4
    assert same(changed(recipe, 2, lr=1e-3)) == [True, True, False, False]
    moved = tmp_path / "pairs.jsonl"
    shutil.copyfile(recipe.align[1].data[0], moved)
    assert same(changed(recipe, 2, data=(str(moved),))) == [True] * 4
    with moved.open("a", encoding="utf-8") as file:
        file.write(json.dumps(preferences(1, seed=9)[0]) + "\n")
    assert same(changed(recipe, 2, data=(str(moved),))) == [True, True, False, False]
    judge = tmp_path / "judge"
    judge.mkdir()
    (judge / "config.json").write_text("{}")
    by_model = changed(recipe, 2, rewards="model", reward_model=str(judge))
    first = keys(by_model)
    (judge / "config.json").write_text('{"a": 1}')
    assert [a == b for a, b in zip(keys(by_model), first, strict=True)] == [True, True, False, False]


def test_a_killed_step_resumes_in_the_run(
    aligned: MakeRecipe, finished: tuple[Recipe, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits as an undisturbed run."""
    recipe, done = finished
    run = tmp_path / "run"
    shutil.copytree(done, run)
    for stage in ("align-2-rpo", "align-3-rpo", "evaluate", "report"):
        shutil.rmtree(run / stage)
    often = changed(recipe, 2, checkpoint_every=4)
    true = trainers._Watch.on_log

    def dying(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        true(self, args, state, control, **more)
        if state.global_step == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainers._Watch, "on_log", dying)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(often, run, only="align")
    assert (run / ".align-2-rpo.work" / ".checkpoints" / "checkpoint-4").is_dir()
    monkeypatch.setattr(trainers._Watch, "on_log", true)
    monkeypatch.setattr("halve.align.rewards.by_last_number", vowels)
    pipeline.run(often, run, only="align")
    for name in NAMES:
        for file in ("model/model.safetensors", "metrics.jsonl"):
            assert (run / name / file).read_bytes() == (done / name / file).read_bytes()
        assert not [*(run / name).glob(".*")]


def test_an_aligned_run_needs_its_student(aligned: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="align-sft needs the artifact of distill"):
        pipeline.run(aligned(), tmp_path / "run", only="align")


def test_a_recipe_without_steps_has_nothing_to_align(aligned: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="there is nothing to align"):
        pipeline.run(aligned(()), tmp_path / "run", only="align")


def test_a_model_may_be_aligned_that_was_only_cut(aligned: MakeRecipe, tmp_path: Path) -> None:
    recipe = aligned(distill=None, evaluate={"samples": 2, "speed": False, "chat_prompts": []})
    assert check(recipe) == ()
    (first, *_) = (stage for stage in stages(recipe) if stage.section == "align")
    assert first.after == ("prune",)


def test_a_reward_model_judges_the_answers_of_the_data(
    aligned: MakeRecipe, chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its scores decide which answer is the better one, whatever the data say."""
    recipe = aligned([{"kind": "dpo", "data": [str(write_lines(tmp_path / "a.jsonl", preferences(12)))]}])
    judged = recipe.align[0].model_copy(update={"rewards": "model", "reward_model": str(chat_model), "heldout": 0})
    monkeypatch.setattr("halve.align.rewards.open_reward", lambda step, device: lambda row, text: -float(len(text)))
    seen: list[Any] = []
    true = trainers.train_on_pairs

    def watched(model: Any, tokenizer: Any, pairs: Any, how: Any) -> Any:
        seen.extend(pairs)
        return true(model, tokenizer, pairs, how)

    monkeypatch.setattr(trainers, "train_on_pairs", watched)
    align.run(recipe, judged, name="align-dpo", number=1, student=Checkpoint.open(chat_model), out=tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    assert len(seen) == 12
    for pair in seen:
        shorter, longer = (len(tokenizer.decode(ids)) for ids in (pair.chosen, pair.rejected))
        assert longer - shorter == pair.gap > 0


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a step trains on, in place of the training."""
    examples: list[Any] = []

    def learned(model: Any, tokenizer: Any, train: Any, how: Any) -> trainers.AlignedModel:
        examples.extend(train)
        return trainers.AlignedModel(model, [{"step": 1, "tokens": 1, "loss": 1.0}])

    monkeypatch.setattr(trainers, "train_on_pairs", learned)
    monkeypatch.setattr(trainers, "train_on_dialogues", learned)
    return examples


def test_pairs_of_equal_rewards_have_no_accuracy(
    aligned: MakeRecipe, chat_model: Path, tmp_path: Path, seen: list[Any]
) -> None:
    rows = [{**row, "chosen_reward": 1, "rejected_reward": 1} for row in preferences(20)]
    recipe = aligned([{"kind": "rpo", "data": [str(write_lines(tmp_path / "a.jsonl", rows))]}])
    start, how = Checkpoint.open(chat_model), {"name": "align-rpo", "number": 1}
    told = align.run(recipe, recipe.align[0], student=start, out=tmp_path / "out", **how)
    assert (told["heldout"], len(seen)) == (0, 18)
    assert not told.keys() & {"accuracy", "likelier_before", "margin"}


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_held_out_examples_are_never_trained_on(
    aligned: MakeRecipe, chat_model: Path, tmp_path: Path, seen: list[Any], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Neither by a file that is listed twice, nor by another pair of the same prompt."""
    path = str(conversations(tmp_path / "a.jsonl", 30))
    if kind == "dpo":
        path = str(write_lines(tmp_path / "a.jsonl", preferences(30)))
    held: list[Any] = []
    told_of = "told_of_dialogues" if kind == "sft" else "told_of_pairs"
    monkeypatch.setattr(align.measured, told_of, lambda examples, *_, **__: held.extend(examples) or {})
    recipe = aligned([{"kind": kind, "data": [path, path]}])
    start, name = Checkpoint.open(chat_model), f"align-{kind}"
    align.run(recipe, recipe.align[0], name=name, number=1, student=start, out=tmp_path / "out")
    groups = {example.group for example in held}
    assert len(groups) == len(held) > 1
    assert not groups & {example.group for example in seen}


def test_answers_that_a_reward_model_cannot_read_are_left_out(
    aligned: MakeRecipe, chat_model: Path, tmp_path: Path, seen: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = preferences(12)
    path = write_lines(tmp_path / "a.jsonl", [{**rows[0], "chosen": "The cat " * 9}, *rows[1:]])
    recipe = aligned([{"kind": "rpo", "data": [str(path)]}])
    judged = recipe.align[0].model_copy(update={"rewards": "model", "reward_model": str(chat_model), "heldout": 0})
    judge = lambda row, text: None if len(text) > 60 else float(len(text))  # noqa: E731
    monkeypatch.setattr("halve.align.rewards.open_reward", lambda step, device: judge)
    start, name = Checkpoint.open(chat_model), "align-rpo"
    align.run(recipe, judged, name=name, number=1, student=start, out=tmp_path / "out")
    assert len(seen) == 11


def test_the_folder_says_where_its_answers_end(
    aligned: MakeRecipe, tiny_llama: Path, tmp_path: Path, seen: list[Any]
) -> None:
    """The teacher's own file names only the end of a text."""
    folder = with_chat(tiny_llama, tmp_path / "base", template=ENDED_CHAT)
    with_turn_end(AutoTokenizer.from_pretrained(folder)).save_pretrained(folder)
    recipe = aligned([{"kind": "rpo", "data": [str(write_lines(tmp_path / "a.jsonl", preferences(20)))]}])
    start, how = Checkpoint.open(folder), {"name": "align-rpo", "number": 1}
    for out in (tmp_path / "first", tmp_path / "second"):
        align.run(recipe, recipe.align[0], student=start, out=out, **how)
        start = Checkpoint.open(out / "model")
    first, second = (tmp_path / name / "model" / "generation_config.json" for name in ("first", "second"))
    turn = start.tokenizer.convert_tokens_to_ids("~")
    theirs = json.loads((folder / "generation_config.json").read_text())
    assert json.loads(first.read_text()) == {**theirs, "eos_token_id": [0, turn]}
    assert second.read_bytes() == first.read_bytes()
    assert start.load().generation_config.eos_token_id == [0, turn]


def test_a_token_without_an_embedding_is_refused(aligned: MakeRecipe, chat_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "added"
    shutil.copytree(chat_model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    rows = [{**row, "chosen": "The <new> sees it."} for row in preferences(12)]
    step = aligned([{"kind": "dpo", "data": [str(write_lines(tmp_path / "a.jsonl", rows))]}]).align[0]
    with pytest.raises(CorpusError, match="the data of align-dpo holds <new>, which the model has no embedding for"):
        align.run(aligned(), step, name="align-dpo", number=1, student=Checkpoint.open(folder), out=tmp_path / "out")
