"""The memory plan: the peak memory of one rank in a training, before anything is loaded.

    masters      float32 weights of the trained parameters, a rank's shard of them
    gradients    float32, of the same parameters
    moments      those of the optimizer
    teacher      its weights, where and how the recipe keeps them; if it is corrected beside, masters and moments too
    gathered     what FSDP gathers temporarily: two layers, the embeddings, the head
    passing      activations, copies in half precision and chunks of the loss, from a rehearsal (`rehearsal`)

Not counted: PyTorch's own context and the fragmentation of its allocator. `fits` leaves a tenth free for them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from halve.anatomy import Arch, Counts
from halve.preflight.rehearsal import Cast, Learned, Rehearsal, rehearse
from halve.recipe.schema import Correct, Distill, Training
from halve.train.loop.optimizers import iterates_wide

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SPARE = 0.1
"""Share of the memory that the plan leaves free."""

_QUANTIZED = 1 + 4 / 256
"""Bytes of a moment in 8 bits: torchao keeps a float32 scale for every 256 entries."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    masters_bytes: int
    gradient_bytes: int
    moment_bytes: int
    teacher_bytes: int
    gathered_bytes: int
    passing_bytes: int
    unknown: str = ""
    """Why `passing_bytes` could not be rehearsed, if so. They are then 0."""

    @property
    def total_bytes(self) -> int:
        """The sum."""
        return sum(value for value in asdict(self).values() if isinstance(value, int))

    def fits(self, room: float) -> bool:
        """Whether it fits into this many bytes with `SPARE` left free. An unknown size does not fit."""
        return not self.unknown and self.total_bytes < (1 - SPARE) * room


@dataclass(frozen=True)
class Held:
    """Bytes at one moment of a stage that trains nothing."""

    models_bytes: int
    sums_bytes: int
    """Gram matrices and what their solution takes."""
    states_bytes: int
    """What is kept of all samples. It lies in main memory on every device, and what is larger in a file."""
    passing_bytes: int
    on_cpu: bool
    unknown: str = ""
    """Why `passing_bytes` are not known, if so. They are then 0."""

    @property
    def total_bytes(self) -> int:
        """The bytes on the device."""
        return self.models_bytes + self.sums_bytes + self.passing_bytes + (self.states_bytes if self.on_cpu else 0)

    def fits(self, room: float) -> bool:
        """Whether it fits into this many bytes with `SPARE` left free. An unknown size does not fit."""
        return not self.unknown and self.total_bytes < (1 - SPARE) * room


@dataclass(frozen=True)
class Sized:
    """What a plan knows about a model."""

    config: PretrainedConfig
    arch: Arch
    counts: Counts

    @property
    def layer(self) -> float:
        """Parameters of one layer, on average."""
        return self.counts.non_embedding / self.arch.layers

    @property
    def table(self) -> int:
        """Parameters of the embeddings, or of the head."""
        return self.arch.vocab * self.arch.hidden


@dataclass(frozen=True)
class Hardware:
    """Where a run is planned: ranks, groups of ranks that hold a whole model, kind of device, precision."""

    ranks: int = 1
    replicas: int = 1
    cuda: bool = True
    half: bool = True

    @property
    def shards(self) -> int:
        """Ranks that share one model."""
        return self.ranks // self.replicas


@dataclass(frozen=True)
class DistillSetting:
    """A setting of a distillation, and its memory."""

    optimizer: str
    recompute: str
    teacher: str
    memory: Memory


@dataclass(frozen=True)
class Distillation:
    """What is planned: student, teacher, place, and tokens in a sample."""

    training: Distill
    student: Sized
    teacher: Sized
    place: Hardware
    context: int
    teacher_dtype: torch.dtype
    lora_rank: int | None = None
    """The rank of adapters, if these are trained alone."""

    @cached_property
    def rehearsal(self) -> Rehearsal:
        """The rehearsal of its passes."""
        return _rehearsed(self._cast(), self.training, self.training, self.context, ranks=self.place.ranks)

    def memory(self) -> Memory:
        """Its memory."""
        return self._memory(self.training, self.rehearsal)

    def _memory(self, training: Distill, found: Rehearsal) -> Memory:
        place = self.place
        student_memory = _learning(training, self.student, found, place, batch=training)
        held, gathered = _frozen(training, self.teacher, self._cast().teacher_dtype.itemsize, place)
        return replace(student_memory, teacher_bytes=held, gathered_bytes=student_memory.gathered_bytes + gathered)

    def with_correction(self, section: Correct) -> Memory:
        """The same with a correction beside. Student and teacher train in turns, so the larger peak counts."""
        student_memory = _learning(self.training, self.student, self.rehearsal, self.place, batch=self.training)
        cast = replace(self._cast(), student=self.teacher.config, teacher=None)
        played = _rehearsed(cast, section, self.training, self.context, ranks=self.place.ranks)
        its = _learning(section, self.teacher, played, self.place, batch=self.training)
        fuller = max(student_memory, its, key=lambda one: one.gradient_bytes + one.gathered_bytes + one.passing_bytes)
        held = its.masters_bytes + its.moment_bytes
        unknown = student_memory.unknown or its.unknown
        kept = {
            "masters_bytes": student_memory.masters_bytes,
            "moment_bytes": student_memory.moment_bytes,
            "teacher_bytes": held,
        }
        return replace(fuller, **kept, unknown=unknown)

    def settings(self) -> tuple[DistillSetting, ...]:
        """Other settings: optimizer, recomputation, place of the teacher."""
        training = self.training
        ways = [way for way in _OPTIMIZERS if way == "adamw" or self.place.ranks == 1]
        cacheable = training.intermediate is None and set(training.terms) != {"ce"}
        places = [where for where in _TEACHERS if where != "cached" or cacheable]
        settings = []
        for recompute in ("none", "full"):
            distillation = self
            if training.activation_checkpointing != recompute:
                distillation = replace(
                    self, training=training.model_copy(update={"activation_checkpointing": recompute})
                )
            for way, where in product(ways, places):
                asked = distillation.training.model_copy(update={**_OPTIMIZERS[way], **_TEACHERS[where]})
                settings.append(
                    DistillSetting(way, recompute, where, distillation._memory(asked, distillation.rehearsal))
                )
        return tuple(settings)

    def _cast(self) -> Cast:
        place = self.place
        asked = None if self.training.cache == "logits" else self.teacher.config
        dtype = self.teacher_dtype if place.half else torch.float32
        return Cast(self.student.config, asked, place.half, dtype, place.cuda, place.ranks > 1, self.lora_rank)


_OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": "adamw", "offload_optimizer": False},
    "adamw8bit": {"optimizer": "adamw8bit", "offload_optimizer": False},
    "adamw, offloaded": {"optimizer": "adamw", "offload_optimizer": True},
}
_TEACHERS: dict[str, dict[str, Any]] = {
    "on the device": {"offload_teacher": False, "teacher_device": "same", "cache": "none"},
    "offloaded": {"offload_teacher": True, "teacher_device": "same", "cache": "none"},
    "cached": {"offload_teacher": False, "teacher_device": "same", "cache": "hidden"},
}


def correction_memory(training: Correct, teacher: Sized, place: Hardware, *, context: int) -> Memory:
    """The memory of a correction before the other stages."""
    cast = Cast(teacher.config, None, place.half, cuda=place.cuda, in_shards=place.ranks > 1)
    rehearsal = _rehearsed(cast, training, training, context, ranks=place.ranks)
    return _learning(training, teacher, rehearsal, place, batch=training)


def _samples(batch: Training, ranks: int) -> int:
    """The samples of one micro-batch on one rank."""
    return min(batch.micro_batch or batch.batch, max(1, batch.batch // ranks))


def _rehearsed(cast: Cast, training: Training, batch: Training, context: int, *, ranks: int) -> Rehearsal:
    return rehearse(cast, training, samples=_samples(batch, ranks), context=context)


def _learning(training: Training, model: Sized, found: Rehearsal, place: Hardware, *, batch: Training) -> Memory:
    """The memory of one learner. `batch` says how many micro-batches make a step."""
    one_pass = place.ranks == 1 and _samples(batch, 1) == batch.batch
    gradients = 4 * found.trained / place.shards
    # of Muon the update in float32 and three factors, in half or in float32
    factor = 4 if iterates_wide(on_cpu=not place.cuda) else 2
    scratch = (4 + 3 * factor) * found.largest if training.optimizer == "muon" else 0
    passing = max(found.first - gradients, 0) if one_pass else found.later
    return Memory(
        masters_bytes=round(4 * model.counts.params / place.shards),
        gradient_bytes=round(gradients),
        moment_bytes=0 if training.offload_optimizer else round(moments(training, found) / place.shards),
        teacher_bytes=0,
        gathered_bytes=0 if place.ranks == 1 else round(_gathered(model, 2 if place.half else 4)),
        passing_bytes=0 if found.problem else round(max(passing, scratch)),
        unknown=found.problem,
    )


def moments(training: Training, found: Learned) -> float:
    """Bytes of an optimizer's moments, on any device."""
    if training.offload_optimizer:
        return 8.0 * found.trained
    if training.optimizer == "adamw8bit":
        return 2 * _QUANTIZED * found.trained
    if training.optimizer == "muon":
        return 4.0 * found.matrices + 8.0 * (found.trained - found.matrices)
    return 8.0 * found.trained


def _gathered(model: Sized, each: int) -> float:
    """Two layers with their gradients, the embeddings, and the head with its gradient."""
    return 2 * model.layer * (each + 4) + 4 * model.table + 8 * model.table


def _frozen(training: Distill, teacher: Sized, each: int, place: Hardware) -> tuple[int, int]:
    """A teacher's weights on the student's device, and what FSDP gathers of them."""
    head, params = each * teacher.table, each * teacher.counts.params
    if training.cache != "none" or training.teacher_device != "same":
        return head, 0
    if training.offload_teacher:
        layers = each * teacher.counts.non_embedding
        return round(params - layers + each * teacher.layer), 0
    if place.ranks > 1 and training.shard_teacher:
        return round(params / place.shards) + head, round(2 * each * teacher.layer) + head
    return params, 0
