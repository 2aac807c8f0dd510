"""What a run will do and cost, said before it starts: sizes, tokens, FLOPs, memory, disk. Reads no weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from halve.anatomy import Anatomy, Arch, Counts
from halve.anatomy.runtimes import runtimes
from halve.recipe import Recipe, Training
from halve.rounds import Shape, learns_from_previous, named, rounds, shapes
from halve.train.answers import token_bytes
from halve.train.chunked import chunk_tokens
from halve.train.schedule import spans

GPU_BYTES = 80e9
# Matrix rate that MFU is counted against: one H100 SXM in bf16, dense, from its data sheet.
GPU_FLOPS = 989e12
MFU = 0.4


@dataclass(frozen=True)
class Memory:
    """Bytes on one device while distilling in bf16 compute with float32 masters, and whether 80 GB hold them.

    masters, gradients and AdamW's two moments are float32 and autocast keeps a 16-bit copy of the weights (18 bytes a
    student parameter; 12 with moments in 8 bits, 10 with moments in main memory); the teacher stands in its
    checkpoint's 16 bits; activations are those that one micro-batch keeps for the backward pass, about 34 hidden plus
    3 ffn 16-bit entries a token and layer; the loss keeps two float32 chunks of logits. An estimate: no GPU has been
    measured yet.
    """

    student_bytes: int
    teacher_bytes: int
    activation_bytes: int
    loss_bytes: int

    @property
    def total_bytes(self) -> int:
        """The sum."""
        return self.student_bytes + self.teacher_bytes + self.activation_bytes + self.loss_bytes

    @property
    def fits(self) -> bool:
        """Whether it fits one 80 GB GPU with a tenth to spare."""
        return self.total_bytes < 0.9 * GPU_BYTES


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
    memory: Memory
    disk_bytes: int
    cache_bytes: int
    """The part of the disk that caches of teachers' answers take at most."""
    schedule: dict[str, Any]
    tried: bool
    """Whether a trial may share the budget between depth and width in another way than is shown."""

    @property
    def gpu_hours(self) -> float:
        """Hours on one H100 at 40 % MFU."""
        return sum(self.flops.values()) / (GPU_FLOPS * MFU) / 3600

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        memory = {**asdict(self.memory), "total_bytes": self.memory.total_bytes, "fits_80gb": self.memory.fits}
        return {**asdict(self), "memory": memory, "gpu_hours": self.gpu_hours}


def forecast(recipe: Recipe) -> Forecast:
    """Plan and cost of a recipe from the teacher's config alone.

    Raises what planning raises: `CheckpointError`, `AnatomyError`, `PlanError`.
    """
    context = recipe.data.context
    found = shapes(recipe)
    teacher, last = found[0].before, found[-1]
    before = teacher.ledger.count(teacher.sizes, context=context)
    made = tuple(_made(shape, context) for shape in found)
    flops, tokens = _work(recipe, found)
    return Forecast(
        name=recipe.name,
        teacher=teacher.sizes,
        student=last.after,
        teacher_counts=before,
        student_counts=made[-1].counts,
        dropped_layers=made[-1].dropped_layers,
        rounds=made,
        runtimes=tuple((r.name, r.opens, r.remedy) for r in runtimes(last.before, last.after)),
        tokens=tokens,
        flops=flops,
        memory=_peak(recipe, found, before, made),
        disk_bytes=_disk(recipe, before, made, tokens) + cache_bytes(recipe, found),
        cache_bytes=cache_bytes(recipe, found),
        schedule=_schedule(recipe),
        tried=any(_is_tried(part) for part in rounds(recipe)),
    )


def _is_tried(recipe: Recipe) -> bool:
    asked = recipe.prune
    return asked.shape == "trial" and (asked.params is not None or asked.non_embedding_ratio is not None)


def _made(shape: Shape, context: int) -> Round:
    kept, layers = shape.kept_layers, range(shape.before.sizes.layers)
    counts = shape.student.ledger.count(shape.after, kept_layers=kept, context=context)
    return Round(shape.after, counts, () if kept is None else tuple(i for i in layers if i not in kept))


def _peak(recipe: Recipe, found: tuple[Shape, ...], before: Counts, made: tuple[Round, ...]) -> Memory:
    """The memory of the round that takes most."""
    candidates = []
    for i, (part, shape) in enumerate(zip(rounds(recipe), found, strict=True)):
        teacher = made[i - 1].counts if learns_from_previous(recipe, i + 1) else before
        candidates.append(memory(shape.before, shape.after, teacher, made[i].counts, part))
    return max(candidates, key=lambda one: one.total_bytes)


def memory(anatomy: Anatomy, after: Arch, before: Counts, counts: Counts, recipe: Recipe) -> Memory:
    """The memory of distillation on one device."""
    section = recipe.distill
    context = recipe.data.context
    rows = context
    if section:
        rows = (section.micro_batch or section.batch) * max(span.context for span in spans(section, context))
    return Memory(
        student_bytes=_bytes_a_parameter(section) * counts.params,
        teacher_bytes=_teacher_bytes(recipe, before),
        activation_bytes=2 * rows * after.layers * (34 * after.hidden + 3 * after.ffn),
        loss_bytes=2 * 4 * min(rows, chunk_tokens(anatomy.sizes.vocab, cuda=True)) * anatomy.sizes.vocab,
    )


def _bytes_a_parameter(training: Training | None) -> int:
    """Masters, gradients and a 16-bit copy; two moments of 4 bytes, of 1 in 8 bits, of none where they are offloaded.

    `muon` is counted as AdamW, which it stays below.
    """
    if training is not None and training.offload_optimizer:
        return 10
    return 12 if training is not None and training.optimizer == "adamw8bit" else 18


def _teacher_bytes(recipe: Recipe, before: Counts) -> int:
    """Its weights; where it learns beside, masters, and what training adds to those that move."""
    if recipe.correct is None or not recipe.corrects_beside:
        return before.weight_bytes
    return (18 if recipe.correct.method == "full" else 4) * before.params


def _work(recipe: Recipe, found: tuple[Shape, ...]) -> tuple[dict[str, float], dict[str, int]]:
    """Forward is one unit, backward two: 3 for what is trained, 1 for the teacher (DESIGN: work per token)."""
    tokens: dict[str, int] = {}
    flops: dict[str, float] = {}

    def add(name: str, training: Training, per_token: Callable[[int], float]) -> None:
        tokens[name], flops[name] = training.tokens, _over_phases(training, recipe.data.context, per_token)

    if recipe.correct and recipe.corrects_before:
        add("correct", recipe.correct, lambda context: 3 * _whole(found[0], context))
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
                for name in (distill, *(f"{distill} ({one})" for one in part.distill.baselines if one != "ce")):
                    learned = min(recipe.correct.tokens, part.distill.tokens)
                    flops[name] += 3.0 * learned * _whole(teacher, recipe.data.context)
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


def _disk(recipe: Recipe, before: Counts, made: tuple[Round, ...], tokens: dict[str, int]) -> int:
    """Models, one training checkpoint of 12 bytes a parameter with its successor beside it, and the token files."""
    total = before.weight_bytes + 24 * before.params if recipe.corrects_before else 0
    for part, after in zip(rounds(recipe), (one.counts for one in made), strict=True):
        students = 1 + (1 + len(part.distill.baselines) if part.distill else 0)
        total += students * after.weight_bytes
        if part.distill and recipe.corrects_beside:
            corrected = {"student", *part.distill.baselines} - {"ce"}
            total += len(corrected) * before.weight_bytes + 24 * before.params
    return total + 24 * max(one.counts.params for one in made) + 4 * max(tokens.values())


def cache_bytes(recipe: Recipe, found: tuple[Shape, ...]) -> int:
    """What caches take at most: samples that are drawn more than once are kept once, in 16 bits but for float32."""
    total = 0
    for number, part in enumerate(rounds(recipe), 1):
        if part.distill is not None:
            teacher = found[number - 1 if learns_from_previous(recipe, number) else 0].before.sizes
            total += part.distill.tokens * token_bytes(
                part.distill.cache,
                hidden=teacher.hidden,
                vocab=teacher.vocab,
                samples=part.distill.cache_samples,
                half=part.distill.precision != "float32",
            )
    return total


def _schedule(recipe: Recipe) -> dict[str, Any]:
    section: Training | None = recipe.distill
    if section is None:
        return {}
    keys = ("lr", "min_lr", "warmup_steps", "batch", "tokens")
    return {key: getattr(section, key) for key in keys} | {"context": recipe.data.context}
