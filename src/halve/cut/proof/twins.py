"""Tiny random twins, and the same twins with masked entries, with which the proof compares surgery."""

from __future__ import annotations

import copy
import math
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from halve.anatomy import Anatomy, Arch
from halve.anatomy.configs import build, has_heads, quiet
from halve.anatomy.solve import TWIN_POINT
from halve.cut.plan.plan import Plan, select
from halve.cut.plan.sizes import require_sizes
from halve.model.hooks import first_input, hooked


@dataclass(frozen=True)
class TwinKind:
    """A kind of twin."""

    dtype: torch.dtype
    square: bool
    """hidden = heads x head_dim, even if the family's code does not require it."""
    own_heads: bool
    """Heads as wide as the family's own, where rotary or latent parts have fixed sizes."""

    def twin(self, anatomy: Anatomy) -> Anatomy:
        """The anatomy of this twin of a model."""
        return anatomy.twin(square=self.square, own_heads=self.own_heads)

    def differs(self, anatomy: Anatomy) -> bool:
        """Whether it differs from the kinds before it: coupled code allows only square twins."""
        if not has_heads(anatomy.config):
            return not self.own_heads and not self.square
        same_heads = self.own_heads and anatomy.sizes.head_dim == TWIN_POINT["head_dim"]
        return not same_heads and not (self.square and anatomy.coupled)

    def __str__(self) -> str:
        words = [str(self.dtype).removeprefix("torch.")]
        words += ["hidden = heads x head_dim"] if self.square else []
        words += ["heads of the family's size"] if self.own_heads else []
        return ", ".join(words)


KINDS = tuple(
    TwinKind(dtype, square, own_heads)
    for dtype in (torch.float64, torch.float32)
    for own_heads in (False, True)
    for square in (False, True)
)
"""In the order in which they are tried. The first works for most families."""


def random_twin(twin: Anatomy, *, seed: int, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A model with every parameter and saved vector drawn at order one, so that every weight has a visible effect.

    Matrices have variance 1.5 / fan-in, norm weights are in [0.5, 1.5], and biases are normal. With the usual initial
    values (norms of one, biases of zero), a forgotten norm or bias would not be noticed.
    """
    model = build(twin.config, device="cpu", dtype=dtype, initialize=True)
    model.config._attn_implementation = "eager"
    model.config._experts_implementation = "eager"  # the fused kernels know no float64
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in {**model.state_dict(), **parameters}.items():
            table = name not in parameters and value.ndim > 1  # of masks and decays that the code computes
            if value.is_floating_point() and not table:
                value.copy_(_draw(name, value, generator))
    model.eval()
    return model


def running_twin(anatomy: Anatomy, *, seed: int) -> PreTrainedModel | None:
    """The first kind of random twin that the family's code runs, if there is one."""
    for kind in KINDS:
        if kind.differs(anatomy):
            with suppress(Exception):  # a family's own code may raise anything at sizes that it was not written for
                twin = kind.twin(anatomy)
                model = random_twin(twin, seed=seed, dtype=kind.dtype)
                logits(model, twin)
                return model
    return None


def _draw(name: str, value: Tensor, generator: torch.Generator) -> Tensor:
    if value.ndim >= 2:
        drawn = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        return drawn * math.sqrt(1.5 / value.shape[-1])
    if name.endswith("bias"):
        return torch.randn(value.shape, generator=generator, dtype=torch.float64)
    return torch.rand(value.shape, generator=generator, dtype=torch.float64) + 0.5


def logits(model: PreTrainedModel, twin: Anatomy) -> Tensor:
    """Logits [2, 12, vocab] of fixed token ids, without cache."""
    with torch.no_grad(), quiet():
        logits_BSV: Tensor = model(input_ids=fixed_ids(twin), use_cache=False).logits
        return logits_BSV.detach().clone()


def fixed_ids(twin: Anatomy) -> Tensor:
    """Token ids [2, 12] that differ from each other."""
    return torch.arange(24).reshape(2, 12) * 37 % twin.sizes.vocab


def twin_plan(axis: str, twin: Anatomy, seed: int) -> Plan:
    """A plan that cuts one axis of the twin by random scores. Coupled axes are cut together."""
    sizes = twin.sizes
    smaller: dict[str, int] = {
        "hidden": {"hidden": sizes.hidden - sizes.heads * 2},
        "ffn": {"ffn": sizes.ffn - 16},
        "heads": {"heads": sizes.heads // 2},
        "kv_heads": {"kv_heads": sizes.kv_heads // 2, "heads": sizes.heads // 2},
        "layers": {"layers": max(1, sizes.layers - 1)},
    }[axis]
    if twin.coupled and axis in ("hidden", "heads", "kv_heads"):
        smaller = {"hidden": sizes.hidden // 2, "heads": sizes.heads // 2, "kv_heads": max(1, sizes.kv_heads // 2)}
    after = sizes.at(**smaller)
    if after.heads < after.kv_heads or sizes.heads == sizes.kv_heads:
        after = after.at(kv_heads=after.heads)
    require_sizes(twin, after)
    return select(twin, after, RandomScores(sizes, seed), gain="none")


class RandomScores:
    """Uniform scores of every axis."""

    def __init__(self, sizes: Arch, seed: int) -> None:
        g = torch.Generator().manual_seed(seed + 1)
        self.hidden: Tensor | None = torch.rand(sizes.hidden, generator=g)
        self.ffn: Tensor | None = torch.rand(sizes.layers, sizes.ffn, generator=g)
        self.heads: Tensor | None = torch.rand(sizes.layers, sizes.heads, generator=g)
        self.kv_heads: Tensor | None = torch.rand(sizes.layers, sizes.kv_heads, generator=g)
        self.layers: Tensor | None = torch.rand(sizes.layers, generator=g)


def masked(model: PreTrainedModel, plan: Plan, anatomy: Anatomy) -> PreTrainedModel:
    """The full model with the removed entries masked: the reference for `trim`, made without slicing weights.

    Removed entries are set to zero where they are written and where they are read. A norm over such entries computes
    its statistics over the remaining ones. All layers are kept, so this is for plans of full depth.
    """
    result = copy.deepcopy(model)
    sizes = anatomy.sizes.sizes
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            for dim, expr in enumerate(anatomy.params[name]):
                alive = torch.zeros(parameter.shape[dim], dtype=parameter.dtype)
                alive[expr.indices(sizes, plan.kept(anatomy.layer_of(name)))] = 1
                parameter.mul_(alive.view([-1 if d == dim else 1 for d in range(parameter.ndim)]))
    for name, module in result.named_modules():
        kept = _kept_of_norm(name, module, plan, anatomy)
        if kept is not None:
            module.forward = _StatisticsOver(module, kept)
        elif "norm" in type(module).__name__.lower() and not [*module.parameters()]:
            # it does not state its width, and only inputs as wide as the stream lose entries
            module.forward = _StatisticsOver(module, torch.tensor(plan.hidden), width=plan.before.hidden)
    return result


def _kept_of_norm(name: str, module: nn.Module, plan: Plan, anatomy: Anatomy) -> Tensor | None:
    if name in anatomy.norms:
        return torch.tensor(plan.hidden)
    shape = anatomy.params.get(f"{name}.weight")
    if "norm" not in type(module).__name__.lower() or shape is None or len(shape) != 1:
        return None
    kept = shape[0].indices(anatomy.sizes.sizes, plan.kept(anatomy.layer_of(name)))
    return kept if len(kept) < shape[0].size(anatomy.sizes.sizes) else None


class _StatisticsOver:
    """A norm's own code, run on the remaining entries. The others become zero.

    With `width`, this applies only to inputs with this many channels.
    """

    def __init__(self, module: nn.Module, kept: Tensor, *, width: int | None = None) -> None:
        self.kept, self.width, self.own = kept, width, module.forward
        self.small = copy.deepcopy(module)
        for name, parameter in self.small.named_parameters():
            setattr(self.small, name, nn.Parameter(parameter[kept].clone()))
        if hasattr(self.small, "normalized_shape"):
            self.small.normalized_shape = (len(kept),)  # type: ignore[assignment]

    def __call__(self, x: Tensor) -> Tensor:
        if self.width not in (None, x.shape[-1]):
            whole: Tensor = self.own(x)
            return whole
        out = self.small(x[..., self.kept])
        full = torch.zeros(x.shape, dtype=out.dtype)
        full[..., self.kept] = out
        return full


def skipping(model: PreTrainedModel, anatomy: Anatomy, layer: int) -> AbstractContextManager[None]:
    """In this context, this layer returns its input unchanged."""

    def forward_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = first_input(args, kwargs)
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    return hooked([model.get_submodule(f"{anatomy.layers_path}.{layer}")], after=forward_input)
