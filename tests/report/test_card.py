"""The card of a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import yaml
from made_run import seal

from halve.report import page as report


def test_the_card(run: Path, tmp_path: Path) -> None:
    report.write_report(run, tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["halve", "pruning", "distillation"],
    }
    assert "| **Distilled student** | " in body
    embedded = body.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(embedded)["distill"]["baselines"] == ["ce", "random_init"]
    assert "someone" not in card
    tables = [line for line in body.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in tables} == {8, 5}


def test_the_card_names_the_students_license(run: Path, tmp_path: Path) -> None:
    part = shutil.copytree(run, tmp_path / "run")
    (part / "distill" / "model").mkdir()
    (part / "distill" / "model" / "README.md").write_text("---\nlicense: other\nlicense_name: 'llama3: 1'\n---\n")
    seal(part / "distill")
    report.write_report(part, tmp_path / "out")
    front = yaml.safe_load((tmp_path / "out" / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    assert (front["license"], front["license_name"]) == ("other", "llama3: 1")
    assert front["tags"] == ["halve", "pruning", "distillation"]


def test_a_hub_teacher_is_named_as_base_model(run: Path, tmp_path: Path) -> None:
    part = shutil.copytree(run, tmp_path / "run")
    recipe = json.loads((part / "recipe.json").read_text())
    (part / "recipe.json").write_text(json.dumps(recipe | {"model": "owner/name-8B"}))
    report.write_report(part, tmp_path / "out")
    assert "\nbase_model: owner/name-8B\n" in (tmp_path / "out/README.md").read_text(encoding="utf-8")
