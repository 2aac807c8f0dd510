"""The key of a stage's result: a hash of the recipe fields that it reads and of the content of its inputs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halve.disk.files import content_hashes
from halve.disk.gguf_header import SUFFIX
from halve.disk.soundness import CONFIG, GENERATION, TEMPLATES, TOKENIZER_FILES
from halve.evaluation.rows import split_files
from halve.recipe.rounds import compares, rounds
from halve.recipe.schema import Recipe
from halve.text import sources

if TYPE_CHECKING:
    from halve.model.checkpoint import Checkpoint


_ALIGN = "align."


@dataclass(frozen=True)
class Keyed:
    """The parts of a stage from which its key is computed."""

    name: str
    section: str
    """The command that runs only this stage. Except for cache, it is also the recipe's section."""
    recipe: Recipe
    """The recipe of the run, or of the round from the second round on."""
    reads: tuple[str, ...]
    """The fields of this recipe on which its result depends. `-section.field` excludes a field."""
    after: tuple[str, ...]
    """The stages whose artifacts it reads."""
    outside: tuple[str, ...]
    """Its other inputs: teacher, train, valid, choices, task_data, depth_task, tournament_choices, imported, and
    align.1: the data of the first step of alignment."""
    number: int
    """Its round. Stages that read the whole run belong to the first."""


def keys_of(recipe: Recipe, teacher: Checkpoint, stages: Sequence[Keyed], *, memo: Path) -> dict[str, str]:
    """The keys of stages by name; each stage comes after those it needs. `memo` stores hashes of outside files."""
    taken = dict.fromkeys(name for stage in stages for name in stage.outside)
    outside = {name: content(recipe, name, memo, teacher=teacher) for name in taken}
    removed = _removed(recipe, teacher)
    keys: dict[str, str] = {}
    for stage in stages:
        parts: dict[str, Any] = {
            "stage": stage.name,
            "recipe": fields(stage.recipe, stage.reads),
            "after": [keys[name] for name in stage.after],
            "outside": [outside[name] for name in stage.outside],
        }
        if stage.section == "score" and removed:
            parts["removed"] = removed[stage.number - 1]
        keys[stage.name] = hashed(parts)
    return keys


def _removed(recipe: Recipe, teacher: Checkpoint) -> list[int | bool | None]:
    """For each round, how its scores depend on the number of dropped layers. Empty if they do not."""
    from halve.cut.layers.chosen import read_of
    from halve.preflight.sizes import planned_rounds

    if not compares(recipe.score):
        return []
    numbers = [
        0 if shape.kept_layers is not None or part.search else shape.before.sizes.layers - shape.after.layers
        for part, shape in zip(rounds(recipe), planned_rounds(recipe, teacher), strict=True)
    ]
    return [read_of(recipe.score, number) for number in numbers]


def hashed(parts: Mapping[str, Any]) -> str:
    """One hash of plain data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def fields(recipe: Recipe, reads: Sequence[str]) -> dict[str, Any]:
    """The values of dotted fields as plain data."""
    plain = recipe.model_dump(mode="json")
    chosen: dict[str, Any] = {}
    for path in reads:
        section, _, field = path.removeprefix("-").partition(".")
        if path.startswith("-"):
            chosen[section] = _without(chosen[section], field)
        elif field:
            chosen[section] = {**chosen.get(section, {}), field: plain[section][field]}
        else:
            chosen[section] = plain[section]
    return chosen


def _without(section: Any, field: str) -> Any:
    """A section, or each of a list of them, without a field, which may be that of a section inside."""
    if isinstance(section, list):
        return [_without(part, field) for part in section]
    name, _, inner = field.partition(".")
    if inner:
        return {**section, name: _without(section[name], inner)}
    return {key: value for key, value in section.items() if key != field}


def content(recipe: Recipe, name: str, memo: Path, *, teacher: Checkpoint) -> list[Any]:
    """The hash of an input's content, which does not depend on its place."""
    if name == "teacher" and teacher.gguf is not None:
        return [[[SUFFIX], teacher.gguf.made_of]]
    if name == "teacher":
        return _teacher(teacher, memo)
    if name == "choices":
        files = [Path(path) for path in recipe.evaluate.choices]
    elif name == "imported":
        files = [Path(entry.file) for entry in recipe.evaluate.imported]
    elif name == "task_data":
        return _task_data(recipe, memo)
    elif name == "tournament_choices":
        choices = None if recipe.search is None else recipe.search.tournament.choices
        files = [Path(choices)] if choices else []
    elif name == "depth_task":
        files = [Path(recipe.score.depth_task)] if recipe.score.depth_task else []
    elif name == "train" and isinstance(recipe.data.train, dict):
        parts = recipe.data.train.items()
        return [[part, mixed.weight, _texts(mixed.sources, memo), *["plain"] * mixed.plain] for part, mixed in parts]
    elif name.startswith(_ALIGN):
        step = recipe.align[int(name.removeprefix(_ALIGN)) - 1]
        return [*_texts(step.data, memo), *_judge(step.reward_model, memo)]
    else:
        return _texts(recipe.data.train_sources if name == "train" else recipe.data.valid, memo)
    return _hashed(files, memo)


def _teacher(teacher: Checkpoint, memo: Path) -> list[Any]:
    """The files of a teacher that a stage reads or that go with every student."""
    used = {CONFIG, GENERATION, *TOKENIZER_FILES, *(path.name for path in teacher.weights)}
    files = [path for path in sorted(teacher.files.iterdir()) if path.name in used]
    templates = sorted((teacher.files / TEMPLATES).glob("*.jinja"))  # whose names are what they are asked for by
    return [*_hashed([*files, *templates], memo), *(path.name for path in templates)]


def _task_data(recipe: Recipe, memo: Path) -> list[Any]:
    """The rows of every task, by its name and by the splits of its files, one for each file."""
    data: list[Any] = []
    for task, path in sorted(recipe.evaluate.data.items()):
        parts = [(split, file) for split, files in split_files(Path(path)).items() for file in files]
        data.append([task, [split for split, _ in parts], _hashed([file for _, file in parts], memo)])
    return data


def _texts(listed: Sequence[str], memo: Path) -> list[Any]:
    hub = [source for source in listed if source.startswith(sources.HUB)]
    files = [path for source in listed if source not in hub for path in sources.files(source)]
    return [*hub, *_hashed(files, memo)]


def _judge(source: str | None, memo: Path) -> list[Any]:
    """The content of a reward model's folder, or a hub name."""
    if source is None or not Path(source).is_dir():
        return [source]
    return _hashed(sorted(path for path in Path(source).iterdir() if path.is_file()), memo)


def _hashed(files: Sequence[Path], memo: Path) -> list[Any]:
    """Hash the content and the suffixes of a file, which determine how it is read, but not its name."""
    return [[path.suffixes, sha256] for path, sha256 in zip(files, content_hashes(files, memo=memo), strict=True)]
