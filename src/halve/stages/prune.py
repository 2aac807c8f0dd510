"""The prune stage: prove the anatomy, make the plan, cut, and check the result."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halve.anatomy import Anatomy, Arch
from halve.cut.apply import Cut, Goal, cut, turn
from halve.cut.given import calibration_samples, read_scores, rescorer
from halve.cut.layers.chosen import DEPTH, choose_layers
from halve.cut.layers.depth import DepthChoice
from halve.cut.layers.layer_merge import laco_search, search_setting
from halve.cut.plan.plan import Plan
from halve.cut.plan.shapes import to_try
from halve.cut.plan.sizes import target
from halve.cut.proof.prove import Proof, prove
from halve.cut.repair.rotate import rotates, student_anatomy
from halve.cut.score.calibration import Calibration, require_calibration
from halve.cut.score.scores import Scores, random_scores
from halve.cut.trial import Tried, best, try_shapes
from halve.disk.files import read_json, write_json
from halve.errors import CheckpointError, PlanError
from halve.model import measure, saving
from halve.model.card import name_of
from halve.model.checkpoint import Checkpoint, resolve_device
from halve.model.finite import require_finite
from halve.model.precision import cast_weights, stored_dtype
from halve.process import fresh
from halve.process.waits import wait
from halve.progress import SILENT, Progress
from halve.recipe.rounds import compares
from halve.recipe.schema import Prune, Recipe
from halve.search.choice import ChosenShape
from halve.text import corpus
from halve.text.conversation_samples import samples_of
from halve.text.mixture import Mixture, open_mixture

CHECK_SAMPLES = 8
MICRO_BATCH = 4


@dataclass(frozen=True)
class _Wanted:
    """The cut that the recipe asks for, as far as it can be known before weights are read."""

    asked: Prune
    after: Arch
    kept_layers: tuple[int, ...] | None
    """None: the layers with the best scores."""
    proof: Proof
    ranking: Scores
    compared: Path | None
    """The path of the score stage's comparison of layers. None in the random control, which may not use the teacher."""


@dataclass(frozen=True, eq=False)
class _Source:
    """The loaded teacher, and the text of its calibration."""

    calibration: Calibration
    text: Mixture
    tokenizer: PreTrainedTokenizerBase

    def on(self, num_samples: int) -> Calibration:
        """The teacher with this number of samples."""
        return self.calibration.on(self.text.calibration(num_samples))


@fresh.kept()
def run(
    recipe: Recipe,
    *,
    teacher: Checkpoint,
    scores: Path | None,
    cache: Path,
    out: Path,
    like: Path | None = None,
    searched: Path | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Cut the teacher to the recipe's sizes. Writes `out/plan.json`, `out/scores.safetensors` and `out/model`.

    The plan is written before the cut. After it, `made` is added: which student was kept, and in which basis.
    Returns sizes, perplexities and the results of the checks. `scores` is the score stage's file, read with the
    recipe's aggregators. If sets of layers were compared, `depth.json` is next to it. `searched` is the folder of a
    search stage. Without `scores`, the cut is the random control: it ranks by random numbers from the recipe's seed and
    uses nothing of the teacher's activations. It gets the sizes of the plan `like`, if that is given.

    Raises `PlanError` for invalid sizes and `AnatomyError` for an axis whose proof fails, both before weights are read,
    `CorpusError` for unsuitable calibration samples, and `CheckpointError` if the result does not match the plan.
    """
    wanted = _wanted(recipe, teacher, scores, like=like, searched=searched)
    model = teacher.load_to_run(dtype=recipe.dtype, device=resolve_device(recipe.device))
    tokenizer = teacher.tokenizer
    valid = corpus.open_split(recipe, "valid", cache=cache, tokenizer=tokenizer, progress=progress)
    heldout = samples_of(valid, recipe.data.context, recipe.seed).heldout(CHECK_SAMPLES)
    nll = partial(measure.language_modeling, samples=heldout.ids, predicted=heldout.predicted, micro_batch=MICRO_BATCH)
    before_nll = nll(model)
    text = open_mixture(recipe, cache=cache, tokenizer=tokenizer, progress=progress)
    samples = calibration_samples(recipe, wanted.asked, teacher.anatomy.sizes, text)
    require_calibration(samples, vocab=teacher.anatomy.sizes.vocab)
    calibration = Calibration(model, teacher.anatomy, samples, recipe.score.micro_batch, progress)
    done, tried = _student(recipe, wanted, _Source(calibration, text, tokenizer), out)
    del model, calibration
    planned = {**done.plan.to_json(), "made": done.made(wanted.asked)}
    write_json(out / "plan.json", planned)
    record = {
        "stage": "prune",
        "base_model": name_of(recipe.model),
        "teacher": teacher.fingerprint,
        "prune": wanted.asked.model_dump(mode="json"),
        "plan": planned,
        "gains": done.gains,
    }
    computing, stored = done.student.dtype, stored_dtype(recipe.dtype, teacher.config)
    saving.save_model(cast_weights(done.student, stored), out / "model", extra_from=teacher.files, record=record)
    after_nll = nll(cast_weights(done.student, computing))  # of the weights as they are saved
    counts = done.anatomy.ledger.count(done.plan.after, kept_layers=done.plan.layers)
    _check(cast_weights(done.student, stored), counts.params, out / "model", heldout.ids[:1, :32], after_nll)
    return {
        "params": counts.params,
        "non_embedding": counts.non_embedding,
        "teacher_params": teacher.anatomy.ledger.count(teacher.anatomy.sizes).params,
        "perplexity": measure.perplexity(after_nll, heldout.weights).as_dict(),
        "teacher_perplexity": measure.perplexity(before_nll, heldout.weights).as_dict(),
        "checks": [f"{check.axis}: {check.name}" for check in wanted.proof.checks],
        "shapes": [shape.to_json() for shape in tried],
        **done.figures,
    }


def _wanted(
    recipe: Recipe, teacher: Checkpoint, scores: Path | None, *, like: Path | None, searched: Path | None
) -> _Wanted:
    """Check that the model allows the sizes, axes and rotation, and read the scores."""
    asked = recipe.prune if scores is not None else _blind(recipe.prune)
    anatomy = teacher.anatomy
    if searched is not None:
        choice = ChosenShape.load(searched)
        after, kept_layers = choice.arch, choice.kept_layers
    elif recipe.search is not None:  # the random control of such a cut
        assert like is not None
        after, kept_layers = anatomy.sizes, None
    else:
        after, kept_layers = target(student_anatomy(anatomy, asked), asked)
    if like is not None:
        after = Plan.load(like).after
    proof = prove(anatomy)
    proof.demand(anatomy.sizes, after)
    rotates(anatomy, asked)  # refuses a rotation that the family does not allow
    ranking = random_scores(anatomy, recipe.seed) if scores is None else read_scores(recipe, teacher, scores)
    return _Wanted(asked, after, kept_layers, proof, ranking, None if scores is None else scores.with_name(DEPTH))


def _student(recipe: Recipe, wanted: _Wanted, source: _Source, out: Path) -> tuple[Cut, tuple[Tried, ...]]:
    """Choose sizes and layers, and cut. The plan and its scores are written before the first weight is cut."""
    calibration, asked, ranking = source.calibration, wanted.asked, wanted.ranking
    listed = _shapes(calibration.anatomy, asked, wanted.proof, ranking)
    sizes = [arch for family in listed for arch in family] or [wanted.after]
    turned = turn(calibration, asked, sizes=sizes)
    goal = Goal(wanted.after, wanted.kept_layers)
    tried: tuple[Tried, ...] = ()
    if listed:
        tried = try_shapes(calibration, ranking, asked, listed, turned=turned, path=out / "trial.jsonl")
        goal = Goal(best(tried).arch, best(tried).kept_layers)
    choice = _choice(recipe, wanted, source, goal, anew=bool(tried))
    if choice is not None:
        write_json(out / DEPTH, choice.to_json())
        goal = replace(goal, kept_layers=choice.kept)
    if asked.layer_merge == "laco_search" and goal.arch.layers < calibration.anatomy.sizes.layers:
        combine, interval = search_setting(calibration.anatomy.sizes.layers)
        few = source.on(recipe.score.depth_samples)
        collapse = laco_search(few, layers=goal.arch.layers, combine=combine, interval=interval)
        goal = replace(goal, kept_layers=collapse.kept, merges=collapse.merges)

    def planned(plan: Plan) -> None:
        write_json(out / "plan.json", plan.to_json())
        replace(ranking, statistics=None).save(out / "scores.safetensors")

    rescore = rescorer(recipe, calibration.samples_BS)
    return cut(calibration, ranking, asked, goal, turned=turned, rescore=rescore, planned=planned), tried


def _choice(recipe: Recipe, wanted: _Wanted, source: _Source, goal: Goal, *, anew: bool) -> DepthChoice | None:
    """The layers to keep, if sets of layers are compared. `anew`: a trial chose their number after the score stage."""
    by_sets = compares(recipe.score) if anew else goal.kept_layers is None
    remove = source.calibration.anatomy.sizes.layers - goal.arch.layers
    if wanted.compared is None or not by_sets or not remove:
        return None
    if not anew and wanted.compared.exists():
        return DepthChoice.from_json(read_json(wanted.compared)).of(remove)
    few = source.on(recipe.score.depth_samples)
    return choose_layers(recipe, few, remove=remove, tokenizer=source.tokenizer, scores=wanted.ranking)


def _shapes(anatomy: Anatomy, asked: Prune, proof: Proof, ranking: Scores) -> list[list[Arch]]:
    """The shapes of a budget over proved axes. Empty if sizes are given.

    Layers are dropped only if scores distinguish them, which magnitudes do not.
    """
    refused = dict(proof.refusals)
    if bool((ranking.layers == ranking.layers[0]).all()):
        refused.setdefault("layers", "its scores are all alike")
    return to_try(student_anatomy(anatomy, asked), asked, refused=refused)


def _blind(asked: Prune) -> Prune:
    """The same sizes, without everything that uses the teacher's activations except for the norms' gains."""
    off = {
        "selection": "rank",
        "rotation": "none",
        "refit": "none",
        "head_merge": 0.0,
        "layer_merge": "none",
        "steps": 1,
        "shape": "width",
    }
    return asked.model_copy(update=off)


def _check(student: PreTrainedModel, params: int, folder: Path, ids: Tensor, nll: Tensor) -> None:
    """The checks of every cut model. A failure is a defect of halve or of the family's code."""
    counted = sum(parameter.numel() for parameter in student.parameters())
    if counted != params:
        raise PlanError(
            f"the student has {counted} parameters, its plan {params}",
            why="surgery and counting disagree",
            fix="report this with the model's config.json",
        )
    require_finite(
        "the student's perplexity",
        nll,
        verb="is",
        why="its activations overflow after the cut",
        fix="use dtype: float32, a smaller cut, or gain: none",
    )
    _check_cache(student, ids)
    _check_reopens(student, folder, ids)


def _check_cache(student: PreTrainedModel, ids: Tensor) -> None:
    """Check that greedy generation is the same with and without the key-value cache, up to ties within rounding."""
    ids = ids.to(student.device)
    with torch.inference_mode():
        made = measure.generate_greedily(student, ids, num_new_tokens=16)
        logits = student(made, use_cache=False).logits[:, ids.shape[1] - 1 : -1].float()
    chosen = logits.gather(-1, made[:, ids.shape[1] :, None])[..., 0]
    behind = float((logits.amax(-1) - chosen).max())
    rounding = 64 * torch.finfo(student.dtype).eps * float(logits.abs().max())
    if not behind <= rounding:
        raise CheckpointError(
            "the student generates other text with the key-value cache than without",
            why=f"a cached token lies {behind:.3g} below the best logit, rounding explains {rounding:.3g}",
            fix="report this with the model's config.json",
        )


_FRESH = """
import sys, torch, transformers
from safetensors.torch import load_file, save_file
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=False).eval()
with torch.no_grad():
    logits = model(load_file(sys.argv[2])["ids"], use_cache=False).logits.float().contiguous()
save_file({"logits": logits}, sys.argv[3])
"""


def _check_reopens(student: PreTrainedModel, folder: Path, ids: Tensor) -> None:
    """Check that plain transformers opens the folder in a process without halve and computes the same logits."""
    given, made = folder.with_name("ids.safetensors"), folder.with_name("logits.safetensors")
    save_file({"ids": ids.cpu().contiguous()}, given)
    try:
        with wait("opening the student in a fresh process"):
            why = fresh.python(_FRESH, *(str(path.absolute()) for path in (folder, given, made)))
        if not why:
            with torch.inference_mode():
                logits = student(ids.to(student.device), use_cache=False).logits.float().cpu()
            gap = float((load_file(made)["logits"] - logits).abs().max())
            tolerance = max(1e-3, 64 * torch.finfo(student.dtype).eps * float(logits.abs().max()))
            why = "" if gap <= tolerance else f"its logits differ by {gap:.3g}"
    finally:
        given.unlink(missing_ok=True)
        made.unlink(missing_ok=True)
    if why:
        raise CheckpointError(
            "the student does not reopen in plain transformers",
            why=why,
            fix="report this with the model's config.json",
        )
