"""Saving models, so that what comes out opens everywhere.

Out comes an ordinary Hugging Face folder whose config.json spells out `head_dim`, and says rope settings and precision
in the words of transformers 4 and 5 both, so that other runtimes read the same numbers.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig

from halve.anatomy.configs import quiet
from halve.card import CARD, license_of, model_card
from halve.errors import CheckpointError
from halve.files import disk_guard, sync, sync_tree
from halve.soundness import CONFIG, GENERATION, TOKENIZER_FILES, is_terms

RECORD, TEMPLATES = "halve.json", "additional_chat_templates"


def save_model(
    model: transformers.PreTrainedModel,
    folder: str | Path,
    *,
    extra_from: Path | None,
    record: Mapping[str, Any] | None,
) -> None:
    """Write an ordinary Hugging Face folder, whole or not at all.

    `extra_from` is the folder whose tokenizer, chat templates, generation config and terms of use are copied; `record`
    becomes halve.json and a short model card, which names that folder's license. An earlier model in `folder` is
    replaced. Raises `DiskError` when the device is full and `CheckpointError` for a folder that holds something else.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / CONFIG).is_file() and any(folder.iterdir()):
        raise CheckpointError(
            f"{folder} is in the way",
            why="it is not empty and holds no model that could be replaced",
            fix="choose a new folder",
        )
    draft = folder.with_name(f".{folder.name}.tmp")
    try:
        with disk_guard(folder):
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            _write_weights(model, draft)
            _write_config(draft, model.config)
            _copy_extras(extra_from, draft)
            if record is not None:
                _write_object(draft / RECORD, record)
                license = {} if extra_from is None else license_of(extra_from)
                (draft / CARD).write_text(model_card(record, license=license), encoding="utf-8")
            sync_tree(draft)
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(draft, folder)
            sync(folder.parent)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _write_weights(model: transformers.PreTrainedModel, draft: Path) -> None:
    """`save_pretrained` writes into the model's config; it gets copies."""
    config, generation = model.config, model.generation_config
    model.config = copy.deepcopy(config)
    model.generation_config = GenerationConfig()
    try:
        with quiet():
            model.save_pretrained(draft)
    finally:
        model.config, model.generation_config = config, generation
    for file in draft.glob("*.safetensors"):
        file.chmod((draft / CONFIG).stat().st_mode)  # safetensors writes files that others cannot read
    (draft / GENERATION).unlink(missing_ok=True)
    if generation is not None:
        generation.to_json_file(draft / GENERATION)


def _write_config(draft: Path, config: transformers.PretrainedConfig) -> None:
    """Complete the config.json that `save_pretrained` wrote with what other readers need."""
    raw = json.loads((draft / CONFIG).read_text(encoding="utf-8"))
    head_dim = _undeclared_head_dim(config)
    if head_dim is not None:
        raw["head_dim"] = head_dim
    plain = _read_back(config, raw)
    spelled: dict[str, Any] = {}
    for extra in (_old_precision(raw), _old_rope(raw), _older_rope(config, raw)):
        # a family whose code reads an old key differently keeps its own spelling alone
        if _read_back(config, {**raw, **extra}, but=extra) == _without(plain, extra):
            spelled |= extra
    _write_object(draft / CONFIG, raw | spelled)


def _undeclared_head_dim(config: transformers.PretrainedConfig) -> int | None:
    """The head size, where the config leaves it out and the model's code would read it; found by trying."""
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


def _old_precision(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {"torch_dtype": raw["dtype"]} if "dtype" in raw else {}


def _old_rope(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Version 4's spelling of `rope_parameters`; without it that version takes theta 10000, no scaling."""
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


def _older_rope(config: transformers.PretrainedConfig, raw: Mapping[str, Any]) -> dict[str, Any]:
    """GPT-NeoX's names of the same, for a config class that takes them in (others just keep them)."""
    old = _old_rope(raw)
    names = {"rotary_emb_base": old.get("rope_theta"), "rotary_pct": old.get("partial_rotary_factor")}
    taken = set(names) - set(_read_back(config, {**raw, **names}))
    return {name: value for name, value in names.items() if name in taken and value is not None}


def _read_back(
    config: transformers.PretrainedConfig, raw: Mapping[str, Any], *, but: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What this transformers makes of a raw config, without the keys of `but`."""
    with quiet():
        return _without(type(config).from_dict(copy.deepcopy(dict(raw))).to_dict(), but or {})


def _without(values: Mapping[str, Any], keys: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}


def _copy_extras(source: Path | None, draft: Path) -> None:
    if source is None:
        return
    own = [source / name for name in (*TOKENIZER_FILES, GENERATION)]
    terms = [path for path in source.iterdir() if is_terms(path)]
    for path in (*own, *terms, *(source / TEMPLATES).glob("*.jinja")):
        if path.is_file():
            target = draft / path.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)


def _write_object(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
