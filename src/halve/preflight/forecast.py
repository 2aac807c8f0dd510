"""A forecast of what a run will do and cost: sizes, tokens, FLOPs, memory, disk. Reads no weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from halve.anatomy import Arch, Counts
from halve.anatomy.runtimes import runtimes, worst
from halve.model.checkpoint import Checkpoint
from halve.model.precision import computing_dtype, stored_dtype
from halve.preflight import work
from halve.preflight.alignment import like_corrections
from halve.preflight.asked import Asked
from halve.preflight.cutting import pruning
from halve.preflight.device import PlannedDevice, at_hand
from halve.preflight.evaluation import evaluation_memory
from halve.preflight.memory import (
    Distillation,
    DistillSetting,
    Hardware,
    Held,
    Memory,
    Sized,
    correction_memory,
)
from halve.preflight.nests import nest_memory, planned_nest
from halve.preflight.searches import ShapesTried
from halve.preflight.sizes import PlannedRound, planned_rounds, require_proved
from halve.preflight.space import Disk, planned_disk
from halve.preflight.times import a_card, hours_by_stage
from halve.recipe.rounds import cuts_original, learns_from_previous, named, parsed, rounds, trainings
from halve.recipe.schema import Recipe, Training
from halve.recipe.tournaments import adapters_rank, tournament_training
from halve.search.searched import bounded_by_times_alone
from halve.text.schedule import spans
from halve.train.ranks.group import require_shares

_SEARCHES: Final = ("search", "finalists", "cache-search", "trial", "layers", "values")
"""What a search is made of."""


@dataclass(frozen=True)
class Round:
    """The result of one round of pruning and distillation."""

    student: Arch
    counts: Counts
    dropped_layers: tuple[int, ...]


@dataclass(frozen=True)
class Forecast:
    """Everything that `--dry-run` prints. `student` and the fields after it belong to the last round."""

    name: str
    teacher: Arch
    student: Arch
    teacher_counts: Counts
    student_counts: Counts
    dropped_layers: tuple[int, ...]
    rounds: tuple[Round, ...]
    nested: tuple[Round, ...]
    """The smaller students inside the student, without the layers that they drop: scores choose them."""
    runtimes: tuple[tuple[str, str, str], ...]
    tokens: dict[str, int]
    flops: dict[str, float]
    unknown: dict[str, str]
    """By row of these two, work that is not counted, and why."""
    hours_by_stage: dict[str, float | None]
    """Hours on the device. Its ranks share trainings. None if its speed is not known."""
    gpu_hours_by_stage: dict[str, float]
    """Hours of one H100 at `gpu_mfu`."""
    memory: dict[str, Memory]
    """The memory of one rank in every training stage."""
    held: dict[str, Held]
    """The memory of the stages that cut and measure, on one rank."""
    settings: tuple[DistillSetting, ...]
    """Other settings for the distillation that needs most memory, if `compare` is set."""
    place: Hardware
    device: PlannedDevice
    """The device for which memory and hours are planned."""
    disk: Disk
    schedule: dict[str, Any]
    searched: bool
    """Whether a search chooses the shape."""
    timed: bool
    """Whether only times bound the shapes of a search: they are known once these are measured."""
    trial: tuple[tuple[Arch, ...], ...]
    """For every round, the sizes from which its trial chooses, if they are known. The sizes above then cut only
    width."""

    @property
    def searches(self) -> tuple[str, ...]:
        """The stages that choose a shape by a search. Empty without one."""
        parts = (stage for stage in self.flops if {stage, parsed(stage)[0]} & {*_SEARCHES})
        return tuple(parts) if self.searched else ()

    @property
    def hours(self) -> float | None:
        """Hours on the device. None if its speed is not known."""
        known = [hours for hours in self.hours_by_stage.values() if hours is not None]
        return sum(known) if len(known) == len(self.hours_by_stage) else None

    @property
    def gpu_hours(self) -> float:
        """Hours of one H100 at `gpu_mfu`. Given for every device, because people plan on a laptop for a cluster."""
        return sum(self.gpu_hours_by_stage.values())

    @property
    def gpu_mfu(self) -> float:
        """The share of its peak FLOP/s with which a card is planned."""
        return a_card(self.device).mfu

    @property
    def room_bytes(self) -> float:
        """The part of the device's memory for one rank."""
        return self.device.memory_bytes / (1 if self.device.cuda else self.place.ranks)

    @property
    def fits(self) -> bool:
        """Whether every planned stage fits the device."""
        stages: list[Memory | Held] = [*self.memory.values(), *self.held.values()]
        return all(planned.fits(self.room_bytes) for planned in stages)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""

        def told(memory: Memory | Held) -> dict[str, Any]:
            return {**asdict(memory), "total_bytes": memory.total_bytes, "fits": memory.fits(self.room_bytes)}

        memory = {stage: told(stage_memory) for stage, stage_memory in self.memory.items()}
        held = {stage: told(planned) for stage, planned in self.held.items()}
        settings = [{**asdict(setting), "memory": told(setting.memory)} for setting in self.settings]
        disk = {**asdict(self.disk), "total_bytes": self.disk.total_bytes}
        sums = {"gpu_hours": self.gpu_hours, "hours": self.hours, "fits": self.fits}
        return {**asdict(self), "memory": memory, "held": held, "settings": settings, "disk": disk, **sums}


def forecast(
    recipe: Recipe,
    teacher: Checkpoint | None = None,
    *,
    ranks: int = 1,
    device: PlannedDevice | None = None,
    compare: bool = False,
) -> Forecast:
    """Plan and cost of a recipe on this many ranks, from the teacher's config alone.

    `teacher` is the recipe's model, if the caller has opened it. `device` is by default the device on which this
    machine would run the recipe. A recipe with `device: cpu` is always planned for the CPU. `compare` adds `settings`:
    the memory of the distillation on a GPU with other settings. Raises `CheckpointError`, `AnatomyError`, `PlanError`,
    and `TrainError` if the samples of a step cannot be split over the ranks.
    """
    context = recipe.data.context
    teacher = teacher or Checkpoint.open(recipe.model)
    if device is None or recipe.device == "cpu":
        device = at_hand(recipe.device, computing_dtype(recipe.dtype, teacher.config, on_cpu=True))
    shapes = planned_rounds(recipe, teacher)
    require_proved(shapes)
    whole, last = shapes[0].before, shapes[-1]
    before = whole.ledger.count(whole.sizes, context=context)
    made = tuple(_made(shape, context) for shape in shapes)
    asked = Asked.of(recipe, teacher)
    done = work.planned_work(recipe, shapes, teacher, asked)
    place = _place(recipe, ranks, cuda=device.cuda)
    memory, settings = _memory(recipe, shapes, place, compare=compare and place.cuda)
    return Forecast(
        name=recipe.name,
        teacher=whole.sizes,
        student=last.after,
        teacher_counts=before,
        student_counts=made[-1].counts,
        dropped_layers=made[-1].dropped_layers,
        rounds=made,
        nested=_inside(recipe, shapes),
        runtimes=_opened(shapes[max(n for n in range(len(shapes)) if cuts_original(recipe, n + 1)) :]),
        tokens={stage: round(stage_work.tokens) for stage, stage_work in done.items()},
        flops={stage: float(stage_work.flops) for stage, stage_work in done.items()},
        hours_by_stage=hours_by_stage(done, device, ranks=ranks, half=place.half),
        gpu_hours_by_stage={stage: hours or 0.0 for stage, hours in hours_by_stage(done, a_card(device)).items()},
        unknown={**asked.unknown, **_unread(done)},
        memory=memory,
        held=_held(recipe, shapes, on_cpu=not device.cuda),
        settings=settings,
        place=place,
        device=device,
        disk=planned_disk(recipe, shapes, cuda=place.cuda),
        schedule=_schedule(recipe),
        searched=recipe.search is not None,
        timed=any(part.search is not None and bounded_by_times_alone(part) for part in rounds(recipe)),
        trial=work.trials(recipe, shapes),
    )


def _made(shape: PlannedRound, context: int) -> Round:
    kept, layers = shape.kept_layers, range(shape.before.sizes.layers)
    return Round(
        shape.after, shape.counts(context=context), () if kept is None else tuple(i for i in layers if i not in kept)
    )


def _unread(done: Mapping[str, work.Work]) -> dict[str, str]:
    """Steps of alignment of whose data nothing could be read."""
    steps = (stage for stage, its in done.items() if parsed(stage)[0] == "align" and not its.tokens)
    return dict.fromkeys(steps, "none of its rows are on this machine")


def _inside(recipe: Recipe, shapes: Sequence[PlannedRound]) -> tuple[Round, ...]:
    if recipe.nest is None:
        return ()
    student, sizes = planned_nest(recipe, shapes)
    return tuple(Round(arch, student.ledger.count(arch, context=recipe.data.context), ()) for arch in sizes[1:])


def _opened(found: Sequence[PlannedRound]) -> tuple[tuple[str, str, str], ...]:
    """Which runtimes open the last of students that were cut from each other. Layers that one moves stay moved."""
    rounds = [runtimes(shape.before, shape.after, shape.kept_layers) for shape in found]
    return tuple(
        (told[0].name, worst(r.opens for r in told), next((r.remedy for r in told if r.remedy), ""))
        for told in zip(*rounds, strict=True)
    )


def _place(recipe: Recipe, ranks: int, *, cuda: bool) -> Hardware:
    """Where training runs, and in which precision."""
    trained = trainings(recipe).values()
    for training in trained:
        require_shares(training, ranks)
    precisions = {training.precision for training in trained}
    half = "bfloat16" in precisions or (cuda and "auto" in precisions)
    return Hardware(ranks, max((training.replicas for training in trained), default=1), cuda, half)


def _memory(
    recipe: Recipe, found: tuple[PlannedRound, ...], place: Hardware, *, compare: bool
) -> tuple[dict[str, Memory], tuple[DistillSetting, ...]]:
    """The memory of every training stage, and other settings for the distillation that needs most."""
    teacher = _sized(found[0], found[0].before.sizes)
    memory: dict[str, Memory] = {}
    distillations: dict[str, Distillation] = {}
    if recipe.correct is not None and recipe.corrects_before:
        memory["correct"] = correction_memory(recipe.correct, teacher, place, context=_longest(recipe.correct, recipe))
    for number, (part, shape) in enumerate(zip(rounds(recipe), found, strict=True), 1):
        if part.search is not None and part.search.method == "tournament":
            trained, kind = tournament_training(part), stored_dtype(recipe.dtype, teacher.config)
            memory[named("search", number)] = Distillation(
                trained, _sized(shape, shape.after), teacher, place, recipe.data.context, kind, adapters_rank(part)
            ).memory()
        if part.distill is None:
            continue
        name = named("distill", number)
        if recipe.nest is not None:  # every rank holds all of the student
            place = replace(place, replicas=place.ranks)
        distillation = distillations[name] = Distillation(
            part.distill,
            _sized(shape, shape.after),
            _sized(shape, shape.before.sizes) if learns_from_previous(recipe, number) else teacher,
            place,
            _longest(part.distill, recipe),
            stored_dtype(recipe.dtype, teacher.config),
        )
        corrects = recipe.correct is not None and recipe.corrects_beside
        memory[name] = (
            distillation.with_correction(recipe.correct) if corrects and recipe.correct else distillation.memory()
        )
        if recipe.nest is not None:
            memory[name] = nest_memory(memory[name], *planned_nest(recipe, found), recipe.nest.draws)
    alone, last = Hardware(cuda=place.cuda, half=place.half), _sized(found[-1], found[-1].after)
    likenesses = like_corrections(recipe, found[-1].after.hidden)
    for number, (step, training) in enumerate(zip(recipe.align, likenesses, strict=True), 1):
        length = step.context or recipe.data.context
        memory[named("align", number, step.kind)] = correction_memory(training, last, alone, context=length)
    if not (distillations and compare):
        return memory, ()
    return memory, distillations[max(distillations, key=lambda name: memory[name].total_bytes)].settings()


def _held(recipe: Recipe, found: tuple[PlannedRound, ...], *, on_cpu: bool) -> dict[str, Held]:
    """The memory of every prune stage, and of the evaluation."""
    where: dict[str, Any] = {
        "dtype": computing_dtype(recipe.dtype, found[0].before.config, on_cpu=on_cpu),
        "on_cpu": on_cpu,
    }
    tried = [ShapesTried.of(part, shape).shapes for part, shape in zip(rounds(recipe), found, strict=True)]
    held = {
        named("prune", number): pruning(part, shape, shapes, turned=work.is_rotated(part, shape, shapes), **where)
        for number, (part, shape, shapes) in enumerate(zip(rounds(recipe), found, tried, strict=True), 1)
    }
    return {**held, "evaluate": evaluation_memory(recipe, found, **where)}


def _longest(training: Training, recipe: Recipe) -> int:
    return max(span.context for span in spans(training, recipe.data.context))


def _sized(shape: PlannedRound, arch: Arch) -> Sized:
    """The model before a round's cut, or after it."""
    if arch == shape.before.sizes:
        return Sized(shape.before.config, arch, shape.before.ledger.count(arch))
    return Sized(shape.config(), arch, shape.counts())


def _schedule(recipe: Recipe) -> dict[str, Any]:
    section: Training | None = recipe.distill
    if section is None:
        return {}
    keys = ("lr", "min_lr", "warmup_steps", "batch", "tokens")
    return {key: getattr(section, key) for key in keys} | {"context": recipe.data.context}
