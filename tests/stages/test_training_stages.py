"""Correction and distillation from folder to folder, as the pipeline calls them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from halve.errors import CorpusError, TokenizerError, TrainError
from halve.model.checkpoint import Checkpoint
from halve.recipe.schema import Recipe
from halve.stages import cache, correct, distill
from halve.train.teachers import cache as cached_answers

STEPS = {"tokens": 4 * 8 * 32, "batch": 8, "lr": 3e-3, "min_lr": 1e-3, "warmup_steps": 1, "eval_samples": 4}
MakeRecipe = Callable[..., Recipe]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """The tiny llama without its last layer, in bfloat16."""
    folder = tmp_path_factory.mktemp("students") / "student"
    shutil.copytree(tiny_llama, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3, "dtype": "bfloat16"}))
    tensors = load_file(folder / "model.safetensors")
    kept = {name: value.bfloat16() for name, value in tensors.items() if "layers.3." not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def distilled(
    recipe: Recipe,
    tmp_path: Path,
    *,
    teacher: Path,
    student: Path,
    variant: str = "student",
    answers: Path | None = None,
) -> tuple[dict[str, Any], dict[str, torch.Tensor], list[dict[str, Any]]]:
    out = tmp_path / variant
    out.mkdir(parents=True)
    data = tmp_path / "data"
    metrics = distill.run(
        recipe,
        teacher=Checkpoint.open(teacher),
        student=Checkpoint.open(student),
        variant=variant,
        cache=data,
        out=out,
        answers_in=answers,
    )
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return metrics, load_file(out / "model" / "model.safetensors"), lines


def test_a_student_with_a_tokenizer_of_its_own_is_refused(
    make_recipe: MakeRecipe, tiny_llama: Path, student: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(student, other)
    spec = json.loads((other / "tokenizer.json").read_text())
    (one, first), (two, second) = list(spec["model"]["vocab"].items())[-2:]
    spec["model"]["vocab"] |= {one: second, two: first}
    (other / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(TokenizerError, match="has another tokenizer than"):
        distilled(make_recipe(distill=STEPS), tmp_path, teacher=tiny_llama, student=other)


def test_a_corrected_teacher_is_a_model_like_the_teacher(
    make_recipe: MakeRecipe, tiny_llama: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(correct=STEPS)
    metrics = correct.run(recipe, teacher=Checkpoint.open(tiny_llama), cache=tmp_path / "data", out=tmp_path)
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_llama, tmp_path / "model"))
    assert {k: (v.shape, v.dtype) for k, v in before.items()} == {k: (v.shape, v.dtype) for k, v in after.items()}
    assert any(not torch.equal(before[name], after[name]) for name in before)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert metrics["heldout"] == lines[-1]["heldout"]
    assert metrics["heldout"]["ce"] < lines[0]["heldout"]["ce"]
    AutoTokenizer.from_pretrained(tmp_path / "model")
    record = json.loads((tmp_path / "model" / "halve.json").read_text())
    assert (record["stage"], record["tokens"], record["seed"]) == ("correct", 1024, 0)


def test_a_student_comes_nearer_to_its_teacher(
    make_recipe: MakeRecipe, tiny_llama: Path, student: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(distill=STEPS | {"tokens": 20 * 8 * 32})
    metrics, after, lines = distilled(recipe, tmp_path, teacher=tiny_llama, student=student)
    assert {value.dtype for value in after.values()} == {torch.bfloat16}
    assert lines[-1]["heldout"]["kl"] < 0.8 * lines[0]["heldout"]["kl"]
    assert metrics["variant"] == "student"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student" / "model", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_variants_share_the_tokens_and_differ_in_one_thing(
    make_recipe: MakeRecipe, tiny_llama: Path, student: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(distill=STEPS)
    starts, ends = {}, {}
    for variant in ("student", "ce", "random_init"):
        _, ends[variant], lines = distilled(recipe, tmp_path, teacher=tiny_llama, student=student, variant=variant)
        starts[variant] = lines[0]["heldout"]
    assert starts["ce"] == starts["student"]
    assert starts["random_init"]["ce"] > starts["student"]["ce"]
    assert any(not torch.equal(ends["ce"][name], ends["student"][name]) for name in ends["ce"])
    (tmp_path / "again").mkdir()
    _, again, _ = distilled(recipe, tmp_path / "again", teacher=tiny_llama, student=student, variant="random_init")
    assert all(torch.equal(again[name], ends["random_init"][name]) for name in again)


@pytest.mark.parametrize("objective", ["ce", {"kl": 0.75, "ce": 0.25}])
def test_the_recipe_chooses_the_objective(
    objective: Any, make_recipe: MakeRecipe, tiny_llama: Path, student: Path, tmp_path: Path
) -> None:
    losses = []
    for place, asked in (("kl", "kl"), ("other", objective)):
        recipe = make_recipe(distill=STEPS | {"objective": asked})
        (tmp_path / place).mkdir()
        losses.append(distilled(recipe, tmp_path / place, teacher=tiny_llama, student=student)[2][1]["loss"])
    assert losses[1] > 1.2 * losses[0]


def test_a_random_teacher_is_refused(make_recipe: MakeRecipe, tiny_llama: Path, student: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny_llama, teacher)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_llama)).save_pretrained(teacher)
    with pytest.raises(TrainError, match="the teacher teaches nothing"):
        distilled(make_recipe(distill=STEPS), tmp_path, teacher=teacher, student=student)
    assert not (tmp_path / "student" / "model").exists()


def test_a_sample_longer_than_the_context_is_refused(
    make_recipe: MakeRecipe, tiny_llama: Path, corpus: Path, tmp_path: Path
) -> None:
    data = {"train": [str(corpus / "train.txt")], "valid": [str(corpus / "valid.txt")], "context": 200}
    with pytest.raises(CorpusError, match="a sample has 200 tokens, the model's context has 128"):
        correct.run(
            make_recipe(correct=STEPS, data=data),
            teacher=Checkpoint.open(tiny_llama),
            cache=tmp_path,
            out=tmp_path / "out",
        )


def cached(recipe: Recipe, tmp_path: Path, teacher: Path) -> Path:
    out = tmp_path / "cache"
    out.mkdir(parents=True)
    cache.run(recipe, teacher=Checkpoint.open(teacher), cache=tmp_path / "data", out=out)
    return out


def losses(lines: list[dict[str, Any]]) -> list[float]:
    return [line["loss"] for line in lines[1:]]


def test_several_students_learn_from_cached_states_what_they_learn_from_the_teacher(
    make_recipe: MakeRecipe, tiny_llama: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = STEPS | {"objective": {"kl": 0.75, "jsd": 1.0, "ce": 0.25}, "micro_batch": 4}
    answers = cached(make_recipe(distill=steps | {"cache": "hidden"}), tmp_path, tiny_llama)
    live, read = {}, {}
    for variant in ("student", "random_init", "ce"):
        recipe = make_recipe(distill=steps)
        live[variant] = distilled(recipe, tmp_path / "live", teacher=tiny_llama, student=student, variant=variant)
    loaded: list[str] = []
    load = Checkpoint.load

    def watched(opened: Checkpoint, **kwargs: Any) -> Any:
        loaded.append(opened.source)
        return load(opened, **kwargs)

    monkeypatch.setattr(Checkpoint, "load", watched)
    for variant in live:
        recipe = make_recipe(distill=steps | {"cache": "hidden"})
        where = {"teacher": tiny_llama, "student": student, "variant": variant, "answers": answers}
        read[variant] = distilled(recipe, tmp_path / "read", **where)
        assert losses(read[variant][2]) == pytest.approx(losses(live[variant][2]), rel=1e-4)
        assert read[variant][0]["heldout"] == pytest.approx(live[variant][0]["heldout"], rel=1e-3)
        assert read[variant][0]["teacher_ce"] == pytest.approx(live[variant][0]["teacher_ce"], rel=1e-5)
    assert set(loaded) == {str(student)}  # the teacher's body is not there


def test_a_student_learns_from_drawn_logits(
    make_recipe: MakeRecipe, tiny_llama: Path, student: Path, tmp_path: Path
) -> None:
    steps = STEPS | {"tokens": 20 * 8 * 32}
    recipe = make_recipe(distill=steps | {"cache": "logits", "cache_samples": 32})
    answers = cached(recipe, tmp_path, tiny_llama)
    where = {"teacher": tiny_llama, "student": student}
    _, _, drawn = distilled(recipe, tmp_path, **where, answers=answers)
    _, _, live = distilled(make_recipe(distill=steps), tmp_path / "live", **where)
    assert drawn[0]["heldout"] == pytest.approx(live[0]["heldout"], rel=1e-4)
    assert losses(drawn) == pytest.approx(losses(live), abs=0.05)  # of KL: the cross-entropy is far above
    assert min(line["heldout"]["ce"] for line in live if "heldout" in line) > 0.5
    gained = live[0]["heldout"]["kl"] - live[-1]["heldout"]["kl"]
    assert drawn[0]["heldout"]["kl"] - drawn[-1]["heldout"]["kl"] > 0.8 * gained


def test_a_cache_of_something_else_is_refused_before_the_first_step(
    make_recipe: MakeRecipe, tiny_llama: Path, student: Path, tmp_path: Path
) -> None:
    keys = STEPS | {"cache": "hidden"}
    answers = cached(make_recipe(distill=keys), tmp_path, tiny_llama)
    other = tmp_path / "other"
    shutil.copytree(tiny_llama, other)
    tensors = load_file(other / "model.safetensors")
    name = "model.norm.weight"
    save_file(tensors | {name: tensors[name] * 1.01}, other / "model.safetensors", metadata={"format": "pt"})
    longer = make_recipe(distill=keys | {"tokens": 6 * 8 * 32})
    shorter = make_recipe(distill=keys | {"tokens": 2 * 8 * 32})
    for place, recipe, teacher, what in (
        ("a", make_recipe(distill=keys), other, "is of another teacher"),
        ("b", longer, tiny_llama, "has no answer for sample"),
        ("c", make_recipe(distill=keys, seed=3), tiny_llama, "has no answer for sample"),
    ):
        with pytest.raises(TrainError, match=what):
            distilled(recipe, tmp_path / place, teacher=teacher, student=student, answers=answers)
        assert not (tmp_path / place / "student" / "metrics.jsonl").exists()
    distilled(shorter, tmp_path / "d", teacher=tiny_llama, student=student, answers=answers)


def test_a_teacher_that_teaches_nothing_is_not_cached(
    make_recipe: MakeRecipe, tiny_llama: Path, tmp_path: Path
) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny_llama, teacher)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_llama)).save_pretrained(teacher)
    with pytest.raises(TrainError, match="the teacher teaches nothing"):
        cached(make_recipe(distill=STEPS | {"cache": "logits"}), tmp_path, teacher)
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("keys", [{"offload_teacher": True}, {"teacher_device": "cpu"}])
def test_where_the_teacher_is_changes_nothing(
    keys: dict[str, Any], make_recipe: MakeRecipe, tiny_llama: Path, student: Path, tmp_path: Path
) -> None:
    found = []
    for place, asked in (("plain", {}), ("elsewhere", keys)):
        recipe = make_recipe(distill=STEPS | asked)
        found.append(distilled(recipe, tmp_path / place, teacher=tiny_llama, student=student)[1])
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_resumed_training_reads_the_cache_to_the_same_bits(
    make_recipe: MakeRecipe, tiny_llama: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = STEPS | {"tokens": 6 * 8 * 32, "cache": "logits", "checkpoint_every": 2}
    recipe = make_recipe(distill=keys)
    answers = cached(recipe, tmp_path, tiny_llama)
    where: dict[str, Any] = {"teacher": tiny_llama, "student": student, "answers": answers}
    _, whole, _ = distilled(recipe, tmp_path / "whole", **where)
    asked = 0
    answer = cached_answers.CachedDraws.answer

    def failing(self: Any, batch: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked == 6:
            raise KeyboardInterrupt
        return answer(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(cached_answers.CachedDraws, "answer", failing)
        with pytest.raises(KeyboardInterrupt):
            distilled(recipe, tmp_path / "cut", **where)
    (tmp_path / "cut" / "student").rename(tmp_path / "cut" / "kept")
    out = tmp_path / "cut" / "kept"
    data = tmp_path / "cut" / "data"
    metrics = distill.run(
        recipe,
        teacher=Checkpoint.open(tiny_llama),
        student=Checkpoint.open(student),
        variant="student",
        cache=data,
        out=out,
        answers_in=answers,
    )
    assert metrics["steps"] == 6
    after = load_file(out / "model" / "model.safetensors")
    assert all(torch.equal(whole[name], after[name]) for name in whole)
