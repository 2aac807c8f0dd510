"""Models that are sharded over several ranks: trained, frozen, and gathered again to be saved.

The head never runs as a module, because losses use its matrix one chunk at a time. So a sharded head is gathered once
per step. Its gradient accumulates over the micro-batches and is then reduced into the shards once. On one rank nothing
is gathered or reduced.

Shapes: D hidden, V vocab.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial

from halve.model import saving
from halve.model.head import Body, Head, split
from halve.model.precision import cast_weights, loaded_dtypes
from halve.recipe.schema import Distill, Training
from halve.train.ranks import blocks
from halve.train.ranks.group import ALONE, Ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Learner:
    """A model in training: its body and its head, whose parameters are shards if there are several ranks."""

    body: Body
    own: Head
    ranks: Ranks
    """The ranks that train it together."""

    def head(self) -> Head:
        """The whole head, for `step.gradients`. If it is gathered, gradients stay in it until `settle`."""
        weight, bias = _gathered(self.own.weight), _gathered(self.own.bias)
        return replace(self.own, weight=weight, bias=bias, accumulates=True)

    def rest(self) -> None:
        """Free parameters that a forward pass without gradients has gathered. They are shards again."""
        if isinstance(self.body.module, FSDPModule):
            self.body.module.reshard()

    def settle(self, head: Head) -> None:
        """Reduce the gradients of a gathered head over the ranks, into those of the shards."""
        for shard, whole in ((self.own.weight, head.weight), (self.own.bias, head.bias)):
            if isinstance(shard, DTensor) and whole is not None and whole.grad is not None:
                summed = DTensor.from_local(whole.grad, shard.device_mesh, [Partial()] * shard.device_mesh.ndim)
                mine = summed.redistribute(placements=shard.placements)
                shard.grad = mine if shard.grad is None else shard.grad + mine
                whole.grad = None


def learner(
    model: PreTrainedModel,
    training: Training,
    *,
    device: str,
    half: bool,
    ranks: Ranks = ALONE,
    whole: bool = False,
) -> Learner:
    """Prepare a model, in place, to be trained by `ranks`, as float32 masters on `device`.

    With several ranks, each takes its shards from a model that should be in main memory (`Ranks.home`). `half` says
    whether products are computed in bfloat16. With `whole`, every rank holds all weights, and a step adds up their
    gradients. Make optimizers from the parameters that the model has afterwards.
    """
    model.eval()  # not train(), because with dropout a step would depend on more than its number
    if ranks.alone or whole:
        model.to(device)
        if model.dtype in _HALF:
            model.float()
    body, head = split(model)
    blocks.recompute(model, training.activation_checkpointing)
    if training.compile:
        blocks.compiled(model)
    if not (ranks.alone or whole):
        blocks.shard(model, body.module, ranks.mesh(training.replicas), half=half, trains=True)
        output = model.get_output_embeddings()
        head = replace(head, weight=output.weight, bias=getattr(output, "bias", None))
        model.to(device)  # parameters that are not sharded
    if model.dtype in _HALF:  # only now, so that a rank holds float32 masters only of its shards
        model.float()
    return Learner(body, head, ranks)


def frozen(model: PreTrainedModel, body: Body, training: Distill, *, half: bool, ranks: Ranks = ALONE) -> None:
    """Prepare a model that only runs forward: compiled and sharded if the recipe says so.

    Its head was split off before and stays whole on every rank.
    """
    if training.compile:
        blocks.compiled(model)
    if training.shard_teacher and not ranks.alone:
        blocks.shard(model, body.module, ranks.mesh(training.replicas), half=half, trains=False)


def save(
    model: PreTrainedModel,
    folder: Path,
    *,
    dtype: torch.dtype,
    extra_from: Path | None,
    record: Mapping[str, Any] | None,
    ranks: Ranks = ALONE,
) -> None:
    """`saving.save_model` of a model that `ranks` have trained. Rank 0 writes while the others wait."""
    plain = cast_weights(model, dtype) if ranks.alone else _whole(model, dtype, ranks)

    def write() -> None:
        assert plain is not None
        saving.save_model(plain, folder, extra_from=extra_from, record=record)

    ranks.lead(write)


def _gathered(own: Tensor | None) -> Any:
    if not isinstance(own, DTensor):
        return own
    return _full(own).requires_grad_(own.requires_grad and torch.is_grad_enabled())


@torch.no_grad()
def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def _whole(model: PreTrainedModel, dtype: torch.dtype, ranks: Ranks) -> PreTrainedModel | None:
    """The whole model on the CPU of rank 0. Every rank has to call this."""
    state: dict[str, Tensor] = {}
    done: dict[int, Tensor] = {}
    wanted = loaded_dtypes(model, dtype)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in done:
            whole = _full(tensor)
            done[id(tensor)] = whole.to("cpu", wanted.get(name)) if ranks.leads else whole
            if not ranks.leads:
                done[id(tensor)] = torch.empty(0)
        state[name] = done[id(tensor)]
    if not ranks.leads:
        return None
    with torch.device("meta"):
        plain: PreTrainedModel = type(model)(copy.deepcopy(model.config))
    plain.load_state_dict(state, assign=True)
    plain.generation_config = model.generation_config
    plain.tie_weights()
    return plain
