"""The work of a search by its parts, counted from the anatomy: what a plan expects, and what a search has done.

Left out, as in all plans, are measurements on held-out samples and questions. The cut of the choice by the prune stage
comes on top.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from halve.anatomy import Anatomy, Arch
from halve.anatomy.configs import context_length
from halve.anatomy.work import Costed, distilling, distilling_adapters
from halve.cut import cost
from halve.cut.cost import Work
from halve.cut.repair.rotate import rotates, student_anatomy
from halve.cut.trial import Tried
from halve.model.checkpoint import Checkpoint
from halve.model.choices import PaddedBatch, batch_up, encode, load_items
from halve.recipe.rounds import compares
from halve.recipe.schema import Distill, Recipe, Score
from halve.recipe.tournaments import adapters_rank, tournament_training
from halve.search.searched import joint_comparison
from halve.search.settled import Candidates


def layers_compared(before: Costed, score: Score, depths: Collection[int], items: Sequence[PaddedBatch] = ()) -> Work:
    """The comparison of sets of layers for every number of layers that candidates have. `score` is a joint one."""
    if not compares(score):
        return Work()
    removals = {before.arch.layers - depth for depth in depths} - {0}
    if score.depth_pattern == "greedy":
        removals = {max(removals, default=0)}
    return sum((cost.comparing(before, score, remove=remove, items=items) for remove in removals), Work())


def candidates_tried(recipe: Recipe, before: Costed, student: Anatomy, shapes: Sequence[Arch], *, turned: bool) -> Work:
    """The trial of these shapes, and the basis in which they and the finalists are cut."""
    done = cost.trying(before, student, recipe.prune, recipe.score, shapes, turned=turned)
    return done + cost.turning(before, recipe.prune) if turned and shapes else done


def answers_cached(before: Costed, training: Distill) -> Work:
    """The teacher's answers, from which all finalists learn. A cache of hidden states needs no logits."""
    return Work(training.tokens, training.tokens * (before.body if training.cache == "hidden" else before.whole))


def finalist_cut(recipe: Recipe, before: Costed, after: Costed, *, turned: bool) -> Work:
    """The cut of one finalist."""
    prune, budget = recipe.prune, cost.budget_for(before, recipe.prune)
    done = cost.choosing(before, after.arch, prune, recipe.score)
    done += cost.rescoring(before, after.arch, prune, recipe.score)
    done += cost.gaining(before, after.arch, prune, samples=budget.used)
    done += cost.tying(before, after, prune, samples=budget.used, turned=turned)
    if prune.refit != "none":
        done += cost.refitting(before, after, prune, budget=budget, turned=turned)
        done += cost.doubting(before, after, prune, turned=turned)
    return done


def finalists_trained(recipe: Recipe, before: Costed, after: Costed, tokens: int) -> Work:
    """The training of finalists on so many tokens in all."""
    each = distilling if adapters_rank(recipe) is None else distilling_adapters
    return Work(tokens, tokens * each(after, before, tournament_training(recipe)))


def flops_by_part(
    recipe: Recipe,
    teacher: Checkpoint,
    settled: Candidates,
    finalists: Sequence[Tried],
    tokens: Sequence[int],
    *,
    chosen: int,
) -> dict[str, float | None]:
    """FLOPs of a tournament: of what was tried, of the finalists that were cut, and of the tokens that each trained on.

    `run` is the recipe's distillation of the chosen finalist, None without one.
    """
    anatomy, student = teacher.anatomy, student_anatomy(teacher.anatomy, recipe.prune)
    before = Costed.of(anatomy, recipe.data.context)
    after = [Costed(student, shape.arch, before.context, shape.kept_layers) for shape in finalists]
    turned = rotates(anatomy, recipe.prune) and any(arch.hidden < before.arch.hidden for arch in settled.archs)
    score = joint_comparison(recipe.score)
    parts = {
        "layers": layers_compared(before, score, {arch.layers for arch in settled.archs}, _items(score, teacher)),
        "trial": candidates_tried(recipe, before, student, settled.tried, turned=turned),
        "cache": answers_cached(before, tournament_training(recipe)),
        "finalists": _sum(finalist_cut(recipe, before, model, turned=turned) for model in after),
        "rungs": _sum(finalists_trained(recipe, before, model, n) for model, n in zip(after, tokens, strict=True)),
    }
    run: dict[str, Any] = {"run": None}
    if recipe.distill is not None:
        run["run"] = float(recipe.distill.tokens * distilling(after[chosen], before, recipe.distill))
    return {part: float(work.flops) for part, work in parts.items()} | run


def _items(score: Score, teacher: Checkpoint) -> tuple[PaddedBatch, ...]:
    """The questions by which layers are compared."""
    if score.depth != "task" or score.depth_task is None:
        return ()
    limit = context_length(teacher.config)
    return tuple(batch_up(encode(teacher.tokenizer, load_items(score.depth_task), max_tokens=limit)))


def _sum(works: Iterable[Work]) -> Work:
    return sum(works, Work())
