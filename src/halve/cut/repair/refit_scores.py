"""Scores of neurons and heads by the order in which a refit can spare them: the selection of
`halve.cut.repair.selection`.

Neurons compete within their layer and query heads within their group. Heads that have their own key and value compete
within their layer. Which groups of several query heads go is left to their activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel

from halve.anatomy import Anatomy, Arch
from halve.cut.repair.gram import Gram
from halve.cut.repair.selection import removal_order
from halve.cut.score.sites import input_dim
from halve.cut.score.taps import find_points, width
from halve.cut.score.walk import Call, States, first_states, layer_modules, record_calls, run_layer, states_bytes
from halve.model.hooks import on_input
from halve.progress import SILENT, Progress


@dataclass(frozen=True)
class Choice:
    """Structures of `size` channels each at the input of a matrix. Every cell keeps `keep` of them."""

    size: int
    keep: int
    cells: tuple[int, ...]


def choices(before: Arch, after: Arch, head_channels: int) -> dict[str, Choice]:
    """The structures to choose from, by axis."""
    per_group, kept = before.heads // before.kv_heads, after.heads // after.kv_heads
    found = {}
    if after.ffn < before.ffn:
        found["ffn"] = Choice(1, after.ffn, (0,) * before.ffn)
    if per_group == 1 and after.heads < before.heads:
        found["heads"] = Choice(head_channels, after.heads, (0,) * before.heads)
    elif kept < per_group:
        found["heads"] = Choice(head_channels, kept, tuple(head // per_group for head in range(before.heads)))
    return found


@torch.no_grad()
def score_by_refit(
    model: PreTrainedModel,
    anatomy: Anatomy,
    after: Arch,
    samples_BS: Int64[Tensor, "batch seq"],
    *,
    layers: Sequence[int],
    strength: float,
    micro_batch: int,
    progress: Progress = SILENT,
) -> dict[str, Tensor]:
    """Scores of neurons and heads, by axis, if some are cut. The later the refit can spare an entry, the higher.

    Heads with their own key and value are scored as `heads` and `kv_heads`. It takes one forward pass, layer by layer,
    so that only one layer's Gram matrices are in memory. Layers that are not listed score zero.
    """
    before, points = anatomy.sizes, find_points(model, anatomy)
    asked = choices(before, after, width(anatomy, "heads") // before.heads)
    scores = {axis: torch.zeros(before.layers, len(choice.cells)) for axis, choice in asked.items()}
    if not asked:
        return scores
    states = States(len(samples_BS), samples_BS.shape[1], before.hidden, dtype=model.dtype)
    size = states_bytes(len(samples_BS), samples_BS.shape[1], [before.hidden], dtype=model.dtype)
    calls: dict[int, list[Call]] = {}
    parts = [slice(start, start + micro_batch) for start in range(0, len(samples_BS), micro_batch)]
    modules = layer_modules(model, anatomy)[: max(layers) + 1]
    with progress.task(f"select by refit (states: {size / 2**20:,.0f} MiB)", samples_BS.numel() * len(modules)) as task:
        for rows in parts:
            ids_BS = samples_BS[rows]
            if len(ids_BS) not in calls:
                calls[len(ids_BS)] = record_calls(model, anatomy, ids_BS)[0]
            states[rows] = first_states(model, anatomy, ids_BS)
        for layer, module in enumerate(modules):
            named = {axis: dict(points[axis]) for axis in asked}
            wanted = {axis: one for axis, one in asked.items() if layer in layers and layer in named[axis]}
            names = {axis: named[axis][layer] for axis in wanted}
            grams = {axis: Gram(len(one.cells) * one.size, device=model.device) for axis, one in wanted.items()}
            with ExitStack() as hooks:
                for axis in wanted:
                    hooks.enter_context(on_input(model.get_submodule(names[axis]), grams[axis].add))
                for rows in parts:
                    x_BSD = states[rows].to(model.device)
                    states[rows] = run_layer(module, calls[len(x_BSD)][layer], x_BSD)
            for axis, one in wanted.items():
                grams[axis].check(names[axis])
                weight = model.get_parameter(f"{names[axis]}.weight")
                order = removal_order(
                    grams[axis].xx_XX,
                    weight if input_dim(anatomy, names[axis]) == 1 else weight.T,
                    size=one.size,
                    keep=one.keep,
                    cells=one.cells,
                    strength=strength,
                )
                scores[axis][layer] = len(one.cells)
                scores[axis][layer, list(order)] = torch.arange(len(order), dtype=torch.float32)
            task.advance(samples_BS.numel())
    if "heads" in scores and before.heads == before.kv_heads:
        scores["kv_heads"] = scores["heads"]
    return scores
