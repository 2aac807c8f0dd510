"""The kind of each layer, found from the built layers, and whether layers keep their kind when others are dropped.

A layer's code may depend on the layer's number: through a list, a count of dense layers, or a period. The result always
shows in the built layer: another module, another shape or another flag.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from halve.anatomy import configs
from halve.anatomy.lists import layer_lists
from halve.errors import AnatomyError, HalveError

Kind = tuple[tuple[str, object], ...]
"""What a layer is built of: modules with their classes, parameters with their shapes, flags with their values."""

_NUMBERS = ("idx", "index", "_id", "number")


def kinds(layers: nn.Module) -> list[Kind]:
    """The kind of each layer in a list. The layer's own number is not part of its kind."""
    return [tuple(_traits(layer).items()) for layer in layers.children()]


def built_alike(kind: Kind) -> Kind:
    """A kind without fractional numbers: a factor that changes from layer to layer does not make another kind."""
    return tuple((trait, value) for trait, value in kind if not isinstance(value, float))


def _traits(layer: nn.Module) -> dict[str, object]:
    traits: dict[str, object] = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    for name, module in layer.named_modules():
        traits[name or "layer"] = type(module).__name__
        for flag, value in sorted(vars(module).items()):
            counts = flag == "training" or flag.endswith(_NUMBERS)
            if not counts and (value is None or isinstance(value, bool | int | float | str)):
                traits[f"{name}.{flag}".lstrip(".")] = value
    return traits


def find_layers(model: PreTrainedModel, count: int) -> str:
    """The name of the module list that holds the layers. Raises `AnatomyError` if there is none."""
    lists = [name for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    lists = [name for name in lists if not any(part.isdigit() for part in name.split("."))]
    if len(lists) != 1:
        raise AnatomyError(
            f"cannot find the layers of {model.config.model_type}",
            why=f"{len(lists)} module lists have {count} entries, as many as there are layers",
            fix="halve reads decoder-only models with one stack of layers",
        )
    return str(lists[0])


def firsts(model: PreTrainedModel, config: PretrainedConfig, layers_path: str) -> list[int]:
    """For every layer, the first layer of the same kind with the same entries in the config's lists."""
    seen: dict[object, int] = {}
    lists = layer_lists(config, configs.num_layers(config))
    first_layers = []
    for index, kind in enumerate(kinds(model.get_submodule(layers_path))):
        listed = tuple((name, str(values[index])) for name, values in lists.items())
        first_layers.append(seen.setdefault((built_alike(kind), listed), index))
    return first_layers


def representatives(firsts: Sequence[int]) -> tuple[int, ...]:
    """One layer of each kind, plus the first two and the last, which may be special."""
    return tuple(sorted({*firsts, 0, min(1, len(firsts) - 1), len(firsts) - 1}))


def changed(before: Sequence[Kind], config: PretrainedConfig, layers_path: str, kept: Sequence[int]) -> str | None:
    """The layer whose kind would change if only the kept layers of this config remained, or None.

    >>> from halve.anatomy import discover
    >>> from transformers import AutoConfig
    >>> config = AutoConfig.for_model("llama", num_hidden_layers=3)
    >>> model = configs.build(config, device="meta")
    >>> changed(kinds(model.model.layers), config, "model.layers", [0, 2]) is None
    True
    """
    try:
        student = configs.build(configs.resized(config, {}, kept_layers=kept), device="meta")
    except HalveError as error:
        return f"its code builds no model of layers {_short(kept)}: {error.why}"
    after = kinds(student.get_submodule(layers_path))
    for layer, kind in zip(kept, after, strict=True):
        if kind != before[layer]:
            place = f"layer {layer} would be layer {list(kept).index(layer)} and another"
            return f"{place}: {_difference(before[layer], kind)}"
    return None


def _difference(before: Kind, after: Kind) -> str:
    was, becomes = dict(before), dict(after)
    trait = next(trait for trait in (*becomes, *was) if was.get(trait) != becomes.get(trait))
    return f"{trait} {becomes.get(trait, 'missing')} instead of {was.get(trait, 'none')}"


def fixed(before: Sequence[Kind], config: PretrainedConfig, layers_path: str) -> str | None:
    """Why layers cannot be dropped, or None. Tried without the first, a middle, the last and every second layer."""
    everyone = range(len(before))
    for gone in (range(1), range(len(before) // 2, len(before) // 2 + 1), range(len(before))[-1:], everyone[::2]):
        kept = [layer for layer in everyone if layer not in gone]
        if kept and (reason := changed(before, config, layers_path, kept)) is not None:
            return f"this family's code computes a layer's kind from its number: {reason}"
    return None


def require_same(config: PretrainedConfig, layers_path: str, kept: Sequence[int]) -> None:
    """Raise `AnatomyError` if a kept layer would change its kind."""
    if list(kept) == list(range(configs.num_layers(config))):
        return
    before = kinds(configs.build(config, device="meta").get_submodule(layers_path))
    if (reason := changed(before, config, layers_path, kept)) is not None:
        raise AnatomyError(
            f"cannot keep layers {_short(kept)} of {config.model_type}",
            why=f"this family's code computes a layer's kind from its number: {reason}",
            fix="cut another axis; halve inspect lists what can be cut",
        )


def _short(kept: Sequence[int]) -> str:
    return ", ".join(map(str, kept[:8])) + (", ..." if len(kept) > 8 else "")
