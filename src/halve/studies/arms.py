"""From an arm and a seed to a recipe: keys override each other, and shares of the teacher's sizes become numbers."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halve.errors import RecipeError
from halve.recipe import strict_yaml
from halve.recipe.read import parse
from halve.recipe.schema import Recipe
from halve.studies.declare import BASE, Arm, Study

if TYPE_CHECKING:
    from halve.anatomy import Arch

SIZES = ("params", "non_embedding_ratio", "hidden", "ffn", "heads", "kv_heads", "layers", "drop_layers")
SELECT, TEST = "@select", "@test"
"""Placeholders in a study's recipe: the items by which layers are chosen, and the items of the measurement."""


@dataclass(frozen=True)
class Setting:
    """The setting of a study: a teacher, texts, items for choosing and for measuring, and changes to the base."""

    name: str
    """The name of the teacher on the page."""
    model: str
    train: tuple[str, ...]
    valid: tuple[str, ...]
    items: tuple[str, str] | None
    changes: Mapping[str, Any]


def cell(study: Study, arm: Arm, setting: Setting, *, seed: int, sizes: Arch, teacher: str) -> Recipe:
    """The recipe of one arm and seed, named by a hash of its content, so that equal arms share one run.

    `sizes` are the teacher's. `teacher` is the folder of the model that this arm cuts and learns from. Raises
    `RecipeError` for unknown keys and missing items.
    """
    raw = layered(layered(_base(setting), study.base), arm.recipe)
    raw.pop("correct", None)  # the correction in the base makes the corrected teacher, once for all studies
    if "correct" in arm.recipe:
        raw["correct"] = arm.recipe["correct"]
    if study.items:
        raw = layered(raw, {"evaluate": {"choices": [TEST]}})
    return _named(_resolved(raw, setting, sizes), setting, seed=seed, model=teacher, source=f"study {study.name}")


def correction_recipe(setting: Setting, *, seed: int) -> Recipe:
    """The recipe whose `correct` stage makes the teacher of a seed. Only this stage is run."""
    raw = layered(_base(setting), {"prune": {"non_embedding_ratio": 0.5}})
    raw = {key: raw[key] for key in ("dtype", "data", "correct", "prune", "device") if key in raw}
    return _named(raw, setting, seed=seed, model=setting.model, source="the studies' correction")


def layered(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merge mappings key by key; `above` overrides. The sizes of a cut are replaced together.

    >>> layered({"prune": {"layers": 3, "gain": "none"}, "seed": 1}, {"prune": {"ffn": 8}})
    {'prune': {'gain': 'none', 'ffn': 8}, 'seed': 1}
    """
    merged = copy.deepcopy(dict(below))
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            if key == "prune" and any(size in value for size in SIZES):
                old = {name: kept for name, kept in old.items() if name not in SIZES}
            merged[key] = layered(old, value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def _base(setting: Setting) -> dict[str, Any]:
    raw: dict[str, Any] = strict_yaml.parse_yaml(BASE.read_text(encoding="utf-8"))
    return layered(raw, setting.changes)


def _named(raw: dict[str, Any], setting: Setting, *, seed: int, model: str, source: str) -> Recipe:
    data = {**raw.get("data", {}), "train": list(setting.train), "valid": list(setting.valid)}
    raw = {**raw, "seed": seed, "model": model, "data": data}
    digest = hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()
    return parse({"name": f"seed-{seed}-{digest[:12]}", **raw}, folder=Path(), source=source)


def _resolved(raw: dict[str, Any], setting: Setting, sizes: Arch) -> dict[str, Any]:
    tokens = raw["distill"]["tokens"]
    base_tokens = strict_yaml.parse_yaml(BASE.read_text(encoding="utf-8"))["distill"]["tokens"]
    base_tokens = setting.changes.get("distill", {}).get("tokens", base_tokens)
    raw = {**raw, "prune": _cut(raw["prune"], sizes), "distill": {**raw["distill"], "tokens": _of(tokens, base_tokens)}}
    if "correct" in raw:
        raw["correct"] = {**raw["correct"], "tokens": _of(raw["correct"]["tokens"], raw["distill"]["tokens"])}
    steps = []
    for step in raw.get("then", ()):
        distill = layered(raw["distill"], step.get("distill", {}))
        prune = layered(_unsized(raw["prune"]), step["prune"])
        tokens = _of(distill["tokens"], base_tokens)
        steps.append({**step, "prune": _cut(prune, sizes), "distill": {**distill, "tokens": tokens}})
    if steps:
        raw["then"] = steps
    items: dict[str, Any] = _with_items(raw, setting)
    return items


def _unsized(prune: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in prune.items() if key not in SIZES}


def _cut(prune: Mapping[str, Any], sizes: Arch) -> dict[str, Any]:
    """Turn shares of the teacher's sizes into valid sizes: heads in whole groups, hidden in multiples of the heads."""
    cut = {key: value for key, value in prune.items() if not _is_share(value)}
    share = {key: _share(value) for key, value in prune.items() if _is_share(value)}
    for axis in ("layers", "ffn", "kv_heads"):
        if axis in share:
            cut[axis] = max(1, round(getattr(sizes, axis) * share[axis]))
    if "heads" in share:
        groups = cut.get("kv_heads", sizes.kv_heads)
        cut["heads"] = max(1, round(sizes.heads * share["heads"] / groups)) * groups
    if "hidden" in share:
        heads = cut.get("heads", sizes.heads)
        cut["hidden"] = max(1, round(sizes.hidden * share["hidden"] / heads)) * heads
    return cut


def _of(value: Any, whole: int) -> Any:
    return round(_share(value) * whole) if _is_share(value) else value


def _is_share(value: Any) -> bool:
    return isinstance(value, str) and value.endswith("%")


def _share(text: str) -> float:
    return float(text.removesuffix("%")) / 100


def _with_items(value: Any, setting: Setting) -> Any:
    if isinstance(value, dict):
        return {key: _with_items(nested, setting) for key, nested in value.items()}
    if isinstance(value, list):
        return [_with_items(nested, setting) for nested in value]
    if value not in (SELECT, TEST):
        return value
    if setting.items is None:
        raise RecipeError(
            "this study needs multiple-choice items",
            why="it chooses layers by the accuracy on some items and measures the accuracy on others",
            fix="--choices FILE, JSON lines with context, choices and answer",
        )
    return setting.items[0 if value == SELECT else 1]
