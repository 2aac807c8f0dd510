"""The objective's keys from the recipe to a distilled model on the disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from halve.model.checkpoint import Checkpoint
from halve.recipe.schema import Recipe
from halve.stages import distill
from halve.train.loop import checkpoints, loop

MakeRecipe = Callable[..., Recipe]
STEPS = {"tokens": 6 * 8 * 32, "batch": 8, "lr": 3e-3, "min_lr": 1e-3, "warmup_steps": 1, "eval_samples": 4}
STATES = {"states": ["embedding", "input", "output", "attention"], "layers": {-2: -2, 0: 0}}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """The tiny llama without its last layer."""
    folder = tmp_path_factory.mktemp("students") / "student"
    shutil.copytree(tiny_llama, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in tensors.items() if "layers.3." not in k}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder


def distilled(
    recipe: Recipe, out: Path, *, teacher: Path, student: Path
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    out.mkdir(exist_ok=True, parents=True)
    distill.run(
        recipe,
        teacher=Checkpoint.open(teacher),
        student=Checkpoint.open(student),
        variant="student",
        cache=out.parent / "data",
        out=out,
    )
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return load_file(out / "model" / "model.safetensors"), lines


@pytest.mark.parametrize(
    "keys",
    [
        {"objective": "reverse_kl"},
        {"objective": "jsd", "beta": 0.3, "temperature": 2.0},
        {"objective": {"mse": 0.1, "cosine": 1.0}},
        {"top_k": 20},
        {"top_k": 20, "top_k_tail": True},
        {"intermediate": STATES},
        {"intermediate": STATES, "precision": "bfloat16", "activation_checkpointing": "full"},
        {"intermediate": STATES, "offload_teacher": True, "micro_batch": 4},
        {"intermediate": STATES | {"alpha": 0.5}, "objective": {"kl": 1.0, "ce": 0.5}},
    ],
)
def test_every_objective_brings_the_student_nearer(
    keys: dict[str, Any], make_recipe: MakeRecipe, tiny_llama: Path, student: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(distill=STEPS | keys)
    _, lines = distilled(recipe, tmp_path / "out", teacher=tiny_llama, student=student)
    assert lines[-1]["heldout"]["kl"] < lines[0]["heldout"]["kl"]


def test_the_map_of_states_is_trained_and_not_exported(
    make_recipe: MakeRecipe, tiny_llama: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(distill=STEPS | {"intermediate": STATES, "checkpoint_every": 2})
    maps, train = [], loop.train

    def watched(model: Any, lesson: loop.Lesson, *args: Any, **options: Any) -> Any:
        assert lesson.extra is not None
        before = lesson.extra.weight.detach().clone()
        result = train(model, lesson, *args, **options)
        maps.append((before, lesson.extra.weight.detach()))
        return result

    monkeypatch.setattr(loop, "train", watched)
    model, _ = distilled(recipe, tmp_path / "out", teacher=tiny_llama, student=student)
    assert model.keys() == load_file(student / "model.safetensors").keys()
    ((before, after),) = maps
    assert torch.equal(before, torch.eye(32))
    assert not torch.equal(before, after)


def test_a_killed_run_with_states_ends_with_the_same_bits(
    make_recipe: MakeRecipe, tiny_llama: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(distill=STEPS | {"intermediate": STATES, "checkpoint_every": 2})
    whole, course = distilled(recipe, tmp_path / "whole" / "out", teacher=tiny_llama, student=student)

    class Killed(BaseException):
        pass

    saved, save = [], checkpoints.save

    def once(*args: Any, **options: Any) -> Any:
        if saved:
            raise Killed
        saved.append(1)
        return save(*args, **options)

    monkeypatch.setattr(checkpoints, "save", once)
    with pytest.raises(Killed):
        distilled(recipe, tmp_path / "killed" / "out", teacher=tiny_llama, student=student)
    monkeypatch.setattr(checkpoints, "save", save)
    again, rest = distilled(recipe, tmp_path / "killed" / "out", teacher=tiny_llama, student=student)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert [line["loss"] for line in rest[1:]] == [line["loss"] for line in course[1:]]
