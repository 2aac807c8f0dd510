"""Tables for people: what the command prints on stdout. With --json the same figures as plain data."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from halve.errors import HalveError
from halve.model.card import made_in_words
from halve.process.waits import bytes_in_words
from halve.report.times import at_most, duration, other_precision, time_of_a_run, times_on

if TYPE_CHECKING:
    from halve.anatomy import Anatomy, Arch
    from halve.cut.plan.sizes import Candidate
    from halve.cut.proof.prove import Proof
    from halve.preflight.forecast import Forecast
    from halve.preflight.memory import Memory
    from halve.recipe.schema import Recipe

_WORD = 8
"""A column of words is at least so wide, if it has them."""


def as_json(value: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(value, indent=2, default=str))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table; all columns but the first are numbers unless they hold words. Numbers are not broken over lines."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    numeric = [index > 0 and all(_numeric(row[index]) for row in rows) for index in range(len(columns))]
    cells = [[str(row[index]) for row in rows] for index in range(len(columns))]
    room = console.width - 3 * len(columns) - 1

    def fits(heads: Sequence[str]) -> bool:
        widths = [max(map(len, (*head.split("\n"), *column))) for head, column in zip(heads, cells, strict=True)]
        return sum(w if number else min(w, _WORD) for w, number in zip(widths, numeric, strict=True)) <= room

    heads = list(columns)
    if not fits(heads):
        heads = ["\n".join(head.split()) if number else head for head, number in zip(heads, numeric, strict=True)]
    whole = fits(heads)  # in a terminal that is too narrow, all digits are shown, on several lines
    drawn = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for head, number in zip(heads, numeric, strict=True):
        drawn.add_column(head, justify="right" if number else "left", overflow="fold", no_wrap=number and whole)
    for row in zip(*cells, strict=True):
        drawn.add_row(*row)
    console.print(drawn)


def _numeric(cell: object) -> bool:
    return isinstance(cell, int | float) or (isinstance(cell, str) and cell[:1].isdigit()) or cell == ""


def pruned(plan: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
    """Sizes, parameters and perplexity before and after a cut, on the same held-out text."""
    before, after = plan["before"], plan["after"]
    rows: list[tuple[object, ...]] = [(axis, f"{before[axis]:,}", f"{after[axis]:,}") for axis in after]
    rows.append(("parameters", f"{metrics['teacher_params']:,}", f"{metrics['params']:,}"))
    rows.append(("perplexity", _estimate(metrics["teacher_perplexity"]), _estimate(metrics["perplexity"])))
    table("cut", ("", "before", "after"), rows)
    if made := plan.get("made"):
        print(made_in_words(made))


def cache_(count: int | None) -> str:
    """The bytes of a key-value cache, if the family's code shows them."""
    return "unknown" if count is None else bytes_in_words(count)


def inspection(anatomy: Anatomy, proof: Proof | None) -> dict[str, Any]:
    """The output of `halve inspect` as plain data."""
    counts = anatomy.ledger.count(anatomy.sizes)
    refused = proof.refusals if proof is not None else anatomy.refusals
    return {
        "family": anatomy.family,
        "sizes": anatomy.sizes.sizes,
        "params": counts.params,
        "non_embedding": counts.non_embedding,
        "active_params": counts.active_params,
        "flops_per_token": counts.flops_per_token,
        "kv_cache_bytes_per_token": counts.kv_cache_bytes_per_token,
        "tied_embeddings": anatomy.tied,
        "coupled": anatomy.coupled,
        "weights": {name: [str(expr) for expr in shape] for name, shape in anatomy.params.items()},
        "can_be_cut": [a for a in ("layers", "hidden", "ffn", "heads", "kv_heads") if a not in refused],
        "refused": dict(refused),
        "proof": None
        if proof is None
        else [
            {"axis": c.axis, "check": c.name, "passed": c.passed, "measure": c.measure, "detail": c.detail}
            for c in proof.checks
        ],
    }


def inspection_tables(anatomy: Anatomy, proof: Proof | None) -> None:
    """The tables of `halve inspect`. Of layers that are alike, only the first is shown."""
    from halve.cut.plan.sizes import format_count

    facts = inspection(anatomy, proof)
    print(f"{anatomy.family}: {anatomy.sizes}")
    print(
        f"{format_count(facts['params'])} parameters, {format_count(facts['non_embedding'])} without embeddings"
        f"{', tied embeddings' if anatomy.tied else ''}; key-value cache"
        f" {cache_(facts['kv_cache_bytes_per_token'])} per token"
    )
    shown = [n for n in anatomy.params if anatomy.layer_of(n) in (None, *_first_of_kind(anatomy))]
    rows = [(name, ", ".join(f"({expr})" for expr in anatomy.params[name])) for name in shown]
    table("weights", ("weight", "made of"), rows)
    axes = []
    for axis in ("layers", "hidden", "ffn", "heads", "kv_heads", "head_dim", "vocab"):
        reason = facts["refused"].get(axis)
        verdict = "no" if reason else ("yes, proved" if proof is not None else "yes, if its proof passes")
        if not reason and anatomy.coupled and axis in ("hidden", "heads"):
            verdict += ", hidden and heads together (hidden = heads x head_dim in this family's code)"
        axes.append((axis, getattr(anatomy.sizes, axis), verdict, reason or ""))
    table("axes", ("axis", "size", "can be cut", "reason"), axes)
    if proof is not None:
        checks = [
            (c.axis, c.name, "passed" if c.passed else "FAILED", f"{c.measure:.1e}", c.detail) for c in proof.checks
        ]
        table("proof on a random twin", ("axis", "check", "result", "difference", ""), checks)


def _first_of_kind(anatomy: Anatomy) -> list[int]:
    """The first layer of each set of layers whose weights are made of the same axes."""
    seen: dict[object, int] = {}
    for layer, made_of in enumerate(anatomy.ledger.layers):
        seen.setdefault(made_of, layer)
    return list(seen.values())


def candidates_table(
    anatomy: Anatomy,
    found: Sequence[Candidate],
    verdicts: Sequence[Sequence[tuple[str, str, str]]],
    *,
    title: str,
    costs: Mapping[str, Sequence[str]],
) -> None:
    """The table of `halve plan`; `costs` are further columns."""
    from halve.cut.plan.sizes import format_count

    before = anatomy.ledger.count(anatomy.sizes)
    print(f"teacher: {anatomy.family}, {anatomy.sizes}: {format_count(before.params)} parameters")
    rows: list[tuple[object, ...]] = []
    for number, (candidate, verdict) in enumerate(zip(found, verdicts, strict=True)):
        a, c = candidate.arch, candidate.counts
        heads, cache = f"{a.heads}/{a.kv_heads}", cache_(c.kv_cache_bytes_per_token)
        counted = (f"{c.params:,}", f"{c.non_embedding:,}", cache, f"{c.flops_per_token / 1e9:.3g}")
        more = (column[number] for column in costs.values())
        rows.append((a.layers, a.hidden, a.ffn, heads, *counted, *more, _opened_by(verdict)))
    columns = ("layers", "hidden", "ffn", "heads/kv", "params", "non-embedding", "KV/token", "GFLOP/token")
    table(title, (*columns, *costs, "opens in"), rows)
    remedies = {(name, remedy) for verdict in verdicts for name, opens, remedy in verdict if opens != "yes" and remedy}
    for name, remedy in sorted(remedies)[:4]:
        print(f"{name} would open it with: {remedy}")


def _opened_by(verdict: Sequence[tuple[str, str, str]]) -> str:
    """The names of the runtimes, with the verdict where a runtime does not open the student or this is not known."""
    return ", ".join(name if opens == "yes" else f"{name}: {opens}" for name, opens, _ in verdict)


def forecast_tables(found: Forecast) -> None:
    """The tables of `halve run --dry-run`."""
    from halve.cut.plan.sizes import format_count

    archs = [found.teacher, *(planned.student for planned in (*found.rounds, *found.nested))]
    counts = [found.teacher_counts, *(planned.counts for planned in (*found.rounds, *found.nested))]
    names = ["student"] if len(found.rounds) == 1 else [f"round {i}" for i in range(1, 1 + len(found.rounds))]
    names += [f"nested {i}" for i in range(2, 2 + len(found.nested))]
    rows: list[Sequence[object]] = [
        (axis, *(getattr(arch, axis) for arch in archs)) for axis in ("layers", "hidden", "ffn", "heads", "kv_heads")
    ]
    rows += [
        ("parameters", *(f"{c.params:,} ({format_count(c.params)})" for c in counts)),
        ("non-embedding", *(f"{c.non_embedding:,}" for c in counts)),
        ("weights in 16 bits", *(bytes_in_words(c.weight_bytes) for c in counts)),
        ("KV cache per token", *(cache_(c.kv_cache_bytes_per_token) for c in counts)),
        ("GFLOP per token", *(f"{c.flops_per_token / 1e9:.3g}" for c in counts)),
    ]
    table(f"{found.name}: plan", ("", "teacher", *names), rows)
    if found.timed:
        print(
            "shapes that only times bound are known once these are measured in the search: until then the teacher"
            " stands for the student of this plan, and the rows of the search are upper bounds"
        )
    elif found.searched:
        print("the student of this plan is the search's first candidate; another may be chosen")
    elif any(found.trial):
        print("the student of this plan is cut in width alone; the trial may choose another shape within the budget")
    trial(found.trial)
    for name, opens, remedy in found.runtimes:
        print(f"opens in {name}: {opens}{'; with ' + remedy if remedy else ''}")
    columns, times = times_on(found.device, found.hours_by_stage, found.gpu_hours_by_stage)
    work = [(at_most(stage), f"{n:,}", f"{found.flops[stage]:.3g}", *times[stage]) for stage, n in found.tokens.items()]
    table("work", ("stage", "tokens", "FLOP", *columns), work)
    if found.searches:
        print(_search_in_a_line(found))
    for stage, why in found.unknown.items():
        print(f"the work of {stage} is not counted in full: {why}")
    if "boundary" in found.tokens:
        print("boundary: data.boundary: auto checks whether the teacher has learned the end-of-sequence token")
    _memory(found)
    _untrained(found)
    disk = found.disk
    parts = [
        f"models and training states {bytes_in_words(disk.model_bytes)}",
        f"text {bytes_in_words(disk.text_bytes)}",
    ]
    parts += [f"caches at most {bytes_in_words(disk.cache_bytes)}"] if disk.cache_bytes else []
    print(f"{time_of_a_run(found)}; disk {bytes_in_words(disk.total_bytes)}: {', '.join(parts)}")
    if line := other_precision(found):
        print(line)
    if found.schedule:
        print("schedule: " + ", ".join(f"{key} {value:g}" for key, value in found.schedule.items()))


def _search_in_a_line(found: Forecast) -> str:
    flops, hours = (sum(by[stage] or 0.0 for stage in found.searches) for by in (found.flops, found.hours_by_stage))
    took = f", about {duration(hours)}" if hours else ""
    return f"the search takes at most {flops / sum(found.flops.values()):.0%} of the FLOP{took}"


def trial(rounds: Sequence[Sequence[Arch]]) -> None:
    """The shapes from which the trial of each round chooses."""
    for number, shapes in enumerate(rounds, 1):
        if shapes:
            print(f"the trial{f' of round {number}' if len(rounds) > 1 else ''} chooses from {len(shapes)} shapes:")
        for shape in shapes:
            print(f"  {shape}")


def plan_in_a_line(found: Forecast) -> str:
    """The forecast in one line, as it is printed before a run."""
    most = max(found.memory.items(), key=lambda entry: entry[1].total_bytes, default=None)
    parts = [] if most is None else [f"{most[0]} takes {_held(most[1])} per rank"]
    parts += [f"{sum(found.flops.values()):.3g} FLOP, {time_of_a_run(found)}"]
    return f"plan: {'; '.join(parts)}; disk {bytes_in_words(found.disk.total_bytes)}"


def plan_before(recipe: Recipe, *, ranks: int) -> str:
    """This line for a recipe. Empty if the run itself will refuse the recipe. An error in it does not stop the run."""
    from halve.preflight.forecast import forecast

    try:
        return f"{plan_in_a_line(forecast(recipe, ranks=ranks))}; details with --dry-run"
    except HalveError:
        return ""
    except Exception as error:
        return f"no plan could be made: {' '.join(f'{type(error).__name__}: {error}'.split())[:200]}"


def _held(memory: Memory) -> str:
    return f"{'over ' if memory.unknown else ''}{bytes_in_words(memory.total_bytes)}"


def _memory(found: Forecast) -> None:
    """The memory that training takes, and the settings that would fit a card."""
    place, room = found.place, bytes_in_words(found.room_bytes)
    if not found.memory:
        return
    where = f"each of {place.ranks} ranks" if place.ranks > 1 else found.device.name
    precision = "bfloat16 products, float32 masters" if place.half else "float32"
    names = ("masters", "gradients", "moments", "teacher", "gathered", "activations and loss", "all")
    rows = []
    for stage, m in found.memory.items():
        held = (m.masters_bytes, m.gradient_bytes, m.moment_bytes, m.teacher_bytes, m.gathered_bytes, m.passing_bytes)
        verdict = "?" if m.unknown else "yes" if m.fits(found.room_bytes) else "no"
        cells = [*map(bytes_in_words, (*held, m.total_bytes))]
        if m.unknown:
            cells[-2:] = "?", _held(m)
        rows.append((stage, *cells, verdict))
    columns = ("stage", *names, f"fits {room}")
    table(f"memory on {where}, {precision}", columns, rows)
    for unknown in dict.fromkeys(filter(None, (m.unknown for m in found.memory.values()))):
        print(f"the memory of activations is not known: {unknown}")
    if any(m.unknown for m in found.memory.values()):
        return
    if not place.cuda or (found.fits and place.ranks > 1):
        return
    ways = dict.fromkeys((setting.recompute, setting.teacher) for setting in found.settings)
    by_optimizer: dict[str, list[str]] = {}
    for setting in found.settings:
        cell = bytes_in_words(setting.memory.total_bytes) + (" fits" if setting.memory.fits(found.room_bytes) else "")
        by_optimizer.setdefault(setting.optimizer, []).append(cell)
    table(
        f"distillation with other settings (a tenth of {room} is left free)",
        ("optimizer", *(f"teacher {teacher}, recompute {recompute}" for recompute, teacher in ways)),
        [(optimizer, *cells) for optimizer, cells in by_optimizer.items()],
    )


def _untrained(found: Forecast) -> None:
    """The memory of the stages that cut and measure."""
    room, rows = found.room_bytes, []
    for stage, held in found.held.items():
        parts = (held.models_bytes, held.sums_bytes, held.states_bytes, held.passing_bytes, held.total_bytes)
        verdict = "?" if held.unknown else "yes" if held.fits(room) else "no"
        rows.append((stage, *map(bytes_in_words, parts), verdict))
    columns = ("stage", "models", "Gram matrices", "states", "passes", "all", f"fits {bytes_in_words(room)}")
    table(f"memory of cutting and measuring on {found.device.name}", columns, rows)
    if not found.device.cuda:
        return
    print("states of the calibration samples lie in main memory and are left out of the sum")


def results(found: Mapping[str, Any]) -> None:
    """The table of the evaluate stage: every model with standard errors."""
    models = found["models"]
    tasks = sorted({name for model in models.values() for name in accuracies(model)})
    rows = []
    for name, model in models.items():
        cells = [_estimate(model.get(key)) for key in ("perplexity", "bits_per_byte", "kl", "agreement")]
        cells += [_estimate(accuracies(model).get(task)) for task in tasks]
        rows.append((name, f"{model['params']:,}", f"{model['non_embedding_params']:,}", *cells))
    columns = (
        "model",
        "params",
        "non-embedding",
        "perplexity",
        "bits/byte",
        f"KL to {found['reference']}",
        "agreement",
    )
    table("held-out text (± standard error)", (*columns, *tasks), rows)
    if found.get("tasks"):
        _task_scores(found["tasks"], list(models))


def _task_scores(tasks: Mapping[str, Any], names: Sequence[str]) -> None:
    """Scores of every model, and the differences of the student on the same items."""
    asked = [entry for entry in tasks["listed"] if entry["status"] == "asked"]
    rows = []
    for entry in tasks["listed"]:
        scores = [tasks["scores"][name].get(entry["key"], {}) for name in names]
        cells = [_estimate(score.get(entry.get("metric"))) or entry["status"] for score in scores]
        rows.append((entry["key"], entry.get("metric", ""), *cells))
    table(f"tasks of lm-evaluation-harness {tasks['harness']} (± standard error)", ("task", "metric", *names), rows)
    for entry in tasks["listed"]:
        if entry["status"] != "asked":
            print(f"{entry['key']}: {entry['status']}, {entry['why']}")
    if tasks["differences"] and asked:
        pairs = [(entry["key"], [by[entry["key"]] for by in tasks["differences"].values()]) for entry in asked]
        lines = [(key, *(_paired(difference) for difference in listed)) for key, listed in pairs]
        columns = ("task", *(f"minus {name}" for name in tasks["differences"]))
        table("the student on the same items (± standard error; p of McNemar's test)", columns, lines)


def _paired(difference: Mapping[str, Any]) -> str:
    test = difference.get("mcnemar")
    return _estimate(difference) + ("" if test is None else f", p {test['p']:.2g}")


def accuracies(model: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The multiple-choice accuracies of the evaluate stage, by column name."""
    by_column = {}
    for task, ours in model.get("choices", {}).items():
        by_column[task] = ours
        for rule in ("acc", "acc_norm"):
            if ours.get(rule):
                by_column[f"{task} {rule}"] = ours[rule]
    return by_column


def study_table(found: Mapping[str, Any]) -> None:
    """The results and verdicts of a study."""
    metrics = found["metrics"]
    rows = [(arm["label"], *(_mean(arm["metrics"][metric]) for metric in metrics)) for arm in found["arms"]]
    seeds = len(found["seeds"])
    columns = (metric.replace("_", " ") for metric in metrics)
    table(f"{found['title']} (mean of {seeds} seeds ± standard error)", ("arm", *columns), rows)
    verdicts = [
        (claim["text"], claim["metric"].replace("_", " "), _mean(claim["effect"]), claim["verdict"])
        for claim in found["claims"]
    ]
    table("verdicts", ("claim", "metric", "effect", "verdict"), verdicts)


def _mean(value: Mapping[str, Any] | None) -> str:
    return _estimate(None if value is None else {"value": value["mean"], "stderr": value["stderr"]})


def _estimate(value: Mapping[str, Any] | None) -> str:
    if not value or value.get("value") is None:
        return ""
    error = value.get("stderr")
    return f"{value['value']:.4g}" + (f" ± {error:.2g}" if error is not None else "")
