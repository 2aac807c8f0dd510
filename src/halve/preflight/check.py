"""Every error that can be known before any weight is loaded."""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halve.disk.rundir import check_folder
from halve.errors import DiskError, HalveError, RecipeError
from halve.preflight import bounds as preflight_bounds
from halve.preflight import samples as preflight_text
from halve.preflight.alignment import of_the_alignment
from halve.preflight.chat import check_conversations
from halve.preflight.tasks import check_gates, of_the_tasks
from halve.process.waits import bytes_in_words
from halve.recipe.rounds import cuts_original, learns_from_previous, rounds, trainings
from halve.recipe.schema import Distill, Phase, Recipe, Training
from halve.text import sources
from halve.text.rows import Wanted

if TYPE_CHECKING:
    from halve.model.checkpoint import Checkpoint
    from halve.preflight.sizes import PlannedRound


def check(
    recipe: Recipe, out: Path | None = None, *, teacher: Checkpoint | None = None, ranks: int | None = None
) -> tuple[HalveError, ...]:
    """The errors of a recipe that names, headers, sizes and first lines can show. Empty if there are none.

    Checks the teacher's config, file headers and tokenizer, the beginning of every text file, the number of samples of
    short text, the sizes of the plan, the multiple-choice files and the device. With `out`, it also checks the run
    folder and the free disk space.

    `teacher` is the recipe's model, if the caller has opened it. `ranks` is how many processes will train together.
    None means that this is not known yet, as on a machine that submits jobs to a cluster. Memory for a step is then not
    checked.
    """
    errors: list[HalveError] = []

    def tell(probes: Iterator[Callable[[], Any]]) -> None:
        for probe in probes:
            try:
                probe()
            except HalveError as error:
                if str(error) not in map(str, errors):
                    errors.append(error)

    tell(_of_the_place(recipe, out))
    try:
        teacher = teacher or _opened(recipe)
    except HalveError as error:
        errors.append(error)
    else:
        tell(_of_the_teacher(recipe, teacher, ranks))
    tell(_of_the_text(recipe))
    if out is not None and teacher is not None:
        tell(iter([partial(_check_room, recipe, teacher, out)]))
    if not errors:
        tell(iter([partial(sources.require_distinct, recipe.data.valid, "data.valid")]))
    if not errors and teacher is not None:  # the errors so far would be reported again
        tell(iter([partial(preflight_text.check_samples, recipe, teacher, out and out / "data")]))
    return tuple(errors)


def _opened(recipe: Recipe) -> Checkpoint:
    from halve.model.checkpoint import Checkpoint

    return Checkpoint.open(recipe.model)


def _of_the_place(recipe: Recipe, out: Path | None) -> Iterator[Callable[[], Any]]:
    from halve.model.checkpoint import resolve_device

    if out is not None:
        yield partial(check_folder, out, recipe)
        yield partial(preflight_bounds.check_place, out)
    yield partial(resolve_device, recipe.device)
    yield partial(preflight_bounds.check_workers, recipe)


def _of_the_teacher(recipe: Recipe, teacher: Checkpoint, ranks: int | None) -> Iterator[Callable[[], Any]]:
    yield partial(_check_search, recipe, teacher)  # what the config shows comes before the files of a big model
    yield partial(_check_plan, recipe, teacher)
    yield teacher.require_weights
    yield partial(_check_tokenizer, recipe, teacher)
    yield partial(check_conversations, recipe, teacher)
    yield partial(_check_nest, recipe, teacher)
    yield partial(_check_causal, teacher)
    yield partial(_check_proof, recipe, teacher)
    yield partial(_check_rotation, recipe, teacher)
    yield partial(_check_correction, recipe, teacher)
    for name, training in trainings(recipe).items():
        if ranks is not None:
            yield partial(_check_shares, training, ranks)
            yield partial(check_gates, training, ranks)
        yield partial(_check_place, training)
        yield partial(_check_packages, training)
        for phase in training.phases:
            yield partial(_check_phase, recipe, teacher, name, phase)
    if recipe.data.documents == "apart":
        yield partial(_check_apart, recipe, teacher)
    yield from preflight_bounds.of_the_teacher(recipe, teacher, ranks)
    yield from of_the_alignment(recipe, teacher)


def _of_the_text(recipe: Recipe) -> Iterator[Callable[[], Any]]:
    from halve.model.choices import load_items

    for source, wanted in preflight_text.read_as(recipe):
        yield partial(_check_corpus, source, wanted)
    searched = None if recipe.search is None else recipe.search.tournament.choices
    for path in filter(None, (*recipe.evaluate.choices, recipe.score.depth_task, searched)):
        yield partial(load_items, path)
    yield from of_the_tasks(recipe)


def _check_tokenizer(recipe: Recipe, teacher: Checkpoint) -> None:
    from halve.model import measure
    from halve.text import tokenize
    from halve.text.rendering import template_of

    measure.require_context(teacher.config, recipe.data.context, "a sample")
    teacher.require_tokenizer()
    if recipe.evaluate.asks_tasks and recipe.evaluate.chat_template:
        template_of(teacher.tokenizer, "evaluate.chat_template")
    if recipe.data.reads_text:
        marks = tokenize.marks(teacher.tokenizer, recipe.data.boundary)
        teacher.require_embedded(max(marks.between, default=0), f"with data.boundary {recipe.data.boundary} the text")


def _check_search(recipe: Recipe, teacher: Checkpoint) -> None:
    """Check that there are candidates, that the tournament has tokens for its rungs, and that adapters can be added."""
    if recipe.search is None:
        return
    from halve.preflight.searches import ShapesTried
    from halve.preflight.sizes import planned_rounds, require_met
    from halve.search.searched import planned_rungs
    from halve.train.loop import adapters

    require_met(recipe, teacher)
    asked = recipe.search.tournament
    keys = {"key": "search.tournament.train", "rank_key": "search.tournament.lora_rank", "instead": "train: full"}
    for part, shape in zip(rounds(recipe), planned_rounds(recipe, teacher), strict=True):
        if part.search is None or part.search.method != "tournament":
            continue
        tries = ShapesTried.of(part, shape)
        planned_rungs(part, min(part.search.candidates, tries.count))
        for arch in tries.shapes if tries.known and asked.train == "lora" else ():
            narrow = replace(teacher.anatomy, sizes=arch)
            adapters.require_lora(narrow, asked.lora_rank, **keys)


def _check_plan(recipe: Recipe, teacher: Checkpoint) -> None:
    from halve.preflight.outcomes import SMALLEST_ALONG, require_every_outcome

    # without later rounds, only numbers of layers can be too small
    axes = SMALLEST_ALONG if recipe.then else ("layers",)
    require_every_outcome(recipe, teacher, partial(_check_states, recipe), axes=axes)
    for number in range(2, 2 + len(recipe.then)):
        if learns_from_previous(recipe, number) and cuts_original(recipe, number):
            raise RecipeError(
                f"round {number} learns from the last student and cuts the run's teacher",
                why="a student with cut: original stands beside the last one, which may be smaller",
                fix=f"teacher: original or cut: previous in round {number}",
            )
        if learns_from_previous(recipe, number) and rounds(recipe)[number - 2].distill is None:
            raise RecipeError(
                f"round {number} learns from the last student, which is not trained",
                why=f"round {number - 1} has no section distill, so its student stays as it was cut",
                fix=f"add distill: to round {number - 1}, or teacher: original to round {number}",
            )


def _check_nest(recipe: Recipe, teacher: Checkpoint) -> None:
    from halve.preflight.nests import check_nest

    check_nest(recipe, teacher)


def _check_correction(recipe: Recipe, teacher: Checkpoint) -> None:
    """Check that the model has what the correction trains, and that the packages for it are installed."""
    if recipe.correct is not None:
        from halve.train.loop import adapters, optimizers

        adapters.require_trainable(teacher.anatomy, recipe.correct)
        optimizers.require(recipe.correct)  # its own, also beside a distillation


def _check_states(recipe: Recipe, found: Sequence[PlannedRound]) -> None:
    """Check that teacher and student have the layers whose states are compared."""
    from halve.train.objectives.intermediate import layer_pairs

    for number, (part, shape) in enumerate(zip(rounds(recipe), found, strict=True), 1):
        states = None if part.distill is None else part.distill.intermediate
        if states is not None:
            teacher = shape if learns_from_previous(recipe, number) else found[0]
            layer_pairs(states.layers, teacher=teacher.before.sizes.layers, student=shape.after.layers)


def _check_shares(training: Training, ranks: int) -> None:
    """Check that there are enough ranks for the replicas, and that samples can be split equally over the ranks."""
    from halve.train.ranks.group import require_shares

    require_shares(training, ranks)


def _check_packages(training: Training) -> None:
    """Check that the packages of the optimizer and the loggers are installed."""
    from halve.train.loop import journal, optimizers

    optimizers.require(training)
    journal.require_loggers(training.loggers)


def _check_place(training: Training) -> None:
    from halve.train.teachers.live import require_place

    if isinstance(training, Distill):
        require_place(training)


def _check_phase(recipe: Recipe, teacher: Checkpoint, section: str, phase: Phase) -> None:
    from halve.anatomy.configs import context_length

    known = list(recipe.data.train) if isinstance(recipe.data.train, dict) else []
    unknown = [name for name in phase.mixture or {} if name not in known]
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        raise RecipeError(
            f"a phase of {section} mixes {unknown[0]}, which data.train does not have",
            why=f"its parts are {', '.join(known)}" if known else "data.train is a list of sources without parts",
            fix=f"did you mean {near[0]}?"
            if near
            else f"add a part {unknown[0]} with sources and weight to data.train",
        )
    limit = context_length(teacher.config)
    if limit is not None and phase.context is not None and phase.context > limit:
        raise RecipeError(
            f"a phase of {section} has context {phase.context}, the model's has {limit}",
            why="positions past the model's context were never trained",
            fix=f"set that phase's context to {limit} or less",
        )


def _check_causal(teacher: Checkpoint) -> None:
    from halve.cut.proof.causal import check_causal

    check_causal(teacher.anatomy)


def _check_proof(recipe: Recipe, teacher: Checkpoint) -> None:
    from halve.preflight.sizes import planned_rounds, require_proved

    require_proved(planned_rounds(recipe, teacher))


def _check_rotation(recipe: Recipe, teacher: Checkpoint) -> None:
    """Check that the models of all rounds allow the rotation that is asked for."""
    from halve.cut.repair.rotate import rotates
    from halve.preflight.sizes import planned_rounds

    for part, shape in zip(rounds(recipe), planned_rounds(recipe, teacher), strict=True):
        if part.prune.rotation == "pca":  # the default keeps the basis where it has to
            rotates(shape.before, part.prune)


def _check_apart(recipe: Recipe, teacher: Checkpoint) -> None:
    """Check that the tokenizer separates documents, and that a tiny twin of the model keeps them apart.

    If no twin runs, the stages check the model itself.
    """
    from halve.cut.proof.twins import running_twin
    from halve.text import documents, tokenize

    if recipe.data.reads_text:
        documents.require_separator(tokenize.separator(teacher.tokenizer, recipe.data.boundary))
    if (twin := running_twin(teacher.anatomy, seed=0)) is not None:
        documents.require_apart(twin)


def _check_corpus(source: str, wanted: Wanted) -> None:
    if not source.startswith(sources.HUB):
        sources.probe(source, wanted)


def _check_room(recipe: Recipe, teacher: Checkpoint, out: Path) -> None:
    """Check that the disk has room for the plan, without what an earlier start of the run has already written."""
    from halve.model.checkpoint import resolve_device
    from halve.preflight.sizes import planned_rounds
    from halve.preflight.space import planned_disk

    cuda = resolve_device(recipe.device) == "cuda"
    needed = planned_disk(recipe, planned_rounds(recipe, teacher), cuda=cuda).total_bytes
    left = needed - _written(out)
    free = shutil.disk_usage(next(folder for folder in (out, *out.absolute().parents) if folder.exists())).free
    if free < left:
        written = f" {bytes_in_words(needed - left)} of {bytes_in_words(needed)} are written." if left < needed else ""
        raise DiskError(
            f"{out} needs about {bytes_in_words(left)}{' more' if written else ''}",
            why=f"{bytes_in_words(free)} are free there.{written}"
            if written
            else f"{bytes_in_words(free)} are free there",
            fix="free some space, choose another folder with --out, or drop some of distill.baselines",
        )


def _written(out: Path) -> int:
    """Bytes of the files in a run folder."""
    return sum(path.lstat().st_size for path in out.rglob("*") if path.is_file() and not path.is_symlink())
