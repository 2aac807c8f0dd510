"""Run a study: every arm and seed is a run of the pipeline, and their results are collected.

    OUT/runs/seed-0-4f1c...     one run, named by a hash of its recipe; equal arms share it
    OUT/data                    the token files of all runs
    OUT/NAME/results.json       the results and verdicts of a study (see `collect`), with table.md and plot.svg

A study that is started again resumes where it stopped. A finished study changes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halve.disk.files import atomic_file, read_object, write_json
from halve.disk.rundir import MANIFEST, read_manifest, sound
from halve.pipeline import run as pipeline
from halve.recipe.rounds import named
from halve.recipe.schema import Recipe
from halve.studies import page
from halve.studies.arms import Setting, cell, correction_recipe
from halve.studies.declare import Arm, Claim, Metric, Study
from halve.studies.statistics import differences, mean, standard_error, verdict

if TYPE_CHECKING:
    from halve.anatomy import Arch

STUDY_FORMAT = 1
HIGHER_IS_BETTER = ("accuracy_before", "accuracy_after")
_TEACHER = "teacher"

Say = Callable[[str], None]
Values = dict[str, list[float | None]]


def run(study: Study, setting: Setting, *, seeds: Sequence[int], out: Path, command: str, say: Say) -> dict[str, Any]:
    """Run a study in `out` and return its results, which are also written to `out/NAME`.

    `command` is what a reader types to repeat it. `say` gets a line for every run. Raises what the pipeline raises.
    """
    sizes = _sizes(setting)
    arms_to_run = {name: arm for name, arm in study.arms.items() if arm.of is None}
    done: dict[str, list[dict[str, Any]]] = {name: [] for name in arms_to_run}
    count = 0
    for seed in seeds:
        for name, arm in arms_to_run.items():
            began, count = time.monotonic(), count + 1
            teacher = _teacher(setting, seed=seed, out=out, say=say) if arm.teacher == "corrected" else setting.model
            recipe = cell(study, arm, setting, seed=seed, sizes=sizes, teacher=teacher)
            folder = pipeline.run(recipe, _folder(out, recipe), cache=out / "data")
            finished_run = {"folder": folder, "recipe": recipe, "results": _results(folder / "evaluate")}
            done[name].append(finished_run)
            which = f"{study.name} {count}/{len(arms_to_run) * len(seeds)}: {name}, seed {seed}"
            say(f"{which}: {_figures(arm, finished_run)}, {time.monotonic() - began:.0f} s")
    results = collect(study, done, setting, seeds=seeds, command=command)
    place = out / study.name
    write_json(place / "results.json", results)
    for name, text in (("table.md", page.markdown(results, plot="plot.svg")), ("plot.svg", page.plot(results))):
        with atomic_file(place / name) as draft:
            draft.write_text(text, encoding="utf-8")
    return results


def _results(evaluated: Path) -> dict[str, Any]:
    return read_object(sound(evaluated, read_manifest(evaluated), "results.json"))


def collect(
    study: Study,
    done: Mapping[str, Sequence[Mapping[str, Any]]],
    setting: Setting,
    *,
    seeds: Sequence[int],
    command: str,
) -> dict[str, Any]:
    """Results by arm and verdicts by claim, as plain data.

        arms    [{name, label, kept (of the non-embedding parameters), paper, metrics {metric: estimate or null}}]
        claims  [{text, better, worse, metric, paper, tie, effect (an estimate), verdict}]

    An estimate is {mean, stderr, values}, with the values in the order of `seeds`. The effect of a claim is positive if
    the claim holds. Its standard error is that of the paired differences.
    """
    runs = {name: done[arm.of or name] for name, arm in study.arms.items()}
    values: dict[str, Values] = {
        name: {metric: [_value(metric, arm, finished_run) for finished_run in runs[name]] for metric in study.metrics}
        for name, arm in study.arms.items()
    }
    manifests = [finished_run["folder"] / "evaluate" / MANIFEST for each in done.values() for finished_run in each]
    return {
        "format": STUDY_FORMAT,
        **{key: getattr(study, key) for key in ("name", "title", "source", "question", "note")},
        "date": datetime.fromtimestamp(max(path.stat().st_mtime for path in manifests), UTC).date().isoformat(),
        "command": command,
        "seeds": list(seeds),
        **_circumstances(setting, next(iter(done.values()))),
        "metrics": list(study.metrics),
        "plot": list(study.plot),
        "arms": [
            {
                "name": name,
                "label": arm.label,
                "kept": _kept(arm, runs[name][0]),
                "paper": arm.paper,
                "metrics": {metric: _estimate(by_seed) for metric, by_seed in values[name].items()},
            }
            for name, arm in study.arms.items()
        ],
        "claims": [_judged(claim, values) for claim in study.claims],
    }


def _circumstances(setting: Setting, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The teacher, the setting and the machine, by the runs of one arm (one run per seed)."""
    first = runs[0]
    recipe: Recipe = first["recipe"]
    assert recipe.distill is not None
    teacher = first["results"]["models"][_TEACHER]
    return {
        "teacher": {
            "name": setting.name,
            "params": teacher["params"],
            "non_embedding_params": teacher["non_embedding_params"],
            "perplexity": _estimate(
                [finished_run["results"]["models"][_TEACHER]["perplexity"]["value"] for finished_run in runs]
            ),
        },
        "setting": {
            "calibration_samples": recipe.score.samples,
            "context": recipe.data.context,
            "tokens": recipe.distill.tokens,
            "batch": recipe.distill.batch,
            "lr": recipe.distill.lr,
            "heldout_tokens": first["results"]["samples"]["tokens"],
        },
        "machine": first["results"]["machine"],
        "versions": read_manifest(first["folder"] / "evaluate")["versions"],
    }


def _judged(claim: Claim, values: Mapping[str, Values]) -> dict[str, Any]:
    better, worse = (values[name][claim.metric] for name in (claim.better, claim.worse))
    if claim.metric in HIGHER_IS_BETTER:
        better, worse = worse, better
    pairs = [(a, b) for a, b in zip(worse, better, strict=True) if a is not None and b is not None]
    effects = differences([a for a, _ in pairs], [b for _, b in pairs])
    said = verdict(effects) if effects else "inconclusive"
    return {**claim.model_dump(), "effect": _estimate([*effects]), "verdict": said}


def _estimate(values: Sequence[float | None]) -> dict[str, Any] | None:
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return {"mean": mean(known), "stderr": standard_error(known), "values": known}


def _value(metric: Metric, arm: Arm, one: Mapping[str, Any]) -> float | None:
    """A metric of the arm's model before or after retraining, in the last round."""
    what, _, when = metric.partition("_")
    base = arm.before if when == "before" else arm.after
    if base is None:
        return None
    model = one["results"]["models"][_last(base, one)]
    if what == "accuracy":
        (estimate,) = model["choices"].values()
    else:
        estimate = model[what]
    value: float | None = estimate["value"]
    return value


def _last(base: str, one: Mapping[str, Any]) -> str:
    return named(base, 1 + len(one["recipe"].then))


def _kept(arm: Arm, one: Mapping[str, Any]) -> float:
    models = one["results"]["models"]
    kept: float = models[_last(arm.after, one)]["non_embedding_params"] / models[_TEACHER]["non_embedding_params"]
    return kept


def _figures(arm: Arm, one: Mapping[str, Any]) -> str:
    figures = {metric: _value(metric, arm, one) for metric in ("kl_before", "kl_after")}
    return ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in figures.items() if value is not None)


def _teacher(setting: Setting, *, seed: int, out: Path, say: Say) -> str:
    """The folder of the teacher that was corrected with this seed."""
    recipe = correction_recipe(setting, seed=seed)
    folder = _folder(out, recipe)
    model = folder / "correct" / "model"
    if not model.exists():
        say(f"correct the teacher, seed {seed}")
    pipeline.run(recipe, folder, only="correct", cache=out / "data")
    return str(model.resolve())


def _folder(out: Path, recipe: Recipe) -> Path:
    return out / "runs" / recipe.name


def _sizes(setting: Setting) -> Arch:
    from halve.model.checkpoint import Checkpoint

    return Checkpoint.open(setting.model).anatomy.sizes
