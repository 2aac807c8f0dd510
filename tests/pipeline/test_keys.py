"""The key of a stage changes with the content of every file that the stage reads."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halve.model.checkpoint import Checkpoint
from halve.pipeline.keys import content
from halve.recipe.schema import Recipe

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def key(make_recipe: MakeRecipe, tiny_llama: Path, tmp_path: Path) -> Callable[..., Any]:
    """`key("task_data", evaluate=...)`: what the key of a stage holds of an input."""

    def of(name: str, model: Path = tiny_llama, **changes: Any) -> list[Any]:
        recipe = make_recipe(model=str(model), **changes)
        teacher = Checkpoint.open(model, home=tmp_path)
        return content(recipe, name, tmp_path / "hashes.json", teacher=teacher)

    return of


def test_what_goes_with_every_student_counts(key: Callable[..., Any], tiny_llama: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    templates = model / "additional_chat_templates"
    seen = [key("teacher"), key("teacher", model)]
    assert seen[0] == seen.pop(), "the same content in another place"

    def another() -> bool:
        seen.append(key("teacher", model))
        return seen[-1] not in seen[:-1]

    (model / "generation_config.json").write_text('{"eos_token_id": [1, 2]}', encoding="utf-8")
    assert another()
    (model / "generation_config.json").unlink()
    assert another()
    templates.mkdir()
    assert not another()
    (templates / "tools.jinja").write_text("{{ tools }}", encoding="utf-8")
    assert another()
    (templates / "tools.jinja").write_text("{{ tools }}!", encoding="utf-8")
    assert another()
    (templates / "tools.jinja").rename(templates / "documents.jinja")
    assert another()
    (model / "README.md").write_text("A card is copied by no stage.", encoding="utf-8")
    assert not another()


def test_every_shard_of_a_task_counts(key: Callable[..., Any], tmp_path: Path) -> None:
    shards = [tmp_path / f"test-{i:05d}-of-00002.jsonl" for i in range(2)]
    for shard in shards:
        shard.write_text('{"question": "Why?", "answer": "#### 1"}', encoding="utf-8")
    section = {"data": {"gsm8k": str(tmp_path)}, "tasks": {"gsm8k": 0}}
    before = key("task_data", evaluate=section)
    assert before == key("task_data", evaluate=section)
    shards[1].write_text('{"question": "How?", "answer": "#### 2"}', encoding="utf-8")
    assert key("task_data", evaluate=section) != before
