"""Read this first: the stages of a run, in order, and what each depends on.

    teacher + corpus -> correct -> score -> search -> prune -> nest -> cache -> distill, baselines -> align -> evaluate
        -> report

With a section `search`, cache-search and search choose the size that prune then cuts to. Otherwise they are left out.
If a recipe has further rounds (`then`), score-2, prune-2 and distill-2 follow for the last student, and so on. A round
that cuts the teacher again uses the scores of the first. Every step of `align` is a stage: align-sft, align-2-rpo.

`stages` lists the stages of a recipe. Every stage is a function from artifacts to one artifact. Only this file knows
the order. `halve.pipeline.run` runs the stages and skips those that are done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halve.disk.rundir import RunDir
from halve.pipeline.keys import Keyed
from halve.progress import Progress
from halve.recipe.alignments import HOW_ALIGNED
from halve.recipe.evaluations import OF_TASKS
from halve.recipe.rounds import cuts_original, learns_from_previous, named, nested_students, rounds, scored_in
from halve.recipe.schema import CHAT_PROMPTS, HOW, Distill, Recipe
from halve.recipe.tournaments import tournament_training

if TYPE_CHECKING:
    from halve.model.checkpoint import Checkpoint

SECTIONS = ("correct", "score", "search", "prune", "nest", "cache", "distill", "align", "evaluate", "report")
_EVERYWHERE = ("seed", "device", "dtype", "data.text_field", "data.context", "data.boundary")
_OF_CONVERSATIONS = ("data.messages_field", "data.count")
_INPUTS = ("teacher", "train", "valid")


@dataclass(frozen=True)
class Stage(Keyed):
    """One step of a run: its folder, its inputs, and its function."""

    act: _Act


_Names = tuple[str, ...]


@dataclass(frozen=True)
class StageContext:
    """What a stage may use."""

    folder: RunDir
    cache: Path
    progress: Progress
    teacher: Checkpoint
    """The model that the recipe names."""
    students: dict[str, Checkpoint] = field(default_factory=dict)
    """Models of earlier stages that have been opened."""

    def scores(self, stage: str) -> Path:
        return self.folder.stage(stage) / "scores.safetensors"

    def model(self, stage: str | None) -> Checkpoint:
        """The model that a stage made. None means the model that the recipe names."""
        from halve.model.checkpoint import Checkpoint

        if stage is None:
            return self.teacher
        if stage not in self.students:
            self.students[stage] = Checkpoint.open(self.folder.stage(stage) / "model")
        return self.students[stage]


_Act = Callable[[StageContext, Recipe, Path], Mapping[str, Any]]


def stages(recipe: Recipe) -> tuple[Stage, ...]:
    """The stages of a recipe. Each comes after those it needs."""
    listed: list[Stage] = []
    models: dict[str, str] = {}
    original = None  # the stage that makes the teacher, if it is corrected
    if recipe.corrects_before:
        models["corrected"] = original = "correct"
        reads: _Names = (*_everywhere(recipe), "data.documents", "correct", *_but_how("correct"))
        listed.append(Stage("correct", "correct", recipe, reads, (), _INPUTS, 1, _correct))
    last = original
    for number, part in enumerate(rounds(recipe), 1):
        teacher = last if learns_from_previous(recipe, number) else original
        cut = original if cuts_original(recipe, number) else last
        made, students = _round(part, number, scored_in(recipe, number), cut=cut, teacher=teacher)
        listed += made
        models |= students
        last = models.get(named("distilled", number), named("prune", number))
    student = next(name for name, stage in models.items() if stage == last)
    last = _align(recipe, listed, models, last)
    chain = (student, *(named("aligned", number, step.kind) for number, step in enumerate(recipe.align, 1)))
    results = ("distilled", "aligned")
    subject = next((name for name, stage in models.items() if stage == last and name.startswith(results)), None)
    beside = {
        named("corrected", number): models[named("distilled", number)]
        for number, part in enumerate(rounds(recipe), 1)
        if part.corrects_beside
    }
    usual = ("-evaluate.chat_prompts",) if recipe.evaluate.chat_prompts == CHAT_PROMPTS else ()
    # without tasks, a key does not depend on how they would be asked; with tasks, on the content of their data
    tasks = ("-evaluate.data",) if recipe.evaluate.asks_tasks else tuple(f"-evaluate.{key}" for key in OF_TASKS)
    reads = (*_everywhere(recipe), "evaluate", "-evaluate.choices", *usual, *tasks)
    of_tools = ("imported",) if recipe.evaluate.imported else ()
    reads = (*reads, *(() if of_tools else ("-evaluate.imported",)))
    measured = ("teacher", "valid", "choices", *(("task_data",) if recipe.evaluate.asks_tasks else ()), *of_tools)
    act = _evaluate(models, beside, _inside(recipe, models), subject=subject, chain=chain)
    listed.append(Stage("evaluate", "evaluate", recipe, reads, tuple(models.values()), measured, 1, act))
    everything = tuple(stage.name for stage in listed)
    listed.append(Stage("report", "report", recipe, (*_everywhere(recipe), "name"), everything, (), 1, _report))
    return tuple(listed)


def _inside(recipe: Recipe, models: Mapping[str, str]) -> dict[str, str]:
    """The students inside the student, by name and folder."""
    trained = models.get("distilled")
    return {} if trained is None else {name: f"{trained}/{name}" for name in nested_students(recipe)}


def _everywhere(recipe: Recipe) -> _Names:
    """The fields that every stage depends on; a recipe without conversations does not name theirs."""
    return _EVERYWHERE if recipe.data.messages_field is None else (*_EVERYWHERE, *_OF_CONVERSATIONS)


def _round(
    recipe: Recipe, number: int, scored: int, *, cut: str | None, teacher: str | None
) -> tuple[list[Stage], dict[str, str]]:
    """The stages of one round, and their models by the names of the evaluation.

    `scored` is the round whose scores it uses. `cut` and `teacher` are the stages of the model to cut and of the
    teacher. None means the recipe's model.
    """
    listed: list[Stage] = []
    score, prune, at_random = named("score", scored), named("prune", number), named("prune", number, "random")
    whole: _Names = () if cut is None else (cut,)
    taught: _Names = () if teacher is None else (teacher,)

    def add(name: str, section: str, act: _Act, reads: _Names, after: _Names, outside: _Names = _INPUTS) -> None:
        after = tuple(dict.fromkeys(after))
        listed.append(Stage(name, section, recipe, (*_everywhere(recipe), *reads), after, outside, number, act))

    # aggregators are applied when scores are used: the file holds raw statistics for all of them
    reads: _Names = ("score", "-score.batch_agg", "-score.seq_agg", "-score.depth_task")
    if scored == number:
        add(score, "score", _score(cut), reads, whole, ("teacher", "train", "depth_task"))
    searched: _Names = ()
    if recipe.search is not None:
        searching = _search(recipe, number, score, cut=cut, teacher=teacher)
        listed += searching
        searched = (searching[-1].name,)
    reads = ("prune", "score", "-score.depth_task")
    add(prune, "prune", _prune(cut, score, searched=searched), reads, (*whole, score, *searched))
    models = {named("pruned", number): prune}
    begun = prune  # what the student is before its training
    if recipe.nest is not None:
        begun = "nest"
        reads = ("nest", "-nest.draws", "prune.gain", "score", "-score.depth_task")
        add(begun, "nest", _nest(prune), reads, (prune,), ("train",))
    if recipe.distill is None:
        return listed, models

    answers = None
    if recipe.distill.cache != "none":
        answers = named("cache", number)
        add(answers, "cache", _cache(teacher), _cached_by(recipe.distill), taught)
        taught = (*taught, answers)
    for variant in ("student", *recipe.distill.baselines):
        distill_reads: _Names = ("data.documents", "distill", "-distill.baselines", *_but_how("distill"))
        start = begun
        if recipe.nest is not None:
            distill_reads = (*distill_reads, "nest")
        if variant == "ce":  # it has its own objective
            distill_reads = (*distill_reads, "-distill.objective", "-distill.temperature")
        elif recipe.corrects_beside:  # the teacher is trained as well
            distill_reads = (*distill_reads, "correct", *_but_how("correct"))
        if variant == "random_prune":
            start = at_random
            add(start, "prune", _prune(cut, None, like=prune), ("prune", "score", "-score.depth_task"), (*whole, prune))
        stage = named("distill", number, "" if variant == "student" else variant)
        add(stage, "distill", _distill(variant, start, teacher, answers), distill_reads, (*taught, start))
        models[named("distilled" if variant == "student" else variant, number)] = stage
    return listed, models


def _search(recipe: Recipe, number: int, score: str, *, cut: str | None, teacher: str | None) -> list[Stage]:
    """The stages that find the size of a round's student: for a tournament, first the teacher's answers.

    The answers serve every round, because all searches of a recipe train alike.
    """
    assert recipe.search is not None
    listed: list[Stage] = []
    whole = tuple(stage for stage in (cut, teacher) if stage is not None)
    found_by = ("search", "-search.tournament.on_spike", "prune", "score", "-score.depth_task")
    reads: _Names = (*_everywhere(recipe), *found_by, "evaluate.samples")
    answers = None
    if recipe.search.method == "tournament":
        training = tournament_training(recipe)
        trained = recipe.model_copy(update={"distill": training})
        answers = named("cache", 1, "search")
        cached = (*_everywhere(recipe), *_cached_by(training))
        taught = () if teacher is None else (teacher,)
        if number == 1:
            listed.append(Stage(answers, "cache", trained, cached, taught, _INPUTS, number, _cache(teacher)))
        if recipe.distill is not None:
            reads = (*reads, "data.documents", "distill", "-distill.baselines", *_but_how("distill"))
    after = tuple(dict.fromkeys((*whole, score, *(() if answers is None else (answers,)))))
    outside = (*_INPUTS, "depth_task", "tournament_choices")
    act = _searching(cut, score, answers)
    return [*listed, Stage(named("search", number), "search", recipe, reads, after, outside, number, act)]


def _align(recipe: Recipe, listed: list[Stage], models: dict[str, str], last: str | None) -> str | None:
    """Add the steps of alignment and their models. Returns the stage of the last model."""
    for number, step in enumerate(recipe.align, 1):
        name = named("align", number, step.kind)
        beside = (*HOW_ALIGNED, "data", "reward_model")  # what these hold is hashed
        reads = (*_everywhere(recipe), "align", *(f"-align.{key}" for key in beside))
        only = recipe.model_copy(update={"align": (step,)})
        assert last is not None  # every recipe prunes
        act = _aligned(number, name, last)
        listed.append(Stage(name, "align", only, reads, (last,), (f"align.{number}",), 1, act))
        models[named("aligned", number, step.kind)] = last = name
    return last


def _but_how(section: str) -> _Names:
    return tuple(f"-{section}.{key}" for key in HOW)


def _correct(run: StageContext, recipe: Recipe, out: Path) -> Mapping[str, Any]:
    from halve.stages import correct

    return correct.run(recipe, teacher=run.teacher, cache=run.cache, out=out, progress=run.progress)


def _score(cut: str | None) -> _Act:
    def act(run: StageContext, recipe: Recipe, out: Path) -> Mapping[str, Any]:
        from halve.stages import score

        return score.run(recipe, teacher=run.model(cut), cache=run.cache, out=out, progress=run.progress)

    return act


def _searching(cut: str | None, scored: str, answers: str | None) -> _Act:
    def act(run: StageContext, recipe: Recipe, out: Path) -> Mapping[str, Any]:
        from halve.stages import search

        return search.run(
            recipe,
            teacher=run.model(cut),
            scores=run.scores(scored),
            answers_in=None if answers is None else run.folder.stage(answers),
            cache=run.cache,
            out=out,
            progress=run.progress,
        )

    return act


def _prune(cut: str | None, scored: str | None, like: str | None = None, searched: _Names = ()) -> _Act:
    """Cut by the scores of a stage, to the size that a search found, if there is one.

    Without scores it is a random cut, to the sizes of the cut `like`.
    """

    def act(run: StageContext, recipe: Recipe, out: Path) -> Mapping[str, Any]:
        from halve.stages import prune

        return prune.run(
            recipe,
            teacher=run.model(cut),
            scores=None if scored is None else run.scores(scored),
            cache=run.cache,
            out=out,
            like=None if like is None else run.folder.stage(like) / "plan.json",
            searched=run.folder.stage(searched[0]) if searched else None,
            progress=run.progress,
        )

    return act


def _nest(cut: str) -> _Act:
    def act(run: StageContext, recipe: Recipe, out: Path) -> Mapping[str, Any]:
        from halve.stages import nest

        return nest.run(recipe, student=run.model(cut), cache=run.cache, out=out, progress=run.progress)

    return act


def _cached_by(training: Distill) -> _Names:
    """The fields on which a cache depends: the drawn samples and what is stored for them. Nothing of the student."""
    keys = ["tokens", "batch", "phases", "eval_samples", "precision", "cache"]
    if training.cache == "logits":
        keys += ["cache_samples", "temperature"]
    return ("data.documents", *(f"distill.{key}" for key in keys))


def _cache(teacher: str | None) -> _Act:
    def act(run: StageContext, recipe: Recipe, out: Path) -> Mapping[str, Any]:
        from halve.stages import cache

        return cache.run(recipe, teacher=run.model(teacher), cache=run.cache, out=out, progress=run.progress)

    return act


def _distill(variant: str, start: str, teacher: str | None, answers: str | None) -> _Act:
    def act(run: StageContext, recipe: Recipe, out: Path) -> Mapping[str, Any]:
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


def _aligned(number: int, name: str, start: str) -> _Act:
    def act(run: StageContext, recipe: Recipe, out: Path) -> Mapping[str, Any]:
        from halve.stages import align

        (step,) = recipe.align
        return align.run(
            recipe, step, name=name, number=number, student=run.model(start), out=out, progress=run.progress
        )

    return act


def _evaluate(
    models: Mapping[str, str],
    beside: Mapping[str, str],
    inside: Mapping[str, str],
    *,
    subject: str | None,
    chain: Sequence[str],
) -> _Act:
    """Evaluate models, and teachers that were corrected beside, given by name and stage.

    `inside` are students inside the student, by name and folder. `chain` are the student and the models of its
    alignment.
    """

    def act(run: StageContext, recipe: Recipe, out: Path) -> Mapping[str, Any]:
        from halve.model.checkpoint import Checkpoint
        from halve.stages import evaluate

        taught = {name: Checkpoint.open(run.folder.stage(stage) / "teacher") for name, stage in beside.items()}
        made = {name: run.model(stage) for name, stage in {**models, **inside}.items()}
        return evaluate.run(
            recipe,
            models={"teacher": run.teacher, **taught, **made},
            reference="corrected" if recipe.corrects_before else "teacher",
            subject=subject,
            chain=chain,
            cache=run.cache,
            out=out,
            progress=run.progress,
        )

    return act


def _report(run: StageContext, recipe: Recipe, out: Path) -> Mapping[str, Any]:
    from halve.report import page as report

    report.write_report(run.folder.path, out)
    return {}
