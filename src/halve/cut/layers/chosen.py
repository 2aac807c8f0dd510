"""Which layers are dropped if the recipe compares sets of layers. Used by the stages that know their number."""

from __future__ import annotations

from collections.abc import Collection

from transformers import PreTrainedTokenizerBase

from halve.cut.layers.depth import DepthChoice, choose
from halve.cut.score.calibration import Calibration
from halve.cut.score.scores import Scores
from halve.model.choices import load_items
from halve.recipe.rounds import compares
from halve.recipe.schema import Recipe, Score

DEPTH = "depth.json"


def read_of(score: Score, remove: int) -> int | bool | None:
    """How the score stage's comparison depends on the number of dropped layers. None if nothing is compared.

    Block importance comes with every score. A comparison of single layers is valid for any number of layers.
    """
    if not compares(score):
        return None
    return remove > 0 if score.depth_pattern == "single" else remove


def choose_layers(
    recipe: Recipe,
    calibration: Calibration,
    *,
    remove: int,
    tokenizer: PreTrainedTokenizerBase,
    scores: Scores,
    keep: Collection[int] = (),
) -> DepthChoice:
    """Compare sets of `remove` layers as the section `score` says (see `halve.cut.layers.depth.choose`).

    None of `keep` is removed.
    """
    task = recipe.score.depth_task
    return choose(
        calibration,
        criterion=recipe.score.depth,
        pattern=recipe.score.depth_pattern,
        remove=remove,
        keep=keep,
        items=load_items(task) if task is not None and recipe.score.depth == "task" else (),
        tokenizer=tokenizer,
        seed=recipe.seed,
        scores=scores,
    )
