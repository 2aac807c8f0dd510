"""How much memory one step takes, found by running it on tensors that have shapes but no contents.

The passes are those of the loop itself, under PyTorch's fake tensors. So every family, precision and kind of
recomputation is counted by what it really stores. No weight is read and no memory is taken. An 8B model takes seconds.

A GPU is rehearsed on the CPU. Attention stores the same there: queries, keys, values, the result and a number for each
row. Only the factors of the head's products differ, and these are set as on the GPU.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig

from halve.anatomy.configs import build, num_layers, resized
from halve.errors import HalveError
from halve.model.head import Body, Head, parts
from halve.process.waits import wait
from halve.recipe.schema import Correct, Distill, Training
from halve.text.batch import Batch, predictions
from halve.train.loop import adapters
from halve.train.losses import chunked, divergences
from halve.train.objectives import intermediate
from halve.train.objectives import logits as objectives
from halve.train.ranks import blocks
from halve.train.teachers.live import Live

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_FEW = 2
"""Layers of the shallower model. Families that alternate between two kinds of layers do so within it."""


@dataclass(frozen=True)
class Cast:
    """The models of a rehearsal: a student and its teacher (None if it learns from text alone).

    `half`: products are computed in bfloat16. `in_shards`: layers are then gathered in bfloat16 and not cast.
    """

    student: PretrainedConfig
    teacher: PretrainedConfig | None
    half: bool
    teacher_dtype: torch.dtype = torch.bfloat16
    cuda: bool = False
    in_shards: bool = False
    lora_rank: int | None = None
    """The rank of adapters, if a distillation trains these alone."""


@dataclass(frozen=True, kw_only=True)
class Learned:
    """The trained parameters: their number, how many are in matrices between hidden states, the largest of these."""

    trained: int
    matrices: int
    largest: int


@dataclass(frozen=True, kw_only=True)
class Rehearsal(Learned):
    """The memory of a step, without the weights of both models and the optimizer's moments.

    `first` is the peak of the first micro-batch, with its growing gradients. `later` is the peak of the others, without
    gradients. `kept` are the bytes that are stored for the backward pass when the loss is known. If the family's code
    cannot run on tensors without contents, `problem` says why, and the bytes are 0.
    """

    first: int
    later: int
    kept: int
    problem: str = ""


class Watched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that are made while it is active: `now`, and the `most` so far."""

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._alive = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count its results."""
        grouped = func is torch.ops.aten._grouped_mm.default
        result = _grouped(*args, **(kwargs or {})) if grouped else func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        self.most = max(self.most, self.now)
        return result

    def begin_anew(self) -> int:
        """Reset the peak, and return the current bytes."""
        self.most = self.now
        return self.now

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, num_bytes = storage._cdata, storage.nbytes()
        if address not in self._alive:
            self._alive.add(address)
            self.now += num_bytes
            weakref.finalize(storage, self._drop, address, num_bytes)

    def _drop(self, address: int, num_bytes: int) -> None:
        self._alive.discard(address)
        self.now -= num_bytes


def _grouped(a: Tensor, b: Tensor, offs: Tensor | None = None, **_: Any) -> Tensor:
    """The result shapes of `torch._grouped_mm`, which computes a mixture's experts and their gradients.

    PyTorch's own rule for tensors without contents refuses every dtype but bfloat16. Its kernels accept others.
    """
    if a.ndim == b.ndim == 2:
        assert offs is not None, "groups of columns are told by their ends"
        return a.new_empty(offs.shape[0], a.shape[0], b.shape[1])
    groups = a.shape[:1] if a.ndim == b.ndim else ()
    return a.new_empty(*groups, a.shape[-2], b.shape[-1])


def rehearse(cast: Cast, training: Training, *, samples: int, context: int) -> Rehearsal:
    """Run two micro-batches of this many samples. A process runs equal ones once.

    For a deep student, two shallow ones are run instead, because the memory grows by the same amount with every layer.
    Raises what `intermediate.match` raises.
    """
    models = [
        None if config is None else (type(config), repr(config.to_dict())) for config in (cast.student, cast.teacher)
    ]
    held = (cast.half, cast.teacher_dtype, cast.cuda, cast.in_shards, cast.lora_rank)
    asked = (type(training), training.model_dump_json(exclude=_ELSEWHERE))
    key = (*models, *held, *asked, samples, context)
    if key not in _rehearsed:
        _rehearsed[key] = _rehearse(cast, training, samples=samples, context=context)
    return _rehearsed[key]


_rehearsed: dict[tuple[Hashable, ...], Rehearsal] = {}
_ELSEWHERE = {
    *("tokens", "batch", "micro_batch", "lr", "min_lr", "optimizer", "offload_optimizer"),
    *("cache", "teacher_device", "offload_teacher", "shard_teacher"),
}
"""Keys that a pass does not depend on: a plan compares settings that differ in these."""


def _rehearse(cast: Cast, training: Training, *, samples: int, context: int) -> Rehearsal:
    problem = ""
    try:
        with _quietly(), wait("running a step on tensors without contents, for the memory plan"):
            played = _played(cast, training, samples=samples, context=context)
    except HalveError:
        raise
    except Exception as error:  # a family's code may read contents, which do not exist
        played, problem = _Played(0, 0, 0), " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return Rehearsal(
        **played._asdict(), **asdict(learned(cast.student, training, lora_rank=cast.lora_rank)), problem=problem
    )


def learned(config: PretrainedConfig, training: Training, *, lora_rank: int | None = None) -> Learned:
    """The parameters of a model that a training changes. With `lora_rank`, a distillation changes adapters alone."""
    model = _learner(Cast(config, None, half=False, lora_rank=lora_rank), training)
    matrices = [
        p.numel() for layer in blocks.layers(model) for p in layer.parameters() if p.requires_grad and p.ndim == 2
    ]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Learned(trained=trained, matrices=sum(matrices), largest=max(matrices, default=0))


def forward_bytes(config: PretrainedConfig, dtype: torch.dtype, *, samples: int, context: int) -> int:
    """The peak of a pass without gradients, weights left out. Nothing is kept from layer to layer: a few are run.

    Raises whatever a family's code raises on tensors without contents.
    """
    key: tuple[Any, ...] = (type(config), repr(config.to_dict()), dtype, samples, context)
    if key not in _passes:
        model = build(_fewer(config, _FEW), device="meta", dtype=dtype).eval()
        with _quietly(), FakeTensorMode():
            _give_storage(model)
            ids_BS, body = torch.zeros(samples, context, dtype=torch.long), parts(model)[0]
            with Watched([*model.parameters(), *model.buffers()]) as watched, torch.no_grad():
                body(ids_BS)
            _passes[key] = watched.most
    return _passes[key]


_passes: dict[tuple[Any, ...], int] = {}


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep PyTorch from logging errors of code that needs contents. `problem` has the message."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


class _Played(NamedTuple):
    first: int
    later: int
    kept: int


def _played(cast: Cast, training: Training, *, samples: int, context: int) -> _Played:
    depth = num_layers(cast.student)
    by_number = isinstance(training, Distill) and training.intermediate is not None and training.intermediate.layers
    if depth <= 2 * _FEW or by_number:
        return _play(cast, training, samples=samples, context=context)
    few, more = (
        _play(_shallow(cast, layers), training, samples=samples, context=context) for layers in (_FEW, 2 * _FEW)
    )
    steps = (depth - 2 * _FEW) / _FEW
    return _Played(*(round(b + steps * (b - a)) for a, b in zip(few, more, strict=True)))


def _play(cast: Cast, training: Training, *, samples: int, context: int) -> _Played:
    student, frozen = _learner(cast, training), None
    if cast.teacher is not None:
        frozen = build(cast.teacher, device="meta", dtype=cast.teacher_dtype).requires_grad_(False)
    with FakeTensorMode():
        for model in filter(None, (student, frozen)):
            _give_storage(model)
        act = _Act.of(cast, training, student, frozen)
        batch = Batch(torch.zeros(samples, context, dtype=torch.long), tuple(range(samples)))
        body, own_head = parts(student)
        head = replace(own_head, accumulates=True)
        most, kept = [], 0
        with Watched(act.known) as watched:
            for _ in range(2):
                before = watched.begin_anew()
                with torch.autocast("cpu", torch.bfloat16, enabled=cast.half):
                    loss, _ = act.objective(body, head, batch)
                kept = watched.now - before
                torch.autograd.backward(loss)
                del loss
                most.append(watched.most - before)
    return _Played(most[0], most[1], kept)


def _shallow(cast: Cast, layers: int) -> Cast:
    """The same with this many layers. A teacher stores nothing from layer to layer, so few are enough."""

    teacher = None if cast.teacher is None else _fewer(cast.teacher, layers)
    return replace(cast, student=_fewer(cast.student, layers), teacher=teacher)


def _fewer(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    if num_layers(config) <= layers:
        return config
    return resized(config, {"layers": layers}, kept_layers=tuple(range(layers)))


@dataclass(frozen=True)
class _Act:
    objective: objectives.Objective
    known: tuple[Tensor, ...]
    """The bytes of weights, which exist before the step."""

    @classmethod
    def of(cls, cast: Cast, training: Training, student: PreTrainedModel, teacher: PreTrainedModel | None) -> _Act:
        objective, more = _objective(cast, training, student, teacher)
        models = [model for model in (student, teacher) if model is not None]
        weights = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
        return cls(objective, (*weights, *more))


def _objective(
    cast: Cast, training: Training, student: PreTrainedModel, teacher: PreTrainedModel | None
) -> tuple[objectives.Objective, list[Tensor]]:
    """The loss of the stage, with the chunk size of the planned device, and the loss's own weights."""

    def summed(hidden_ND: Tensor, head: Head, target: chunked.Target) -> Tensor:
        vocab = head.weight.shape[0]
        chunk = chunked.chunk_tokens(vocab, cuda=cast.cuda)
        hidden_ND = hidden_ND[: 2 * chunk]  # further chunks and blocks take the same memory, and more time
        return chunked.chunked(hidden_ND, head, target, vocab=vocab, chunk=chunk, operand=operand, blocks=2)

    operand = torch.bfloat16 if cast.half else None
    if teacher is None or not isinstance(training, Distill) or not objectives.teacher_terms(training):

        def from_text(body: Body, head: Head, batch: Batch) -> tuple[Tensor, int]:
            labels = batch.labels()
            return summed(predictions(body, batch), head, chunked.cross_entropy_target(labels)), labels.numel()

        return from_text, []
    rows = divergences.weighted(objectives.teacher_terms(training))
    its_body, its_head = parts(teacher)
    if cast.cuda:  # a CPU would make a float32 copy of it, and a GPU does not
        its_head = replace(its_head, weight=its_head.weight.float())
    live = Live(its_body, its_head)

    def from_teacher(body: Body, head: Head, batch: Batch) -> tuple[Tensor, int]:
        states_ND, taught = live.answer(batch)
        target = chunked.follow(states_ND, taught, rows, vocab=head.weight.shape[0], operand=operand)
        if ce := training.terms.get("ce", 0.0):
            target = chunked.sum_of([(1.0, target), (ce, chunked.cross_entropy_target(batch.labels()))])
        return summed(predictions(body, batch), head, target), batch.labels().numel()

    states = training.intermediate
    # attention relations are computed one head at a time, over positions that shapes do not show: not rehearsed
    heard = () if states is None else tuple(state for state in states.states if state != "attention")
    if states is None or not heard:
        return from_teacher, [its_head.weight]
    matching = intermediate.match(student, teacher, states=heard, layers=states.layers, seed=0)
    mapping = [] if matching.map is None else [matching.map.weight]
    return intermediate.with_states(from_teacher, matching, alpha=states.alpha), [its_head.weight, *mapping]


def _learner(cast: Cast, training: Training) -> PreTrainedModel:
    """The student as `shards.learner` prepares it, or a teacher that is corrected, on the meta device."""
    model = build(cast.student, device="meta").requires_grad_(True)
    if isinstance(training, Correct):
        adapters.choose_trained(model, training, seed=0)
    elif cast.lora_rank is not None:
        adapters.require_peft(key="search.tournament.train", instead="train: full")
        adapters.add_lora(model, rank=cast.lora_rank, alpha=1.0, seed=0)
    if cast.in_shards and cast.half:
        for module in (module for layer in blocks.layers(model) for module in layer.modules()):
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(parameter.bfloat16(), parameter.requires_grad))
    blocks.recompute(model, training.activation_checkpointing)
    return model


def _give_storage(model: PreTrainedModel) -> None:
    """Move every tensor from meta to the CPU, which takes no memory under fake tensors. Tied ones stay tied."""
    there: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in there:
                    made = torch.empty(tensor.shape, dtype=tensor.dtype)
                    there[id(tensor)] = (
                        nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
                    )
                tensors[name] = there[id(tensor)]
