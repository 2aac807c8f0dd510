"""Listening to a model: one forward pass over the calibration samples, and what it says of every axis.

Where the scores are taken (a point is one tensor that weights read):

    ffn      the input of the down projection, after the activation function
    heads    the input of the attention's output projection
    hidden   every tensor that attention and MLP read from the residual stream, each once: the outputs of the
             norms in front of them, or the stream itself in families that normalize after them
    layers   each layer's input beside its output

2407.14679's formula for ffn reads the first matrix's output, before the activation; what we read is what the
removed column multiplies, and exists in gated and fused MLPs alike. The paper scores hidden at all
LayerNorms; we leave out the final norm, as NVIDIA's code does, and norms on the sub-layers' outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from halve.anatomy import Anatomy
from halve.cut.importance import block_importance, seq_statistics, sums_over_batch
from halve.cut.scores import WIDTH_AXES, Statistics
from halve.errors import AnatomyError, CheckpointError
from halve.progress import SILENT, Progress

Point = tuple[int, str]
"""The layer and the module whose input is scored."""


def measure(
    model: PreTrainedModel,
    anatomy: Anatomy,
    samples_BS: Int64[Tensor, "batch seq"],
    *,
    micro_batch: int,
    progress: Progress = SILENT,
) -> Statistics:
    """Run the samples through the model's body once and collect every score's statistics.

    The logits are never made. `micro_batch` samples go through at a time and are moved to the model's device
    then; the result does not depend on how many, but for rounding in the model's own products. No activation
    is kept beyond the module that reads it.

    Raises `AnatomyError` where the anatomy names a module that the model does not call as expected, and
    `CheckpointError` where activations are not finite.
    """
    assert not model.training, "score a model in eval mode"
    assert len(samples_BS) > 0, "no samples"
    points = find_points(model, anatomy)
    num_layers, device = anatomy.sizes.layers, model.device
    sums = {
        axis: torch.zeros(2, 3, len(found), width(anatomy, axis), dtype=torch.float64, device=device)
        for axis, found in points.items()
    }
    block_sums = torch.zeros(num_layers, dtype=torch.float64, device=device)
    batch = 0  # samples in the present forward pass; the hooks read it, since some modules see tokens flattened

    def tap(axis: str, index: int) -> Callable[[Tensor], None]:
        def add(act: Tensor) -> None:
            act_BSC = act.reshape(batch, -1, act.shape[-1])
            sums[axis][:, :, index] += sums_over_batch(seq_statistics(act_BSC))

        return add

    def tap_layer(layer: int) -> Callable[[Tensor, Tensor], None]:
        def add(before_BSD: Tensor, after_BSD: Tensor) -> None:
            block_sums[layer] += block_importance(before_BSD, after_BSD).sum()

        return add

    with ExitStack() as hooks, torch.inference_mode():
        for axis, found in points.items():
            for index, (_, name) in enumerate(found):
                hooks.enter_context(on_input(model.get_submodule(name), tap(axis, index)))
        for layer in range(num_layers):
            module = model.get_submodule(f"{anatomy.layers_path}.{layer}")
            hooks.enter_context(on_passage(module, tap_layer(layer)))
        task = hooks.enter_context(progress.task("score", samples_BS.numel()))
        for part_BS in torch.split(samples_BS, micro_batch):
            batch = len(part_BS)
            model.base_model(input_ids=part_BS.to(device), use_cache=False)
            task.advance(part_BS.numel())

    _check_finite(sums, block_sums, points)
    return Statistics(
        sums={axis: tensor.cpu() for axis, tensor in sums.items()},
        point_layers={axis: tuple(layer for layer, _ in found) for axis, found in points.items()},
        block_sums=block_sums.cpu(),
        num_samples=len(samples_BS),
        head_dim=anatomy.sizes.head_dim,
        kv_heads=anatomy.sizes.kv_heads,
    )


def width(anatomy: Anatomy, axis: str) -> int:
    """Channels at this axis' points; heads are scored channel by channel first."""
    sizes = anatomy.sizes
    return {"hidden": sizes.hidden, "ffn": sizes.ffn, "heads": sizes.heads * sizes.head_dim}[axis]


def find_points(model: PreTrainedModel, anatomy: Anatomy) -> dict[str, tuple[Point, ...]]:
    """Find the points of each axis: of modules that read one and the same tensor, the first.

    Watches the model read two tokens. An axis that the anatomy refuses and that has no point is left out.
    Raises `AnatomyError` where a point of another axis is missing.
    """
    read: dict[str, list[Tensor]] = {}
    names = {name for axis in WIDTH_AXES for layer in anatomy.readers(axis) for name in layer}
    with ExitStack() as hooks, torch.inference_mode():
        for name in names:
            # What was read is kept alive here, so that one address means one tensor.
            hooks.enter_context(on_input(model.get_submodule(name), read.setdefault(name, []).append))
        model.base_model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=model.device), use_cache=False)
    found = {}
    for axis in WIDTH_AXES:
        problem = _problem(anatomy, axis, read)
        if problem is None:
            found[axis] = tuple(_distinct(anatomy, axis, read))
        elif axis not in anatomy.refusals:
            raise AnatomyError(
                f"cannot score {axis} of family {anatomy.family}",
                why=problem,
                fix=f"this family's {axis} cannot be cut yet; please report the model",
            )
    return found


def _problem(anatomy: Anatomy, axis: str, read: dict[str, list[Tensor]]) -> str | None:
    for layer, readers in enumerate(anatomy.readers(axis)):
        if not readers:
            return f"no module of layer {layer} reads it"
        for name in readers:
            if len(read[name]) != 1:
                return f"{name} is called {len(read[name])} times in a forward pass"
            if read[name][0].shape[-1] != width(anatomy, axis):
                return f"{name} reads {read[name][0].shape[-1]} channels, not {width(anatomy, axis)}"
    return None


def _distinct(anatomy: Anatomy, axis: str, read: dict[str, list[Tensor]]) -> Iterator[Point]:
    for layer, readers in enumerate(anatomy.readers(axis)):
        seen = set()
        for name in readers:
            address = read[name][0].data_ptr()
            if address not in seen:
                seen.add(address)
                yield layer, name


@contextmanager
def on_input(module: nn.Module, call: Callable[[Tensor], None]) -> Iterator[None]:
    """While open, hand the first input of a module to `call`, before the module sees it."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call(_first(args, kwargs))

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def on_passage(module: nn.Module, call: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
    """While open, hand the first input and the first output of a module to `call`."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        call(_first(args, kwargs), output if isinstance(output, Tensor) else output[0])

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    first = args[0] if args else next(iter(kwargs.values()))
    assert isinstance(first, Tensor), f"the first input is a {type(first).__name__}"
    return first


def _check_finite(sums: dict[str, Tensor], block_sums: Tensor, points: dict[str, tuple[Point, ...]]) -> None:
    bad = [
        (layer, name)
        for axis, found in points.items()
        for (layer, name), finite in zip(found, sums[axis].isfinite().all(-1).all(0).all(0).tolist(), strict=True)
        if not finite
    ]
    bad += [(layer, f"layer {layer}") for layer, finite in enumerate(block_sums.isfinite().tolist()) if not finite]
    if bad:
        raise CheckpointError(
            f"activations are not finite, first at {min(bad)[1]}",
            why="NaN or infinity came out of the model on the calibration samples",
            fix="try dtype: float32; if that does not help, fetch the checkpoint again",
        )
