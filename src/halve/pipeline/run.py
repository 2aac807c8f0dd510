"""Run a recipe in a run folder: every stage once, in order, resumable.

A stage's key is a hash of its name, the recipe fields it reads, the keys of the stages before it and the content of
its outside inputs. A stage that has finished with the same key is not run again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from halve.disk.rundir import HASHES, RunDir, has_begun
from halve.errors import HalveError, RunError
from halve.pipeline import reused
from halve.pipeline.keys import keys_of
from halve.pipeline.order import SECTIONS, Stage, StageContext, stages
from halve.preflight import check as preflight
from halve.process import fresh
from halve.process.waits import heard
from halve.progress import SILENT, RichProgress
from halve.recipe.rounds import TOGETHER
from halve.recipe.schema import Recipe

if TYPE_CHECKING:
    from rich.console import Console

    from halve.model.checkpoint import Checkpoint
    from halve.train.ranks.group import Ranks

__all__ = ["SECTIONS", "Stage", "check", "run", "stages"]


def check(
    recipe: Recipe, out: Path | None = None, *, teacher: Checkpoint | None = None, ranks: int | None = None
) -> tuple[HalveError, ...]:
    """The errors of `preflight.check`. If there are none, changed files that a run in `out` would reuse."""
    from halve.model.checkpoint import Checkpoint

    errors = preflight.check(recipe, out, teacher=teacher, ranks=ranks)
    if not errors and out is not None:
        try:
            teacher = teacher or Checkpoint.open(recipe.model)
            reused.require_unchanged(recipe, teacher, out, stages(recipe), cache=out / "data")
        except HalveError as error:
            return (error,)
    return errors


def run(
    recipe: Recipe,
    out: str | Path,
    *,
    only: str | None = None,
    needed: bool = False,
    cache: Path | None = None,
    console: Console | None = None,
) -> Path:
    """Run a recipe in the folder `out`, or resume it, and return the folder.

    Processes that were started by torchrun run it together, in one folder that all of them can read (see
    `train.ranks.group`).

    `only` names one of `SECTIONS` and runs only its stages; in later rounds, only those whose inputs exist. `needed`
    adds the stages that these need. `cache` holds token files and hashes of inputs, by default in `out/data`. Several
    runs may share it. Without a `console` there are no messages. A killed run resumes where it stopped. A finished run
    changes nothing.

    Raises `RunError` for a folder that is not this recipe's run and for a section whose inputs are missing, every error
    of `check`, and `PlanError` for times that no shape of a search meets, all before the first stage. What `check`
    finds makes no folder, and a folder in which no stage has begun may become another recipe's.
    """
    fresh.require_guard()
    out = Path(out)
    cache = out / "data" if cache is None else cache
    listed = stages(recipe)
    if only is not None and not any(stage.section == only for stage in listed):
        raise _nothing_to_do(recipe, only)
    from halve.model.checkpoint import Checkpoint, resolve_device
    from halve.train.ranks import group as ranks

    with ranks.joined(resolve_device(recipe.device)) as here, ExitStack() as stack:
        if not here.leads:
            console = None
        progress = SILENT if console is None else RichProgress(console)
        stack.enter_context(heard(progress.say))
        teacher = Checkpoint.open(recipe.model, home=cache)
        begin = partial(_checked_as_new, recipe, teacher, out, listed, only, needed=needed, ranks=here.size)
        checked = here.lead(begin)
        opened: list[RunDir] = []
        here.lead(lambda: opened.append(stack.enter_context(RunDir.open(out, recipe))))
        folder = opened[0] if opened else stack.enter_context(RunDir.follow(out))
        ask = partial(_what_to_do, recipe, teacher, folder, listed, only, cache, needed=needed)
        wanted, done, keys = here.lead(partial(ask, ranks=None if checked else here.size))
        this = StageContext(folder, cache, progress, teacher)
        here.lead(partial(_require_times, [stage for stage in listed if stage.name in {*wanted} - {*done}], this, keys))
        if len(done) < len(wanted):
            recipe, listed = _settled(recipe, listed, this, here)
        coming = [stage for stage in listed if stage.name in {*wanted} - {*done}]
        _read_inputs(recipe, coming, this, here)
        for stage in (stage for stage in listed if stage.name in wanted):
            if stage.name in done:
                this.progress.say(f"{stage.name}: done before")
                continue
            began = time.monotonic()
            _carry_out(stage, this, keys, here)
            this.progress.say(f"{stage.name}: done in {time.monotonic() - began:.1f} s")
    return out


def _nothing_to_do(recipe: Recipe, only: str) -> RunError:
    asked = "distill.cache" if only == "cache" else f"section {only}"
    if only == "correct" and recipe.corrects_beside:
        asked = "correct.when: before"  # the distillation does it
    return RunError(
        f"there is nothing to {only}",
        why=f"recipe {recipe.name} has no {asked}",
        fix=f"add {asked.removeprefix('section ')} to the recipe, or run one of {', '.join(SECTIONS)}",
    )


def _checked_as_new(
    recipe: Recipe,
    teacher: Checkpoint,
    out: Path,
    listed: Sequence[Stage],
    only: str | None,
    *,
    needed: bool,
    ranks: int,
) -> bool:
    """Raise what a run that has not begun would raise before its first stage. Nothing is written.

    Returns whether it was checked. A GGUF file is not: the check may need the model folder that is made of it, and this
    is kept in the run.
    """
    if has_begun(out) or teacher.gguf is not None:
        return False
    _require_plan(recipe, teacher, out, _wanted(out, listed, only, lambda name: False, needed=needed), ranks)
    return True


def _what_to_do(
    recipe: Recipe,
    teacher: Checkpoint,
    folder: RunDir,
    listed: Sequence[Stage],
    only: str | None,
    cache: Path,
    *,
    needed: bool,
    ranks: int | None,
) -> tuple[list[str], list[str], dict[str, str]]:
    """The names of the requested stages, of those that are done, and the keys of all stages.

    `ranks` is the number of processes, or None if the recipe has been checked for them.
    """
    keys = keys_of(recipe, teacher, listed, memo=cache / HASHES)

    def is_done(name: str) -> bool:
        return folder.is_done(name, keys[name])

    wanted = _wanted(folder.path, listed, only, is_done, needed=needed)
    done = [stage.name for stage in wanted if is_done(stage.name)]
    if len(done) < len(wanted) and ranks is not None:
        _require_plan(recipe, teacher, folder.path, [stage for stage in wanted if stage.name not in done], ranks)
    reused.require_sound(folder, wanted, done)
    return [stage.name for stage in wanted], done, keys


def _require_plan(recipe: Recipe, teacher: Checkpoint, out: Path, coming: Sequence[Stage], ranks: int) -> None:
    """Raise the first error of the recipe, or that of ranks in stages that they do not share."""
    for error in preflight.check(recipe, out, teacher=teacher, ranks=ranks):
        raise error
    if ranks > 1 and any(stage.section == "align" for stage in coming):
        raise RunError(
            f"{ranks} ranks cannot align",
            why="a step of align trains in one process, and the others would wait for it for hours",
            fix="torchrun ... halve distill with this recipe, and then halve run in one process",
        )


def _require_times(coming: Sequence[Stage], this: StageContext, keys: Mapping[str, str]) -> None:
    """Measure the times that bound coming searches, where these find them. Raises `PlanError` if no shape meets them.

    Times are of random weights, so the config is enough, and every search cuts the recipe's model or its correction:
    a further round (`then`) has none. A search that has settled its candidates needs no times any more.
    """
    from halve.preflight.sizes import require_times_met
    from halve.search.searched import TIMES
    from halve.search.settled import Candidates

    for stage in (stage for stage in coming if stage.section == "search"):
        left = this.folder.left(stage.name, keys[stage.name])
        if left is None or Candidates.settled(left) is None:
            require_times_met(stage.recipe, this.teacher, times=this.cache / TIMES)


def _wanted(
    out: Path, listed: Sequence[Stage], only: str | None, is_done: Callable[[str], bool], *, needed: bool
) -> list[Stage]:
    """The requested stages. Raises `RunError` if one of the first round lacks an input."""
    wanted = [stage for stage in listed if only in (None, stage.section)]
    if needed:
        return _with_needed(listed, wanted)
    return wanted if only is None else _possible(out, wanted, is_done)


def _settled(
    recipe: Recipe, listed: Sequence[Stage], this: StageContext, here: Ranks
) -> tuple[Recipe, tuple[Stage, ...]]:
    """The recipe and the stages with `data.boundary` decided for this teacher."""
    from halve.text.boundary import bounded, settled

    boundary = here.lead(partial(settled, recipe, this.teacher, cache=this.cache, progress=this.progress))
    listed = tuple(replace(stage, recipe=bounded(stage.recipe, boundary)) for stage in listed)
    return bounded(recipe, boundary), listed


def _read_inputs(recipe: Recipe, coming: Sequence[Stage], this: StageContext, here: Ranks) -> None:
    """Prepare what the coming stages share: the teacher's files and the text. Raises `CorpusError` if that is unfit."""
    from halve.text.opened import require_embedded

    if any("teacher" in stage.outside for stage in coming):  # made of a GGUF file before it is looked for
        here.lead(lambda: str(this.teacher.files))
    read = partial(require_embedded, recipe, this.teacher, cache=this.cache, progress=this.progress)
    if any("valid" in stage.outside for stage in coming):  # its errors are reported before any work
        here.lead(partial(read, "valid"))
    if any(stage.section in TOGETHER for stage in coming):  # else every rank would tokenize it, or query the hub
        here.lead(partial(read, "train"))


def _carry_out(stage: Stage, run: StageContext, keys: Mapping[str, str], here: Ranks) -> None:
    """Run one stage: on all ranks if it trains, otherwise on the first, which also opens and commits it."""
    folder, key = run.folder, keys[stage.name]
    if stage.section != "report":  # the report reads few files and checks them itself
        here.lead(lambda: folder.verify(*stage.after))
    work = Path(here.lead(lambda: str(folder.work(stage.name, key))))
    if stage.section in TOGETHER:
        metrics = stage.act(run, stage.recipe, work)
    else:
        metrics = here.lead(lambda: stage.act(run, stage.recipe, work))
    inputs = {name: keys[name] for name in stage.after}
    here.lead(lambda: str(folder.commit(stage.name, key, metrics, seed=stage.recipe.seed, inputs=inputs)))


def _with_needed(listed: Sequence[Stage], wanted: Sequence[Stage]) -> list[Stage]:
    """These stages and all that they need, in order."""
    names = {stage.name for stage in wanted}
    for stage in reversed(listed):  # each comes after those that it needs
        if stage.name in names:
            names |= set(stage.after)
    return [stage for stage in listed if stage.name in names]


def _possible(out: Path, wanted: Sequence[Stage], is_done: Callable[[str], bool]) -> list[Stage]:
    """The stages whose inputs exist or will be made. Stages of later rounds without inputs are left out."""
    possible: list[Stage] = []
    for stage in wanted:
        names = {earlier.name for earlier in possible}
        missing = [name for name in stage.after if name not in names and not is_done(name)]
        if not missing:
            possible.append(stage)
        elif stage.number == 1:
            raise RunError(
                f"{stage.name} needs the artifact of {missing[0]}",
                why=f"{missing[0]} has not finished with this recipe in {out}",
                fix=f"halve {missing[0].partition('-')[0]} with the same recipe and --out first, or halve run",
            )
    return possible
