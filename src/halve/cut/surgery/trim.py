"""Build the model that a Plan describes: a pure function that returns a new, ordinary model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from halve.anatomy import Anatomy
from halve.anatomy.configs import build, resized
from halve.anatomy.kinds import require_same
from halve.cut.plan.plan import Plan
from halve.cut.plan.sizes import config_sizes
from halve.cut.surgery.gain import norm_kind


def trim(
    model: PreTrainedModel, plan: Plan, anatomy: Anatomy, *, gains: Mapping[str, float] | None = None
) -> PreTrainedModel:
    """A new model made of the entries that the plan keeps. The given model is not changed.

    `gains` has factors for the output of norms over `hidden`, by module name in the given model (see
    `halve.cut.surgery.gain`). If the family's code multiplies embeddings by sqrt(hidden), the embedding table is scaled
    to compensate for the smaller factor. If the table is also the head, the final norm compensates for its scale.
    The model is built from a rewritten config, so the family's own code makes rotary tables, layer numbers and group
    counts. Tied weights stay tied.

    Raises `AnatomyError` if a kept layer would change its kind.
    """
    require_same(model.config, anatomy.layers_path, plan.layers)
    config = resized(model.config, config_sizes(anatomy, plan.after), kept_layers=plan.layers)
    student = build(config, device=str(model.device), dtype=model.dtype)
    old = dict(model.named_parameters())
    kept = cut_parts(anatomy, plan, [name for name, _ in student.named_parameters()])
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            value = kept[name].of(old)
            assert value.shape == parameter.shape, (name, value.shape, parameter.shape)
            parameter.data = value.to(parameter.device).clone()
        _copy_buffers(model, student, plan, anatomy)
    student.tie_weights()
    _scale_norms(student, gains or {}, plan, anatomy)
    scale = _embedding_factor(plan, anatomy)
    if scale != 1.0 and anatomy.tied and anatomy.final_norm is not None:
        _scale_output(student.get_submodule(anatomy.final_norm), 1 / scale)
    student.generation_config = model.generation_config
    return student.eval()


@dataclass(frozen=True, eq=False)
class Part:
    """How one parameter of a smaller model is taken from the larger one's."""

    source: str
    """Its name in the larger model."""
    entries: tuple[tuple[int, Tensor], ...]
    """Dimensions of which not all entries stay where they are, and the entries that are taken."""
    scale: float

    def of(self, old: Mapping[str, Tensor]) -> Tensor:
        """Its value, from the larger model's parameters by name. Gradients flow back into them."""
        value = _selected(old[self.source], self.entries)
        return value if self.scale == 1.0 else value * self.scale


def cut_parts(anatomy: Anatomy, plan: Plan, names: Iterable[str]) -> dict[str, Part]:
    """How `trim` takes parameters with these names, without the gains of norms. Embeddings are scaled as it says."""
    scale, made = _embedding_factor(plan, anatomy), {}
    for name in names:
        source, kept = _origin(name, plan, anatomy)
        entries = _entries(anatomy, source, kept)
        made[name] = Part(source, entries, scale if source == anatomy.embeddings[0] else 1.0)
    return made


def take(value: Tensor, anatomy: Anatomy, name: str, kept: Mapping[str, tuple[int, ...]]) -> Tensor:
    """The kept part of one parameter, of any shape that the anatomy knows."""
    return _selected(value, _entries(anatomy, name, kept))


def _selected(value: Tensor, entries: tuple[tuple[int, Tensor], ...]) -> Tensor:
    for dim, chosen in entries:
        value = value.index_select(dim, chosen.to(value.device))
    return value


def _entries(anatomy: Anatomy, name: str, kept: Mapping[str, tuple[int, ...]]) -> tuple[tuple[int, Tensor], ...]:
    sizes, entries = anatomy.sizes.sizes, []
    for dim, expr in enumerate(anatomy.params[name]):
        if any(axis in kept and tuple(kept[axis]) != tuple(range(sizes[axis])) for axis in expr.axes):
            entries.append((dim, expr.indices(sizes, kept)))
    return tuple(entries)


def _origin(name: str, plan: Plan, anatomy: Anatomy) -> tuple[str, dict[str, tuple[int, ...]]]:
    layer = anatomy.layer_of(name)
    if layer is None:
        return name, plan.kept(None)
    return anatomy.in_layer(name, plan.layers[layer]), plan.kept(layer)


def _copy_buffers(model: PreTrainedModel, student: PreTrainedModel, plan: Plan, anatomy: Anatomy) -> None:
    """Copy saved buffers, which act like weights. In no proved family do their shapes depend on a cut axis."""
    old = model.state_dict()
    parameters = {name for name, _ in student.named_parameters(remove_duplicate=False)}
    for name, value in student.state_dict().items():
        if name not in parameters:
            value.copy_(old[_origin(name, plan, anatomy)[0]])


def _embedding_factor(plan: Plan, anatomy: Anatomy) -> float:
    return sqrt(plan.before.hidden / plan.after.hidden) if anatomy.scaled_embedding else 1.0


def _scale_norms(student: PreTrainedModel, gains: Mapping[str, float], plan: Plan, anatomy: Anatomy) -> None:
    for new_name in anatomy.norms:
        layer = anatomy.layer_of(new_name)
        if layer is not None and layer not in plan.layers:
            continue
        here = new_name if layer is None else anatomy.in_layer(new_name, plan.layers.index(layer))
        factor = gains.get(new_name, 1.0)
        if factor == 1.0:
            continue
        _scale_weight(student.get_submodule(here), factor)


def _scale_weight(module: nn.Module, factor: float) -> None:
    weight = getattr(module, "weight", None)
    if weight is None:
        return  # a norm without parameters cannot carry a gain
    offset = norm_kind(module).offset
    with torch.no_grad():
        weight.copy_((weight.double() + offset) * factor - offset)


def _scale_output(module: nn.Module, factor: float) -> None:
    """Scale the whole output of a norm, including its bias."""
    _scale_weight(module, factor)
    if isinstance(bias := getattr(module, "bias", None), Tensor):
        with torch.no_grad():
            bias.mul_(factor)
