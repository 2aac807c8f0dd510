"""What candidates are cut from: the loaded teacher with its scores and calibration samples, in the basis of the cut."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from halve.anatomy import Arch
from halve.cut.apply import Goal, Rescore, Turned, cut, turn
from halve.cut.given import calibration_samples, read_scores, rescorer
from halve.cut.layers.chosen import choose_layers
from halve.cut.score.calibration import Calibration, require_calibration
from halve.cut.score.scores import Scores
from halve.cut.trial import Tried, try_shapes
from halve.model import saving
from halve.model.checkpoint import Checkpoint, resolve_device
from halve.model.precision import cast_weights, stored_dtype
from halve.progress import SILENT, Progress
from halve.recipe.schema import Recipe, Score
from halve.search.searched import joint_comparison
from halve.text.mixture import Mixture, open_mixture


@dataclass(frozen=True, eq=False)
class Workshop:
    """What candidates are cut from and with."""

    recipe: Recipe
    calibration: Calibration
    scores: Scores
    turned: Turned
    rescore: Rescore
    text: Mixture
    tokenizer: PreTrainedTokenizerBase
    stored: torch.dtype
    """The precision of finalists' folders."""

    @classmethod
    def open(
        cls,
        recipe: Recipe,
        teacher: Checkpoint,
        *,
        scores: Path,
        archs: Sequence[Arch],
        cache: Path,
        progress: Progress = SILENT,
    ) -> Workshop:
        """Load the teacher. `scores` is the score stage's file, `archs` are the sizes of all candidates, and `cache` is
        the run's folder of token files.

        Raises `CorpusError` for unsuitable calibration samples, and what loading raises.
        """
        anatomy, tokenizer = teacher.anatomy, teacher.tokenizer
        ranking = read_scores(recipe, teacher, scores)
        model = teacher.load_to_run(dtype=recipe.dtype, device=resolve_device(recipe.device))
        text = open_mixture(recipe, cache=cache, tokenizer=tokenizer, progress=progress)
        samples_BS = calibration_samples(recipe, recipe.prune, anatomy.sizes, text)
        require_calibration(samples_BS, vocab=anatomy.sizes.vocab)
        calibration = Calibration(model, anatomy, samples_BS, recipe.score.micro_batch, progress)
        turned = turn(calibration, recipe.prune, sizes=archs)
        stored = stored_dtype(recipe.dtype, teacher.config)
        return cls(recipe, calibration, ranking, turned, rescorer(recipe, samples_BS), text, tokenizer, stored)

    def layers(self, depths: Collection[int]) -> dict[int, tuple[int, ...]]:
        """For each of these numbers of layers, which layers stay, found by removing them together."""
        return self.compared(depths, joint_comparison(self.recipe.score))

    def compared(self, depths: Collection[int], score: Score) -> dict[int, tuple[int, ...]]:
        """The same by a comparison of sets of layers, as a section `score` asks for it."""
        recipe = self.recipe.model_copy(update={"score": score})
        few = self.calibration.on(self.text.calibration(score.depth_samples))
        total = self.calibration.anatomy.sizes.layers
        removals = sorted({total - depth for depth in depths} - {0})
        chosen = {total: tuple(range(total))}
        greedy = score.depth_pattern == "greedy"
        given = {"tokenizer": self.tokenizer, "scores": self.scores}
        keep = () if recipe.search is None else recipe.search.layers.keep
        for remove in removals[-1:] if greedy else removals:
            choice = choose_layers(recipe, few, remove=remove, **given, keep=keep)
            chosen |= {total - n: choice.of(n).kept for n in (removals if greedy else [remove])}
        return chosen

    def tried(
        self, archs: Sequence[Arch], kept_layers: Mapping[int, tuple[int, ...]], *, path: Path
    ) -> tuple[Tried, ...]:
        """Every candidate's KL on samples that its refit did not see. What is in `path` is not measured again."""
        shapes = [[arch] for arch in archs]
        prune = self.recipe.prune
        return try_shapes(
            self.calibration, self.scores, prune, shapes, turned=self.turned, path=path, kept_layers=kept_layers
        )

    def cut(self, finalist: Tried, folder: Path, *, extra_from: Path, record: Mapping[str, Any]) -> None:
        """Cut a finalist as the prune stage would, into a model folder."""
        goal, prune = Goal(finalist.arch, finalist.kept_layers), self.recipe.prune
        quiet = self.calibration.silent()
        made = cut(quiet, self.scores, prune, goal, turned=self.turned, rescore=self.rescore)
        record = {**record, "plan": made.plan.to_json()}
        saving.save_model(cast_weights(made.student, self.stored), folder, extra_from=extra_from, record=record)
