"""What a config says about single layers, and how to rewrite it for fewer layers.

Some configs list a kind for every layer. Some list the numbers of the layers of a kind. Some compute a layer's kind
from its number, such as the first n layers or every nth layer. Each is rewritten so that a kept layer keeps its kind.
`kinds.py` checks afterwards whether this worked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig

from halve.anatomy.quirks import (
    CYCLES,
    INDEX_LISTS,
    LAST_LAYERS,
    OTHER_LISTS,
    PERIODS,
    PREFIX_COUNTS,
    RUNS,
    SPARSE_STEP,
)


def layer_lists(config: PretrainedConfig, count: int) -> dict[str, list[Any]]:
    """The lists of the config with an entry for each of `count` layers, as the family's code reads them.

    A list may be longer than the model is deep: the code reads only its first entries. If a list is empty or too short,
    the list that the code makes by default is taken instead.
    """
    lists = {}
    for name, value in config.to_dict().items():
        if not isinstance(value, list) or name in (*OTHER_LISTS, *INDEX_LISTS):
            continue
        if len(value) == count:
            lists[name] = value
        elif (default := _made_of_none(config, name, count)) is not None:
            lists[name] = value[:count] if len(value) > count else default
    return lists


def fewer_layers(config: PretrainedConfig, kept: Sequence[int], count: int) -> dict[str, Any]:
    """The changes to the config if only the `kept` ones of `count` layers remain."""
    values: dict[str, Any] = {name: [old[i] for i in kept] for name, old in layer_lists(config, count).items()}
    for name in INDEX_LISTS:
        if isinstance(old := getattr(config, name, None), list):
            values[name] = [new for new, layer in enumerate(kept) if layer in old]
    for name in CYCLES:
        if isinstance(old := getattr(config, name, None), list | tuple) and old:
            values[name] = [old[layer % len(old)] for layer in kept]
    for name in PREFIX_COUNTS:
        if isinstance(old := getattr(config, name, None), int):
            values[name] = sum(layer < old for layer in kept)
    for name in LAST_LAYERS:
        if isinstance(old := getattr(config, name, None), int) and old >= 0:
            values[name] = sum(layer <= old for layer in kept) - 1
    for types, layers in RUNS.items():
        if hasattr(config, types) and layers in values:
            values[types] = [[values[layers], 1]]
    for period, offset in PERIODS.items():
        values |= _periodic(config, period, offset, kept)
    return values | _sparse_steps(config, kept)


def _made_of_none(config: PretrainedConfig, name: str, count: int) -> list[Any] | None:
    """The list that the family's configuration makes by default, if it has one entry per layer."""
    try:
        made = getattr(type(config)(**{**config.to_dict(), name: None}), name)
    except Exception:  # if its validation refuses a missing list, it makes none by default
        return None
    return made if isinstance(made, list) and len(made) == count else None


def _periodic(config: PretrainedConfig, period: str, offset: str | None, kept: Sequence[int]) -> dict[str, int]:
    """A period and an offset with which the kept layers keep their kinds; empty if there are none."""
    every = getattr(config, period, None)
    if not isinstance(every, int) or every < 1:
        return {}
    first = getattr(config, offset) if offset else every - 1
    wanted = [layer % every == first for layer in kept]
    for size in (every, *range(1, len(kept) + 2)):
        for start in range(size) if offset else (size - 1,):
            if [new % size == start for new in range(len(kept))] == wanted:
                return {period: size} | ({offset: start} if offset else {})
    return {}


def _sparse_steps(config: PretrainedConfig, kept: Sequence[int]) -> dict[str, Any]:
    """Mixtures at every nth layer, rewritten as one entry per layer."""
    period, exceptions = SPARSE_STEP
    every, dense = getattr(config, period, None), getattr(config, exceptions, None)
    if not isinstance(every, int) or every <= 1 or not hasattr(config, exceptions):
        return {}
    plain = [new for new, layer in enumerate(kept) if (layer + 1) % every or layer in (dense or ())]
    return {period: 1, exceptions: plain}
