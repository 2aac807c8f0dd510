"""A model that is a config alone, and a recipe for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import TINY


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY), encoding="utf-8")
    return folder


@pytest.fixture
def recipe(model: Path, tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("some words\n" * 100, encoding="utf-8")
    path = tmp_path / "tiny.yaml"
    path.write_text(
        f"""
name: tiny
model: {model}
data: {{train: [text.txt], valid: [text.txt], context: 32}}
prune: {{ffn: 80}}
distill: {{tokens: 1000, batch: 4}}
""",
        encoding="utf-8",
    )
    return path
