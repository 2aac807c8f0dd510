"""Older spellings of keys in config.json, in addition to those of this transformers.

Version 4 of transformers and the converters of other runtimes read keys that this version has renamed and no longer
writes. If such a key is missing, they take the family's default or stop. Each key that is added here repeats one that
is already there. A key that would change what this transformers reads is not written.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from halve.anatomy.configs import quiet
from halve.anatomy.quirks import EXPERT_KEYS

Raw = Mapping[str, Any]


def spelled_out(config: PretrainedConfig, raw: Raw) -> dict[str, Any]:
    """The raw config that `save_pretrained` wrote, completed with what other readers need."""
    head_dim = _undeclared_head_dim(config)
    complete = dict(raw) if head_dim is None else {**raw, "head_dim": head_dim}
    plain = _read_back(config, complete)
    spelled: dict[str, Any] = {}
    for words in (_precision, _rope, _older_rope, _context, _experts):
        extra = words(config, complete)
        # a family whose code reads an old key differently keeps its own spelling alone
        if _read_back(config, {**complete, **extra}, but=extra) == _without(plain, extra):
            spelled |= extra
    return complete | spelled


def _undeclared_head_dim(config: PretrainedConfig) -> int | None:
    """The head size, if the config leaves it out and the model's code would read it. Found by trying."""
    text = config.get_text_config()
    heads, hidden = getattr(text, "num_attention_heads", None), getattr(text, "hidden_size", None)
    if text is not config or getattr(config, "head_dim", None) or not heads or not hidden:
        return None
    head_dim = int(hidden) // int(heads)
    shapes = []
    for tried in (head_dim, 2 * head_dim):
        attempt = copy.deepcopy(config)
        attempt.head_dim = tried
        try:
            with torch.device("meta"), quiet():
                model = AutoModelForCausalLM.from_config(attempt, trust_remote_code=False)
        except Exception:  # the family's code refuses another head size
            return None
        shapes.append({name: weight.shape for name, weight in model.state_dict().items()})
    return head_dim if shapes[0] != shapes[1] else None


def _precision(_: PretrainedConfig, raw: Raw) -> dict[str, Any]:
    return {"torch_dtype": raw["dtype"]} if "dtype" in raw else {}


def _rope(_: PretrainedConfig, raw: Raw) -> dict[str, Any]:
    """Version 4's spelling of `rope_parameters`. Without it, that version uses theta 10000 and no scaling."""
    rope = raw.get("rope_parameters")
    if not isinstance(rope, dict) or not rope:
        return {}
    old: dict[str, Any] = {}
    if isinstance(rope.get("sliding_attention"), dict):
        old["rope_local_base_freq"] = rope["sliding_attention"].get("rope_theta")
    rope = rope.get("full_attention", rope)
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        return {}
    old["rope_theta"] = rope["rope_theta"]
    if "partial_rotary_factor" in rope:
        old["partial_rotary_factor"] = rope["partial_rotary_factor"]
    scaling = {key: value for key, value in rope.items() if key not in old}
    old["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else scaling
    return old


def _older_rope(config: PretrainedConfig, raw: Raw) -> dict[str, Any]:
    """GPT-NeoX's names of the same, for a config class that takes them in (others just keep them)."""
    old = _rope(config, raw)
    names = {"rotary_emb_base": old.get("rope_theta"), "rotary_pct": old.get("partial_rotary_factor")}
    taken = set(names) - set(_read_back(config, {**raw, **names}))
    return {name: value for name, value in names.items() if name in taken and value is not None}


def _context(_: PretrainedConfig, raw: Raw) -> dict[str, Any]:
    """GPT-2's older name of its number of positions."""
    return {"n_ctx": raw["n_positions"]} if "n_positions" in raw else {}


def _experts(config: PretrainedConfig, raw: Raw) -> dict[str, Any]:
    """The number of experts under the name that the config's class takes for the one it writes."""
    names = {alias: name for alias, name in config.attribute_map.items() if alias in EXPERT_KEYS and name in raw}
    return {alias: raw[name] for alias, name in names.items()}


def _read_back(config: PretrainedConfig, raw: Raw, *, but: Raw | None = None) -> dict[str, Any]:
    """The config that this transformers reads from a raw config, without the keys of `but`."""
    with quiet():
        return _without(type(config).from_dict(copy.deepcopy(dict(raw))).to_dict(), but or {})


def _without(values: Raw, keys: Raw) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}
