"""The precision in which weights are stored, and the one in which a stage computes with them."""

from __future__ import annotations

import functools
import re
import time
from typing import TYPE_CHECKING, cast

import torch
from torch.nn.functional import linear
from torch.utils._python_dispatch import _disable_current_modes

from halve.anatomy.configs import build
from halve.recipe.schema import Dtype

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_SLOWER = 2.0
"""How many times as long as in float32 a product may take before weights are raised to float32."""
_ROWS, _INNER, _OUTER = 128, 512, 512
_TRIES = 5


def stored_dtype(asked: Dtype, config: PretrainedConfig) -> torch.dtype:
    """The precision of the weights of a model, and of students that are cut from it: the recipe's `dtype`."""
    if asked != "auto":
        return cast(torch.dtype, getattr(torch, asked))
    dtype = config.dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def computing_dtype(asked: Dtype, config: PretrainedConfig, *, on_cpu: bool) -> torch.dtype:
    """The precision in which a stage runs a model that it does not train.

    It is the stored one. But with `auto` it is float32 on a CPU that has no units for the stored one. float32 holds
    every weight exactly.
    """
    stored = stored_dtype(asked, config)
    return torch.float32 if asked == "auto" and on_cpu and is_slow_here(stored) else stored


@torch.no_grad()
def cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The same model with its weights in another precision: in that of each which loading its folder in `dtype` gives.

    Some architectures keep a few tensors in float32 that `model.to(dtype)` would round, such as the biases by which
    DeepSeek's router chooses experts. Buffers that no file holds stay as they are, such as the rotary frequencies.
    """
    wanted = loaded_dtypes(model, dtype)
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensor.data = tensor.data.to(wanted.get(name))
    return model


def loaded_dtypes(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The precision of each stored tensor of a model that is loaded in `dtype`."""
    empty = build(model.config, device="meta", dtype=dtype)
    kept = [re.compile(pattern) for pattern in empty._get_dtype_plan(dtype)]
    return {
        name: torch.float32 if any(pattern.search(name) for pattern in kept) else tensor.dtype
        for name, tensor in empty.state_dict().items()
        if tensor.is_floating_point()
    }


@functools.cache
@torch.no_grad()
def is_slow_here(dtype: torch.dtype) -> bool:
    """Whether this CPU takes more than twice as long for products of this precision as for those of float32.

    Processors without units for bfloat16 take 6 to 60 times as long; those with such units a quarter of the time. A few
    small products show it, the fastest of each, because other work only slows them down.
    """
    if dtype.itemsize >= torch.float32.itemsize:
        return False
    with _disable_current_modes(), torch.autocast("cpu", enabled=False):  # a rehearsal's tensors have no values
        return _seconds(dtype) > _SLOWER * _seconds(torch.float32)


def _seconds(dtype: torch.dtype) -> float:
    states, weight = torch.ones(_ROWS, _INNER, dtype=dtype), torch.ones(_OUTER, _INNER, dtype=dtype)
    seconds = []
    for _ in range(_TRIES):
        began = time.perf_counter()
        linear(states, weight)
        seconds.append(time.perf_counter() - began)
    return min(seconds)
