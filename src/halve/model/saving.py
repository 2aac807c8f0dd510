"""Saving models so that they open everywhere.

The result is an ordinary Hugging Face folder. Its config.json also has the keys that older readers need
(`halve.anatomy.spelling`).
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import transformers
from transformers import GenerationConfig

from halve.anatomy.configs import quiet
from halve.anatomy.spelling import spelled_out
from halve.disk import plain_json
from halve.disk.files import plain
from halve.disk.folders import atomic_folder, finish_folder, is_free
from halve.disk.soundness import CONFIG, GENERATION, TEMPLATES, TOKENIZER_FILES, is_terms
from halve.errors import CheckpointError
from halve.model.card import CARD, license_of, model_card
from halve.process.waits import wait

RECORD = "halve.json"
_CODE = "auto_map"
"""The key under which JSON files name a model's own code."""


def save_model(
    model: transformers.PreTrainedModel,
    folder: str | Path,
    *,
    extra_from: Path | None,
    record: Mapping[str, Any] | None,
    ends: Sequence[int] = (),
) -> None:
    """Write an ordinary Hugging Face folder, completely or not at all.

    `extra_from` is the folder whose tokenizer, chat templates, generation config and terms of use are copied; `record`
    becomes halve.json, with null for numbers that are not finite, and a short model card, which names that folder's
    license. `ends` replaces the tokens at which, by its generation config, a text ends; without any, they stay. An
    earlier model in `folder` is replaced. Raises `DiskError` when the device is full and `CheckpointError` for a folder
    that holds something else.
    """
    folder, place = Path(folder), Path(folder).resolve()
    finish_folder(place, last=CONFIG)
    if not (place / CONFIG).is_file() and not is_free(place):
        raise CheckpointError(
            f"{folder} is in the way",
            why="it is not empty and holds no model that could be replaced",
            fix="choose a new folder",
        )
    with wait(f"writing {folder}"), atomic_folder(folder, last=CONFIG) as draft:
        _write_weights(model, draft)
        _write_config(draft, model.config)
        _copy_extras(extra_from, draft)
        if ends:
            _write_ends(draft / GENERATION, ends)
        if record is not None:
            _write_object(draft / RECORD, plain(record))
            license = {} if extra_from is None else license_of(extra_from)
            (draft / CARD).write_text(model_card(record, license=license), encoding="utf-8")


def _write_weights(model: transformers.PreTrainedModel, draft: Path) -> None:
    """Save the weights. `save_pretrained` changes the model's config, so it gets copies."""
    config, generation = model.config, model.generation_config
    model.config = copy.deepcopy(config)
    model.generation_config = GenerationConfig()
    try:
        with quiet():
            model.save_pretrained(draft)
    finally:
        model.config, model.generation_config = config, generation
    for file in draft.glob("*.safetensors"):
        file.chmod((draft / CONFIG).stat().st_mode)  # safetensors writes files that other users cannot read
    (draft / GENERATION).unlink(missing_ok=True)
    if generation is not None:
        generation.to_json_file(draft / GENERATION)


def _write_config(draft: Path, config: transformers.PretrainedConfig) -> None:
    """Complete the config.json that `save_pretrained` wrote with what other readers need."""
    raw = json.loads((draft / CONFIG).read_text(encoding="utf-8"))
    raw.pop(_CODE, None)
    _write_object(draft / CONFIG, spelled_out(config, raw))


def _copy_extras(source: Path | None, draft: Path) -> None:
    if source is None:
        return
    named_files = [source / name for name in (*TOKENIZER_FILES, GENERATION)]
    terms = [path for path in source.iterdir() if is_terms(path)]
    for path in (*named_files, *terms, *(source / TEMPLATES).glob("*.jinja")):
        if path.is_file():
            target = draft / path.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
            if path.suffix == ".json":
                _drop_code(target)


def _write_ends(path: Path, ends: Sequence[int]) -> None:
    with suppress(ValueError):  # transformers passes over a file that is not JSON
        raw = plain_json.parse_json(path.read_bytes()) if path.is_file() else {}
        if isinstance(raw, dict):
            _write_object(path, {**raw, "eos_token_id": list(ends)})


def _drop_code(path: Path) -> None:
    """Remove the reference to a model's own code from a copied file, because this code is not copied."""
    text = path.read_bytes()
    if f'"{_CODE}"'.encode() not in text:
        return
    with suppress(ValueError):  # a file that is not JSON names no code
        raw = plain_json.parse_json(text)
        if isinstance(raw, dict) and raw.pop(_CODE, None) is not None:
            _write_object(path, raw)


def _write_object(path: Path, value: Mapping[str, Any]) -> None:
    """In ASCII: a string of a teacher's file may hold half of a surrogate pair, which UTF-8 cannot."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
