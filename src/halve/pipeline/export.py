"""Write the last student of a run, or any of its checkpoints, as an ordinary model folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from pydantic import ValidationError
from torch.distributed.checkpoint.api import CheckpointException

from halve.disk.files import CHANGED, read_object, read_sealed
from halve.disk.folders import atomic_folder, finish_folder, is_free
from halve.disk.rundir import MARKER, RECIPE, RunDir
from halve.disk.soundness import CONFIG
from halve.errors import RunError
from halve.model import saving
from halve.model.card import name_of
from halve.model.checkpoint import Checkpoint
from halve.pipeline.run import Stage, stages
from halve.recipe.rounds import named, nested_students
from halve.recipe.schema import Recipe
from halve.train.loop import checkpoints

_SCRATCH = ".checkpoints"
_TRIES = 5


def export(source: str | Path, out: str | Path, *, student: str | None = None) -> Path:
    """Write the model of a run folder or of a checkpoint to the folder `out`, as safetensors, and return it.

    For a run this is its last aligned or distilled student, or the newest checkpoint of a distillation that is under
    way. A checkpoint is in the folder of an unfinished stage, such as `run/.distill.work/.checkpoints/step-00000200`.
    It holds float32 masters; the exported model has the precision of the model from which the training started. The
    run may continue meanwhile. `student` names another student of a run as the report does, such as distilled-2 or
    aligned-sft.

    Raises `RunError` if there is nothing to export, for an unknown student, or if `out` is not empty, and `DiskError`
    if the disk is full. Then nothing is left behind.
    """
    source, out = Path(source).absolute(), Path(out)
    place = out.resolve()
    finish_folder(place, last=CONFIG)
    if not is_free(place):
        raise RunError(f"{out} is in the way", why="it is not an empty folder", fix="choose a new folder with --out")
    if (source / checkpoints.FACTS).is_file():
        return _of_checkpoint(source, out)
    if not (source / MARKER).is_file():
        raise RunError(
            f"{source} is neither a run folder nor a checkpoint",
            why=f"it has no {MARKER} and no {checkpoints.FACTS}",
            fix="give the folder of a run, or one such as run/.distill.work/.checkpoints/step-00000200 in it",
        )
    recipe = _recipe(source)
    students = {_named(stage): stage for stage in stages(recipe) if _is_student(stage)}
    inside = nested_students(recipe)
    if student in inside:
        return _inside(source, student, out)
    if student is not None and student not in students:
        raise RunError(
            f"{source} has no student {student}",
            why=f"it trains {', '.join((*students, *inside)) or 'none'}",
            fix="give one of these with --student, or leave it out for the last one",
        )
    for name, stage in reversed(students.items()):
        if student not in (None, name):
            continue
        for _ in range(_TRIES):
            if not (kept := checkpoints.complete(source / f".{stage.name}.work" / _SCRATCH)):
                break
            try:
                return _of_checkpoint(kept[-1], out)
            except (OSError, CheckpointException):
                if kept[-1].exists():
                    raise
                # in the meantime the run has written the next checkpoint and removed this one
        if (source / stage.name / "model").is_dir():
            with RunDir.follow(source) as run:
                run.verify(stage.name)
            return _copied(source / stage.name / "model", out)
    raise RunError(
        f"{source} has no trained student{'' if student is None else f' {student}'}",
        why="no distillation of it has finished or left a checkpoint",
        fix="let halve run continue until the first checkpoint (distill.checkpoint_every)",
    )


def _is_student(stage: Stage) -> bool:
    if stage.section == "align":
        return True
    return stage.section == "distill" and (stage.name == stage.section or stage.name.rpartition("-")[2].isdigit())


def _named(stage: Stage) -> str:
    """The name of a stage's student on the page."""
    if stage.section == "align":
        return stage.name.replace(stage.section, "aligned", 1)
    return named("distilled", stage.number)


def _recipe(run: Path) -> Recipe:
    try:
        return Recipe.model_validate(read_object(run / RECIPE))
    except ValidationError as error:
        why = f"it is no recipe of this halve: {error.errors()[0]['msg']}"
        raise RunError(f"cannot read {run / RECIPE}", why=why, fix=CHANGED) from error


def _of_checkpoint(folder: Path, out: Path) -> Path:
    run, work = folder.parents[2], folder.parents[1].name
    name = work.removeprefix(".").removesuffix(".work")
    stage = next((s for s in stages(_recipe(run)) if s.name == name), None) if (run / RECIPE).is_file() else None
    if stage is None:
        raise RunError(
            f"{folder} does not lie in its run",
            why="the model's config and tokenizer are taken from the run that the checkpoint belongs to",
            fix="give its path inside the run: run/.distill.work/.checkpoints/...",
        )
    recipe = stage.recipe
    cut = [name for name in stage.after if name.partition("-")[0] in ("prune", "nest")]
    begun = Checkpoint.open(run / cut[-1] / "model" if cut else recipe.model, home=run / "data")
    model = begun.load(dtype=recipe.dtype)
    masters = checkpoints.parameters(folder, "student")
    parameters = dict(model.named_parameters())
    if masters.keys() != parameters.keys():
        raise RunError(
            f"{folder} does not hold a whole model",
            why="this training stores only what it trains, such as adapters",
            fix="let the stage finish: its model folder has them merged",
        )
    if any(masters[key].shape != parameter.shape for key, parameter in parameters.items()):
        raise RunError(
            f"{folder} is of a model with other sizes",
            why=f"{begun.source}, which its training started from, has changed since then",
            fix="let halve run continue: it starts this training again",
        )
    facts = read_sealed(folder / checkpoints.FACTS)
    if (why := checkpoints.damaged(folder, facts)) is not None:
        again = "let halve run continue: it takes the checkpoint before, or starts this training again"
        raise RunError(f"{folder} is damaged", why=why, fix=again)
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(masters[key])
    record = {
        "stage": stage.section,
        "base_model": name_of(recipe.model),
        "checkpoint": name,
        "step": facts["step"],
        "seed": recipe.seed,
        "training": facts["identity"]["training"],
    }
    saving.save_model(model, out, extra_from=begun.files, record=record)
    return out


def _inside(run: Path, student: str, out: Path) -> Path:
    """A student inside the student, which is a model of its own once the distillation has finished."""
    if not (run / "distill" / student / "model").is_dir():
        raise RunError(
            f"{run} has no trained student {student}",
            why="students inside the student are written when the distillation has finished",
            fix="let halve run continue; the largest can be exported from a checkpoint",
        )
    with RunDir.follow(run) as folder:
        folder.verify("distill")
    return _copied(run / "distill" / student / "model", out)


def _copied(model: Path, out: Path) -> Path:
    with atomic_folder(out, last=CONFIG) as draft:
        shutil.copytree(model, draft, dirs_exist_ok=True)
    return out
