"""The teacher's distribution over the next token, batch by batch.

A live teacher runs forward for every batch: on the student's device, on another one, or with its layers offloaded to
main memory. Stored answers are read from a cache (see `cache`).

Shapes: N tokens (those that a batch predicts), D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from halve.errors import RecipeError
from halve.model.checkpoint import Checkpoint
from halve.model.head import Body, Head, split
from halve.recipe.schema import Distill, Dtype
from halve.text.batch import Batch, predictions
from halve.train.ranks import blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Answer = TypeVar("Answer", covariant=True)

STUDENTS_DEVICE = "same"
"""`teacher_device`: that of the student."""


@runtime_checkable
class Teacher(Protocol[Answer]):
    """Answers for every predicted position of a batch: `Hidden`, or `divergences.Sampled` if only draws are known."""

    def answer(self, batch: Batch) -> Answer:
        """Return the answer on the batch's device, without gradients."""


class Hidden(NamedTuple):
    """The whole distribution: hidden states, and the head that computes logits from them."""

    states: Float[Tensor, "tokens hidden"]
    head: Head


@dataclass(frozen=True)
class Live:
    """A model that runs forward for every batch."""

    body: Body
    head: Head

    def answer(self, batch: Batch) -> Hidden:
        """Run the body."""
        with torch.inference_mode():
            return Hidden(predictions(self.body, batch), self.head)


def load_teacher(
    source: Checkpoint, training: Distill, *, dtype: Dtype, device: str, half: bool, in_shards: bool = False
) -> tuple[PreTrainedModel, Live]:
    """Load a teacher to the place that the recipe's section sets. It answers on the student's `device`.

    A teacher that will be `in_shards` is loaded to main memory, with a head on the device. It can answer once it is
    sharded. `half` says whether products are computed in bfloat16. If not, its weights become float32, because products
    of half-precision weights would not be exact, and on a CPU not fast. Raises what loading and splitting raise, and
    `RecipeError` for a device that does not exist.
    """
    waits = training.offload_teacher
    place = "cpu" if waits or in_shards else _place(training, device)
    model = source.load(dtype=dtype, device=place).requires_grad_(False)
    if not half:
        model.float()
    if waits:
        visiting(model, device)
    body, head = split(model)
    if in_shards:
        return model, Live(body, _moved(head, device))
    if not waits and not _same(place, device):
        body, head = away(body, place=place, half=half), _moved(head, device)
    return model, Live(body, head)


def stays(training: Distill) -> bool:
    """Whether the teacher stays on the student's device. Only then can it be sharded over ranks."""
    return training.teacher_device == STUDENTS_DEVICE and not training.offload_teacher


def require_place(training: Distill) -> None:
    """Raise `RecipeError` for a `teacher_device` that torch does not know or that does not exist."""
    _place(training, "cpu")


def away(body: Body, *, place: str, half: bool) -> Body:
    """Run a body on another device than the caller's: tokens are sent there, and hidden states come back.

    Autocast is set for one kind of device, so `half` says again whether products there are computed in bfloat16.
    """
    return Body(_Away(body.module, place, half))


def visiting(model: PreTrainedModel, device: str, *, fetch: Callable[[Tensor], Tensor] | None = None) -> None:
    """Offload the layers of a frozen model: each is copied to `device` only while it runs. The rest moves there.

    `fetch` makes the tensors of a running layer from the offloaded ones (default: a copy on the device). Results are
    those of the model on that device. The device holds embeddings, head and one layer. Changes the model in place.
    """
    take = fetch or (lambda waiting: waiting.to(device, non_blocking=True))
    layers = blocks.layers(model)
    waiting = {id(tensor) for layer in layers for tensor in _tensors(layer)}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and id(tensor) not in waiting:
                tensor.data = tensor.data.to(device)
    for layer in layers:
        _Visitor(layer, take, pinned=torch.device(device).type == "cuda")


class _Away(nn.Module):
    def __init__(self, module: nn.Module, place: str, half: bool) -> None:
        super().__init__()
        self.module, self.place, self.in_half = module, torch.device(place), half

    def forward(self, *, input_ids: Tensor, **kwargs: Any) -> tuple[Tensor]:
        there = {key: value.to(self.place) if isinstance(value, Tensor) else value for key, value in kwargs.items()}
        with torch.autocast(self.place.type, torch.bfloat16, enabled=self.in_half):
            hidden_BSD: Tensor = self.module(input_ids=input_ids.to(self.place), **there)[0]
        return (hidden_BSD.to(input_ids.device),)


class _Visitor:
    """A layer's offloaded weights, pinned if they go to a GPU. They are on the device only while the layer runs."""

    def __init__(self, layer: nn.Module, fetch: Callable[[Tensor], Tensor], *, pinned: bool) -> None:
        self.fetch = fetch
        self.home = [(tensor, tensor.data.pin_memory() if pinned else tensor.data) for tensor in _tensors(layer)]
        for tensor, waiting in self.home:
            tensor.data = waiting
        layer.register_forward_pre_hook(self.come)
        layer.register_forward_hook(self.leave, always_call=True)

    @torch.inference_mode(False)  # a parameter cannot take the data of a tensor that was made in inference mode
    def come(self, *_: Any) -> None:
        for tensor, waiting in self.home:
            tensor.data = self.fetch(waiting)

    def leave(self, *_: Any) -> None:
        for tensor, waiting in self.home:
            tensor.data = waiting


def _tensors(layer: nn.Module) -> list[Tensor]:
    return [*layer.parameters(), *layer.buffers()]


def _place(training: Distill, device: str) -> str:
    wanted = training.teacher_device
    if wanted == STUDENTS_DEVICE:
        return device
    try:
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(
            f"distill.teacher_device {wanted} is not there",
            why=str(error).splitlines()[0],
            fix="give a device that torch has, such as cpu or cuda:1, or same",
        ) from error
    return wanted


def _same(place: str, device: str) -> bool:
    first, second = (torch.empty(0, device=name).device for name in (place, device))
    return first == second


def _moved(head: Head, device: str) -> Head:
    bias = None if head.bias is None else head.bias.to(device)
    return replace(head, weight=head.weight.to(device), bias=bias)
