"""Where a layer reads and writes the residual stream, in the order of its code.

A site is one least-squares problem of the refit: the matrices that read the same tensor, or one matrix that writes.
Sites are found by running two tokens. So parallel blocks, fused projections and families with norms in other places
need no table.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from halve.anatomy import Anatomy
from halve.anatomy.axes import Expr
from halve.model.hooks import on_passage

_HIDDEN = Expr.parse("hidden")


@dataclass(frozen=True)
class Site:
    """One or more matrices of a layer, by module name."""

    kind: Literal["read", "write"]
    modules: tuple[str, ...]


@dataclass(frozen=True)
class Sites:
    """The sites of every layer in call order, and whether the layer adds its writers' outputs to its input."""

    layers: tuple[tuple[Site, ...], ...]
    scales: tuple[float | None, ...]
    """For each layer, c in `output = input + c * sum of the writers' outputs`; None if this does not hold."""


def find_sites(model: PreTrainedModel, anatomy: Anatomy) -> Sites:
    """Run every layer once. Matrices that are not called exactly once, such as experts, are not sites."""
    calls: list[tuple[str, Tensor, Tensor]] = []
    passages: dict[int, tuple[Tensor, Tensor]] = {}
    wanted = [name for name in anatomy.modules if anatomy.layer_of(name) is not None]

    def note(name: str, x: Tensor, y: Tensor) -> None:
        calls.append((name, x, y))

    def pass_by(layer: int, x: Tensor, y: Tensor) -> None:
        passages[layer] = (x, y)

    with ExitStack() as hooks, torch.no_grad():
        for name in wanted:
            hooks.enter_context(on_passage(model.get_submodule(name), partial(note, name)))
        for layer in range(anatomy.sizes.layers):
            module = model.get_submodule(f"{anatomy.layers_path}.{layer}")
            hooks.enter_context(on_passage(module, partial(pass_by, layer)))
        ids = torch.arange(8, device=model.device).remainder(anatomy.sizes.vocab)[None]
        model.base_model(input_ids=ids, use_cache=False)
    times = [name for name, _, _ in calls]
    once = [call for call in calls if times.count(call[0]) == 1]
    layers, scales = [], []
    for layer in range(anatomy.sizes.layers):
        here = [call for call in once if anatomy.layer_of(call[0]) == layer]
        layers.append(_group(here, anatomy))
        written = [y for name, _, y in here if writes(anatomy, name)]
        scales.append(_scale(*passages[layer], written))
    return Sites(tuple(layers), tuple(scales))


def writes(anatomy: Anatomy, name: str) -> bool:
    """Whether a matrix's output is made of hidden and its input is not: it writes to the residual stream."""
    return output_expr(anatomy, name) == _HIDDEN and anatomy.modules[name] != _HIDDEN


def output_expr(anatomy: Anatomy, name: str) -> Expr:
    """What the output of a matrix is made of."""
    shape = anatomy.params[f"{name}.weight"]
    return shape[1 - input_dim(anatomy, name)]


def input_dim(anatomy: Anatomy, name: str) -> int:
    """The dimension of the stored weight that the input multiplies: `Linear` has it last, `Conv1D` first."""
    return 1 if anatomy.params[f"{name}.weight"][1] == anatomy.modules[name] else 0


def _group(calls: list[tuple[str, Tensor, Tensor]], anatomy: Anatomy) -> tuple[Site, ...]:
    sites: list[Site] = []
    readers: dict[int, int] = {}  # address of what is read -> number of its site
    for name, x, _ in calls:
        if writes(anatomy, name):
            sites.append(Site("write", (name,)))
        elif anatomy.modules[name] == _HIDDEN:
            if (known := readers.get(x.data_ptr())) is not None:
                sites[known] = Site("read", (*sites[known].modules, name))
            else:
                readers[x.data_ptr()] = len(sites)
                sites.append(Site("read", (name,)))
    return tuple(sites)


def _scale(before: Tensor, after: Tensor, written: list[Tensor]) -> float | None:
    """c of `after = before + c * sum(written)` where one exists."""
    if not written:
        return None
    change = (after - before).double().flatten()
    total = sum(y.double().flatten() for y in written)
    assert isinstance(total, Tensor)
    c = float(change @ total / (total @ total).clamp_min(torch.finfo(torch.float64).tiny))
    gap = float((change - c * total).norm() / change.norm().clamp_min(torch.finfo(torch.float64).tiny))
    eps = torch.finfo(before.dtype).eps
    return c if c and gap < 64 * eps * max(1.0, float(before.norm() / change.norm().clamp_min(1e-30))) else None
