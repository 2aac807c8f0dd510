"""A whole run from a GGUF file: made into a folder once, resumed with the same bits, told on the card."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_files as files
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from halve.model.gguf import weights
from halve.pipeline import run as pipeline
from halve.preflight.sizes import planned_rounds
from halve.preflight.space import planned_disk
from halve.recipe.schema import Recipe

MakeRecipe = Callable[..., Recipe]
PRUNE = {"ffn": 40, "refit_samples": 8}
DISTILL = {"tokens": 256, "batch": 4, "warmup_steps": 1, "eval_samples": 2}


@pytest.fixture
def path(tiny_llama: Path, tmp_path: Path) -> Path:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)
    return files.write_gguf(model, tmp_path / "tiny.gguf", tokenizer=tokenizer, kind=files.Q8_0)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are dequantized, one after another."""
    found: list[Path] = []
    plain = weights.dequantized

    def noted(header: Any, config: Any) -> Any:
        found.append(header.path)
        return plain(header, config)

    monkeypatch.setattr(weights, "dequantized", noted)
    return found


def bits(run: Path) -> dict[str, str]:
    kept = [*run.glob("*/model/*"), *run.glob("data/gguf-*/*"), run / "score" / "scores.safetensors"]
    return {str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest() for file in kept}


def test_a_whole_run_and_the_same_again(path: Path, made: list[Path], make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(model=str(path), prune=PRUNE, distill=DISTILL)
    run = pipeline.run(recipe, tmp_path / "run")
    whole = bits(run)
    assert made == [path]
    assert len([name for name in whole if name.startswith("data/gguf-")]) > 4
    assert json.loads((run / "distill/model/halve.json").read_text())["base_model"] == "tiny.gguf"
    for card in ("distill/model/README.md", "report/README.md"):
        assert "The base model tiny.gguf is a GGUF file. It was dequantized to bfloat16" in (run / card).read_text()
    assert (run / "distill/model/chat_template.jinja").read_text().strip() == "{{ messages[0]['content'] }}"
    pipeline.run(recipe, run)  # finished: nothing is looked at again
    assert (made, bits(run)) == ([path], whole)
    pipeline.run(recipe, tmp_path / "halves", only="score")
    pipeline.run(recipe, tmp_path / "halves")
    assert made == [path, path]
    assert bits(tmp_path / "halves") == whole


def test_another_file_is_another_teacher(
    path: Path, made: list[Path], make_recipe: MakeRecipe, tiny_llama: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(model=str(path))
    run = pipeline.run(recipe, tmp_path / "run", only="score")
    first = (run / "score" / "manifest.json").read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    files.write_gguf(AutoModelForCausalLM.from_pretrained(tiny_llama), path, tokenizer=tokenizer, kind=files.F16)
    pipeline.run(recipe, run, only="score")
    assert made == [path, path]
    assert (run / "score" / "manifest.json").read_bytes() != first
    assert len(list(run.glob("data/gguf-*"))) == 2


def test_the_disk_plan_holds_the_folder(path: Path, make_recipe: MakeRecipe, tiny_llama: Path, tmp_path: Path) -> None:
    from halve.model.checkpoint import Checkpoint

    recipe = make_recipe(model=str(path))
    teacher = Checkpoint.open(path, home=tmp_path / "home")
    found = planned_rounds(recipe, teacher)
    plan = planned_disk(recipe, found, cuda=False)
    same = planned_disk(recipe.model_copy(update={"model": str(tiny_llama)}), found, cuda=False)
    more = plan.model_bytes - same.model_bytes
    written = (teacher.files / "model.safetensors").stat().st_size
    assert more == 2 * teacher.anatomy.ledger.count(teacher.anatomy.sizes).params
    assert 0 <= written - more < 8192
