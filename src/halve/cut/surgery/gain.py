"""Gains that compensate for the changed statistics of a norm over fewer channels.

A norm over H' of H channels divides by another spread. If the removed channels were zero, the kept outputs shrink by
sqrt(H'/H), and a gain of sqrt(H/H') is exact but for the norm's eps. If they carried energy, the best single factor of
a norm is smaller; `fit_gains` finds it on calibration samples. The papers do not have this. Its measurements are in
docs/decisions/0007-norm-gain.md.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import sqrt

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from halve.anatomy import Anatomy
from halve.cut.plan.plan import Plan
from halve.model.hooks import on_input


@dataclass(frozen=True)
class NormKind:
    """How a norm module uses its input and its weight, found by probing it."""

    offset: float
    """1.0 where the module multiplies by 1 + weight (Gemma, Nemotron), else 0.0."""
    centered: bool
    """Whether the mean is subtracted first (LayerNorm)."""


def norm_kind(module: nn.Module) -> NormKind:
    """Probe a copy of a norm: zero weight tells the offset, a constant input tells the centering."""
    probe = copy.deepcopy(module).float().cpu()
    width = _width(probe)
    x = torch.linspace(-1, 1, width)[None]
    with torch.no_grad():
        for parameter in probe.parameters():
            parameter.zero_()
        offset = 1.0 if list(probe.parameters()) and probe(x).abs().max() > 1e-3 else 0.0
        for name, parameter in probe.named_parameters():
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        centered = bool(probe(torch.ones(1, width)).abs().max() < 1e-3)
    return NormKind(offset=offset, centered=centered)


def _width(module: nn.Module) -> int:
    weight = getattr(module, "weight", None)
    return int(weight.numel()) if isinstance(weight, Tensor) else int(module.normalized_shape[0])  # type: ignore[index]


def constant_gains(anatomy: Anatomy, plan: Plan) -> dict[str, float]:
    """sqrt(H/H') for every norm over hidden: exact where the removed channels are zero."""
    return dict.fromkeys(anatomy.norms, sqrt(plan.before.hidden / plan.after.hidden))


def fit_gains(model: PreTrainedModel, anatomy: Anatomy, plan: Plan, batches: Iterable[Tensor]) -> dict[str, float]:
    """The least-squares gain of every norm over hidden, on the teacher's own activations.

    For token t with spread r_t over all channels and r'_t over the kept ones (root mean square, about the mean for a
    centered norm), the outputs on kept channels are x/r_t and x/r'_t; the factor that brings the second closest to the
    first, tokens weighted alike, is mean_t(r'_t / r_t). float64 sums. `batches`: int64 [batch, seq].
    """
    kept = torch.tensor(plan.hidden, device=model.device)
    sums = dict.fromkeys(anatomy.norms, torch.zeros((), dtype=torch.float64, device=model.device))
    counts = dict.fromkeys(anatomy.norms, 0)

    def add(name: str, centered: bool, x: Tensor) -> None:
        ratio = spread(x[..., kept], centered=centered) / spread(x, centered=centered)
        ratio = ratio[torch.isfinite(ratio)]
        sums[name] = sums[name] + ratio.double().sum()
        counts[name] += ratio.numel()

    with ExitStack() as hooks:
        for name in anatomy.norms:
            module = model.get_submodule(name)
            hooks.enter_context(on_input(module, partial(add, name, norm_kind(module).centered)))
        hooks.enter_context(torch.inference_mode())
        for batch in batches:
            model.base_model(input_ids=batch.to(model.device), use_cache=False)
    return {name: float(sums[name]) / counts[name] for name in anatomy.norms if counts[name]}


def spread(x: Tensor, *, centered: bool) -> Tensor:
    """Root mean square over the last dimension, about the mean if centered; float32."""
    x = x.float()
    if centered:
        x = x - x.mean(-1, keepdim=True)
    return x.square().mean(-1).sqrt()
