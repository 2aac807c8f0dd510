"""Two ranks make the student of one: of conversations, a GGUF file, with compiled layers, and from drawn logits."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import forked
import gguf_files as files
import pytest
import torch
import yaml
from chat import CHATML, small_talk, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from halve.pipeline import run as pipeline
from halve.recipe.schema import Recipe
from halve.train.ranks import blocks

LIMIT_S = 300.0
TRAINING: dict[str, Any] = {"tokens": 3 * 4 * 96, "batch": 4, "lr": 3e-3, "warmup_steps": 1, "eval_samples": 4}


@pytest.fixture(scope="module")
def recipe(
    make_recipe: Callable[..., Recipe],
    chat_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Recipe:
    """Conversations of several lengths, so that ranks count different numbers of tokens, and a teacher as GGUF."""
    folder = tmp_path_factory.mktemp("chat")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(chat_model), AutoTokenizer.from_pretrained(chat_model)
    path = files.write_gguf(model, folder / "tiny.gguf", tokenizer=tokenizer, kind=files.F32)
    train = write_rows(folder / "train.jsonl", *small_talk(60))
    valid = write_rows(folder / "valid.jsonl", *small_talk(9, seed=1))
    text = {"train": [str(train)], "valid": [str(valid)], "messages_field": "messages", "context": 96}
    return make_recipe(model=str(path), data=text, dtype="float32", distill={**TRAINING, "compile": True})


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Layers are traced and called through the compiler, which makes no machine code. Returns what is compiled."""
    asked: list[Any] = []
    compile_ = functools.partial(torch.compile, backend="eager")

    def noted(function: Any) -> Any:
        asked.append(function)
        return compile_(function)

    monkeypatch.setattr(blocks.torch, "compile", noted)
    return asked


def in_two(recipe: Recipe, run: Path, *words: str) -> None:
    path = run.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True)))
    answers = forked.in_ranks([*words, str(path), "--out", str(run)], 2, folder=run.parent, limit=LIMIT_S)
    assert [answer.code for answer in answers] == [0, 0], answers


def without(run: Path, folder: Path, stages: Sequence[str]) -> Path:
    shutil.copytree(run, folder)
    for stage in stages:
        shutil.rmtree(folder / stage)
    return folder


def require_alike(one: Path, two: Path) -> None:
    """The same losses, gradient norms and weights up to rounding."""
    courses = []
    for run in (one, two):
        lines = [json.loads(line) for line in (run / "distill" / "metrics.jsonl").read_text().splitlines()]
        courses.append([[line["step"], line.get("loss", 0.0), line.get("grad_norm", 0.0)] for line in lines])
    assert len(courses[0]) == len(courses[1]) > 3
    for mine, its in zip(*courses, strict=True):
        assert mine == pytest.approx(its, rel=1e-4)
    models = [AutoModelForCausalLM.from_pretrained(run / "distill" / "model") for run in (one, two)]
    weights = [dict(model.named_parameters()) for model in models]
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_two_ranks_make_the_student_of_one(recipe: Recipe, eager: list[Any], tmp_path: Path) -> None:
    two = tmp_path / "two"
    in_two(recipe, two, "run")
    assert len(list(two.glob("data/gguf-*"))) == 1
    assert (two / "distill" / "model" / "chat_template.jinja").read_text().strip() == CHATML.strip()
    one = without(two, tmp_path / "one", ("distill", "evaluate", "report"))
    pipeline.run(recipe, one, only="distill")
    assert len(eager) == 3 + 4, "the student's layers and the teacher's"
    require_alike(one, two)

    drawn = recipe.model_copy(update={"distill": recipe.distill and recipe.distill.model_copy(update=DRAWN)})
    three = without(one, tmp_path / "three", ("distill",))
    pipeline.run(drawn, three, only="cache")
    four = without(three, tmp_path / "four", ())
    pipeline.run(drawn, three, only="distill")
    in_two(drawn, four, "distill")
    require_alike(three, four)


DRAWN = {"cache": "logits", "cache_samples": 8, "compile": False}
