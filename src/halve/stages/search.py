"""The search stage: of all shapes within a budget, the one that is best after a short distillation.

    trial.jsonl      every candidate, cut and refit on few samples
    rungs.jsonl      the tournament of the best of them (`search.tournament`)
    results.json     what was found, for the report (`search.outcome`)
    choice.json      the sizes and the layers that the prune stage then cuts

What the search has settled on the way, such as its finalists, is in files of `search.settled`, for a resume.

With `method: trial` there are no rungs: the candidate that is best in the trial is chosen, as by `prune.shape: trial`.
With `method: additive` nothing is tried: the integer program chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from halve.anatomy import Arch
from halve.anatomy.configs import context_length
from halve.cut.plan.sizes import Candidate
from halve.cut.repair.rotate import student_anatomy
from halve.cut.trial import Tried, Tries, best, outcome_of_trial
from halve.disk.files import write_json
from halve.disk.soundness import CONFIG
from halve.model.card import name_of
from halve.model.checkpoint import Checkpoint, resolve_device
from halve.model.choices import answer_encoded, encode, load_items
from halve.model.precision import stored_dtype
from halve.progress import SILENT, Progress
from halve.recipe.schema import Recipe
from halve.recipe.tournaments import tournament_training
from halve.search.blocks import additive_choice
from halve.search.budgets import budget_in_words
from halve.search.candidates import Found, within_budget
from halve.search.choice import ChosenShape
from halve.search.counted import flops_by_part
from halve.search.finalists import choose_finalists
from halve.search.halving import Ladder
from halve.search.outcome import outcome, untrained
from halve.search.searched import TIMES, planned_rungs, proved_shapes, searched_anatomy
from halve.search.settled import Candidates, is_cut, save_finalists, settled_finalists
from halve.search.tournament import FINALISTS, LowRank, Played, School, play
from halve.search.workshop import Workshop
from halve.text.opened import open_text
from halve.train.loop import adapters
from halve.train.ranks import shards
from halve.train.ranks.group import here
from halve.train.teachers import answers


def run(
    recipe: Recipe,
    *,
    teacher: Checkpoint,
    scores: Path,
    answers_in: Path | None,
    cache: Path,
    out: Path,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Write `out/choice.json` and `out/results.json`. Returns the choice and its figures.

    `teacher` is cut, and its answers are learned from. `scores` is the score stage's file, `answers_in` the cache of
    the tournament's training, and `cache` the run's folder of token files. A killed search resumes from what it left
    in `out`. Raises `PlanError` if no shape meets the budget, `AnatomyError` for an axis whose proof fails, and what
    cutting and training raise.
    """
    assert recipe.search is not None
    ranks = here()
    open_shop = partial(_opened, recipe, teacher, scores, cache, progress)
    looked = partial(proved_shapes, recipe, teacher.anatomy, times=cache / TIMES)
    if recipe.search.method != "tournament":
        ranks.lead(partial(_without_training, recipe, teacher, looked, open_shop, out, progress))
        return ranks.lead(partial(_figures, out))
    prepare = partial(_prepared, recipe, teacher, looked, open_shop, out, progress)
    finalists = [Tried.from_json(tried) for tried in ranks.lead(prepare)]
    assert answers_in is not None
    training = tournament_training(recipe)
    text = open_text(recipe, training, teacher, cache=cache, progress=progress)
    digest = ranks.lead(lambda: teacher.fingerprint)
    store = answers.open_store(answers_in, recipe, training, teacher=digest, text=text)
    asked = recipe.search.tournament
    adapter = LowRank(asked.lora_rank, asked.lora_alpha) if asked.train == "lora" else None
    plan = planned_rungs(recipe, len(finalists))
    school = School(recipe, training, text, store, resolve_device(recipe.device), ranks, adapter)
    models = [Checkpoint.open(_place(out, i) / "model") for i in range(len(finalists))]
    played = play(models, plan, school, out=out, graduate=_graduate(models, school, out), progress=progress)
    ranks.lead(partial(_concluded, recipe, teacher, finalists, plan, played, out, progress))
    return ranks.lead(partial(_figures, out))


def _figures(out: Path) -> dict[str, Any]:
    """The choice's figures. Rank 0 reads them for all: once it goes on, it moves the folder."""
    return dict(ChosenShape.load(out).metrics)


def _opened(
    recipe: Recipe, teacher: Checkpoint, scores: Path, cache: Path, progress: Progress, archs: Sequence[Arch]
) -> Workshop:
    """What these shapes are cut from."""
    return Workshop.open(recipe, teacher, scores=scores, archs=archs, cache=cache, progress=progress)


_Look = Callable[[], tuple[Found, tuple[Candidate, ...]]]
_OpenShop = Callable[[Sequence[Arch]], Workshop]


def _tried(look: _Look, open_shop: _OpenShop, out: Path) -> tuple[Workshop, Candidates, tuple[Tried, ...]]:
    """What candidates are cut from, the candidates, and the trial of those that meet the budget with their layers."""
    settled = Candidates.settled(out)
    if settled is None:
        seen, candidates = look()
        shop = open_shop([candidate.arch for candidate in candidates])
        settled = _settled(shop, seen, candidates)
        settled.save(out)
    else:
        shop = open_shop(settled.archs)
    return shop, settled, shop.tried(settled.tried, settled.kept_layers, path=out / "trial.jsonl")


def _settled(shop: Workshop, seen: Found, candidates: Sequence[Candidate]) -> Candidates:
    """The candidates, the layers that they keep, and which of them meet the budget with these."""
    archs = tuple(candidate.arch for candidate in candidates)
    kept = shop.layers({arch.layers for arch in archs})
    tried = tuple(candidate.arch for candidate in within_budget(seen, candidates, kept))
    if len(tried) < len(archs):
        shop.calibration.progress.say(
            f"{len(archs) - len(tried)} of {len(archs)} candidates are left out: with the layers that they"
            f" keep they do not have {budget_in_words(seen.ranges)}"
        )
    return Candidates(archs, tried, kept)


def _without_training(
    recipe: Recipe, teacher: Checkpoint, look: _Look, open_shop: _OpenShop, out: Path, progress: Progress
) -> None:
    """The choice by a trial or by the integer program."""
    assert recipe.search is not None
    tried: tuple[Tried, ...] = ()
    if recipe.search.method == "additive":
        seen, candidates = look()
        num_candidates = len(candidates)
        shop = open_shop([candidate.arch for candidate in candidates])
        chosen = additive_choice(shop.calibration, shop.scores, candidates, seen)
        progress.say(f"chosen by added-up values: {chosen.arch}, harm {chosen.kl:.4g}")
    else:
        _, settled, tried = _tried(look, open_shop, out)
        num_candidates = len(settled.archs)
        chosen = best(tried)
        progress.say(f"tried {len(tried)} shapes; chosen: {outcome_of_trial(tried)}")
    ledger = searched_anatomy(recipe, teacher.anatomy).ledger
    counts = ledger.count(chosen.arch, kept_layers=chosen.kept_layers)
    counted = {"params": counts.params, "non_embedding": counts.non_embedding}
    metrics = {"method": recipe.search.method, "candidates": num_candidates, "sizes": chosen.arch.sizes, **counted}
    results = untrained(
        recipe.search.method,
        tried,
        chosen,
        lambda shape: ledger.count(shape.arch, kept_layers=shape.kept_layers),
        candidates=num_candidates,
    )
    write_json(out / "results.json", results)
    ChosenShape(chosen.arch, chosen.kept_layers, metrics).save(out)


def _prepared(
    recipe: Recipe, teacher: Checkpoint, look: _Look, open_shop: _OpenShop, out: Path, progress: Progress
) -> list[dict[str, Any]]:
    """Try the candidates and cut the finalists. What an earlier start has done is not done again.

    The teacher is loaded only if something is left to cut.
    """
    assert recipe.search is not None
    shop, finalists = None, settled_finalists(out)
    if finalists is None:
        shop, _, tried = _tried(look, open_shop, out)
        finalists = choose_finalists(tried, recipe.search.candidates)
        save_finalists(finalists, out)
    folders = [_place(out, i) / "model" for i in range(len(finalists))]
    missing = [i for i, finalist in enumerate(finalists) if not is_cut(finalist, folders[i])]
    if missing and shop is None:
        shop = open_shop([finalist.arch for finalist in finalists])
    record = {"stage": "search", "base_model": name_of(recipe.model), "teacher": teacher.fingerprint}
    with progress.task("cut finalists", len(finalists), done=len(finalists) - len(missing)) as task:
        for i in missing:
            assert shop is not None
            shop.cut(finalists[i], folders[i], extra_from=teacher.files, record=record)
            task.advance(1)
    return [finalist.to_json() for finalist in finalists]


def _place(out: Path, finalist: int) -> Path:
    return out / FINALISTS / str(finalist)


def _graduate(models: list[Checkpoint], school: School, out: Path) -> Callable[[int, PreTrainedModel], None] | None:
    """Save finalists at their rungs, each over its earlier state, if they will answer questions.

    Those that leave the tournament answer as they then were. The weights are not used otherwise.
    """
    assert school.recipe.search is not None
    if school.recipe.search.tournament.choices is None:
        return None

    def save(finalist: int, model: PreTrainedModel) -> None:
        start, folder = models[finalist], _place(out, finalist) / "trained"
        adapters.merge(model)
        dtype = stored_dtype(school.recipe.dtype, start.config)
        shards.save(model, folder, dtype=dtype, extra_from=start.files, record=None, ranks=school.ranks)

    return save


def _answered(recipe: Recipe, played: Played, out: Path) -> tuple[str, Mapping[int, Tensor]] | None:
    """Which items of the multiple-choice file each finalist answers correctly, as it was at its last rung."""
    assert recipe.search is not None
    if recipe.search.tournament.choices is None:
        return None
    path, device = Path(recipe.search.tournament.choices), resolve_device(recipe.device)
    right: dict[int, Tensor] = {}
    for finalist in sorted({showing.finalist for showing in played.showings}):
        folder = _place(out, finalist) / "trained"
        if not (folder / CONFIG).is_file():  # of a search that an earlier version began, which kept the last ones alone
            continue
        checkpoint = Checkpoint.open(folder)
        items = encode(checkpoint.tokenizer, load_items(path), max_tokens=context_length(checkpoint.config))
        right[finalist] = answer_encoded(checkpoint.load_to_run(dtype=recipe.dtype, device=device), items).right
    return path.name.split(".")[0], right


def _concluded(
    recipe: Recipe,
    teacher: Checkpoint,
    finalists: list[Tried],
    plan: Ladder,
    played: Played,
    out: Path,
    progress: Progress,
) -> None:
    """Write what was found."""
    ledger = student_anatomy(teacher.anatomy, recipe.prune).ledger
    pairs = [
        (Candidate(shape.arch, ledger.count(shape.arch, kept_layers=shape.kept_layers)), shape) for shape in finalists
    ]
    trial, answered = _of_the_trial(finalists, out), _answered(recipe, played, out)
    end = None if recipe.distill is None else recipe.distill.tokens
    results = outcome(pairs, plan, played, trial=trial, answered=answered, seed=recipe.seed, end=end)
    settled = Candidates.settled(out)
    assert settled is not None
    tokens = [finalist["curve"][-1]["tokens"] for finalist in results["finalists"]]
    flops = flops_by_part(recipe, teacher, settled, finalists, tokens, chosen=results["chosen"])
    write_json(out / "results.json", {"method": "tournament", **results, "flops": flops})
    chosen = finalists[results["chosen"]]
    keys = ("chosen", "overtakes", "second", "straight", "trial", "agreement", "rises", "choices", "tokens")
    metrics = {"method": "tournament", "sizes": chosen.arch.sizes, **{key: results[key] for key in keys}}
    ChosenShape(chosen.arch, chosen.kept_layers, metrics).save(out)
    progress.say(f"chosen of {len(finalists)} finalists: {chosen.arch}")


def _of_the_trial(finalists: list[Tried], out: Path) -> int | None:
    """The finalist that the trial would have chosen. None if it would have chosen another shape."""
    settled, found = Candidates.settled(out), Tries(out / "trial.jsonl").found
    assert settled is not None
    chosen = best([found[arch] for arch in settled.tried])
    return next((i for i, finalist in enumerate(finalists) if finalist.arch == chosen.arch), None)
