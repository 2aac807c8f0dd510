"""From scores to a smaller model: all steps of a recipe's `prune` section, in order.

    target sizes -> which entries (ranked, in steps, or by refit) -> plan -> merge -> trim -> refit

The residual stream is rotated before its channels are ranked. Merging and rotation work on a copy of the teacher, whose
own weights are never changed. The plan is complete before the first weight is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from halve.anatomy import Anatomy, Arch
from halve.cut.iterative import select_iteratively
from halve.cut.layers import layer_merge
from halve.cut.plan import heads
from halve.cut.plan.plan import Importance, Plan, select
from halve.cut.repair.budget import Budget, refit_budget
from halve.cut.repair.refit import refit
from halve.cut.repair.refit_scores import score_by_refit
from halve.cut.repair.ridge import FIXED
from halve.cut.repair.rotate import principal_basis, rotate, rotates, stream_moment, tie_head
from halve.cut.repair.taught import Taught, micro_batches
from halve.cut.score.calibration import Calibration
from halve.cut.score.scores import Scores
from halve.cut.score.walk import IN_MEMORY_BYTES
from halve.cut.surgery.gain import constant_gains, fit_gains
from halve.cut.surgery.trim import trim
from halve.model.reference import Reference
from halve.process.waits import wait
from halve.recipe.schema import Prune

FEW_SAMPLES = 32
"""For fits with one unknown per norm or channel: gains, and the final norm of a head that stays tied."""

_COMPARED = {
    "refit_kl": "refit student",
    "unrotated_kl": "student refit in the model's own basis",
    "plain_kl": "plain cut",
}
"""The figures of students that are compared."""

Rescore = Callable[[PreTrainedModel, Anatomy], Importance]
"""Scores a partly cut model again, for `prune.steps` above 1."""


@dataclass(frozen=True, eq=False)
class Turned:
    """The model in the basis in which hidden is cut. `energy_D` is None for the model's own basis."""

    model: PreTrainedModel
    anatomy: Anatomy
    energy_D: Tensor | None


@dataclass(frozen=True)
class Goal:
    """The target of a cut: the sizes, the kept layers, and the merges to make before the other layers are removed."""

    arch: Arch
    kept_layers: Sequence[int] | None = None
    """None: those with the best scores."""
    merges: Sequence[layer_merge.Merge] = ()
    """Those that `layer_merge: laco_search` found."""


@dataclass(frozen=True, eq=False)
class Repair:
    """What a refit is given beside its samples."""

    held: int = 0
    """So many of the last samples choose the ridges and are not fitted."""
    taught: dict[bool, Taught] | None = None
    """For many cuts on the same samples: what the teacher did on them, in its own basis and turned."""
    spared: dict[str, Tensor] | None = None
    """For cuts to the same sizes on the same samples: the scores of neurons and heads by the first one's selection."""

    def lesson(self, source: Calibration, *, turned: bool) -> Taught:
        """The teacher's side of a refit; kept for the next cut where there is one and memory allows."""
        if self.taught is not None and turned in self.taught:
            return self.taught[turned]
        rows = micro_batches(len(source.samples_BS), source.micro_batch, held=self.held)
        lesson = Taught(source, rows, most_bytes=0 if self.taught is None else IN_MEMORY_BYTES)
        if self.taught is not None and lesson.keep:
            self.taught[turned] = lesson
        return lesson


@dataclass(frozen=True, eq=False)
class Cut:
    """A student and how it was made. `anatomy` is that of the model whose entries the plan lists."""

    student: PreTrainedModel
    anatomy: Anatomy
    plan: Plan
    gains: dict[str, float]
    figures: dict[str, Any]

    def made(self, prune: Prune) -> dict[str, Any]:
        """For `plan.json`: which student `prune` led to, refit or plain, and in which basis hidden was cut.

        `compared` has the KL of all that were compared, in nats a token. `unrotated` says why a rotation that `prune`
        allows was left out.
        """
        compared = {key: self.figures[key] for key in (*_COMPARED, "compared_tokens") if key in self.figures}
        made = {"cut": self.figures.get("kept", "plain" if prune.refit == "none" else "refit"), "compared": compared}
        rotated = "energy_kept" in self.figures
        if rotated or prune.rotation == "none" or self.plan.after.hidden == self.plan.before.hidden:
            why = ""
        elif compared and made["cut"] == "plain":
            why = "the plain cut keeps it"
        elif "unrotated_kl" in compared:
            why = "the principal axes were farther from the teacher"
        else:
            why = "a cut in steps keeps it" if prune.steps > 1 else "its norms allow no other"
        return made | {"rotation": "pca" if rotated else "none", "unrotated": why}


def turn(calibration: Calibration, prune: Prune, *, sizes: Sequence[Arch]) -> Turned:
    """Rotate the residual stream to its principal axes if `prune` asks for it and the family allows it.

    `sizes` are the possible sizes of the cut. If none of them cuts hidden, nothing is rotated. Raises `AnatomyError`
    for `rotation: pca` in a family whose norms do not allow it.
    """
    model, anatomy = calibration.model, calibration.anatomy
    if not rotates(anatomy, prune) or all(after.hidden == anatomy.sizes.hidden for after in sizes):
        return Turned(model, anatomy, None)
    moment_DD = stream_moment(calibration.first(token_budget(calibration, prune).used))
    with wait("rotating the weights to the principal axes of the residual stream"):
        basis = principal_basis(moment_DD)
        turned, turned_anatomy = rotate(model, anatomy, basis.columns_DD)
    return Turned(turned, turned_anatomy, basis.energy_D)


def cut(
    calibration: Calibration,
    scores: Scores,
    prune: Prune,
    goal: Goal,
    *,
    turned: Turned,
    rescore: Rescore | None = None,
    planned: Callable[[Plan], None] | None = None,
) -> Cut:
    """Cut a model to valid sizes as `prune` says. The model itself is not changed.

    The calibration samples are for the selection, the gains and the refit. `token_budget` says how many are for what.
    `turned` is the result of `turn`; a cut that keeps hidden does not use it. `planned` receives the plan before any
    weight is cut. `rescore` is needed for `prune.steps` above 1.

    The refit student is compared with the plain cut of the same sizes, on samples that are not fitted. Where hidden was
    cut in another basis and `rotation` is `auto`, a student refit in the model's own basis is compared, too. The
    closest one is kept. `planned` receives its plan as well, if that is another.

    Raises `PlanError` and `CheckpointError`.
    """
    budget = token_budget(calibration, prune)
    solved = calibration.first(budget.used)
    repair, own = Repair(budget.held, spared={}), Turned(calibration.model, calibration.anatomy, None)
    kept = cut_once(solved, scores, prune, goal, turned=turned, repair=repair, rescore=rescore, planned=planned)
    if not budget.compared:
        return kept
    rivals = [("plain_kl", plainly(prune), solved.silent(), Repair())]
    if _is_turned(calibration, goal.arch, turned) and doubts_rotation(prune):
        rivals.insert(0, ("unrotated_kl", prune.model_copy(update={"rotation": "none"}), solved, repair))
    unseen_BS = calibration.samples_BS[budget.used :][: budget.compared]
    reference = Reference(calibration.model, unseen_BS, micro_batch=calibration.micro_batch)
    closest = "refit_kl"
    kls = {closest: float(reference.divergences(kept.student).mean())}
    for key, asked, source, its_repair in rivals:
        rival = cut_once(source, scores, asked, goal, turned=own, repair=its_repair, rescore=rescore)
        kls[key] = float(reference.divergences(rival.student).mean())
        if kls[key] < kls[closest]:
            closest, kept = key, rival
        del rival  # at most two students are held while the next is made
    calibration.progress.say(
        f"KL on {budget.compared} samples that were not fitted: "
        + ", ".join(f"{_COMPARED[key]} {kl:.4g}" for key, kl in kls.items())
        + f"; the {_COMPARED[closest]} is kept"
    )
    if closest != "refit_kl" and planned is not None:
        planned(kept.plan)
    name = "plain" if closest == "plain_kl" else "refit"
    return replace(kept, figures={**kept.figures, **kls, "compared_tokens": unseen_BS.numel(), "kept": name})


def token_budget(calibration: Calibration, prune: Prune) -> Budget:
    """How many of the calibration samples are for what."""
    samples, context = calibration.samples_BS.shape
    return refit_budget(prune, calibration.anatomy.sizes, context=context, available=samples)


def plainly(prune: Prune) -> Prune:
    """The same cut without a refit and without what a refit makes worth while."""
    return prune.model_copy(update={"refit": "none", "rotation": "none", "selection": "rank"})


def cut_once(
    calibration: Calibration,
    scores: Scores,
    prune: Prune,
    goal: Goal,
    *,
    turned: Turned,
    repair: Repair,
    rescore: Rescore | None = None,
    planned: Callable[[Plan], None] | None = None,
) -> Cut:
    """What `cut` does, on all samples, without a plain cut to compare with."""
    anatomy = calibration.anatomy
    if goal.kept_layers is None:
        sizes = anatomy.sizes.at(layers=goal.arch.layers)
        goal = replace(goal, kept_layers=select(anatomy, sizes, scores, gain="none").layers)
    source, ranking, figures = _in_basis(calibration, scores, goal.arch, turned)
    if selects_by_refit(prune, scores.method):
        ranking = _by_refit(calibration, ranking, prune, goal, repair)
    plan = _plan(source, ranking, prune, goal, rescore)
    if planned is not None:
        planned(plan)
    gains = _gains(source, plan)
    student = trim(_merged(source, plan, scores, prune, goal.merges), plan, source.anatomy, gains=gains)
    if prune.refit != "none":
        student = refit(
            student,
            source,
            plan,
            everything=prune.refit == "all",
            held=repair.held,
            strength=_strength(prune),
            taught=repair.lesson(source, turned=source.model is not calibration.model),
        )
    if not anatomy.tied or source.anatomy.tied:
        return Cut(student, source.anatomy, plan, gains, figures)
    more = anatomy.sizes.vocab * goal.arch.hidden if prune.untie else 0
    figures = {**figures, "more_params_untied": more}
    if prune.untie:
        return Cut(student, source.anatomy, plan, gains, figures)
    return Cut(_tied(student, source, prune), anatomy, plan, gains, figures)


def _strength(prune: Prune) -> float:
    """The ridge where none is chosen."""
    return FIXED if prune.ridge == "auto" else prune.ridge


def selects_by_refit(prune: Prune, method: str) -> bool:
    """Whether neurons and heads are chosen by what a refit cannot compensate for, instead of by score."""
    if prune.selection != "auto":
        return prune.selection == "refit"
    return prune.refit != "none" and prune.steps == 1 and method == "activation"


def _in_basis(
    calibration: Calibration, scores: Scores, after: Arch, turned: Turned
) -> tuple[Calibration, Scores, dict[str, float]]:
    """The model in the basis in which its hidden is cut, the scores in this basis, and the reported energy."""
    if turned.energy_D is None or not _is_turned(calibration, after, turned):
        return calibration, scores, {}
    ranking = replace(scores, hidden=turned.energy_D.float(), statistics=None)
    kept = {"energy_kept": float(turned.energy_D[: after.hidden].sum())}
    return calibration.of(turned.model, turned.anatomy), ranking, kept


def doubts_rotation(prune: Prune) -> bool:
    """Whether a cut in another basis is compared with one in the model's own.

    Not where the head is untied: that is asked for with the rotation, and makes another size.
    """
    return prune.rotation == "auto" and not prune.untie


def _is_turned(calibration: Calibration, after: Arch, turned: Turned) -> bool:
    return turned.energy_D is not None and after.hidden < calibration.anatomy.sizes.hidden


def _by_refit(calibration: Calibration, scores: Scores, prune: Prune, goal: Goal, repair: Repair) -> Scores:
    """The scores, with those of neurons and heads replaced by their removal order under a refit where it applies."""
    assert goal.kept_layers is not None
    chooses = prune.ridge == "auto" and prune.refit_samples is None
    strength = None if chooses else _strength(prune)
    chosen = repair.spared or score_by_refit(calibration, goal.arch, layers=goal.kept_layers, strength=strength)
    if repair.spared is not None:
        repair.spared.update(chosen)
    ffn, heads_, groups = (chosen.get(axis, getattr(scores, axis)) for axis in ("ffn", "heads", "kv_heads"))
    return replace(scores, statistics=None, ffn=ffn, heads=heads_, kv_heads=groups)


def _plan(source: Calibration, scores: Scores, prune: Prune, goal: Goal, rescore: Rescore | None) -> Plan:
    """The plan: made at once, or in steps with the remaining model scored again before each."""
    if prune.steps == 1:
        return select(source.anatomy, goal.arch, scores, gain=prune.gain, kept_layers=goal.kept_layers)
    assert rescore is not None, "cutting in steps needs a function that scores"

    def gains_of(part: PreTrainedModel, part_anatomy: Anatomy, plan: Plan) -> dict[str, float]:
        return _gains(source.of(part, part_anatomy).silent(), plan)

    return select_iteratively(
        source.model,
        source.anatomy,
        goal.arch,
        steps=prune.steps,
        score=rescore,
        gain=prune.gain,
        kept_layers=goal.kept_layers,
        gains=gains_of,
    )


def _merged(
    source: Calibration, plan: Plan, scores: Scores, prune: Prune, merges: Sequence[layer_merge.Merge]
) -> PreTrainedModel:
    """The model, or a copy with removed heads and layers merged into the kept ones, as `prune` says."""
    model, anatomy = source.model, source.anatomy
    if prune.head_merge:
        model = heads.merge_heads(model, plan, anatomy, scores, coefficient=prune.head_merge)
    if prune.layer_merge == "laco":
        model = layer_merge.merge_layers(model, anatomy, plan.layers)
    return layer_merge.apply_merges(model, anatomy, merges) if merges else model


def _tied(student: PreTrainedModel, source: Calibration, prune: Prune) -> PreTrainedModel:
    """The student with its head tied again, after the rotation untied it."""
    final_norm = source.anatomy.final_norm
    assert final_norm is not None, "rotation folds the final norm, so that there is one"
    with wait("tying the head again"):
        return tie_head(student, source.first(FEW_SAMPLES), final_norm=final_norm, strength=_strength(prune))


def _gains(source: Calibration, plan: Plan) -> dict[str, float]:
    """Gains that compensate for fewer channels in the norms. A refit of the readers starts from these, too."""
    if plan.gain == "none" or plan.before.hidden == plan.after.hidden:
        return {}
    if plan.gain == "constant":
        return constant_gains(source.anatomy, plan)
    few = source.first(FEW_SAMPLES)

    def batches() -> Iterator[Tensor]:
        with few.progress.task("fit norm gains", few.samples_BS.numel()) as task:
            for part_BS in few.batches:
                yield part_BS
                task.advance(part_BS.numel())

    return fit_gains(few.model, few.anatomy, plan, batches())
