"""Prepare a model's layers for training: activation checkpointing, compilation, sharding.

They are nested as in PyTorch's own trainer: activation checkpointing inside compilation inside shards. This is done for
each layer, then for the rest of the body, and then for the head. Parameter names do not change.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from halve.anatomy import configs, kinds

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ATEN = torch.ops.aten
_PRODUCTS = {
    overload
    for packet in (
        _ATEN.mm,
        _ATEN.addmm,
        _ATEN.bmm,
        _ATEN.baddbmm,
        _ATEN.linear,
        _ATEN._scaled_dot_product_flash_attention,
        _ATEN._scaled_dot_product_flash_attention_for_cpu,
        _ATEN._scaled_dot_product_efficient_attention,
        _ATEN._scaled_dot_product_cudnn_attention,
        _ATEN._grouped_mm,
    )
    for overload in (getattr(packet, name) for name in packet.overloads())  # type: ignore[no-untyped-call]
}
"""Operations whose results `selective` keeps: matrix products and attention, which take most of the time."""


def layers(model: PreTrainedModel) -> list[nn.Module]:
    """The model's layers."""
    path = kinds.find_layers(model, configs.num_layers(model.config))
    return list(cast(nn.ModuleList, model.get_submodule(path)))


def recompute(model: PreTrainedModel, kind: str) -> None:
    """Let layers store less for the backward pass: `full` stores only the input, `selective` also products.

    Nothing in a layer is random in evaluation mode, so recomputed results are the same.
    """
    if kind == "none":
        return
    contexts = {} if kind == "full" else {"context_fn": _keeping_products}
    for layer in layers(model):
        forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
        _set_forward(layer, functools.partial(forward, **contexts))


def compiled(model: PreTrainedModel) -> None:
    """Compile each layer's forward. Layers of the same kind share the code."""
    for layer in layers(model):
        _set_forward(layer, torch.compile(layer.forward))


def shard(model: PreTrainedModel, body: nn.Module, mesh: DeviceMesh, *, half: bool, trains: bool) -> None:
    """Shard the parameters of each layer, of the rest of the body and, if the model trains, of the head.

    Gradients are reduced over ranks in float32. With `half`, layers are gathered in bfloat16, to which autocast would
    cast their matrices anyway. The residual stream keeps its precision.
    """
    tied = _shared_with(model, body)
    plain = MixedPrecisionPolicy(cast_forward_inputs=False)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False) if half else plain
    for layer in layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(body, mesh=mesh, mp_policy=plain, reshard_after_forward=not trains)
    if not trains:
        return
    for outer, name, inner in tied:
        setattr(outer, name, body.get_parameter(inner))
    output = model.get_output_embeddings()
    if not tied or any(not hasattr(p, "device_mesh") for p in output.parameters(recurse=False)):
        fully_shard(output, mesh=mesh, mp_policy=plain)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


def _shared_with(model: nn.Module, body: nn.Module) -> list[tuple[nn.Module, str, str]]:
    """Parameters outside the body that are shared with it: module, name in the module, name in the body."""
    body_names = {id(parameter): name for name, parameter in body.named_parameters()}
    inside = set(body.modules())
    return [
        (module, name, body_names[id(parameter)])
        for module in model.modules()
        if module not in inside
        for name, parameter in module.named_parameters(recurse=False)
        if id(parameter) in body_names
    ]


def _set_forward(layer: nn.Module, forward: Callable[..., Any]) -> None:
    layer.forward = forward  # on the object, not its class, so that hooks and names stay


def _keeping_products() -> Any:
    def policy(_context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in _PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)  # type: ignore[no-untyped-call]
