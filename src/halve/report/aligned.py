"""The section of the report on alignment: what every step changed, and what it kept of the teacher.

Nothing here reads a file. A run without steps has no such section.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from halve.recipe.rounds import named, parsed
from halve.report import plots
from halve.report.charts import loss_curve
from halve.report.plots import figure
from halve.report.sections import ALIGNED, Cell, Facts, Figure, PageSection, Table, TableRow, color, estimate, label

_ARROW = " \N{RIGHTWARDS ARROW} "


def alignment(
    manifests: Mapping[str, Facts], results: Facts | None, logs: Mapping[str, Sequence[Facts]]
) -> PageSection | None:
    """One row a step, with the student before it in the first row."""
    steps = {
        named(ALIGNED, *parsed(stage)[1:]): manifest["metrics"]
        for stage, manifest in manifests.items()
        if parsed(stage)[0] == "align"
    }
    if not steps:
        return None
    measured: Mapping[str, Facts] = (results or {}).get("models", {})
    listed = list(measured)
    start = listed[listed.index(next(iter(steps))) - 1] if next(iter(steps)) in listed else None
    rows = [] if start is None else [_row(start, {}, measured)]
    rows += [_row(name, metrics, measured) for name, metrics in steps.items()]
    tasks = [task for model in list(measured.values())[:1] for task in model["choices"]]
    kept = ("KL to teacher", "perplexity", *tasks)
    head = ("model", "examples", "steps", "tokens", *kept, "nats", "accuracy, %", "likelier, %")
    note = (
        "Every step starts from the model in the row above it. KL to the teacher and perplexity are measured on the"
        " held-out text of the run: a step that loses what was distilled raises them. Nats are the loss per token of"
        " what the assistant says in held-out conversations, before and after the step. Accuracy is the share of"
        " held-out pairs in which the better answer gained more log-probability than the other; 50 % is the start."
        " Likelier is the share in which the better answer is the more probable one, before and after. ± is one"
        " standard error."
    )
    return PageSection("Alignment", note, Table(head, tuple(rows)), figures=tuple(_curves(logs)))


def _row(name: str, metrics: Facts, measured: Mapping[str, Facts]) -> TableRow:
    model = measured.get(name, {})
    counts = [Cell(figure(metrics[key]) if key in metrics else "-") for key in ("examples", "steps", "tokens")]
    kept = [estimate(model.get("kl")), estimate(model.get("perplexity"))]
    kept += [estimate(task, percent=True) for task in model.get("choices", {}).values()]
    nats = _before_after(metrics, "nats")
    accuracy = estimate(metrics.get("accuracy"), percent=True)
    return TableRow(
        label(name), (*counts, *kept, nats, accuracy, _before_after(metrics, "likelier", percent=True)), color(name)
    )


def _before_after(metrics: Facts, what: str, *, percent: bool = False) -> Cell:
    before, after = (estimate(metrics.get(f"{what}_{when}"), percent=percent) for when in ("before", "after"))
    return Cell(f"{before.value}{_ARROW}{after.value}", after.error) if before.value != "-" else Cell("-")


def _curves(logs: Mapping[str, Sequence[Facts]]) -> list[Figure]:
    """The training loss of each step. Losses of different kinds cannot be compared, so each has a figure."""
    figures = []
    for name, log in logs.items():
        if color(name) == ALIGNED and (curve := loss_curve(name, log)):
            title = f"Training loss, {label(name)}"
            svg = plots.curves([curve], title=title, x_label="tokens")
            figures.append(Figure(title, "Mean over neighboring steps.", svg))
    return figures
