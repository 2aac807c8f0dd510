"""What a cut is given: the teacher's scores, its calibration samples, and a way to score what is left of it."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from halve.anatomy import Anatomy, Arch
from halve.cut.apply import Rescore
from halve.cut.repair.budget import samples_needed
from halve.cut.score import width
from halve.cut.score.calibration import Calibration
from halve.cut.score.scores import Scores
from halve.model.checkpoint import Checkpoint
from halve.recipe.schema import Prune, Recipe
from halve.text.mixture import Mixture


def calibration_samples(recipe: Recipe, prune: Prune, sizes: Arch, text: Mixture) -> Tensor:
    """The calibration samples. Those of conversations may be shorter than the context, and then there are more."""
    length = recipe.data.context
    while True:
        samples_BS = text.calibration(max(samples_needed(prune, sizes, length), recipe.score.samples))
        if samples_BS.shape[1] >= length:
            return samples_BS
        length = samples_BS.shape[1]


def read_scores(recipe: Recipe, teacher: Checkpoint, scores: Path) -> Scores:
    """The scores of the score stage with the recipe's aggregators. Raises `RunError` for those of another model."""
    score = recipe.score
    return Scores.load(scores, batch_agg=score.batch_agg, seq_agg=score.seq_agg, model=teacher.fingerprint)


def score_again(recipe: Recipe, calibration: Calibration) -> Scores:
    """Score a model that is made of the teacher's weights, the way the recipe scored the teacher."""
    asked = recipe.score
    return width.score(
        calibration,
        method=asked.method,
        ffn_point=asked.ffn_point,
        batch_agg=asked.batch_agg,
        seq_agg=asked.seq_agg,
        seed=recipe.seed,
        model_fingerprint="",
        samples_fingerprint="",
    )


def rescorer(recipe: Recipe, samples: Tensor) -> Rescore:
    """`score_again` for the models of a cut in steps, on as many samples as the recipe scores."""
    score = recipe.score

    def rescore(model: PreTrainedModel, anatomy: Anatomy) -> Scores:
        return score_again(recipe, Calibration(model, anatomy, samples[: score.samples], score.micro_batch))

    return rescore
