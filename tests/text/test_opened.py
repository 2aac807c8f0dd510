"""Tokens that were added to a tokenizer alone: text may not hold them, all other text is none the worse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from halve.errors import CorpusError
from halve.model.checkpoint import Checkpoint
from halve.pipeline import run as pipeline
from halve.progress import SILENT
from halve.recipe.schema import Recipe
from halve.stages import distill
from halve.text.corpus import open_split
from halve.text.opened import require_embedded

MakeRecipe = Callable[..., Recipe]
PAD = "<pad>"


@pytest.fixture
def padded(tiny_llama: Path, tmp_path: Path) -> Path:
    """The tiny llama with a token that its embedding of 320 rows was not resized for."""
    folder = tmp_path / "padded"
    shutil.copytree(tiny_llama, folder)
    raw = json.loads((folder / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    raw["added_tokens"].append({"id": 320, "content": PAD, **flags, "special": True})
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    return folder


def test_a_tokenizer_with_an_added_token_beyond_the_embedding_works(
    padded: Path, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe = make_recipe(model=str(padded), distill={"tokens": 64, "batch": 2})
    assert Checkpoint.open(padded).tokenizer.convert_tokens_to_ids(PAD) == 320
    assert pipeline.check(recipe) == ()
    one, out = Checkpoint.open(padded), tmp_path / "out"
    out.mkdir()
    found = distill.run(recipe, teacher=one, student=one, variant="student", cache=tmp_path / "cache", out=out)
    assert found["teacher_ce"] > 0


@pytest.mark.parametrize("split", ["train", "valid"])
def test_text_that_makes_it_is_refused(padded: Path, make_recipe: MakeRecipe, tmp_path: Path, split: str) -> None:
    text = "the old cat sees the river. " * 40
    (tmp_path / "good.txt").write_text(text)
    (tmp_path / "bad.txt").write_text(text * 2 + PAD)
    files = {"train": "good.txt", "valid": "good.txt"} | {split: "bad.txt"}
    recipe = make_recipe(
        model=str(padded), data={**{key: [str(tmp_path / name)] for key, name in files.items()}, "context": 16}
    )
    with pytest.raises(CorpusError, match=f"the text of data.{split} holds {PAD}, .*\n.* 320 of .* has 320 entries"):
        pipeline.run(recipe, tmp_path / "run", only="score" if split == "train" else None)
    opened, cache = Checkpoint.open(padded), tmp_path / "run" / "data"
    assert open_split(recipe, split, cache=cache, tokenizer=opened.tokenizer).largest == 320
    with pytest.raises(CorpusError, match=PAD):  # also of a token file that is there
        require_embedded(recipe, opened, split, cache=cache, progress=SILENT)


def test_prompts_and_choices_that_make_it_are_refused_by_check(
    padded: Path, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    (tmp_path / "task.jsonl").write_text(json.dumps({"context": "a", "choices": ["b", PAD], "answer": 0}))
    for evaluated, what in (
        ({"prompts": [f"hello {PAD}"]}, "a prompt of evaluate.prompts"),
        ({"choices": [str(tmp_path / "task.jsonl")]}, "multiple-choice file task"),
    ):
        (error,) = pipeline.check(make_recipe(model=str(padded), evaluate=evaluated))
        assert error.what == f"{what} holds {PAD}, which the model has no embedding for"


def test_a_mark_between_documents_needs_an_embedding(padded: Path, make_recipe: MakeRecipe) -> None:
    raw = json.loads((padded / "tokenizer_config.json").read_text())
    (padded / "tokenizer_config.json").write_text(json.dumps({**raw, "eos_token": PAD}))
    (error,) = pipeline.check(make_recipe(model=str(padded)))
    assert error.what == f"with data.boundary auto the text holds {PAD}, which the model has no embedding for"
