"""The work of a run, stage by stage: tokens that go through models, and FLOPs, before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from halve.anatomy import Anatomy, Arch
from halve.anatomy.work import Costed, by_context, correcting, distilling, learning, taught_in_turns
from halve.cut import cost
from halve.cut.cost import Work
from halve.cut.repair.rotate import rotates
from halve.model.checkpoint import Checkpoint
from halve.preflight.alignment import planned_tokens
from halve.preflight.asked import Asked
from halve.preflight.evaluation import evaluating
from halve.preflight.nests import nesting, planned_nest
from halve.preflight.searches import ShapesTried, adding_up, tournament, work_of_a_trial
from halve.preflight.sizes import PlannedRound
from halve.recipe.rounds import compares, learns_from_previous, named, rounds, scored_in
from halve.recipe.schema import Alignment, Distill, Recipe, Score, Training
from halve.search import counted
from halve.search.searched import joint_comparison
from halve.stages.prune import CHECK_SAMPLES
from halve.text import boundary
from halve.text.schedule import spans

_PerToken = Callable[[int], float]
"""FLOPs per token, by the length of the context."""


def planned_work(
    recipe: Recipe, found: Sequence[PlannedRound], teacher: Checkpoint, asked: Asked | None = None
) -> dict[str, Work]:
    """Work by stage, in order. For a trial and the selection that follows it this is an upper bound.

    What `asked` leaves out is not counted. Without it, items and prompts are read here. The forward pass is one unit
    and the backward pass two: 3 for a trained model, 1 for a teacher.
    """
    asked = asked or Asked.of(recipe, teacher)
    done: dict[str, Work] = {}

    def add(name: str, training: Training, per_token: _PerToken) -> None:
        done[name] = Work(training.tokens, _over_phases(training, recipe.data.context, per_token))

    if documents := boundary.asked_documents(recipe, teacher):
        tokens = sum(map(len, documents))
        done["boundary"] = Work(tokens, tokens * Costed.of(found[0].before, max(map(len, documents))).whole)
    if recipe.correct and recipe.corrects_before:
        add("correct", recipe.correct, by_context(partial(correcting, section=recipe.correct), found[0].before))
    for number, (part, shape) in enumerate(zip(rounds(recipe), found, strict=True), 1):
        cut = _cut(part, shape, asked)
        if scored_in(recipe, number) != number:
            del cut["score"]
        if number > 1:
            cut.pop("cache-search", None)  # the answers of the first search serve all
        done |= {named(stage, number): work for stage, work in cut.items() if work.flops}
        if part.distill is None:
            continue
        distill = named("distill", number)
        if "random_prune" in part.distill.baselines:
            done[f"{named('prune', number)} (random)"] = _cut_at_random(part, shape)
        source = shape if learns_from_previous(recipe, number) else found[0]
        alone: _PerToken = partial(_alone, shape)
        taught: _PerToken = partial(_taught, shape, source, part.distill)
        if recipe.nest is not None:
            student, sizes = planned_nest(recipe, found)
            done["nest"] = nesting(recipe, Costed.of(student, recipe.data.context), sizes)
            taught = partial(_in_turns, student, sizes, source, part.distill, recipe.nest.draws)
        if part.distill.cache != "none":  # the teacher runs once for all students
            add(named("cache", number), part.distill, partial(_cached, source, part.distill))
        add(distill, part.distill, taught)
        for baseline in part.distill.baselines:
            add(f"{distill} ({baseline})", part.distill, alone if baseline == "ce" else taught)
        if recipe.correct and recipe.corrects_beside:
            corrected = correcting(Costed.of(source.before, recipe.data.context), recipe.correct)
            learned = min(recipe.correct.tokens, part.distill.tokens)
            for name in (distill, *(f"{distill} ({variant})" for variant in part.distill.baselines if variant != "ce")):
                done[name] += Work(0, learned * corrected)
    last = _student(found[-1], recipe.data.context)
    for number, step in enumerate(recipe.align, 1):
        done[named("align", number, step.kind)] = _aligned(last, step, planned_tokens(recipe, step, teacher))
    done["evaluate"] = evaluating(recipe, found, asked)
    return done


def trials(recipe: Recipe, found: Sequence[PlannedRound]) -> tuple[tuple[Arch, ...], ...]:
    """For every round, the sizes from which its trial or its search chooses, each once. Empty without one, and where
    they are known only once times are measured.
    """
    listed = (ShapesTried.of(part, shape) for part, shape in zip(rounds(recipe), found, strict=True))
    return tuple(tries.shapes if tries.known else () for tries in listed)


def is_rotated(part: Recipe, shape: PlannedRound, tried: Sequence[Arch]) -> bool:
    """Whether the cut of a round, or one that its trial looks at, takes another basis for hidden."""
    narrower = any(arch.hidden < shape.before.sizes.hidden for arch in tried or (shape.after,))
    return rotates(shape.before, part.prune) and narrower


def _cut(part: Recipe, shape: PlannedRound, asked: Asked) -> dict[str, Work]:
    """The work of scoring and pruning in one round."""
    before, after = _models(part, shape)
    prune, score = part.prune, part.score if part.search is None else joint_comparison(part.score)
    scored = cost.scoring(before, score) + _checked_boundaries(before, score.samples)
    tries = ShapesTried.of(part, shape)
    if part.search is not None:  # it compares at every depth, a trial at the chosen one
        layers = counted.layers_compared(before, score, tries.depths, asked.depth)
    else:
        each = [
            cost.comparing(before, score, remove=remove, items=asked.depth) for remove in _removals(shape, tries, score)
        ]
        layers = max(each, key=lambda work: work.flops, default=Work())
    turned = is_rotated(part, shape, tries.shapes)
    chosen = [cost.choosing(before, arch, prune, score) for arch in tries.shapes or (after.arch,)]
    refit, budget = Work(), cost.budget_for(before, prune)
    if prune.refit != "none":
        refit = cost.refitting(before, after, prune, budget=budget, turned=turned)
        refit += cost.doubting(before, after, prune, turned=turned)
    return {
        "score": scored,
        "layers": layers,
        "trial": work_of_a_trial(part, shape, tries, turned=turned),
        **adding_up(part, shape),
        **tournament(part, shape, tries),
        "selection": max(chosen, key=lambda work: (work.moved_bytes, work.flops)),
        "prune": (cost.turning(before, prune) if turned else Work())
        + cost.rescoring(before, after.arch, prune, score)
        + cost.gaining(before, after.arch, prune, samples=budget.used)
        + cost.tying(before, after, prune, samples=budget.used, turned=turned)
        + cost.measuring(before, after, samples=CHECK_SAMPLES),
        "refit": refit,
    }


def _removals(shape: PlannedRound, tries: ShapesTried, score: Score) -> set[int]:
    """How many layers a round without a search may remove by a comparison."""
    whole = shape.before.sizes.layers
    if not tries.shapes and shape.kept_layers is None:
        return {whole - shape.after.layers}
    return {whole - depth for depth in tries.depths} if compares(score) else set()


def _cut_at_random(part: Recipe, shape: PlannedRound) -> Work:
    before, after = _models(part, shape)
    budget = cost.budget_for(before, part.prune)
    gains = cost.gaining(before, after.arch, part.prune, samples=budget.used)
    return gains + cost.measuring(before, after, samples=CHECK_SAMPLES)


def _models(part: Recipe, shape: PlannedRound) -> tuple[Costed, Costed]:
    return Costed.of(shape.before, part.data.context), _student(shape, part.data.context)


def _student(shape: PlannedRound, context: int) -> Costed:
    return Costed(shape.student, shape.after, context, shape.kept_layers)


def _checked_boundaries(model: Costed, samples: int) -> Work:
    tokens = min(boundary.BOUNDARY_SAMPLES, samples) * model.context
    return Work(tokens, tokens * model.whole)


# ---- a token of training


def _alone(shape: PlannedRound, context: int) -> int:
    """FLOPs per token of training a round's student without a teacher."""
    return learning(_student(shape, context))


def _taught(shape: PlannedRound, teacher: PlannedRound, training: Distill, context: int) -> int:
    """The same with a teacher: the model that `teacher`, this or another round, cuts."""
    return distilling(_student(shape, context), Costed.of(teacher.before, context), training)


def _in_turns(
    student: Anatomy, sizes: Sequence[Arch], teacher: PlannedRound, training: Distill, draws: int, context: int
) -> float:
    """The same for students inside the student."""
    students = [Costed(student, arch, context) for arch in sizes]
    return taught_in_turns(students, Costed.of(teacher.before, context), training, draws=draws)


def _cached(teacher: PlannedRound, training: Distill, context: int) -> int:
    """FLOPs per token of the teacher when its answers are cached. A cache of hidden states needs no logits."""
    model = Costed.of(teacher.before, context)
    return model.body if training.cache == "hidden" else model.whole


def _aligned(student: Costed, step: Alignment, tokens: float) -> Work:
    """A step of alignment: it learns from its tokens, and on pairs the reference reads each of them once.

    Answers that the model writes cost a pass for each of their tokens.
    """
    flops = tokens * learning(student)
    if step.kind != "sft":
        once = tokens / (step.passes or 1.0)
        flops += once * student.whole * (1 if step.answers is None else 1 + step.answers / 2)
    return Work(tokens, flops)


def _over_phases(training: Training, context: int, per_token: Callable[[int], float]) -> float:
    """The work of a training whose phases may differ in context."""
    phases = spans(training, context)
    ends = [*(span.tokens_before for span in phases[1:]), training.tokens]
    parts = zip(phases, ends, strict=True)
    return float(sum(max(end - span.tokens_before, 0) * per_token(span.context) for span, end in parts))
