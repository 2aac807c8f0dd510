"""A mixture in phases, documents apart, through the real stages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_text
from transformers import PreTrainedModel

from halve.cut.repair.budget import samples_needed
from halve.cut.score.calibration import Calibration
from halve.cut.score.scores import Scores, samples_fingerprint
from halve.disk.files import read_json
from halve.errors import AnatomyError
from halve.model.checkpoint import Checkpoint
from halve.model.head import split
from halve.recipe.schema import Recipe
from halve.stages import correct, distill, prune, score
from halve.text import documents
from halve.text.course import open_course
from halve.text.mixture import open_mixture
from halve.train.objectives import logits as objectives

TRAINING = {"tokens": 8 * 4 * 32, "batch": 4, "micro_batch": 2, "lr": 1e-3, "warmup_steps": 0, "eval_samples": 4}
PHASES = [{"from_tokens": 3 * 128, "mixture": {"plain": 1, "rows": 1}}, {"from_tokens": 5 * 128, "context": 64}]


@pytest.fixture
def recipe(make_recipe: Callable[..., Recipe], corpus: Path, tmp_path: Path) -> Recipe:
    """Three parts of plain text and one of JSON lines; later half and half; later in twice the context."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in make_text(seed=2, num_documents=90)))
    parts = {
        "plain": {"sources": [str(corpus / "train.txt")], "weight": 3},
        "rows": {"sources": [str(rows)], "weight": 1},
    }
    return make_recipe(
        data={"train": parts, "valid": [str(rows)], "context": 32, "documents": "apart"},
        correct={**TRAINING, "phases": PHASES},
        distill={**TRAINING, "phases": PHASES},
        prune={"ffn": 48},
    )


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_stages_train_on_what_the_course_says(recipe: Recipe, tmp_path: Path) -> None:
    cache, out = tmp_path / "cache", {name: tmp_path / name for name in ("correct", "distill")}
    for folder in out.values():
        folder.mkdir()
    found = correct.run(recipe, teacher=Checkpoint.open(recipe.model), cache=cache, out=out["correct"])
    course_lines = [line for line in lines(out["correct"]) if line["step"]]
    assert (found["steps"], found["tokens"]) == (7, 5 * 128 + 2 * 256)
    assert [line["tokens"] for line in course_lines] == [*range(128, 5 * 128 + 1, 128), 7 * 128, 9 * 128]

    tokenizer, model = Checkpoint.open(recipe.model).tokenizer, Checkpoint.open(recipe.model).load(dtype="float32")
    assert recipe.correct is not None
    course = open_course(recipe, recipe.correct, cache=cache, tokenizer=tokenizer)
    batch = course.batch(1)
    assert batch.positions is not None
    with torch.no_grad():
        loss, count = objectives.cross_entropy()(*split(model), batch)
    assert course_lines[0]["loss"] == pytest.approx(float(loss) / count, rel=1e-6)
    assert count < batch.ids[:, 1:].numel(), "boundaries are not predicted"
    assert read_json(out["correct"] / "model" / "halve.json")["corpus"] == course.fingerprint

    distill.run(
        recipe,
        teacher=Checkpoint.open(recipe.model),
        student=Checkpoint.open(recipe.model),
        variant="student",
        cache=cache,
        out=out["distill"],
    )
    assert [line["tokens"] for line in lines(out["distill"]) if line["step"]] == [
        line["tokens"] for line in course_lines
    ]


@pytest.mark.filterwarnings("ignore::halve.text.boundary.BoundaryWarning")  # it has read joined text alone
def test_scores_and_cuts_see_the_mixture_joined(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Checkpoint.open(recipe.model).tokenizer
    mixture = open_mixture(recipe, cache=tmp_path, tokenizer=tokenizer)
    ids = mixture.calibration(8)
    rows = [part.calibration(count).tolist() for part, count in zip(mixture.parts, (6, 2), strict=True)]
    assert sorted(ids.tolist()) == sorted(rows[0] + rows[1])
    score.run(recipe, teacher=Checkpoint.open(recipe.model), cache=tmp_path, out=tmp_path)
    scored = Scores.load(tmp_path / "scores.safetensors", batch_agg="l2", seq_agg="mean", model=None)
    assert scored.samples == samples_fingerprint(ids)
    seen: list[torch.Tensor] = []

    def turn(calibration: Calibration, asked: Any, **_: Any) -> None:
        seen.append(calibration.samples_BS)
        raise KeyboardInterrupt

    monkeypatch.setattr(prune, "turn", turn)
    whole, scores = Checkpoint.open(recipe.model), tmp_path / "scores.safetensors"
    with pytest.raises(KeyboardInterrupt):
        prune.run(recipe, teacher=whole, scores=scores, cache=tmp_path, out=tmp_path)
    needed = samples_needed(recipe.prune, whole.anatomy.sizes, recipe.data.context)
    assert torch.equal(seen[0], mixture.calibration(max(needed, recipe.score.samples)))


@pytest.mark.parametrize("stage", ["correct", "distill"])
def test_a_model_that_reads_across_boundaries_is_not_trained(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    packed = documents._packed
    seen: list[PreTrainedModel] = []

    def crossing(model: PreTrainedModel, ids_BS: torch.Tensor) -> torch.Tensor:
        seen.append(model)
        return packed(model, ids_BS) if len(seen) == 1 and stage == "distill" else documents._joined(model, ids_BS)

    monkeypatch.setattr(documents, "_packed", crossing)
    run: dict[str, Callable[[], Any]] = {
        "correct": lambda: correct.run(
            recipe, teacher=Checkpoint.open(recipe.model), cache=tmp_path / "cache", out=tmp_path
        ),
        "distill": lambda: distill.run(
            recipe,
            teacher=Checkpoint.open(recipe.model),
            student=Checkpoint.open(recipe.model),
            variant="student",
            cache=tmp_path / "cache",
            out=tmp_path,
        ),
    }
    with pytest.raises(AnatomyError, match="does not keep packed documents apart"):
        run[stage]()
    assert len(seen) == (2 if stage == "distill" else 1), "of a distillation the teacher and the student are checked"
    assert not (tmp_path / "metrics.jsonl").exists()
