"""The section of the report on alignment: what every step changed, and what it kept of the teacher.

Nothing here reads a file. A run without steps has no such section.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from halve.recipe.rounds import named, parsed
from halve.report import plots
from halve.report.charts import loss_curve
from halve.report.plots import figure
from halve.report.sections import (
    ALIGNED,
    Cell,
    Facts,
    Figure,
    PageSection,
    Table,
    TableRow,
    color,
    estimate,
    file_title,
    label,
    student,
)
from halve.report.task_tables import task_score, with_shots

_ARROW = " \N{RIGHTWARDS ARROW} "


def alignment(
    manifests: Mapping[str, Facts], results: Facts | None, logs: Mapping[str, Sequence[Facts]]
) -> PageSection | None:
    """One row a step, with the student before it in the first row. Accuracies and tasks have a table of their own."""
    steps = {
        named(ALIGNED, *parsed(stage)[1:]): manifest["metrics"]
        for stage, manifest in manifests.items()
        if parsed(stage)[0] == "align"
    }
    if not steps:
        return None
    models: Mapping[str, Facts] = (results or {}).get("models", {})
    measured = [name for name in steps if name in models]
    start = student(results) if results and measured else None
    rows = [] if start is None else [_row(start, {}, results)]
    rows += [_row(name, metrics, results) for name, metrics in steps.items()]
    kept = ("KL to teacher", "perplexity")
    head = ("model", "examples", "tokens", *kept, "nats", "accuracy, %", "likelier, %")
    note = (
        "Every step starts from the model in the row above it. KL to the teacher and perplexity are measured on the"
        " held-out text of the run: a step that loses what was distilled raises them. Below the KL after a step stands"
        " its difference from the row above, with the standard error of the pairs of samples. Nats are the loss per"
        " token of what the assistant says in held-out conversations, before and after the step. Accuracy is the share"
        " of held-out pairs in which the better answer gained more log-probability than the other; 50 % is the start."
        " Likelier is the share in which the better answer is the more probable one, before and after. ± is one"
        " standard error."
    )
    between, second = ("", None) if results is None or start is None else _solved([start, *measured], results)
    return PageSection("Alignment", note, Table(head, tuple(rows)), between, second, tuple(_curves(logs)))


def _row(name: str, metrics: Facts, results: Facts | None) -> TableRow:
    found: Facts = results or {}
    model, step = found.get("models", {}).get(name, {}), found.get("steps", {}).get(name, {})
    examples, tokens = (Cell(figure(metrics[key]) if key in metrics else "-") for key in ("examples", "tokens"))
    if "steps" in metrics:
        examples = replace(examples, under=Cell(f"{figure(metrics['steps'])} steps"))
    kept = (_over(estimate(model.get("kl")), step.get("kl")), estimate(model.get("perplexity")))
    nats = _before_after(metrics, "nats")
    accuracy = estimate(metrics.get("accuracy"), percent=True)
    return TableRow(
        label(name),
        (examples, tokens, *kept, nats, accuracy, _before_after(metrics, "likelier", percent=True)),
        color(name),
    )


def _over(cell: Cell, difference: Facts | None, *, percent: bool = False) -> Cell:
    """The cell with a difference below its value, where there is one."""
    return cell if not difference else replace(cell, under=estimate(difference, percent=percent, signed=True))


def _before_after(metrics: Facts, what: str, *, percent: bool = False) -> Cell:
    before, after = (estimate(metrics.get(f"{what}_{when}"), percent=percent) for when in ("before", "after"))
    return Cell(f"{before.value}{_ARROW}{after.value}", after.error) if before.value != "-" else Cell("-")


def _solved(names: Sequence[str], results: Facts) -> tuple[str, Table | None]:
    """What the models of the alignment solve: multiple-choice files and tasks in rows, as there may be fifteen."""
    rows = (*_chosen(names, results), *_of_tasks(names, results))
    if not rows:
        return "", None
    words = (
        "This table shows accuracies on multiple-choice files and scores of tasks before and after each step, in"
        " percent. Below each value after a step stands its difference from the model to its left, on the same items,"
        " with the standard error of the pairs. Colored differences are over two standard errors away from zero."
    )
    return words, Table(("benchmark (shots)", *map(label, names)), rows)


def _chosen(names: Sequence[str], results: Facts) -> Iterator[TableRow]:
    models, steps = results["models"], results.get("steps", {})
    for file in models[names[0]]["choices"]:
        cells = [
            _over(
                estimate(models[name]["choices"].get(file), percent=True),
                steps.get(name, {}).get("choices", {}).get(file),
                percent=True,
            )
            for name in names
        ]
        yield TableRow(file_title(file), tuple(cells))


def _of_tasks(names: Sequence[str], results: Facts) -> Iterator[TableRow]:
    """A row for each task that was asked. Tasks of both suites whose names are the same have those of the harness."""
    tasks: Facts = results.get("tasks") or {"listed": ()}
    steps = tasks.get("steps", {})
    asked = [entry for entry in tasks["listed"] if entry["status"] == "asked"]
    titles = [with_shots(entry) for entry in asked]
    for entry, title in zip(asked, titles, strict=True):
        key = entry["key"]
        cells = [_over(task_score(tasks, name, entry), steps.get(name, {}).get(key), percent=True) for name in names]
        yield TableRow(title if titles.count(title) == 1 else key, tuple(cells))


def _curves(logs: Mapping[str, Sequence[Facts]]) -> list[Figure]:
    """The training loss of each step. Losses of different kinds cannot be compared, so each has a figure."""
    figures = []
    for name, log in logs.items():
        if color(name) == ALIGNED and (curve := loss_curve(name, log)):
            title = f"Training loss, {label(name)}"
            svg = plots.curves([curve], title=title, x_label="tokens")
            figures.append(Figure(title, "Mean over neighboring steps.", svg))
    return figures
