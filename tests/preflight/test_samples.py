"""Text that makes too few samples is refused by `check`, before a run tokenizes it."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halve.model.checkpoint import Checkpoint
from halve.preflight import samples as preflight_text
from halve.preflight.check import check
from halve.progress import SILENT
from halve.recipe.schema import Recipe, Training
from halve.text import course
from halve.text.opened import require_embedded

MakeRecipe = Callable[..., Recipe]
TRIAL = {"score": {"samples": 2}, "prune": {"non_embedding_ratio": 0.5, "refit_samples": 2}}
SENTENCE = "The old cat sees the small dog. "


@pytest.fixture
def asked(make_recipe: MakeRecipe, tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe whose training and held-out text are these."""

    def make(train: str, valid: str = SENTENCE * 20, **changes: Any) -> Recipe:
        (tmp_path / "train.txt").write_text(train)
        (tmp_path / "valid.jsonl").write_text(json.dumps({"text": valid}) + "\n")
        texts = {"train": [str(tmp_path / "train.txt")], "valid": [str(tmp_path / "valid.jsonl")]}
        data = {**texts, "context": 32, **changes.pop("data", {})}
        return make_recipe(**{"data": data, **changes})

    return make


@pytest.mark.parametrize(
    ("train", "changes", "message"),
    [
        ("cat", {}, "the corpus has fewer tokens than one sample"),
        (SENTENCE * 8, {"score": {"samples": 1}}, "1 calibration samples are too few\n"),
        ("0" * 3000, {}, "calibration samples are constant"),
        (SENTENCE * 40, TRIAL, "2 calibration samples are too few to compare shapes"),
        (
            SENTENCE * 9,
            {"distill": {"tokens": 256, "batch": 4, "phases": [{"from_tokens": 128, "context": 120}]}},
            "fewer tokens than one sample: [0-9]+ of 120",
        ),
    ],
)
def test_too_little_training_text(
    asked: Callable[..., Recipe], train: str, changes: dict[str, Any], message: str
) -> None:
    assert check(asked(SENTENCE * 40)) == ()
    (error,) = check(asked(train, **changes))
    assert re.search(message, str(error)), str(error)


@pytest.mark.parametrize("method", ["trial", "additive"])
def test_a_search_wants_samples_for_its_trial(asked: Callable[..., Recipe], method: str) -> None:
    few = {"score": {"samples": 2}, "prune": {"refit_samples": 2}}
    found = check(asked(SENTENCE * 40, **few, search={"budget": {"non_embedding": "60%"}, "method": method}))
    if method == "additive":
        assert found == ()
        return
    (error,) = found
    assert error.what == "2 calibration samples are too few to compare shapes"
    assert "score.samples of 3 or more" in error.fix
    assert error.fix.endswith("choose search.method: additive")


def test_a_recipe_that_asks_for_too_few_samples_is_refused_with_any_text(asked: Callable[..., Recipe]) -> None:
    (error,) = check(asked((SENTENCE + "\n\n") * 40_000, **TRIAL))
    assert error.what == "2 calibration samples are too few to compare shapes"
    assert error.fix.endswith("set prune.shape: width")


def test_too_little_held_out_text_and_a_part_that_is_too_small(asked: Callable[..., Recipe], tmp_path: Path) -> None:
    (error,) = check(asked(SENTENCE * 40, "cat"))
    assert "the corpus has fewer tokens than one sample" in error.what
    asked("cat")
    parts = {name: {"sources": [str(tmp_path / name)], "weight": 1} for name in ("train.txt", "valid.jsonl")}
    (error,) = check(asked("cat", data={"train": parts}))
    assert "part train.txt of data.train has fewer tokens than one sample" in error.what


def test_a_correction_beside_has_no_course_of_its_own(
    asked: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    original = course.open_course

    def open_course(recipe: Recipe, training: Training, **how: Any) -> course.Course:
        opened.append(type(training).__name__)
        return original(recipe, training, **how)

    monkeypatch.setattr(course, "open_course", open_course)
    training = {"tokens": 256, "batch": 4}
    for when, names in (("beside", ["Distill"]), ("before", ["Correct", "Distill"])):
        opened.clear()
        assert check(asked(SENTENCE * 200, correct={**training, "when": when}, distill=training)) == ()
        assert opened == names


def test_long_text_is_not_tokenized(asked: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = asked(SENTENCE * 40)
    monkeypatch.setattr(preflight_text, "_SHORT_CHARS", 2000)
    assert check(asked("cat", SENTENCE * 100)) == ()
    assert len(check(asked("cat"))) == 1
    monkeypatch.setattr(tempfile, "tempdir", "/no/such/folder")
    monkeypatch.setattr(preflight_text, "_SHORT_CHARS", 100)
    assert check(recipe) == ()


def test_token_files_that_have_changed(asked: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe, cache = asked(SENTENCE * 40), tmp_path / "run" / "data"
    teacher = Checkpoint.open(recipe.model)
    for split in ("train", "valid"):
        require_embedded(recipe, teacher, split, cache=cache, progress=SILENT)
    made = sorted(cache.iterdir())
    preflight_text.check_samples(recipe, teacher, cache)
    assert sorted(cache.iterdir()) == made
    for path in (path for path in made if path.suffix in (".json", ".tokens") and path.name != "hashes.json"):
        before = path.read_bytes()
        path.write_bytes(bytes([before[0] ^ 1]) + before[1:])
        with pytest.raises(Exception, match=re.escape(str(path))):
            preflight_text.check_samples(recipe, teacher, cache)
        path.write_bytes(before)
    made[0].unlink()
    preflight_text.check_samples(recipe, teacher, cache)
    assert not made[0].exists()


def test_a_tokenizer_without_a_first_token_is_asked_for_none(asked: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = asked(SENTENCE * 40)
    teacher, cache = Checkpoint.open(recipe.model), tmp_path / "run" / "data"
    teacher.tokenizer.bos_token = None
    assert teacher.tokenizer.bos_token_id is None
    cache.mkdir(parents=True)  # as a run has it that begins
    preflight_text.check_samples(recipe, teacher, cache)
