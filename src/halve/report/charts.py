"""The sections of the report that are plots: how the students learned, what they could do, and what was important.

Nothing here reads a file. A section whose facts are missing is None.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from halve.report import plots
from halve.report.plots import Level, Number, Series
from halve.report.sections import ALIGNED, SUBJECT, Facts, Figure, PageSection, color, label

_CURVE_POINTS = 160
_RANKED_COLUMNS = 32


# ---- learning ------------------------------------------------------------------------------------------------


def learning_curves(logs: Mapping[str, Sequence[Facts]]) -> PageSection | None:
    """Loss against tokens, for every model that was trained."""
    students = {name: log for name, log in logs.items() if color(name) not in ("corrected", ALIGNED)}
    kl = [*_heldout(students, "kl"), *_inside(students)]
    ce = _heldout(students, "ce")
    figures = []
    if kl:
        positive = all(y > 0 for curve in kl for _, y in curve.points)
        svg = plots.curves(kl, title="Held-out KL to the teacher", x_label="tokens", log_y=positive)
        scale = ", on a logarithmic scale." if positive else "."
        figures.append(Figure("Held-out KL to the teacher", f"Nats per token{scale}", svg))
    if ce:
        svg = plots.curves(ce, title="Held-out cross-entropy", x_label="tokens")
        figures.append(Figure("Held-out cross-entropy", "Nats per token.", svg))
    losses = [loss for name in students if color(name) == SUBJECT and (loss := loss_curve(name, students[name]))]
    if losses:
        svg = plots.curves(losses, title="Training loss", x_label="tokens")
        figures.append(Figure("Training loss of the distilled student", "Mean over neighboring steps.", svg))
    correction = _heldout({n: log for n, log in logs.items() if n == "corrected"}, "ce")
    if correction:
        shown = [Series("Teacher", curve.color, curve.points) for curve in correction]
        svg = plots.curves(shown, title="Teacher correction", x_label="tokens")
        figures.append(Figure("Teacher correction", "Held-out cross-entropy, nats per token.", svg))
    note = (
        "All students train on the same tokens in the same order. Held-out values are measured on a small fixed set of"
        " samples."
    )
    return PageSection("Learning", note, figures=tuple(figures)) if figures else None


def _heldout(logs: Mapping[str, Sequence[Facts]], metric: str) -> list[Series]:
    curves = []
    for name, log in logs.items():
        points = [
            (float(line["tokens"]), float(line["heldout"][metric]))
            for line in log
            if (line.get("heldout") or {}).get(metric) is not None
        ]
        if len(points) > 1:
            curves.append(Series(label(name).split(",")[0], color(name), tuple(points)))
    return curves


def _inside(logs: Mapping[str, Sequence[Facts]]) -> list[Series]:
    """The curves of students inside the student, which its log has as kl-2, kl-3 and so on."""
    log = logs.get(SUBJECT, [])
    metrics = sorted({key for line in log for key in line.get("heldout") or {} if key.startswith("kl-")})
    by_name = {f"nested-{metric.removeprefix('kl-')}": metric for metric in metrics}
    return [curve for name, metric in by_name.items() for curve in _named(_heldout({SUBJECT: log}, metric), name)]


def _named(curves: Sequence[Series], name: str) -> list[Series]:
    return [Series(label(name), color(name), curve.points) for curve in curves]


def loss_curve(name: str, log: Sequence[Facts]) -> Series | None:
    """The loss of every step, the mean over neighboring ones where there are many. None for a single step."""
    steps = [(float(line["tokens"]), float(line["loss"])) for line in log if line.get("loss") is not None]
    if len(steps) < 2:
        return None
    width = math.ceil(len(steps) / _CURVE_POINTS)
    groups = [steps[i : i + width] for i in range(0, len(steps), width)]
    points = tuple((group[-1][0], sum(y for _, y in group) / len(group)) for group in groups)
    return Series(label(name).split(",")[0], color(name), points)


def gates(logs: Mapping[str, Sequence[Facts]], told: Mapping[str, Facts]) -> PageSection | None:
    """Scores of tasks during distillations. `told` has the gates of each model's manifest."""
    if not told:
        return None
    figures = []
    for task, teacher in {task: score for facts in told.values() for task, score in facts["armed"].items()}.items():
        scored = [
            Series(label(name).split(",")[0], color(name), points)
            for name in told
            if (points := _gate(logs.get(name, ()), task))
        ]
        if scored:
            levels = [Level(label("teacher"), teacher)]
            svg = plots.curves(scored, title=f"Gate: {task}", x_label="tokens", levels=levels)
            figures.append(Figure(task, "Score of a few items; the dashed line is the teacher's.", svg))
    note = ["Scores of a few generated answers, measured during the distillation. They do not change it."]
    note += [f"{task} does not count: {why}." for task, why in _not_armed(told).items()]
    warnings = (line.get("gate_warnings", {}) for name in told for line in logs.get(name, ()))
    note += [f"Warning: {words}." for found in warnings for words in found.values()]
    return PageSection("Gates", " ".join(note), figures=tuple(figures))


def _gate(log: Sequence[Facts], task: str) -> tuple[tuple[float, float], ...]:
    found = ((float(line["tokens"]), line.get("gates", {}).get(task)) for line in log)
    return tuple((tokens, float(score)) for tokens, score in found if score is not None)


def _not_armed(told: Mapping[str, Facts]) -> dict[str, str]:
    return {task: why for facts in told.values() for task, why in facts["not_armed"].items()}


# ---- importance ----------------------------------------------------------------------------------------------


def importance(
    scores: Mapping[str, Any] | None, about: Facts, plan: Facts | None, *, title: str = "Importance"
) -> PageSection | None:
    """Importance by axis and layer, with the cut. `scores` are numpy arrays by axis."""
    if not scores:
        return None
    num_layers = len(scores["layers"])
    layers = set(plan["layers"]) if plan else set(range(num_layers))
    names = [str(i) if i in layers else f"{i} \N{MULTIPLICATION SIGN}" for i in range(num_layers)]
    place = {layer: i for i, layer in enumerate(plan["layers"])} if plan else {}
    figures = []
    kept = [i in layers for i in range(num_layers)]
    name = "Layers: block influence"
    svg = plots.bars(scores["layers"].tolist(), kept, title=name, x_label="layer")
    figures.append(Figure(name, "1 - cosine between a layer's input and output. Outlined layers were dropped.", svg))
    if "hidden" in scores:
        values = scores["hidden"].tolist()
        num_kept = len(plan["hidden"]) if plan else len(values)
        svg = plots.profile(values, num_kept, title="Hidden channels by importance", x_label="channels, best first")
        figures.append(Figure("Hidden channels", "One ranking for the whole network.", svg))
    if "ffn" in scores:
        cut_at = plan["after"]["ffn"] / plan["before"]["ffn"] if plan else 1
        svg = plots.ranked(
            [_shades(row.tolist()) for row in scores["ffn"]],
            names,
            title="ffn neurons by importance in each layer",
            x_label="share of the layer's neurons, best first",
            cut_at=cut_at if cut_at < 1 else None,
        )
        words = (
            "One row per layer. The color goes from a quarter of the layer's median score (pale) to four times the"
            " median (strong)."
        )
        figures.append(Figure("ffn neurons", words, svg))
    if "heads" in scores:
        heads = scores["heads"]
        keeps = [
            [not plan or (i in place and j in plan["heads"][place[i]]) for j in range(heads.shape[1])]
            for i in range(num_layers)
        ]
        svg = plots.grid(
            [(row / max(float(row.max()), 1e-30)).tolist() for row in heads],
            keeps,
            names,
            title="Attention heads by importance",
            x_label="head, in groups that share keys and values",
            group=heads.shape[1] // max(1, scores["kv_heads"].shape[1]) if "kv_heads" in scores else 1,
        )
        figures.append(
            Figure("Attention heads", "Scores relative to the highest in the layer. Outlined heads were cut.", svg)
        )
    words = "Scores are from one forward pass over the calibration samples. They can be compared only within one layer."
    if about.get("batch_agg"):
        words += f" They are aggregated by {about['batch_agg']} over samples and by {about['seq_agg']} over tokens."
    if len(layers) < num_layers:
        words += " \N{MULTIPLICATION SIGN} marks dropped layers."
    return PageSection(title, words, figures=tuple(figures))


def _shades(values: Sequence[Number]) -> list[Number]:
    """Ranked values in at most `_RANKED_COLUMNS` columns: log2 of the ratio to the median, from -2..2 to 0..1."""
    ordered = sorted(values, reverse=True)
    middle = max(ordered[len(ordered) // 2], 1e-30)
    columns = min(_RANKED_COLUMNS, len(ordered))
    edges = [round(i * len(ordered) / columns) for i in range(columns + 1)]
    means = [sum(ordered[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    return [min(max((math.log2(max(mean, 1e-30) / middle) + 2) / 4, 0.0), 1.0) for mean in means]
