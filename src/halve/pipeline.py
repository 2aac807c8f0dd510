"""Read this first: the stages of a run, in order, and when each has to run again.

    teacher + corpus -> correct -> score -> prune -> distill (and its baselines) -> evaluate -> report

`stages` lists them for a recipe and `run` carries them out in a run folder (see `rundir`). Every stage is a
function from artifacts to one artifact; only this file knows the order. A stage's key is a hash of its name,
the recipe fields it reads, the keys of the stages before it and the content of what it takes from outside;
a stage that has finished under the same key is not run again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halve.errors import RunError
from halve.preflight import check
from halve.progress import SILENT, Progress, RichProgress
from halve.recipe import Recipe
from halve.rundir import RunDir, content_hashes
from halve.soundness import CONFIG, TOKENIZER_FILES, locate
from halve.train import sources

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Stage", "check", "run", "stages"]

SECTIONS = ("correct", "score", "prune", "distill", "evaluate", "report")
_EVERYWHERE = ("seed", "device", "dtype", "data.text_field", "data.context")
_INPUTS = ("teacher", "train", "valid")


@dataclass(frozen=True)
class Stage:
    """One step of a run: a folder of its own, what it depends on, and the function that does it."""

    name: str
    section: str
    """The recipe's section, and the command that runs this stage alone."""
    reads: tuple[str, ...]
    """The recipe's fields that its result depends on; `-section.field` leaves a field out again."""
    after: tuple[str, ...]
    """The stages whose artifacts it takes."""
    outside: tuple[str, ...]
    """What else it takes: teacher, train, valid, choices."""
    act: _Act


_Names = tuple[str, ...]


@dataclass(frozen=True)
class _Run:
    """What a stage may reach for."""

    recipe: Recipe
    folder: RunDir
    progress: Progress

    @property
    def cache(self) -> Path:
        return self.folder.path / "data"

    @property
    def teacher(self) -> Path | str:
        """The model that is scored, cut and learned from: corrected, if the recipe corrects."""
        return self.model("correct") if self.recipe.correct else self.recipe.model

    def model(self, stage: str) -> Path:
        return self.folder.stage(stage) / "model"


_Act = Callable[[_Run, Path], Mapping[str, Any]]


# ---- the stages, in order ------------------------------------------------------------------------------------


def stages(recipe: Recipe) -> tuple[Stage, ...]:
    """The stages that a recipe asks for, each after those it needs."""
    listed: list[Stage] = []

    def add(name: str, section: str, act: _Act, *, reads: _Names, after: _Names, outside: _Names = _INPUTS) -> None:
        listed.append(Stage(name, section, (*_EVERYWHERE, *reads), after, outside, act))

    corrected: _Names = ("correct",) if recipe.correct else ()
    models = {"pruned": "prune"}
    if recipe.correct:
        models = {"corrected": "correct", **models}
        add("correct", "correct", _correct, reads=("correct", "-correct.checkpoint_every"), after=())

    # the aggregators are chosen when scores are used: their file holds the raw statistics of all
    reads: _Names = ("score", "-score.batch_agg", "-score.seq_agg")
    add("score", "score", _score, reads=reads, after=corrected, outside=("teacher", "train"))
    add("prune", "prune", _prune, reads=("prune", "score"), after=(*corrected, "score"))

    if recipe.distill:
        models["distilled"] = "distill"
        reads = ("distill", "-distill.baselines", "-distill.checkpoint_every")
        add("distill", "distill", _distill("student"), reads=reads, after=(*corrected, "prune"))
        for variant in recipe.distill.baselines:
            models[variant] = f"distill-{variant}"
            own: _Names = reads
            cut = "prune"
            if variant == "ce":  # it has an objective of its own
                own = (*reads, "-distill.objective", "-distill.temperature", "-distill.ce_weight")
            if variant == "random_prune":
                cut = "prune-random"
                add(cut, "prune", _prune_at_random, reads=("prune", "score"), after=corrected)
            add(models[variant], "distill", _distill(variant), reads=own, after=(*corrected, cut))

    reads, measured = ("evaluate", "-evaluate.choices"), ("teacher", "valid", "choices")
    add("evaluate", "evaluate", _evaluate(models), reads=reads, after=tuple(models.values()), outside=measured)
    add("report", "report", _report, reads=("name",), after=tuple(stage.name for stage in listed), outside=())
    return tuple(listed)


def _correct(run: _Run, out: Path) -> Mapping[str, Any]:
    from halve.stages import correct

    return correct.run(run.recipe, teacher=run.recipe.model, cache=run.cache, out=out, progress=run.progress)


def _score(run: _Run, out: Path) -> Mapping[str, Any]:
    from halve.stages import score

    return score.run(run.recipe, teacher=run.teacher, cache=run.cache, out=out, progress=run.progress)


def _prune(run: _Run, out: Path) -> Mapping[str, Any]:
    from halve.stages import prune

    scores = run.folder.stage("score") / "scores.safetensors"
    return prune.run(run.recipe, teacher=run.teacher, scores=scores, cache=run.cache, out=out, progress=run.progress)


def _prune_at_random(run: _Run, out: Path) -> Mapping[str, Any]:
    from halve.stages import prune

    return prune.run(run.recipe, teacher=run.teacher, scores=None, cache=run.cache, out=out, progress=run.progress)


def _distill(variant: str) -> _Act:
    def act(run: _Run, out: Path) -> Mapping[str, Any]:
        from halve.stages import distill

        student = run.model("prune-random" if variant == "random_prune" else "prune")
        return distill.run(
            run.recipe,
            teacher=run.teacher,
            student=student,
            variant=variant,
            cache=run.cache,
            out=out,
            progress=run.progress,
        )

    return act


def _evaluate(models: Mapping[str, str]) -> _Act:
    def act(run: _Run, out: Path) -> Mapping[str, Any]:
        from halve.stages import evaluate

        return evaluate.run(
            run.recipe,
            models={"teacher": run.recipe.model, **{name: run.model(stage) for name, stage in models.items()}},
            reference="corrected" if run.recipe.correct else "teacher",
            cache=run.cache,
            out=out,
            progress=run.progress,
        )

    return act


def _report(run: _Run, out: Path) -> Mapping[str, Any]:
    from halve import report

    report.write(run.folder.path, out)
    return {}


# ---- carrying them out ---------------------------------------------------------------------------------------


def run(recipe: Recipe, out: str | Path, *, only: str | None = None, console: Console | None = None) -> Path:
    """Carry out a recipe in the folder `out`, whatever is done of it already, and return the folder.

    `only` names one of `SECTIONS` and carries out its stages alone. `console` shows progress; without one
    nothing is said. A killed run goes on where it was; a finished run changes nothing.

    Raises `RunError` for a folder that is not this recipe's run and for a section whose inputs are not
    there, and every error of `check` before the first stage.
    """
    out = Path(out)
    listed = stages(recipe)
    if only is not None and not any(stage.section == only for stage in listed):
        raise RunError(
            f"there is nothing to {only}",
            why=f"recipe {recipe.name} has no section {only}",
            fix=f"add {only}: to the recipe, or run one of {', '.join(SECTIONS)}",
        )
    say = console.print if console is not None else _nothing
    with RunDir.open(out, recipe) as folder:
        keys = _keys(recipe, listed, memo=out / "data" / "hashes.json")
        wanted = [stage for stage in listed if only in (None, stage.section)]
        todo = [stage for stage in wanted if not folder.is_done(stage.name, keys[stage.name])]
        if only is not None:
            _require_inputs(folder, wanted, keys)
        if todo:
            for error in check(recipe, out):
                raise error
        this = _Run(recipe, folder, SILENT if console is None else RichProgress(console))
        for stage in wanted:
            if stage not in todo:
                say(f"{stage.name}: done before")
                continue
            began = time.monotonic()
            work = folder.work(stage.name, keys[stage.name])
            metrics = stage.act(this, work)
            inputs = {name: keys[name] for name in stage.after}
            folder.commit(stage.name, keys[stage.name], metrics, seed=recipe.seed, inputs=inputs)
            say(f"{stage.name}: done in {time.monotonic() - began:.1f} s")
    return out


def _nothing(line: str) -> None:
    return None


def _require_inputs(folder: RunDir, wanted: Sequence[Stage], keys: Mapping[str, str]) -> None:
    own = {stage.name for stage in wanted}
    for stage in wanted:
        for name in stage.after:
            if name not in own and not folder.is_done(name, keys[name]):
                raise RunError(
                    f"{stage.name} needs the artifact of {name}",
                    why=f"{name} has not finished with this recipe in {folder.path}",
                    fix=f"halve {name.partition('-')[0]} with the same recipe and --out first, or halve run",
                )


def _keys(recipe: Recipe, listed: Sequence[Stage], *, memo: Path) -> dict[str, str]:
    content = {name: _outside(recipe, name, memo) for stage in listed for name in stage.outside}
    keys: dict[str, str] = {}
    for stage in listed:
        parts = {
            "stage": stage.name,
            "recipe": _fields(recipe, stage.reads),
            "after": [keys[name] for name in stage.after],
            "outside": [content[name] for name in stage.outside],
        }
        keys[stage.name] = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return keys


def _fields(recipe: Recipe, reads: Sequence[str]) -> dict[str, Any]:
    """The values of dotted fields as plain data."""
    plain = recipe.model_dump(mode="json")
    chosen: dict[str, Any] = {}
    for path in reads:
        section, _, field = path.removeprefix("-").partition(".")
        if path.startswith("-"):
            chosen[section] = {key: value for key, value in chosen[section].items() if key != field}
        elif field:
            chosen[section] = {**chosen.get(section, {}), field: plain[section][field]}
        else:
            chosen[section] = plain[section]
    return chosen


def _outside(recipe: Recipe, name: str, memo: Path) -> list[Any]:
    """What identifies an input by its content, wherever it lies."""
    if name == "teacher":
        folder = locate(recipe.model)
        used = {CONFIG, *TOKENIZER_FILES}
        files = [p for p in sorted(folder.iterdir()) if p.suffix == ".safetensors" or p.name in used]
    elif name == "choices":
        files = [Path(path) for path in recipe.evaluate.choices]
    else:
        listed = getattr(recipe.data, name)
        hub = [source for source in listed if source.startswith(sources.HUB)]
        files = [path for source in listed if source not in hub for path in sources.files(source)]
        return [*hub, *_hashed(files, memo)]
    return _hashed(files, memo)


def _hashed(files: Sequence[Path], memo: Path) -> list[Any]:
    """A file's suffixes say how it is read; its name says nothing."""
    return [[path.suffixes, sha256] for path, sha256 in zip(files, content_hashes(files, memo=memo), strict=True)]
