"""One forward pass over the calibration samples, with hooks that collect the scores of every axis.

Where the scores are taken (a point is one tensor that weights read or make):

    ffn      down_input: the input of the down projection, after the activation function
             up_output: the output of the first matrix, before it
    heads    the input of the attention's output projection
    hidden   every tensor that attention and MLP read from the residual stream, each once: the outputs of the
             norms in front of them, or the stream itself in families that normalize after them
    layers   each layer's input and output

The formula of 2407.14679 for ffn reads the output of the first matrix, before the activation. down_input is what the
removed column multiplies. In a gated MLP the first matrix is the gate, and in a fused one the first block of ffn. The
paper scores hidden at all LayerNorms. Here the final norm is left out, as in NVIDIA's code, and so are norms on the
outputs of sub-layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from jaxtyping import Float64
from torch import Tensor, nn
from transformers import PreTrainedModel

from halve.anatomy import Anatomy
from halve.cut.score.calibration import Calibration
from halve.cut.score.importance import block_importance, seq_statistics, sums_over_batch
from halve.cut.score.scores import WIDTH_AXES, Statistics
from halve.cut.score.sites import output_expr
from halve.cut.score.structures import axis_positions
from halve.errors import AnatomyError
from halve.model.finite import not_finite
from halve.model.hooks import Hear, on_input, on_output, on_passage
from halve.recipe.schema import FfnPoint

Point = tuple[int, str]
"""The layer and the module whose input is scored."""


@dataclass(frozen=True, eq=False)
class Tap:
    """One point and how to read it: `open(module, call)` passes every tensor at this point to `call`."""

    layer: int
    module: str
    open: Callable[[nn.Module, Hear], AbstractContextManager[None]]


@dataclass(frozen=True, eq=False)
class Heard:
    """The results of one pass, on the CPU."""

    sums: dict[str, Tensor]
    """By axis: the results of the reduction, summed over samples, `[..., points, channels]`."""
    block_sums: Float64[Tensor, " layers"]
    """`importance.block_importance` of every layer, summed over samples."""


def measure_activations(calibration: Calibration, *, ffn_point: FfnPoint = "down_input") -> Statistics:
    """Run the samples through the model's body once and collect every score's statistics.

    Logits are not computed. One micro-batch at a time is moved to the model's device and run. The result does not
    depend on its size, except for rounding in the model's own products. No activation is kept longer than the module
    that reads it.

    Raises `AnatomyError` if the model does not call a module as the anatomy expects, and `CheckpointError` for
    activations that are not finite.
    """
    model, anatomy = calibration.model, calibration.anatomy
    taps = input_taps(model, anatomy)
    if "ffn" in taps:
        taps["ffn"] = FFN_POINTS[ffn_point](model, anatomy, taps["ffn"])
    heard = listen(calibration, taps, statistics)
    return Statistics(
        sums=heard.sums,
        point_layers={axis: tuple(tap.layer for tap in axis_taps) for axis, axis_taps in taps.items()},
        block_sums=heard.block_sums,
        num_samples=len(calibration.samples_BS),
        head_dim=width(anatomy, "heads") // anatomy.sizes.heads,
        kv_heads=anatomy.sizes.kv_heads,
        ffn_point=ffn_point,
    )


def statistics(act_BSC: Tensor) -> Tensor:
    """The sums of one micro-batch for every aggregator: [2, 3, channels]."""
    return sums_over_batch(seq_statistics(act_BSC))


def listen(calibration: Calibration, taps: Mapping[str, Sequence[Tap]], reduce: Callable[[Tensor], Tensor]) -> Heard:
    """Run the samples through the model's body and add up `reduce` of every tap's [batch, seq, channels], and BI.

    `reduce` returns [..., channels] in float64. Its sums over micro-batches must equal that of all samples. Raises
    `CheckpointError` if a sum is not finite.
    """
    model, samples_BS = calibration.model, calibration.samples_BS
    assert not model.training, "score a model in eval mode"
    assert len(samples_BS) > 0, "no samples"
    device = model.device
    sums: dict[str, dict[int, Tensor]] = {axis: {} for axis in taps}
    batch = 0  # samples in the current forward pass; hooks need it, because some modules get flattened tokens

    def hear(axis: str, index: int) -> Hear:
        def add(act: Tensor) -> None:
            reduced = reduce(act.reshape(batch, -1, act.shape[-1]))
            sums[axis][index] = sums[axis][index].add_(reduced) if index in sums[axis] else reduced

        return add

    with ExitStack() as hooks, torch.inference_mode():
        for axis, axis_taps in taps.items():
            for index, tap in enumerate(axis_taps):
                hooks.enter_context(tap.open(model.get_submodule(tap.module), hear(axis, index)))
        block_sums = hooks.enter_context(on_layers(model, calibration.anatomy))
        task = hooks.enter_context(calibration.progress.task("score", samples_BS.numel()))
        for part_BS in calibration.batches:
            batch = len(part_BS)
            model.base_model(input_ids=part_BS.to(device), use_cache=False)
            task.advance(part_BS.numel())

    # outside of inference mode, so that the results are ordinary tensors
    stacked = {axis: torch.stack([parts[i] for i in range(len(parts))], dim=-2) for axis, parts in sums.items()}
    heard = Heard({axis: tensor.cpu() for axis, tensor in stacked.items()}, block_sums.clone().cpu())
    _check_finite(heard, taps)
    return heard


@contextmanager
def on_layers(model: PreTrainedModel, anatomy: Anatomy) -> Iterator[Float64[Tensor, " layers"]]:
    """In this context, add up each layer's `block_importance` over all samples, in the tensor that is yielded."""
    block_sums = torch.zeros(anatomy.sizes.layers, dtype=torch.float64, device=model.device)

    def turn(layer: int, before_BSD: Tensor, after_BSD: Tensor) -> None:
        block_sums[layer] += block_importance(before_BSD.detach(), after_BSD.detach()).sum()

    with ExitStack() as hooks:
        for layer in range(anatomy.sizes.layers):
            module = model.get_submodule(f"{anatomy.layers_path}.{layer}")
            hooks.enter_context(on_passage(module, partial(turn, layer)))
        yield block_sums


def width(anatomy: Anatomy, axis: str) -> int:
    """The number of channels at the points of this axis. For heads: the channels of all heads."""
    exprs = {anatomy.modules[name] for names in anatomy.readers(axis) for name in names}
    return max((expr.size(anatomy.sizes.sizes) for expr in exprs), default=0)


def _readers(anatomy: Anatomy, axis: str) -> list[tuple[str, ...]]:
    """By layer, every module that reads an axis. Routers and experts read `hidden` like the matrices."""
    readers = [*anatomy.readers(axis)]
    for name in anatomy.mixers if axis == "hidden" else ():
        layer = anatomy.layer_of(name)
        assert layer is not None
        readers[layer] = (*readers[layer], name)
    return readers


def find_points(model: PreTrainedModel, anatomy: Anatomy) -> dict[str, tuple[Point, ...]]:
    """Find the points of each axis. Of several modules that read the same tensor, the first is taken.

    Raises what `find_readers` raises.
    """
    readers = find_readers(model, anatomy)
    return {axis: tuple((layer, names[0]) for layer, names in points) for axis, points in readers.items()}


def find_readers(model: PreTrainedModel, anatomy: Anatomy) -> dict[str, tuple[tuple[int, tuple[str, ...]], ...]]:
    """Every tensor that modules inside the layers read of each axis: its layer, and all modules that read it.

    Found by running two tokens. Layers without an axis have no points for it. An axis without points is left out if the
    anatomy refuses it. Otherwise a missing point raises `AnatomyError`.
    """
    read: dict[str, list[Tensor]] = {}
    names = {name for axis in WIDTH_AXES for layer in _readers(anatomy, axis) for name in layer}
    with ExitStack() as hooks, torch.inference_mode():
        for name in names:
            # The tensors are kept alive here, so that an address identifies a tensor.
            hooks.enter_context(on_input(model.get_submodule(name), read.setdefault(name, []).append))
        _two_tokens(model)
    readers = {}
    for axis in WIDTH_AXES:
        problem = _problem(anatomy, axis, read)
        if problem is None:
            readers[axis] = tuple(_distinct(anatomy, axis, read))
        elif axis not in anatomy.refusals:
            raise _unscorable(anatomy, axis, problem)
    return readers


def input_taps(model: PreTrainedModel, anatomy: Anatomy) -> dict[str, tuple[Tap, ...]]:
    """A tap at every point of `find_points`."""
    points_by_axis = find_points(model, anatomy)
    return {
        axis: tuple(Tap(layer, name, on_input) for layer, name in points) for axis, points in points_by_axis.items()
    }


def _as_read(model: PreTrainedModel, anatomy: Anatomy, taps: Sequence[Tap]) -> tuple[Tap, ...]:
    return tuple(taps)


def first_outputs(model: PreTrainedModel, anatomy: Anatomy, taps: Sequence[Tap] = ()) -> tuple[Tap, ...]:
    """A tap in every layer at the first matrix whose output is made of ffn, at its first block of ffn.

    Of several matrices it is the first that the model calls: in a gated MLP the gate, whose output goes to the
    activation function. Found by running two tokens. Raises `AnatomyError` for a layer without such a matrix.
    """
    called: dict[int, str] = {}

    def note(layer: int, name: str, _: Tensor) -> None:
        called.setdefault(layer, name)

    with ExitStack() as hooks, torch.inference_mode():
        for name in anatomy.modules:
            layer = anatomy.layer_of(name)
            if layer is not None and "ffn" in output_expr(anatomy, name).axes:
                hooks.enter_context(on_output(model.get_submodule(name), partial(note, layer, name)))
        _two_tokens(model)
    if missing := [layer for layer in _layers_with(anatomy, "ffn") if layer not in called]:
        raise _unscorable(anatomy, "ffn", f"no module of layer {missing[0]} makes it")
    sizes, output_taps = anatomy.sizes.sizes, []
    for layer, name in sorted(called.items()):
        first_F = axis_positions(output_expr(anatomy, name), "ffn", sizes)[:, 0].to(model.device)
        output_taps.append(Tap(layer, name, partial(_on_entries, entries=first_F)))
    return tuple(output_taps)


FFN_POINTS: Final[Mapping[FfnPoint, Callable[..., tuple[Tap, ...]]]] = {
    "down_input": _as_read,
    "up_output": first_outputs,
}


def _two_tokens(model: PreTrainedModel) -> None:
    model.base_model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=model.device), use_cache=False)


def _unscorable(anatomy: Anatomy, axis: str, problem: str) -> AnatomyError:
    return AnatomyError(
        f"cannot score {axis} of family {anatomy.family}",
        why=problem,
        fix=f"this family's {axis} cannot be cut yet; please report the model",
    )


def _problem(anatomy: Anatomy, axis: str, read: dict[str, list[Tensor]]) -> str | None:
    having = _layers_with(anatomy, axis)
    if not having:
        return "no layer has it"
    for layer, readers in enumerate(_readers(anatomy, axis)):
        if not readers and layer in having:
            return f"no module of layer {layer} reads it"
        for name in readers:
            if len(read[name]) != 1:
                return f"{name} is called {len(read[name])} times in a forward pass"
            if read[name][0].shape[-1] != width(anatomy, axis):
                return f"{name} reads {read[name][0].shape[-1]} channels, not {width(anatomy, axis)}"
            if name in anatomy.modules and anatomy.modules[name].terms[0][0] != axis:
                return f"{name} reads {anatomy.modules[name]}: what belongs to one entry does not lie together"
    return None


def _layers_with(anatomy: Anatomy, axis: str) -> frozenset[int]:
    """The layers with weights made of an axis. Hybrids have layers without heads, mixtures have some without ffn."""
    owners = (anatomy.layer_of(name) for name, shape in anatomy.params.items() if any(axis in e.axes for e in shape))
    return frozenset(layer for layer in owners if layer is not None)


def _distinct(anatomy: Anatomy, axis: str, read: dict[str, list[Tensor]]) -> Iterator[tuple[int, tuple[str, ...]]]:
    for layer, readers in enumerate(_readers(anatomy, axis)):
        by_address: dict[int, list[str]] = {}
        for name in readers:
            by_address.setdefault(read[name][0].data_ptr(), []).append(name)
        for names in by_address.values():
            yield layer, tuple(names)


def _on_entries(module: nn.Module, call: Hear, *, entries: Tensor) -> AbstractContextManager[None]:
    """`on_output` for some entries of the last dimension."""
    return on_output(module, lambda output: call(output[..., entries]))


def _check_finite(heard: Heard, taps: Mapping[str, Sequence[Tap]]) -> None:
    bad = []
    for axis, axis_taps in taps.items():
        sums = heard.sums[axis]
        finite_P = sums.isfinite().all(-1).reshape(-1, len(axis_taps)).all(0)
        bad += [(tap.layer, tap.module) for tap, finite in zip(axis_taps, finite_P.tolist(), strict=True) if not finite]
    turns = heard.block_sums.isfinite().tolist()
    bad += [(layer, f"layer {layer}") for layer, finite in enumerate(turns) if not finite]
    if bad:
        raise not_finite("activations", where=f", first at {min(bad)[1]}")
