"""Read this first: the stages of a run, in order, and when each has to run again.

    teacher + corpus -> correct -> score -> prune -> cache -> distill (and its baselines) -> evaluate -> report

Where a recipe has further rounds (`then`), score-2, prune-2 and distill-2 follow on the last student, and so on.

`stages` lists them for a recipe and `run` carries them out in a run folder (see `rundir`). Every stage is a
function from artifacts to one artifact; only this file knows the order. A stage's key is a hash of its name,
the recipe fields it reads, the keys of the stages before it and the content of what it takes from outside;
a stage that has finished under the same key is not run again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halve.disk.rundir import HASHES, RunDir
from halve.errors import HalveError, RunError
from halve.pipeline import reused
from halve.pipeline.keys import Keyed, keys_of
from halve.preflight import check as preflight
from halve.process.waits import heard
from halve.progress import SILENT, Progress, RichProgress
from halve.recipe.rounds import learns_from_previous, named, rounds
from halve.recipe.schema import HOW, Distill, Recipe

if TYPE_CHECKING:
    from rich.console import Console

    from halve.model.checkpoint import Checkpoint
    from halve.train.ranks.group import Ranks

__all__ = ["Stage", "check", "run", "stages"]

SECTIONS = ("correct", "score", "prune", "cache", "distill", "evaluate", "report")
_EVERYWHERE = ("seed", "device", "dtype", "data.text_field", "data.context", "data.boundary")
_TOGETHER = ("correct", "distill")
"""Sections whose stages several ranks carry out together; the others' are carried out by one while the rest wait."""
_INPUTS = ("teacher", "train", "valid")


@dataclass(frozen=True)
class Stage(Keyed):
    """One step of a run: a folder of its own, what it depends on, and the function that does it."""

    act: _Act


_Names = tuple[str, ...]


@dataclass(frozen=True)
class _Run:
    """What a stage may reach for."""

    folder: RunDir
    cache: Path
    progress: Progress
    teacher: Checkpoint
    """The model that the recipe names."""
    students: dict[str, Checkpoint] = field(default_factory=dict)
    """Models that stages made, as far as they were opened."""

    def scores(self, stage: str) -> Path:
        return self.folder.stage(stage) / "scores.safetensors"

    def model(self, stage: str | None) -> Checkpoint:
        """The model that a stage made; None is the one that the recipe names."""
        from halve.model.checkpoint import Checkpoint

        if stage is None:
            return self.teacher
        if stage not in self.students:
            self.students[stage] = Checkpoint.open(self.folder.stage(stage) / "model")
        return self.students[stage]


_Act = Callable[[_Run, Recipe, Path], Mapping[str, Any]]


# ---- the stages, in order ------------------------------------------------------------------------------------


def stages(recipe: Recipe) -> tuple[Stage, ...]:
    """The stages that a recipe asks for, each after those it needs."""
    listed: list[Stage] = []
    models: dict[str, str] = {}
    original = None  # the stage that makes the teacher, if it is corrected
    if recipe.corrects_before:
        models["corrected"] = original = "correct"
        reads: _Names = (*_EVERYWHERE, "data.documents", "correct", *_but_how("correct"))
        listed.append(Stage("correct", "correct", recipe, reads, (), _INPUTS, 1, _correct))
    last = original
    for number, part in enumerate(rounds(recipe), 1):
        teacher = last if learns_from_previous(recipe, number) else original
        made, students = _round(part, number, cut=last, teacher=teacher)
        listed += made
        models |= students
        last = models.get(named("distilled", number), named("prune", number))
    subject = next((name for name, stage in models.items() if stage == last and name.startswith("distilled")), None)
    beside = {
        named("corrected", number): models[named("distilled", number)]
        for number, part in enumerate(rounds(recipe), 1)
        if part.corrects_beside
    }
    reads, measured = (*_EVERYWHERE, "evaluate", "-evaluate.choices"), ("teacher", "valid", "choices")
    act = _evaluate(models, beside, subject=subject)
    listed.append(Stage("evaluate", "evaluate", recipe, reads, tuple(models.values()), measured, 1, act))
    everything = tuple(stage.name for stage in listed)
    listed.append(Stage("report", "report", recipe, (*_EVERYWHERE, "name"), everything, (), 1, _report))
    return tuple(listed)


def _round(recipe: Recipe, number: int, *, cut: str | None, teacher: str | None) -> tuple[list[Stage], dict[str, str]]:
    """The stages of one round, and the models they make by the names that evaluation gives them.

    `cut` and `teacher` are the stages whose models are cut and learned from; None is the recipe's model.
    """
    listed: list[Stage] = []
    score, prune, at_random = named("score", number), named("prune", number), named("prune", number, "random")
    whole: _Names = () if cut is None else (cut,)
    taught: _Names = () if teacher is None else (teacher,)

    def add(name: str, section: str, act: _Act, reads: _Names, after: _Names, outside: _Names = _INPUTS) -> None:
        after = tuple(dict.fromkeys(after))
        listed.append(Stage(name, section, recipe, (*_EVERYWHERE, *reads), after, outside, number, act))

    # the aggregators are chosen when scores are used: their file holds the raw statistics of all
    reads: _Names = ("score", "-score.batch_agg", "-score.seq_agg", "-score.depth_task")
    add(score, "score", _score(cut), reads, whole, ("teacher", "train", "depth_task"))
    reads = ("prune", "score", "-score.depth_task")
    add(prune, "prune", _prune(cut, score), reads, (*whole, score))
    models = {named("pruned", number): prune}
    if recipe.distill is None:
        return listed, models

    answers = None
    if recipe.distill.cache != "none":
        answers = named("cache", number)
        add(answers, "cache", _cache(teacher), _cached_by(recipe.distill), taught)
        taught = (*taught, answers)
    for variant in ("student", *recipe.distill.baselines):
        own: _Names = ("data.documents", "distill", "-distill.baselines", *_but_how("distill"))
        start = prune
        if variant == "ce":  # it has an objective of its own
            own = (*own, "-distill.objective", "-distill.temperature")
        elif recipe.corrects_beside:  # the teacher moves as well
            own = (*own, "correct", *_but_how("correct"))
        if variant == "random_prune":
            start = at_random
            add(start, "prune", _prune(cut, None, like=prune), ("prune", "score", "-score.depth_task"), (*whole, prune))
        stage = named("distill", number, "" if variant == "student" else variant)
        add(stage, "distill", _distill(variant, start, teacher, answers), own, (*taught, start))
        models[named("distilled" if variant == "student" else variant, number)] = stage
    return listed, models


def _but_how(section: str) -> _Names:
    return tuple(f"-{section}.{key}" for key in HOW)


def _correct(run: _Run, recipe: Recipe, out: Path) -> Mapping[str, Any]:
    from halve.stages import correct

    return correct.run(recipe, teacher=run.teacher, cache=run.cache, out=out, progress=run.progress)


def _score(cut: str | None) -> _Act:
    def act(run: _Run, recipe: Recipe, out: Path) -> Mapping[str, Any]:
        from halve.stages import score

        return score.run(recipe, teacher=run.model(cut), cache=run.cache, out=out, progress=run.progress)

    return act


def _prune(cut: str | None, scored: str | None, like: str | None = None) -> _Act:
    """Cut by the scores of a stage; None cuts at random, to the sizes of the cut `like`."""

    def act(run: _Run, recipe: Recipe, out: Path) -> Mapping[str, Any]:
        from halve.stages import prune

        return prune.run(
            recipe,
            teacher=run.model(cut),
            scores=None if scored is None else run.scores(scored),
            cache=run.cache,
            out=out,
            like=None if like is None else run.folder.stage(like) / "plan.json",
            progress=run.progress,
        )

    return act


def _cached_by(training: Distill) -> _Names:
    """What a cache depends on: which samples are drawn, and what is kept of them; nothing of the student."""
    keys = ["tokens", "batch", "phases", "eval_samples", "precision", "cache"]
    if training.cache == "logits":
        keys += ["cache_samples", "temperature"]
    return ("data.documents", *(f"distill.{key}" for key in keys))


def _cache(teacher: str | None) -> _Act:
    def act(run: _Run, recipe: Recipe, out: Path) -> Mapping[str, Any]:
        from halve.stages import cache

        return cache.run(recipe, teacher=run.model(teacher), cache=run.cache, out=out, progress=run.progress)

    return act


def _distill(variant: str, start: str, teacher: str | None, answers: str | None) -> _Act:
    def act(run: _Run, recipe: Recipe, out: Path) -> Mapping[str, Any]:
        from halve.stages import distill

        return distill.run(
            recipe,
            teacher=run.model(teacher),
            student=run.model(start),
            variant=variant,
            cache=run.cache,
            out=out,
            answers_in=None if answers is None else run.folder.stage(answers),
            progress=run.progress,
        )

    return act


def _evaluate(models: Mapping[str, str], beside: Mapping[str, str], *, subject: str | None) -> _Act:
    """Of the stages that made them: models, and teachers that were corrected beside, by their names."""

    def act(run: _Run, recipe: Recipe, out: Path) -> Mapping[str, Any]:
        from halve.model.checkpoint import Checkpoint
        from halve.stages import evaluate

        taught = {name: Checkpoint.open(run.folder.stage(stage) / "teacher") for name, stage in beside.items()}
        made = {name: run.model(stage) for name, stage in models.items()}
        return evaluate.run(
            recipe,
            models={"teacher": run.teacher, **taught, **made},
            reference="corrected" if recipe.corrects_before else "teacher",
            subject=subject,
            cache=run.cache,
            out=out,
            progress=run.progress,
        )

    return act


def _report(run: _Run, recipe: Recipe, out: Path) -> Mapping[str, Any]:
    from halve.report import page as report

    report.write(run.folder.path, out)
    return {}


# ---- carrying them out ---------------------------------------------------------------------------------------


def check(
    recipe: Recipe, out: Path | None = None, *, teacher: Checkpoint | None = None, ranks: int | None = None
) -> tuple[HalveError, ...]:
    """What `preflight.check` finds; if nothing, what has changed of the stages that a run in `out` would go on from."""
    from halve.model.checkpoint import Checkpoint

    found = preflight.check(recipe, out, teacher=teacher, ranks=ranks)
    if not found and out is not None:
        try:
            teacher = teacher or Checkpoint.open(recipe.model)
            reused.check(recipe, teacher, out, stages(recipe), cache=out / "data")
        except HalveError as error:
            return (error,)
    return found


def run(
    recipe: Recipe,
    out: str | Path,
    *,
    only: str | None = None,
    cache: Path | None = None,
    console: Console | None = None,
) -> Path:
    """Carry out a recipe in the folder `out`, whatever is done of it already, and return the folder.

    Processes that torchrun or the like has started carry it out together, in one folder that all see (`train.ranks`).

    `only` names one of `SECTIONS` and carries out its stages alone, those of later rounds as far as their inputs are
    there. `cache` holds token files and hashes of inputs, by default `out/data`; runs may share one. Without a
    `console` nothing is said. A killed run goes on where it was; a finished run changes nothing.

    Raises `RunError` for a folder that is not this recipe's run and for a section whose inputs are not
    there, and every error of `check` before the first stage.
    """
    out = Path(out)
    cache = out / "data" if cache is None else cache
    listed = stages(recipe)
    if only is not None and not any(stage.section == only for stage in listed):
        asked = "distill.cache" if only == "cache" else f"section {only}"
        if only == "correct" and recipe.corrects_beside:
            asked = "correct.when: before"  # the distillation does it
        raise RunError(
            f"there is nothing to {only}",
            why=f"recipe {recipe.name} has no {asked}",
            fix=f"add {asked.removeprefix('section ')} to the recipe, or run one of {', '.join(SECTIONS)}",
        )
    from halve.model.checkpoint import Checkpoint, resolve_device
    from halve.text.boundary import bounded, settled
    from halve.text.opened import require_embedded
    from halve.train.ranks import group as ranks

    with ranks.joined(resolve_device(recipe.device)) as here, ExitStack() as stack:
        if not here.leads:
            console = None
        progress = SILENT if console is None else RichProgress(console)
        stack.enter_context(heard(progress.say))
        opened: list[RunDir] = []
        here.lead(lambda: opened.append(stack.enter_context(RunDir.open(out, recipe))))
        folder = opened[0] if opened else stack.enter_context(RunDir.follow(out))
        teacher = Checkpoint.open(recipe.model)
        ask = partial(_what_to_do, recipe, teacher, folder, listed, only, cache, ranks=here.size)
        wanted, done, keys = here.lead(ask)
        this = _Run(folder, cache, progress, teacher)
        if len(done) < len(wanted):
            boundary = here.lead(partial(settled, recipe, teacher, cache=cache, progress=this.progress))
            recipe = bounded(recipe, boundary)
            listed = tuple(replace(stage, recipe=bounded(stage.recipe, boundary)) for stage in listed)
        if any("valid" in stage.outside for stage in listed if stage.name in {*wanted} - {*done}):
            # its faults are told before any work
            here.lead(partial(require_embedded, recipe, teacher, "valid", cache=cache, progress=this.progress))
        for stage in (stage for stage in listed if stage.name in wanted):
            if stage.name in done:
                this.progress.say(f"{stage.name}: done before")
                continue
            began = time.monotonic()
            _carry_out(stage, this, keys, here)
            this.progress.say(f"{stage.name}: done in {time.monotonic() - began:.1f} s")
    return out


def _what_to_do(
    recipe: Recipe,
    teacher: Checkpoint,
    folder: RunDir,
    listed: Sequence[Stage],
    only: str | None,
    cache: Path,
    *,
    ranks: int,
) -> tuple[list[str], list[str], dict[str, str]]:
    """The names of the stages that are asked for, of those of them that are done, and the keys of all."""
    keys = keys_of(recipe, teacher, listed, memo=cache / HASHES)
    wanted = [stage for stage in listed if only in (None, stage.section)]
    if only is not None:
        wanted = _possible(folder, wanted, keys)
    done = [stage.name for stage in wanted if folder.is_done(stage.name, keys[stage.name])]
    if len(done) < len(wanted):
        for error in preflight.check(recipe, folder.path, teacher=teacher, ranks=ranks):
            raise error
    reused.require_sound(folder, wanted, done)
    return [stage.name for stage in wanted], done, keys


def _carry_out(stage: Stage, run: _Run, keys: Mapping[str, str], here: Ranks) -> None:
    """One stage: where ranks train together all of them act, elsewhere the first alone; it begins and commits."""
    folder, key = run.folder, keys[stage.name]
    if stage.section != "report":  # which reads little, and looks at that itself
        here.lead(lambda: folder.verify(*stage.after))
    work = Path(here.lead(lambda: str(folder.work(stage.name, key))))
    if stage.section in _TOGETHER:
        metrics = stage.act(run, stage.recipe, work)
    else:
        metrics = here.lead(lambda: stage.act(run, stage.recipe, work))
    inputs = {name: keys[name] for name in stage.after}
    here.lead(lambda: str(folder.commit(stage.name, key, metrics, seed=stage.recipe.seed, inputs=inputs)))


def _possible(folder: RunDir, wanted: Sequence[Stage], keys: Mapping[str, str]) -> list[Stage]:
    """The stages whose inputs are there or are made on the way; those of later rounds wait for them."""
    possible: list[Stage] = []
    for stage in wanted:
        own = {one.name for one in possible}
        missing = [name for name in stage.after if name not in own and not folder.is_done(name, keys[name])]
        if not missing:
            possible.append(stage)
        elif stage.number == 1:
            raise RunError(
                f"{stage.name} needs the artifact of {missing[0]}",
                why=f"{missing[0]} has not finished with this recipe in {folder.path}",
                fix=f"halve {missing[0].partition('-')[0]} with the same recipe and --out first, or halve run",
            )
    return possible
