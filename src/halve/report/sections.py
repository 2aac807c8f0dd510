"""The sections of the report: from the facts of a run to words, tables and figures. Curves and maps are in `charts`.

Nothing here reads a file. A section whose facts are missing is None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from halve.model.card import made_in_words
from halve.recipe.rounds import parsed
from halve.report import plots
from halve.report.plots import Interval, Number, figure
from halve.report.tables import accuracies

LABELS = {
    "teacher": "Teacher",
    "corrected": "Corrected teacher",
    "pruned": "Pruned, untrained",
    "distilled": "Distilled student",
    "nested": "Student inside",
    "ce": "Trained with CE",
    "random_init": "Random start",
    "random_prune": "Random cut",
    "aligned": "Aligned",
}
CONTROLS = {
    "ce": "the same cut, trained with cross-entropy on the text, without a teacher",
    "random_init": "the student's sizes, distilled from random weights",
    "random_prune": "the same sizes with randomly chosen parts, distilled",
}
SUBJECT, ALIGNED = "distilled", "aligned"
SHOWN = ("teacher", "corrected", "pruned", "distilled", "aligned")

Facts = Mapping[str, Any]


def label(name: str) -> str:
    """The name of a model on the page. In the second round it ends in 2, as in Distilled student 2; Aligned 2, RPO."""
    base, number, variant = parsed(name)
    kind = f", {variant.upper()}" if base == ALIGNED else ""
    return LABELS.get(base, base) + (f" {number}" if number > 1 else "") + kind


def color(name: str) -> str:
    """The class of a model's color: the same in every round."""
    return parsed(name)[0]


def subject(results: Facts) -> str | None:
    """The result of the run: the last aligned or distilled student, or the last pruned model if nothing was trained."""
    aligned: list[str] = [name for name in results["models"] if color(name) == ALIGNED]
    return aligned[-1] if aligned else student(results)


def student(results: Facts) -> str | None:
    """The last distilled student, from which alignment starts, or the last pruned model if nothing was trained."""
    names = [name for name in results["models"] if color(name) in (SUBJECT, "pruned")]
    return max(names, key=lambda name: (parsed(name)[1], color(name) == SUBJECT), default=None)


@dataclass(frozen=True)
class Cell:
    """One value of a table and its standard error, as text. `clear`: over two standard errors away from zero.

    `under` stands below the value: its difference from another.
    """

    value: str
    error: str = ""
    clear: bool = False
    under: Cell | None = None


@dataclass(frozen=True)
class TableRow:
    label: str
    cells: tuple[Cell, ...]
    color: str = ""
    subject: bool = False


@dataclass(frozen=True)
class Table:
    head: tuple[str, ...]
    rows: tuple[TableRow, ...]


@dataclass(frozen=True)
class Figure:
    title: str
    note: str
    svg: str


@dataclass(frozen=True)
class Completion:
    prompt: str
    texts: tuple[Facts, ...]


@dataclass(frozen=True)
class PageSection:
    """A heading with any of: a note, a table, a second table with its own note, figures, completions."""

    title: str
    note: str = ""
    table: Table | None = None
    between: str = ""
    second: Table | None = None
    figures: tuple[Figure, ...] = ()
    completions: tuple[Completion, ...] = field(default=())


# ---- numbers -------------------------------------------------------------------------------------------------


def estimate(one: Facts | None, *, percent: bool = False, signed: bool = False) -> Cell:
    """A value, rounded to the second digit of its standard error. Shares are in percent, without the sign.

    With `signed`, a value is colored from two standard errors on; one whose error is unknown is not.
    """
    if not one or one.get("value") is None:
        return Cell("-")
    scale = 100 if percent else 1
    value, stderr = one["value"] * scale, (one.get("stderr") or 0) * scale
    places = 1 - math.floor(math.log10(stderr)) if stderr > 0 else 3
    places = min(max(places, 0), 1 if percent else 4)
    colored = signed and one.get("stderr") is not None and abs(value) > 2 * stderr
    sign = "+" if signed and value > 0 else ""
    text = f"{sign}{value:,.{places}f}".replace("-", "\N{MINUS SIGN}")
    return Cell(text, f"{stderr:.{places}f}" if stderr > 0 else "", colored)


def short_bytes(num_bytes: Number) -> str:
    """Bytes with a decimal unit."""
    return figure(num_bytes).replace("k", " k").replace("M", " M").replace("B", " G").replace("T", " T") + (
        " B" if abs(num_bytes) < 999.5 else "B"
    )


def times(ratio: Number) -> str:
    """A factor such as 1.8x."""
    return f"{figure(ratio)}\N{MULTIPLICATION SIGN}"


def share(part: Number, whole: Number) -> str:
    """A share in percent."""
    return f"{100 * part / whole:.0f} %" if whole else "-"


# ---- before and after ----------------------------------------------------------------------------------------


def first_and_last(results: Facts | None) -> tuple[Facts, Facts] | None:
    """The first model of the run and its result."""
    last = subject(results) if results else None
    return None if not results or last is None else (next(iter(results["models"].values())), results["models"][last])


def tiles(results: Facts | None) -> list[dict[str, str]]:
    """The headline values: the first model and the result."""
    pair = first_and_last(results)
    if results is None or pair is None:
        return []
    before, after = pair
    headline = [
        _tile("Parameters", before["params"], after["params"], figure),
        _tile("Without embeddings", before["non_embedding_params"], after["non_embedding_params"], figure),
        _tile("Weights", before["weight_bytes"], after["weight_bytes"], short_bytes),
    ]
    if before.get("speed") and after.get("speed"):
        for label, key in (("Prefill", "prefill"), ("Decode", "decode")):
            old, new = (model["speed"][f"{key}_tokens_per_second"] for model in pair)
            headline.append(_tile(label, old, new, figure) | {"unit": "tok/s", "factor": times(new / old)})
    # compare with the teacher of the student: a corrected teacher knows this text better than the original one
    taught = results["models"][results["reference"]]
    old, new = (model["bits_per_byte"]["value"] for model in (taught, after))
    headline.append({"label": "Bits per byte", "after": figure(new), "before": f"its teacher: {figure(old)}"})
    for task in after["choices"]:
        old, new = (100 * model["choices"][task]["value"] for model in (taught, after))
        headline.append({"label": file_title(task), "after": f"{new:.1f} %", "before": f"its teacher: {old:.1f} %"})
    if after.get("agreement"):
        agreement = estimate(after["agreement"], percent=True).value
        headline.append(
            {"label": "Agreement", "after": f"{agreement} %", "before": "same most likely token as its teacher"}
        )
    return headline


def _tile(label: str, before: Number, after: Number, spell: Callable[[Number], str]) -> dict[str, str]:
    return {"label": label, "after": spell(after), "before": f"from {spell(before)}", "factor": share(after, before)}


def sizes_section(plans: Sequence[Facts], results: Facts | None) -> PageSection | None:
    """Sizes of every axis before and after each round, and what was cut."""
    if not plans:
        return None
    sizes = [plans[0]["before"], *(plan["after"] for plan in plans)]
    rows = []
    for axis in ("layers", "hidden", "ffn", "heads", "kv_heads", "head_dim", "vocab"):
        rows.append(_sizes_row(axis, [arch[axis] for arch in sizes], lambda n: f"{n:,}"))
    caches = [4 * arch["layers"] * arch["kv_heads"] * arch["head_dim"] for arch in sizes]
    rows.append(_sizes_row("key-value cache per token, 16 bit", caches, short_bytes))
    models = _cut_models(results, len(plans))
    if models:
        for name, key in (("parameters", "params"), ("without embeddings", "non_embedding_params")):
            rows.append(_sizes_row(name, [model[key] for model in models], lambda n: f"{n:,}"))
        rows.append(_sizes_row("weights", [model["weight_bytes"] for model in models], short_bytes))
    after = ("after",) if len(plans) == 1 else tuple(f"round {i}" for i in range(1, len(plans) + 1))
    words = [_cut_words(plan) for plan in plans]
    if len(plans) > 1:
        words = [f"Round {i}: {text}" for i, text in enumerate(words, 1)]
    note = f"A {plans[0]['family']} model. " + " ".join(words)
    return PageSection("What was cut", note.rstrip(), Table(("", "before", *after, "kept"), tuple(rows)))


def _cut_models(results: Facts | None, count: int) -> list[Facts]:
    """The first model and the pruned model of each round. Empty if one of them was not measured."""
    if not results:
        return []
    pruned = {parsed(name)[1]: model for name, model in results["models"].items() if color(name) in (SUBJECT, "pruned")}
    if set(pruned) != set(range(1, count + 1)):
        return []
    return [next(iter(results["models"].values())), *(pruned[i] for i in range(1, count + 1))]


def _sizes_row(name: str, sizes: Sequence[Number], spell: Callable[[Number], str]) -> TableRow:
    old, new = sizes[0], sizes[-1]
    kept = Cell("unchanged" if old == new else share(new, old))
    return TableRow(name, (*(Cell(spell(size)) for size in sizes), kept))


def _cut_words(plan: Facts) -> str:
    dropped = sorted(set(range(plan["before"]["layers"])) - set(plan["layers"]))
    words = []
    if dropped:
        words.append(f"Dropped {'layers' if len(dropped) > 1 else 'layer'} {_ranges(dropped)}, counted from 0.")
    trimmed = [axis for axis in ("hidden", "ffn", "heads", "kv_heads") if plan["before"][axis] != plan["after"][axis]]
    if trimmed:
        words.append(f"Trimmed {', '.join(trimmed)}.")
    if "hidden" in trimmed:
        words.append(f"Norm gain: {plan['gain']}.")
    if made := plan.get("made"):
        words.append(made_in_words(made))
    return " ".join(words)


def _ranges(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


# ---- quality and speed ---------------------------------------------------------------------------------------


def quality(results: Facts | None) -> PageSection | None:
    """Every model on the same held-out samples, with standard errors and paired differences."""
    if not results:
        return None
    models = results["models"]
    reference: str = results["reference"]
    first = next(iter(models.values()))
    tasks, columns = list(first["choices"]), list(accuracies(first))
    rows = []
    for name, model in models.items():
        cells = [estimate(model["perplexity"]), estimate(model["bits_per_byte"])]
        cells += [estimate(model.get("kl")), estimate(model.get("agreement"), percent=True)]
        cells += [estimate(accuracies(model).get(column), percent=True) for column in columns]
        rows.append(TableRow(label(name), tuple(cells), color(name), name == subject(results)))
    head = ("model", "perplexity", "bits per byte", "KL to teacher", "agreement, %", *_percent(columns))
    samples = results["samples"]
    note = (
        f"All models are measured on the same held-out text: {samples['count']} samples of {samples['context']} tokens."
        f" KL is the divergence from the {_lower(label(reference))}, in nats per token. Agreement is the share of"
        " tokens at which model and teacher rank the same token first. ± is one standard error."
    ) + controls(models)
    note += " acc and acc_norm follow the rules of lm-evaluation-harness." * (len(columns) > len(tasks))
    dot_plots = [
        _dot_plot(
            {name: model["bits_per_byte"] for name, model in models.items()}, "Bits per byte", "Lower is better."
        ),
        _dot_plot({n: model.get("kl") for n, model in models.items()}, "KL to the teacher", "Nats per token."),
        _dot_plot(
            {name: model.get("agreement") for name, model in models.items()},
            "Agreement with the teacher",
            "Percent of tokens with the same most likely token.",
            scale=100,
        ),
        *(
            _dot_plot(
                {name: model["choices"].get(task) for name, model in models.items()},
                file_title(task),
                f"Accuracy in percent over {first['choices'][task]['items']} items.",
                scale=100,
            )
            for task in tasks
        ),
    ]
    between, second = _differences(results.get("differences"), tasks)
    figures = tuple(plot for plot in dot_plots if plot is not None)
    return PageSection("Quality", note, Table(head, tuple(rows)), between, second, figures)


def controls(names: Iterable[str]) -> str:
    """What the control models among these are, in words."""
    known = [base for base in dict.fromkeys(map(color, names)) if base in CONTROLS]
    return "".join(f" {LABELS[base]}: {CONTROLS[base]}." for base in known)


def _differences(differences: Facts | None, tasks: Sequence[str]) -> tuple[str, Table | None]:
    if not differences or not differences["against"]:
        return "", None
    rows = []
    for name, difference in differences["against"].items():
        cells = [estimate(difference.get("nll"), signed=True), estimate(difference.get("kl"), signed=True)]
        cells.append(estimate(difference.get("agreement"), percent=True, signed=True))
        cells += [estimate(difference["choices"].get(task), percent=True, signed=True) for task in tasks]
        rows.append(TableRow(f"minus {_lower(label(name))}", tuple(cells), color(name)))
    subject = "aligned student" if color(differences["subject"]) == ALIGNED else "distilled student"
    words = (
        f"This table shows the {subject} minus each other model, computed sample by sample. All models read"
        " the same text, so these differences have smaller standard errors than the table above. Colored values are"
        " over two standard errors away from zero."
    )
    head = (subject, "nats per token", "KL to teacher", "agreement, %", *_percent(tasks))
    return words, Table(head, tuple(rows))


def _dot_plot(estimates: Mapping[str, Facts | None], title: str, words: str, *, scale: int = 1) -> Figure | None:
    rows = []
    for name, estimated in estimates.items():
        if estimated and estimated.get("value") is not None:
            stderr = estimated.get("stderr")
            error = None if stderr is None else stderr * scale
            rows.append(Interval(label(name), color(name), estimated["value"] * scale, error))
    if not rows:
        return None
    return Figure(title, f"{words} Whiskers are two standard errors.", plots.dots(rows, title=title))


def speed(results: Facts | None) -> PageSection | None:
    """Tokens per second and memory, before and after."""
    pair = first_and_last(results)
    if results is None or pair is None or not all(model.get("speed") for model in pair):
        return None
    before, after = (model["speed"] for model in pair)
    rows = []
    for label, key, spell in (
        ("prefill, tokens per second", "prefill_tokens_per_second", figure),
        ("decode, tokens per second", "decode_tokens_per_second", figure),
        ("peak memory", "peak_memory_bytes", short_bytes),
    ):
        cells = (Cell(spell(before[key])), Cell(spell(after[key])), Cell(times(after[key] / before[key])))
        rows.append(TableRow(label, cells))
    test, machine = results["speed_test"], results["machine"]
    note = (
        f"Measured in plain transformers on {machine_words(machine)}, in {timed_dtype(pair)}. Batch size"
        f" {test['batch']}, {test['prompt_tokens']} prompt tokens, {test['new_tokens']} new tokens. Each value is the"
        f" median of {test['repeats']} interleaved repeats. Peak memory counts the weights and all other tensors."
    )
    return PageSection("Speed", note, Table(("", "teacher", "student", "ratio"), tuple(rows)))


def machine_words(machine: Facts) -> str:
    """What a run was measured on."""
    threads = machine["threads"]
    return f"{machine['device']}, {threads} thread{'' if threads == 1 else 's'}"


def timed_dtype(pair: tuple[Facts, Facts]) -> str:
    """The precision that both were timed in."""
    first, second = (str(model["dtype"]) for model in pair)
    return first if first == second else f"{first} and {second}"


def file_title(name: str) -> str:
    """The name of a multiple-choice file as a title."""
    return name.replace("_", " ").replace("-", " ").capitalize()


def _percent(tasks: Sequence[str]) -> list[str]:
    return [f"{file_title(task)}, %" for task in tasks]


def _lower(label: str) -> str:
    return label[:1].lower() + label[1:]
