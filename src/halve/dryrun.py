"""What a run will do and cost, said before it starts: sizes, tokens, FLOPs, memory, disk. Reads no weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from halve.anatomy import Arch, Counts
from halve.anatomy.runtimes import runtimes, worst
from halve.checkpoint import Checkpoint
from halve.cut.shapes import to_try
from halve.disk import Disk, planned
from halve.memory import CARD_BYTES, Distillation, Memory, Place, Setting, Sized, correcting, dtype_of
from halve.recipe import Recipe, Training
from halve.rounds import Shape, learns_from_previous, named, rounds, shapes
from halve.train import watch
from halve.train.ranks import require_shares
from halve.train.schedule import spans

# Matrix rate that MFU is counted against: one H100 SXM in bf16, dense, from its data sheet.
GPU_FLOPS = 989e12
MFU = 0.4


@dataclass(frozen=True)
class Round:
    """What one round of pruning and distilling makes."""

    student: Arch
    counts: Counts
    dropped_layers: tuple[int, ...]


@dataclass(frozen=True)
class Forecast:
    """Everything that `--dry-run` prints; `student` and what follows it is the last round's."""

    name: str
    teacher: Arch
    student: Arch
    teacher_counts: Counts
    student_counts: Counts
    dropped_layers: tuple[int, ...]
    rounds: tuple[Round, ...]
    runtimes: tuple[tuple[str, str, str], ...]
    tokens: dict[str, int]
    flops: dict[str, float]
    memory: dict[str, Memory]
    """What a rank holds in every stage that trains."""
    settings: tuple[Setting, ...]
    """Other ways to carry out the distillation that takes most, where they are asked for."""
    place: Place
    card_bytes: float
    mfu: float
    disk: Disk
    schedule: dict[str, Any]
    trial: tuple[tuple[Arch, ...], ...]
    """For every round the sizes that its trial chooses from; what is shown above is then width alone."""

    @property
    def gpu_hours(self) -> float:
        """Hours of one H100 at this MFU."""
        return sum(self.flops.values()) / (GPU_FLOPS * self.mfu) / 3600

    @property
    def fits(self) -> bool:
        """Whether every stage that trains fits a card."""
        return all(memory.fits(self.card_bytes) for memory in self.memory.values())

    def to_json(self) -> dict[str, Any]:
        """As plain data."""

        def told(memory: Memory) -> dict[str, Any]:
            return {**asdict(memory), "total_bytes": memory.total_bytes, "fits": memory.fits(self.card_bytes)}

        memory = {stage: told(one) for stage, one in self.memory.items()}
        settings = [{**asdict(one), "memory": told(one.memory)} for one in self.settings]
        disk = {**asdict(self.disk), "total_bytes": self.disk.total_bytes}
        sums = {"gpu_hours": self.gpu_hours, "fits": self.fits}
        return {**asdict(self), "memory": memory, "settings": settings, "disk": disk, **sums}


def forecast(
    recipe: Recipe,
    teacher: Checkpoint | None = None,
    *,
    ranks: int = 1,
    mfu: float = MFU,
    card_bytes: float = CARD_BYTES,
    compare: bool = False,
) -> Forecast:
    """Plan and cost of a recipe from the teacher's config alone, on so many ranks that reach this MFU.

    `teacher` is the recipe's model, where the caller has opened it. `compare` adds `settings`: what the distillation
    would take in other ways. Memory is planned for a GPU unless the recipe says `device: cpu`. Raises what planning
    raises: `CheckpointError`, `AnatomyError`, `PlanError`, and `TrainError` for ranks that the samples of a step cannot
    be shared among.
    """
    context = recipe.data.context
    found = shapes(recipe, teacher or Checkpoint.open(recipe.model))
    whole, last = found[0].before, found[-1]
    before = whole.ledger.count(whole.sizes, context=context)
    made = tuple(_made(shape, context) for shape in found)
    flops, tokens = _work(recipe, found)
    place = _place(recipe, ranks)
    memory, settings = _memory(recipe, found, place, compare=compare)
    return Forecast(
        name=recipe.name,
        teacher=whole.sizes,
        student=last.after,
        teacher_counts=before,
        student_counts=made[-1].counts,
        dropped_layers=made[-1].dropped_layers,
        rounds=made,
        runtimes=_opened(found),
        tokens=tokens,
        flops=flops,
        memory=memory,
        settings=settings,
        place=place,
        card_bytes=card_bytes,
        mfu=mfu,
        disk=planned(recipe, found, cuda=place.cuda),
        schedule=_schedule(recipe),
        trial=trial_shapes(recipe, found),
    )


def trial_shapes(recipe: Recipe, found: tuple[Shape, ...]) -> tuple[tuple[Arch, ...], ...]:
    """For every round the sizes that its trial chooses from, each once; none where nothing is tried."""
    listed = (to_try(shape.student, part.prune) for part, shape in zip(rounds(recipe), found, strict=True))
    return tuple(tuple(dict.fromkeys(arch for family in families for arch in family)) for families in listed)


def _made(shape: Shape, context: int) -> Round:
    kept, layers = shape.kept_layers, range(shape.before.sizes.layers)
    return Round(
        shape.after, shape.counts(context=context), () if kept is None else tuple(i for i in layers if i not in kept)
    )


def _opened(found: Sequence[Shape]) -> tuple[tuple[str, str, str], ...]:
    """Which runtimes open the last student: what a round moves stays moved in those after it."""
    rounds = [runtimes(shape.before, shape.after, shape.kept_layers) for shape in found]
    return tuple(
        (told[0].name, worst(r.opens for r in told), next((r.remedy for r in told if r.remedy), ""))
        for told in zip(*rounds, strict=True)
    )


def _place(recipe: Recipe, ranks: int) -> Place:
    """Where training runs: a recipe for any device is planned for a GPU."""
    trainings = [part for part in (recipe.correct, *(one.distill for one in rounds(recipe))) if part is not None]
    for training in trainings:
        require_shares(training, ranks)
    cuda = recipe.device != "cpu"
    precisions = {training.precision for training in trainings}
    half = "bfloat16" in precisions or (cuda and "auto" in precisions)
    return Place(ranks, max((training.replicas for training in trainings), default=1), cuda, half)


def _memory(
    recipe: Recipe, found: tuple[Shape, ...], place: Place, *, compare: bool
) -> tuple[dict[str, Memory], tuple[Setting, ...]]:
    """What every stage that trains takes, and other settings for the distillation that takes most."""
    teacher = _sized(found[0], found[0].before.sizes)
    memory: dict[str, Memory] = {}
    distillations: dict[str, Distillation] = {}
    if recipe.correct is not None and recipe.corrects_before:
        memory["correct"] = correcting(recipe.correct, teacher, place, context=_longest(recipe.correct, recipe))
    for number, (part, shape) in enumerate(zip(rounds(recipe), found, strict=True), 1):
        if part.distill is None:
            continue
        name = named("distill", number)
        one = distillations[name] = Distillation(
            part.distill,
            _sized(shape, shape.after),
            _sized(shape, shape.before.sizes) if learns_from_previous(recipe, number) else teacher,
            place,
            _longest(part.distill, recipe),
            dtype_of(recipe, teacher.config),
        )
        corrects = recipe.correct is not None and recipe.corrects_beside
        memory[name] = one.with_correction(recipe.correct) if corrects and recipe.correct else one.memory()
    if not (distillations and compare):
        return memory, ()
    return memory, distillations[max(distillations, key=lambda name: memory[name].total_bytes)].settings()


def _longest(training: Training, recipe: Recipe) -> int:
    return max(span.context for span in spans(training, recipe.data.context))


def _sized(shape: Shape, arch: Arch) -> Sized:
    """The model before a round's cut, or after it."""
    if arch == shape.before.sizes:
        return Sized(shape.before.config, arch, shape.before.ledger.count(arch))
    return Sized(shape.config(), arch, shape.counts())


def _work(recipe: Recipe, found: tuple[Shape, ...]) -> tuple[dict[str, float], dict[str, int]]:
    """Forward is one unit, backward two: 3 for what is trained, 1 for the teacher (DESIGN: work per token)."""
    tokens: dict[str, int] = {}
    flops: dict[str, float] = {}

    def add(name: str, training: Training, per_token: Callable[[int], float]) -> None:
        tokens[name], flops[name] = training.tokens, _over_phases(training, recipe.data.context, per_token)

    if recipe.correct and recipe.corrects_before:
        add("correct", recipe.correct, watch.correcting(found[0].before, recipe.correct))
    for number, (part, shape) in enumerate(zip(rounds(recipe), found, strict=True), 1):
        score, distill = named("score", number), named("distill", number)
        tokens[score] = part.score.samples * part.data.context
        flops[score] = float(tokens[score] * _whole(shape, part.data.context))
        if part.distill:
            teacher = shape if learns_from_previous(recipe, number) else found[0]
            alone = partial(_learning, shape)
            taught = partial(_learning, shape, teacher=teacher)
            if part.distill.cache != "none":  # the teacher runs once for all students; of its states logits are made
                add(named("cache", number), part.distill, partial(_whole, teacher))
                taught = partial(_reading, shape, teacher) if part.distill.cache == "hidden" else alone
            add(distill, part.distill, taught)
            for baseline in part.distill.baselines:
                add(f"{distill} ({baseline})", part.distill, alone if baseline == "ce" else taught)
            if recipe.correct and recipe.corrects_beside:
                corrected = watch.correcting(teacher.before, recipe.correct)(recipe.data.context)
                learned = min(recipe.correct.tokens, part.distill.tokens)
                for name in (distill, *(f"{distill} ({one})" for one in part.distill.baselines if one != "ce")):
                    flops[name] += learned * corrected
    return flops, tokens


def _whole(shape: Shape, context: int) -> int:
    """FLOPs a token of the model that a round cuts."""
    return shape.before.ledger.count(shape.before.sizes, context=context).flops_per_token


def _learning(shape: Shape, context: int, *, teacher: Shape | None = None) -> int:
    """FLOPs a token of a round's student in training, with the teacher that it follows."""
    own = 3 * _made(shape, context).counts.flops_per_token
    return own if teacher is None else own + _whole(teacher, context)


def _reading(shape: Shape, teacher: Shape, context: int) -> int:
    """The same where the teacher's hidden states are read."""
    return _learning(shape, context) + 2 * teacher.before.sizes.vocab * teacher.before.sizes.hidden


def _over_phases(training: Training, context: int, per_token: Callable[[int], float]) -> float:
    """The work of a training whose phases may differ in context."""
    found = spans(training, context)
    ends = [*(span.tokens_before for span in found[1:]), training.tokens]
    parts = zip(found, ends, strict=True)
    return float(sum(max(end - span.tokens_before, 0) * per_token(span.context) for span, end in parts))


def _schedule(recipe: Recipe) -> dict[str, Any]:
    section: Training | None = recipe.distill
    if section is None:
        return {}
    keys = ("lr", "min_lr", "warmup_steps", "batch", "tokens")
    return {key: getattr(section, key) for key in keys} | {"context": recipe.data.context}
