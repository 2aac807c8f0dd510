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
from torch import Tensor

from halve.anatomy import Arch
from halve.cut.repair.gram import Gram, shrinkage
from halve.cut.repair.ridge import FIXED
from halve.cut.repair.selection import removal_order
from halve.cut.score.calibration import Calibration
from halve.cut.score.sites import input_dim
from halve.cut.score.taps import find_points, width
from halve.cut.score.walk import Call, States, first_states, layer_modules, record_calls, run_layer, states_bytes
from halve.model.hooks import on_input
from halve.process.waits import bytes_in_words


@dataclass(frozen=True)
class Choice:
    """Structures of `size` channels each at the input of a matrix. Every cell keeps `keep` of them."""

    size: int
    keep: int
    cells: tuple[int, ...]


def choices(before: Arch, after: Arch, head_channels: int) -> dict[str, Choice]:
    """The structures to choose from, by axis."""
    per_group, kept = before.heads // before.kv_heads, after.heads // after.kv_heads
    axis_choices = {}
    if after.ffn < before.ffn:
        axis_choices["ffn"] = Choice(1, after.ffn, (0,) * before.ffn)
    if per_group == 1 and after.heads < before.heads:
        axis_choices["heads"] = Choice(head_channels, after.heads, (0,) * before.heads)
    elif kept < per_group:
        axis_choices["heads"] = Choice(head_channels, kept, tuple(head // per_group for head in range(before.heads)))
    return axis_choices


@torch.no_grad()
def score_by_refit(
    calibration: Calibration, after: Arch, *, layers: Sequence[int], strength: float | None
) -> dict[str, Tensor]:
    """Scores of neurons and heads, by axis, if some are cut. The later the refit can spare an entry, the higher.

    Heads with their own key and value are scored as `heads` and `kv_heads`. It takes one forward pass, layer by layer,
    so that only one layer's Gram matrices are in memory. Layers that are not listed score zero.
    """
    model, anatomy, samples_BS = calibration.model, calibration.anatomy, calibration.samples_BS
    before = anatomy.sizes
    asked = choices(before, after, width(anatomy, "heads") // before.heads)
    scores = {axis: torch.zeros(before.layers, len(choice.cells)) for axis, choice in asked.items()}
    if not asked:
        return scores
    points = find_points(model, anatomy)
    states = States(len(samples_BS), samples_BS.shape[1], before.hidden, dtype=model.dtype)
    size = states_bytes(len(samples_BS), samples_BS.shape[1], [before.hidden], dtype=model.dtype)
    calls: dict[int, list[Call]] = {}
    starts = range(0, len(samples_BS), calibration.micro_batch)
    parts = [slice(start, start + calibration.micro_batch) for start in starts]
    modules = layer_modules(model, anatomy)[: max(layers) + 1]
    title, total = f"select by refit (states: {bytes_in_words(size)})", samples_BS.numel() * len(modules)
    with calibration.progress.task(title, total) as task:
        for rows in parts:
            ids_BS = samples_BS[rows]
            if len(ids_BS) not in calls:
                calls[len(ids_BS)] = record_calls(model, anatomy, ids_BS)[0]
            states[rows] = first_states(model, anatomy, ids_BS)
        for layer, module in enumerate(modules):
            named = {axis: dict(points[axis]) for axis in asked}
            wanted = {axis: choice for axis, choice in asked.items() if layer in layers and layer in named[axis]}
            names = {axis: named[axis][layer] for axis in wanted}
            grams = {
                axis: Gram(len(choice.cells) * choice.size, device=model.device) for axis, choice in wanted.items()
            }
            with ExitStack() as hooks:
                for axis in wanted:
                    hooks.enter_context(on_input(model.get_submodule(names[axis]), grams[axis].add))
                for rows in parts:
                    x_BSD = states[rows].to(model.device)
                    states[rows] = run_layer(module, calls[len(x_BSD)][layer], x_BSD)
            for axis, choice in wanted.items():
                grams[axis].check(names[axis], scarce=strength is not None)
                ridge_strength = max(FIXED, shrinkage(grams[axis])) if strength is None else strength
                weight = model.get_parameter(f"{names[axis]}.weight")
                weight_YC = weight if input_dim(anatomy, names[axis]) == 1 else weight.T
                scores[axis][layer] = _places(grams[axis], weight_YC, choice, strength=ridge_strength)
            task.advance(samples_BS.numel())
    if "heads" in scores and before.heads == before.kv_heads:
        scores["kv_heads"] = scores["heads"]
    return scores


def _places(gram: Gram, weight_YC: Tensor, choice: Choice, *, strength: float) -> Tensor:
    """The place of each structure in the order in which a refit can spare them; those that stay come last alike."""
    size, keep, cells = choice.size, choice.keep, choice.cells
    order = removal_order(gram.xx_XX, weight_YC, size=size, keep=keep, cells=cells, strength=strength)
    places_N = torch.full((len(cells),), float(len(cells)))
    places_N[list(order)] = torch.arange(len(order), dtype=torch.float32)
    return places_N
