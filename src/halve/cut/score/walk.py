"""Run a model layer by layer: the states between layers, and the arguments of each layer's call.

A layer gets more arguments than its input, such as masks and rotary tables. They depend only on the shape of the batch,
because samples are packed and never padded. So they are recorded in one pass, and the layer is called with them again
for any other input of that shape.

Legend: B batch, S seq, D hidden, C channels of any tensor.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from halve.anatomy import Anatomy
from halve.model.hooks import Reached, first_input, first_output, on_input

IN_MEMORY_BYTES = 2**32
"""States that are larger than this are kept in a file."""


@dataclass(frozen=True)
class Call:
    """The arguments with which a model called one of its layers, without the input."""

    positional: tuple[Any, ...]
    keywords: dict[str, Any]


def layer_modules(model: PreTrainedModel, anatomy: Anatomy) -> list[nn.Module]:
    """The layers in their order."""
    return [model.get_submodule(f"{anatomy.layers_path}.{layer}") for layer in range(anatomy.sizes.layers)]


@torch.no_grad()
def record_calls(
    model: PreTrainedModel, anatomy: Anatomy, ids_BS: Int64[Tensor, "batch seq"]
) -> tuple[list[Call], Float[Tensor, "batch seq hidden"]]:
    """How every layer is called on samples of this shape, and the first layer's input.

    The first layer of each class is run to see the form of its output. The others return their input in that form,
    because the arguments of later calls do not depend on it.
    """
    calls: list[Call] = []
    inputs: list[Tensor] = []
    given: dict[type[nn.Module], Any] = {}

    def note(module: nn.Module, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        x_BSD = first_input(args, kwargs)
        rest = {name: value for name, value in kwargs.items() if args or value is not x_BSD}
        inputs.append(x_BSD)
        calls.append(Call(args[1:], rest))
        if type(module) not in given:
            given[type(module)] = run(*args, **kwargs)
            return given[type(module)]
        form = given[type(module)]
        return x_BSD if isinstance(form, Tensor) else (x_BSD, *form[1:])

    with ExitStack() as replaced:
        for module in layer_modules(model, anatomy):
            forward = module.__dict__.get("forward")
            replaced.callback(_restore, module, forward)
            module.forward = partial(note, module, module.forward)
        model.base_model(input_ids=ids_BS.to(model.device), use_cache=False)
    return calls, inputs[0]


def _restore(module: nn.Module, own: Any) -> None:
    """Restore a module's own forward, or that of its class."""
    if own is None:
        del module.forward
    else:
        module.forward = own


@torch.no_grad()
def first_states(
    model: PreTrainedModel, anatomy: Anatomy, ids_BS: Int64[Tensor, "batch seq"]
) -> Float[Tensor, "batch seq hidden"]:
    """The first layer's input; no layer is run."""
    seen: list[Tensor] = []

    def leave(x_BSD: Tensor) -> None:
        seen.append(x_BSD)
        raise Reached

    with on_input(layer_modules(model, anatomy)[0], leave), suppress(Reached):
        model.base_model(input_ids=ids_BS.to(model.device), use_cache=False)
    return seen[0]


@torch.no_grad()
def run_layer(
    layer: nn.Module, call: Call, states_BSD: Float[Tensor, "batch seq hidden"]
) -> Float[Tensor, "batch seq hidden"]:
    """A layer's output for another input of the recorded shape."""
    return first_output(layer(states_BSD, *call.positional, **call.keywords))


class States:
    """One tensor of [samples, seq, channels], in memory or, above `IN_MEMORY_BYTES`, in a temporary file."""

    def __init__(self, samples: int, seq: int, channels: int, *, dtype: torch.dtype) -> None:
        size = samples * seq * channels
        self.file = None
        if size * dtype.itemsize <= IN_MEMORY_BYTES:
            self.values = torch.empty(samples, seq, channels, dtype=dtype)
        else:
            self.file = tempfile.NamedTemporaryFile(prefix="halve-states-")  # noqa: SIM115 (lives as long as this)
            flat = torch.from_file(self.file.name, shared=True, size=size, dtype=dtype)
            self.values = flat.view(samples, seq, channels)

    def __getitem__(self, rows: slice) -> Tensor:
        return self.values[rows]

    def __setitem__(self, rows: slice, value: Tensor) -> None:
        target = self.values[rows]  # mixtures pass tokens on without the dimension of samples
        target.copy_(value.detach().reshape(target.shape))


def states_bytes(samples: int, seq: int, widths: Sequence[int], *, dtype: torch.dtype) -> int:
    """Bytes of several `States`."""
    return samples * seq * sum(widths) * dtype.itemsize
