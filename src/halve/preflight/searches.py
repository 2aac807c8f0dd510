"""What trials and searches will try and train: how many shapes of which sizes, and the work of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from halve.anatomy import Arch
from halve.anatomy.work import Costed
from halve.cut import cost
from halve.cut.cost import Work
from halve.cut.plan.shapes import to_try
from halve.cut.plan.sizes import is_legal
from halve.cut.repair.budget import samples_needed
from halve.cut.repair.rotate import rotates
from halve.model.checkpoint import Checkpoint
from halve.preflight.sizes import PlannedRound
from halve.recipe.rounds import rounds
from halve.recipe.schema import Recipe
from halve.recipe.tournaments import tournament_training
from halve.search import counted
from halve.search.blocks import measured_at, samples_of_values
from halve.search.positions import beyond_positions
from halve.search.searched import TRIED, bounded_by_times_alone, planned_rungs, seen_by, shapes_to_try
from halve.search.space import Space

_UNMARKED = {"magnitude": {"layers": "weights alone do not tell one layer from another"}}


@dataclass(frozen=True)
class ShapesTried:
    """The shapes from which a round's trial or search chooses, as far as a plan knows them."""

    shapes: tuple[Arch, ...]
    """Each once. If they are not known, the dearest that are legal stand for them. Empty without a trial."""
    count: int
    """How many are tried, at most."""
    depths: tuple[int, ...]
    """Their numbers of layers."""
    known: bool = True
    """Whether they are known before times are measured."""

    @classmethod
    def of(cls, part: Recipe, shape: PlannedRound) -> ShapesTried:
        """Those of a round."""
        if part.search is None:
            families = to_try(shape.student, part.prune, refused=_UNMARKED.get(part.score.method))
            return cls._known(arch for family in families for arch in family)
        if part.search.method == "additive":
            return cls((), 0, ())
        if not bounded_by_times_alone(part):
            return cls._known(candidate.arch for candidate in shapes_to_try(part, shape.before))
        space = seen_by(part, shape.before).prices.space
        shapes = tuple(arch for arch in _dearest(space) if is_legal(shape.student, arch)) or (shape.before.sizes,)
        return cls(shapes, min(TRIED * part.search.candidates, len(space)), space.depths, known=False)

    @classmethod
    def _known(cls, archs: Iterable[Arch]) -> ShapesTried:
        shapes = tuple(dict.fromkeys(archs))
        return cls(shapes, len(shapes), tuple(dict.fromkeys(arch.layers for arch in shapes)))


def _dearest(space: Space) -> tuple[Arch, ...]:
    """The dearest to run, the dearest of those that may be cut in another basis, and the one that most is cut from."""
    deepest, whole = space.depths[0], space.anatomy.sizes.hidden
    narrower = [number for number, (hidden, _, _) in enumerate(space.widths) if hidden < whole][:1]
    least = (len(space.widths) - 1, len(space.ffns) - 1)
    return tuple(dict.fromkeys(space.arch(deepest, *at) for at in ((0, 0), *((i, 0) for i in narrower), least)))


def long_caches(recipe: Recipe, teacher: Checkpoint) -> tuple[str, ...]:
    """The notes on memory that a recipe's search counts at contexts beyond the model's positions."""
    searches = [part.search for part in rounds(recipe) if part.search is not None]
    return beyond_positions(teacher.anatomy, *(search.budget for search in searches if search.budget is not None))


def work_of_a_trial(part: Recipe, shape: PlannedRound, tries: ShapesTried, *, turned: bool) -> Work:
    """The trial of all shapes."""
    before = Costed.of(shape.before, part.data.context)

    def of(shapes: Sequence[Arch]) -> Work:
        if part.search is not None:
            return counted.candidates_tried(part, before, shape.student, shapes, turned=turned)
        return cost.trying(before, shape.student, part.prune, part.score, shapes, turned=turned)

    if tries.known:
        return of(tries.shapes)
    return max((of([arch] * tries.count) for arch in tries.shapes), key=lambda work: work.flops)


def tournament(part: Recipe, shape: PlannedRound, tries: ShapesTried) -> dict[str, Work]:
    """The teacher's answers for a tournament, the cuts of its finalists, and their training. The last two at most."""
    if part.search is None or part.search.method != "tournament":
        return {}
    training, before = tournament_training(part), Costed.of(shape.before, part.data.context)
    count = min(part.search.candidates, tries.count)
    dearest = max((Costed(shape.student, arch, before.context) for arch in tries.shapes), key=lambda one: one.whole)
    budget = planned_rungs(part, count).budget
    turned = rotates(shape.before, part.prune) and any(arch.hidden < before.arch.hidden for arch in tries.shapes)
    cuts = [
        counted.finalist_cut(part, before, Costed(shape.student, arch, before.context), turned=turned)
        for arch in tries.shapes
    ]
    return {
        "cache-search": counted.answers_cached(before, training),
        "finalists": sum([max(cuts, key=lambda work: work.flops)] * count, Work()),
        "search": counted.finalists_trained(part, before, dearest, budget),
    }


def adding_up(part: Recipe, shape: PlannedRound) -> dict[str, Work]:
    """The values of blocks for the additive method: a pass for every alternative, and one of the teacher."""
    if part.search is None or part.search.method != "additive":
        return {}
    before = Costed.of(shape.before, part.data.context)
    whole, most = before.arch, TRIED * part.search.candidates
    if bounded_by_times_alone(part):
        space = seen_by(part, shape.before).prices.space
        widths = [space.arch(whole.layers, 0, number) for number in range(len(space.ffns))]
        widths += [space.arch(whole.layers, number, 0) for number in range(len(space.widths))]
    else:
        widths = [candidate.arch for candidate in shapes_to_try(part, shape.before)]
    neurons, groups, hiddens = measured_at(widths)
    masked = [size for size in neurons if size < whole.ffn]
    masked_heads = [pair for pair in groups if pair != (whole.heads, whole.kv_heads)][:most]
    narrow = sorted((size for size in hiddens if size < whole.hidden), reverse=True)[:most]
    available = max(samples_needed(part.prune, whole, before.context), part.score.samples)
    tokens = samples_of_values(available, before.context, whole.vocab) * before.context
    passes = 1 + whole.layers * (len(masked) + len(masked_heads))
    each = passes * before.whole + whole.layers * before.at(whole.at(layers=whole.layers - 1)).whole
    each += sum(before.at(whole.at(hidden=size)).whole for size in narrow)
    return {"values": Work(tokens * each / before.whole, tokens * each)}
