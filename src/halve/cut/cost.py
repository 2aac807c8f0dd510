"""The work of scoring and cutting, from the anatomy alone: tokens that go through a model, and FLOPs.

Counted are the products of a model's matrices, of Gram matrices and of their solutions. Work on a few tokens is left
out: proofs on twins, probes, and the generation that checks the key-value cache. The text may give fewer samples.

Letters: D the teacher's hidden, K the student's, V the vocabulary, C channels that a matrix reads.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from typing import Final

from halve.anatomy import Anatomy, Arch
from halve.anatomy.axes import Expr
from halve.anatomy.work import Costed
from halve.cut.apply import FEW_SAMPLES, doubts_rotation, selects_by_refit
from halve.cut.iterative import sizes_on_the_way
from halve.cut.repair.budget import Budget, refit_budget, samples_needed, trial_budget
from halve.cut.repair.refit_scores import choices
from halve.cut.score.sites import output_expr, writes
from halve.cut.score.taps import width
from halve.cut.score.walk import IN_MEMORY_BYTES
from halve.cut.trial import without_extras
from halve.model.choices import PaddedBatch
from halve.recipe.schema import Prune, Score

_HIDDEN = Expr.parse("hidden")
_PASSES_OF_STATES: Final = ("bi", "angular")
_STRENGTHS_TRIED: Final = 4
"""Of a ridge that is chosen, about."""
_KEPT_A_LAYER: Final = 5
"""Tensors as wide as the residual stream: the stream, and what four sites read or write."""
_KEPT_BYTES: Final = 2
_FLOAT64_BYTES: Final = 8
UPDATE_PASSES: Final = 4
"""Over a matrix that is updated: the product is written and read, the matrix read and written."""
_COST_PASSES: Final = 3
"""Over the refit, for the costs of the next removal: it is read, and its squares are written and read."""


@dataclass(frozen=True)
class Work:
    """Tokens through the larger of the models involved, once per full pass, and all FLOPs on them."""

    tokens: int | float = 0
    flops: int | float = 0
    full: int | float = 0
    """Those of the FLOPs that are sums and solutions in float32 and float64, whatever the models' own precision."""
    thin: int | float = 0
    """Those of them that are updates of rank one. They take as long as memory takes to read and write the matrices."""
    moved_bytes: int | float = 0
    """What the thin updates read and write."""

    def __add__(self, other: Work) -> Work:
        return Work(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))

    @classmethod
    def in_full(cls, flops: int | float) -> Work:
        """Sums and solutions alone."""
        return cls(0, flops, full=flops)


# ---- scoring


def scoring(model: Costed, score: Score) -> Work:
    """One pass over the samples: forward, and backward for gradients. Scores of weights alone need no pass."""
    tokens = float(score.samples * model.context)
    if score.method in ("random", "magnitude"):
        return Work()
    return Work(tokens, tokens * (3 * model.whole if score.method == "taylor" else model.body))


def comparing(model: Costed, score: Score, *, remove: int, items: Sequence[PaddedBatch] = ()) -> Work:
    """The comparison of sets of `remove` layers. A task reads `items` instead of samples.

    Tokens are in full passes: measuring a removal runs only the layers after it.
    """
    if not remove or score.depth in ("taylor", "random"):
        return Work()
    if (score.depth, score.depth_pattern) == ("bi", "single") and score.method == "activation":
        return Work()  # it comes with the scores
    total = model.arch.layers
    read, scored, body = _compared_tokens(model, score, items)
    steps = range(remove) if score.depth_pattern == "greedy" else range(1)
    run = float(sum(total - gone for gone in steps))  # layers of the passes that lead up to the sets
    heads = 0
    if score.depth not in _PASSES_OF_STATES:
        width_of_set = remove if score.depth_pattern == "block" else 1
        for gone in steps:
            sets = total - gone - width_of_set + 1
            run += sets * (sets - 1) / 2
            heads += (1 + sets) * (2 if score.depth == "logit_mse" else 1)
    return Work(read * run / total, body * run / total + scored * heads * model.head)


def _compared_tokens(model: Costed, score: Score, items: Sequence[PaddedBatch]) -> tuple[float, float, float]:
    """Tokens that a comparison reads, those of them that the head sees, and the FLOPs of one pass without the head."""
    if score.depth != "task":
        tokens = float(score.depth_samples * model.context)
        return tokens, tokens, tokens * model.body
    return float(sum(batch.ids.numel() for batch in items)), float(sum(map(num_scored, items))), reading(model, items)


def reading(model: Costed, items: Sequence[PaddedBatch]) -> float:
    """FLOPs of one pass over multiple-choice items, without logits. Padding counts."""
    return float(sum(batch.ids.numel() * replace(model, context=batch.ids.shape[1]).body for batch in items))


def num_scored(batch: PaddedBatch) -> int:
    """The tokens of a batch for which logits are made."""
    return len(batch.row)


# ---- cutting


def budget_for(before: Costed, prune: Prune) -> Budget:
    """How many samples a cut of this model takes for what, where there is text enough."""
    return refit_budget(prune, before.arch, context=before.context)


def turning(model: Costed, prune: Prune) -> Work:
    """The principal basis: one pass, the second moment of what each norm reads, and the rotation of every matrix."""
    tokens, hidden = float(budget_for(model, prune).used * model.context), model.arch.hidden
    moments = 2.0 * hidden**2 * len(model.anatomy.norms)
    matrices = 2.0 * hidden * model.anatomy.ledger.count(model.arch).params
    return Work(tokens, tokens * model.body) + Work.in_full(tokens * moments + matrices)


def rescoring(before: Costed, after: Arch, prune: Prune, score: Score) -> Work:
    """New scores before each of several steps."""
    if prune.steps == 1:
        return Work()
    on_the_way = [before.arch, *sizes_on_the_way(before.anatomy, after, prune.steps)]
    scored = [scoring(before.at(arch), score) for arch in on_the_way[:-1]]
    few = budget_for(before, prune).used
    fitted = [gaining(before.at(a), b, prune, samples=few) for a, b in itertools.pairwise(on_the_way[:-1])]
    return sum([*scored, *fitted], Work())


def choosing(before: Costed, after: Arch, prune: Prune, score: Score) -> Work:
    """The choice of entries by what a refit cannot compensate for: a pass, Gram matrices, and one removal at a time.

    A removal changes the inverse Gram matrix and the refit by products of a column and a row, in float64.
    """
    if not selects_by_refit(prune, score.method):
        return Work()
    axis_choices = choices(before.arch, after, width(before.anatomy, "heads") // before.arch.heads).values()
    tokens, hidden = float(budget_for(before, prune).used * before.context), before.arch.hidden
    each = Work()
    for choice in axis_choices:
        channels, gone = len(choice.cells) * choice.size, len(choice.cells) - choice.keep * len(set(choice.cells))
        costs = hidden if choice.size > 1 else 0  # of single channels they are read off
        removals = gone * 2.0 * choice.size * channels * (channels + hidden + costs)
        each += Work.in_full(tokens * 2 * channels**2 + channels**3)
        each += Work(0, removals, thin=removals, moved_bytes=_moved(channels, gone * choice.size, hidden, choice.size))
    layers = Work(*(after.layers * part for part in astuple(each)))
    return Work(tokens, tokens * before.body) + layers if axis_choices else Work()


def _moved(channels: int, gone: int, hidden: int, size: int) -> float:
    """Bytes that removals read and write: of matrices from which removed single channels are left out now and then."""
    left = channels - gone if size == 1 else channels
    wide = (channels + left) / 2
    squares = (channels**2 + channels * left + left**2) / 3  # the mean over the removals
    return _FLOAT64_BYTES * gone / size * (UPDATE_PASSES * (squares + hidden * wide) + _COST_PASSES * hidden * wide)


def gaining(before: Costed, after: Arch, prune: Prune, *, samples: int) -> Work:
    """A pass over a few of these samples, if gains of norms are fitted."""
    if prune.gain != "fitted" or before.arch.hidden == after.hidden:
        return Work()
    tokens = float(min(FEW_SAMPLES, samples) * before.context)
    return Work(tokens, tokens * before.body)


def tying(before: Costed, after: Costed, prune: Prune, *, samples: int, turned: bool) -> Work:
    """Tying a head again after a rotation: a pass of both models, and the products of both heads."""
    if prune.untie or not _untied(before, after, turned=turned):
        return Work()
    tokens = float(min(FEW_SAMPLES, samples) * before.context)
    grams = 2.0 * after.arch.hidden * (after.arch.hidden + before.arch.hidden)
    passes = Work(tokens, tokens * (before.body + after.body))
    return passes + Work.in_full(tokens * grams + before.arch.vocab * grams)


def trying(
    before: Costed, student: Anatomy, prune: Prune, score: Score, shapes: Sequence[Arch], *, turned: bool
) -> Work:
    """A trial of these shapes: each is cut, refit and measured on a few samples.

    The teacher runs once in each basis where memory holds what it did, and for every shape otherwise.
    """
    available = max(samples_needed(prune, before.arch, before.context), score.samples, 3)
    budget = trial_budget(prune, before.arch, context=before.context, available=available)
    asked, measured = without_extras(prune), budget.compared * before.context
    done = Work(measured, measured * before.whole) if shapes else Work()
    tokens = float(budget.used * before.context)
    held = tokens * before.arch.hidden * _KEPT_A_LAYER * before.arch.layers * _KEPT_BYTES
    if prune.refit != "none" and held <= IN_MEMORY_BYTES:
        bases = {turned and shape.hidden < before.arch.hidden for shape in shapes}
        again = len(shapes) - len(bases)
        done += Work(-tokens * again, -tokens * again * before.body)
    for shape in shapes:
        after = Costed(student, shape, before.context)
        done += gaining(before, shape, asked, samples=budget.used)
        done += tying(before, after, asked, samples=budget.used, turned=turned)
        if prune.refit != "none":
            done += refitting(before, after, asked, budget=budget, turned=turned)
        done += Work(0, measured * after.whole)
    return done


def doubting(before: Costed, after: Costed, prune: Prune, *, turned: bool) -> Work:
    """The refit student beside the plain cut: gains of the latter, a pass of the teacher and of both.

    A student whose hidden is cut in another basis is also compared with one that is refit in the model's own.
    Both keep the same neurons and heads, which are chosen once.
    """
    budget = budget_for(before, prune)
    tokens = float(budget.compared * before.context)
    if not tokens:
        return Work()
    fitted = gaining(before, after.arch, prune, samples=budget.used)
    done = fitted + Work(tokens, tokens * (before.whole + 2 * after.whole))
    if turned and doubts_rotation(prune) and after.arch.hidden < before.arch.hidden:
        done += fitted + refitting(before, after, prune, budget=budget, turned=False) + Work(0, tokens * after.whole)
    return done


def measuring(before: Costed, after: Costed, *, samples: int) -> Work:
    """The perplexity of teacher and student."""
    tokens = float(samples * before.context)
    return Work(tokens, tokens * (before.whole + after.whole))


def refitting(before: Costed, after: Costed, prune: Prune, *, budget: Budget, turned: bool) -> Work:
    """One pass of the teacher. One pass of the student, and for each site the modules before it and its solves."""
    tokens = float(budget.used * before.context)
    solves = _STRENGTHS_TRIED if budget.held else 1
    anatomy, everything = before.anatomy, prune.refit == "all"
    wide, narrow = before.arch.hidden, after.arch.hidden
    reader = tokens * 2 * narrow * (narrow + wide) + solves * (narrow**3 / 3 + 4.0 * wide * narrow**2)
    attention = after.attention / max(after.arch.layers, 1)
    run = solved = 0.0
    for layer in range(anatomy.sizes.layers):
        names = [name for name in anatomy.modules if anatomy.layer_of(name) == layer]
        passed = attention
        for neurons in (False, True):  # attention first
            group = [name for name in names if _of_neurons(anatomy, name) == neurons]
            written = [name for name in group if writes(anatomy, name)]
            read = [name for name in group if name not in written]
            if everything and any(anatomy.modules[name] == _HIDDEN for name in read):
                run += tokens * passed if neurons else 0.0
                solved += reader + sum(_outputs(anatomy, name, after.arch) * 2.0 * wide * narrow for name in read)
            passed += sum(2.0 * _entries(anatomy, name, after.arch) for name in read)
            for name in written:
                channels = anatomy.modules[name].size(after.arch.sizes)
                run += tokens * passed
                solved += tokens * 2 * channels * (channels + narrow)
                solved += solves * (channels**3 / 3 + 4.0 * narrow * channels**2)
            passed += sum(2.0 * _entries(anatomy, name, after.arch) for name in written)
    kept = after.arch.layers / anatomy.sizes.layers
    solved *= kept
    if everything and (not anatomy.tied or _untied(before, after, turned=turned)):
        solved += reader + 2.0 * before.arch.vocab * wide * narrow
    return Work(tokens, tokens * (before.body + after.body) + run * kept) + Work.in_full(solved)


def _untied(before: Costed, after: Costed, *, turned: bool) -> bool:
    """Whether a tied head has been untied. `turned`: hidden is cut in another basis."""
    return turned and before.anatomy.tied and after.arch.hidden < before.arch.hidden


def _of_neurons(anatomy: Anatomy, name: str) -> bool:
    return "ffn" in anatomy.modules[name].axes | output_expr(anatomy, name).axes


def _outputs(anatomy: Anatomy, name: str, arch: Arch) -> int:
    return output_expr(anatomy, name).size(arch.sizes)


def _entries(anatomy: Anatomy, name: str, arch: Arch) -> int:
    return anatomy.modules[name].size(arch.sizes) * _outputs(anatomy, name, arch)
