"""Reading and rewriting Hugging Face configs: the key of each axis, other sizes, fewer layers.

A config is never changed in place. Only configuration code runs here. Weights are not touched.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
)
from transformers.utils import logging as transformers_logging

from halve.anatomy.arch import Arch
from halve.anatomy.lists import fewer_layers
from halve.anatomy.quirks import EXPERT_KEYS, FOLLOWERS, KEYS, POSITION_KEYS, STATES
from halve.errors import AnatomyError, PlanError


def key(config: PretrainedConfig, axis: str) -> str | None:
    """The attribute of this config that holds the size of an axis, if there is one."""
    return next((name for name in KEYS[axis] if hasattr(config, name)), None)


def has_heads(config: PretrainedConfig) -> bool:
    """Whether the config counts heads of attention; recurrent families have none."""
    return key(config, "heads") is not None


def require_text(config: PretrainedConfig) -> None:
    """Raise `AnatomyError` for a config that wraps a language model in other parts."""
    text = _text_part(config)
    if text is None or type(text) in MODEL_FOR_MASKED_LM_MAPPING:  # encoders, too, have a causal class
        return
    what = f"config.json holds one ({text.model_type}) beside {_parts(config, text)}"
    if type(text) in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise AnatomyError(
            f"{config.model_type} wraps a language model in other parts",
            why=f"{what}; halve reads it alone",
            fix=f"save the {text.model_type} to a folder of its own, with the tokenizer, and give that"
            " (docs/guides/first-model.md shows the six lines)",
        )
    if type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise AnatomyError(
            f"{config.model_type} wraps a language model that cannot stand alone",
            why=f"{what}, and transformers has no causal language model of that type",
            fix="give a text-only model, such as the one that this was made from",
        )


def _text_part(config: PretrainedConfig) -> PretrainedConfig | None:
    """The part of a composite config that reads text; None if the config itself does."""
    try:
        text = config.get_text_config(decoder=True)
    except ValueError:  # several read text
        return None
    wrapped = any(getattr(config, name, None) is text for name in config.sub_configs)
    return text if wrapped and isinstance(text, PretrainedConfig) else None


def _parts(config: PretrainedConfig, text: PretrainedConfig) -> str:
    names = [name for name in config.sub_configs if getattr(config, name, None) not in (None, text)]
    return ", ".join(names) or "others"


def num_layers(config: PretrainedConfig) -> int:
    """The number of layers that the config names."""
    name = key(config, "layers")
    value = getattr(config, name) if name else None
    if not isinstance(value, int) or value < 1:
        raise AnatomyError(
            f"the config of {config.model_type} does not say how many layers there are",
            why=f"none of {', '.join(KEYS['layers'])} holds a positive number",
            fix="halve reads decoder-only language models; check config.json against the family",
        )
    return value


def context_length(config: PretrainedConfig) -> int | None:
    """The longest sequence that the model takes by its config; None if the config names no limit."""
    text = config.get_text_config()
    return next((int(limit) for name in POSITION_KEYS if (limit := getattr(text, name, None))), None)


def lengthen_context(config: PretrainedConfig, more: int) -> None:
    """Let a config have room for so many more tokens; one without a limit has it."""
    text = config.get_text_config()
    for name in POSITION_KEYS:
        if limit := getattr(text, name, None):
            setattr(text, name, int(limit) + more)


def shortest_context(several: Iterable[PretrainedConfig]) -> int | None:
    """The `context_length` that all of these models have; None if none has a limit."""
    limits = [context_length(config) for config in several]
    return min((limit for limit in limits if limit is not None), default=None)


def sizes(config: PretrainedConfig) -> Arch:
    """The sizes that the config states or implies. A config without attention heads counts as having one head."""
    values: dict[str, int] = {}
    for axis in ("layers", "hidden", "ffn", "heads", "kv_heads", "head_dim", "vocab"):
        name = key(config, axis)
        value = getattr(config, name) if name else None
        if isinstance(value, int):
            values[axis] = value
    for axis in ("hidden", "vocab") if not has_heads(config) else ("hidden", "heads", "vocab"):
        if axis not in values:
            raise AnatomyError(
                f"the config does not say how large {axis} is",
                why=f"none of {', '.join(KEYS[axis])} holds a number",
                fix="halve reads decoder-only language models; check config.json against the family",
            )
    if not has_heads(config):  # what it calls head_dim, if anything, is of another kind
        values |= {"heads": 1, "kv_heads": 1, "head_dim": values["hidden"]}
    values.setdefault("kv_heads", values["heads"])
    values.setdefault("head_dim", values["hidden"] // values["heads"])
    values.setdefault("ffn", 4 * values["hidden"])
    return Arch.of(values)


def num_experts(config: PretrainedConfig) -> int:
    """How many experts a mixture routes to; 0 for a dense model."""
    counts = [getattr(config, name, None) for name in EXPERT_KEYS]
    return max((count for count in counts if isinstance(count, int)), default=0)


def routed_share(config: PretrainedConfig) -> float:
    """The share of a mixture's experts that each token goes through; 1 for a dense model."""
    chosen = getattr(config, "num_experts_per_tok", None)
    return chosen / num_experts(config) if isinstance(chosen, int) and num_experts(config) else 1.0


def resized(
    config: PretrainedConfig,
    sizes: Mapping[str, int],
    *,
    kept_layers: Sequence[int] | None = None,
    others: Mapping[str, int] | None = None,
) -> PretrainedConfig:
    """A copy with other sizes and, if `kept_layers` is given, only these layers.

    Lists with one entry per layer are shortened, and lists of layer numbers are renumbered. A size without a key in the
    config (`head_dim` in some families) is added; discovery finds out whether the code reads it. `others` are sizes
    that are not axes, by their own keys. The width of recurrent states follows hidden where the code requires it.

    Raises `PlanError` if the family's own validation refuses the sizes.
    """
    result = copy.deepcopy(config)
    values: dict[str, Any] = {}
    if kept_layers is not None:
        values |= _fewer_layers(config, kept_layers)
    for axis, size in sizes.items():
        name = key(config, axis) or (KEYS[axis][0] if axis == "head_dim" else None)
        computed = isinstance(getattr(type(config), name or "", None), property)
        if name is not None and not computed:
            values[name] = size
    values |= {name: sizes[axis] for name, axis in FOLLOWERS.items() if hasattr(config, name) and axis in sizes}
    try:
        with quiet():
            for name, value in {**values, **(others or {})}.items():
                setattr(result, name, value)
            for width, count, expand in states(config):
                inner = getattr(result, expand) * getattr(result, key(config, "hidden") or "hidden_size")
                setattr(result, width, inner // getattr(result, count))
            if "head_dim" in sizes:
                _fit_rope_factors(result, sizes["head_dim"])
            validate = getattr(result, "validate", None)
            if validate is not None:
                validate()
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise PlanError(
            f"{config.model_type} does not accept {_phrase(sizes)}",
            why=str(error).split("Error:")[-1],
            fix="choose sizes that its configuration allows; halve plan lists them",
        ) from error
    return result


def states(config: PretrainedConfig) -> list[tuple[str, str, str]]:
    """The keys of a recurrent state's heads: their width and count, whose product is hidden times an expansion."""
    hidden = key(config, "hidden") or ""
    keys = []
    for names in STATES:
        numbers = [n for name in (*names, hidden) if isinstance(n := getattr(config, name, None), int)]
        if len(numbers) == 4 and numbers[0] * numbers[1] == numbers[2] * numbers[3] > 0:
            keys.append(names)
    return keys


def build(
    config: PretrainedConfig, *, device: str, dtype: torch.dtype = torch.float32, initialize: bool = False
) -> PreTrainedModel:
    """The model that plain transformers builds from a config, never with code from a checkpoint.

    Weights are not initialized unless `initialize` is set. Buffers that the code computes, such as rotary frequencies,
    have their values. Raises `AnatomyError` if transformers knows no causal language model for the config.
    """
    config = copy.deepcopy(config)
    try:
        with quiet(), torch.device(device):
            with nullcontext() if initialize else no_init_weights():
                model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
            model.tie_weights()
            return model.eval()
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError, ArithmeticError, AssertionError) as error:
        raise AnatomyError(
            f"transformers cannot build {config.model_type} as a causal language model",
            why=str(error) or type(error).__name__,
            fix="check config.json against the family; composite and remote-code models are not read",
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' remarks about unusual sizes of twins off the user's screen."""
    before, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    if before != transformers_logging.ERROR:  # to set it takes a walk through every logger of the process
        transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if before != transformers_logging.ERROR:
            transformers_logging.set_verbosity(before)
        if bars:
            transformers_logging.enable_progress_bar()


def _fewer_layers(config: PretrainedConfig, kept: Sequence[int]) -> dict[str, Any]:
    layers_key = key(config, "layers")
    assert layers_key is not None
    # The count goes first: validators compare the lists with it.
    return {layers_key: len(kept), **fewer_layers(config, kept, num_layers(config))}


def _fit_rope_factors(config: PretrainedConfig, head_dim: int) -> None:
    """Shorten long-context rotary factors, which have one entry per rotated pair, to the narrower heads of a twin."""
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict):
        return
    rope = copy.deepcopy(rope)
    for part in (rope, *(v for v in rope.values() if isinstance(v, dict))):
        length = int(head_dim * part.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", 1.0))) // 2
        for name in ("short_factor", "long_factor"):
            if isinstance(factors := part.get(name), list) and len(factors) != length:
                part[name] = [factors[i * len(factors) // length] for i in range(length)]
    config.rope_parameters = rope


def _phrase(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in sizes.items())
