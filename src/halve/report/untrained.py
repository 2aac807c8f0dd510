"""The section of the report about a search that trained nothing: a trial, or a sum of blocks (`method: additive`).

Nothing here reads a file. The facts are those of `halve.search.outcome.untrained`.
"""

from __future__ import annotations

from typing import Any

from halve.report.plots import figure
from halve.report.sections import SUBJECT, Cell, Facts, PageSection, Table, TableRow, estimate

SHAPE_HEAD = ("layers", "hidden", "ffn", "heads", "parameters")
"""Columns of `shape_cells`."""


def shape_cells(shape: Facts) -> list[Cell]:
    """The sizes of a shape and its parameters."""
    arch = shape["arch"]
    sizes = [str(arch["layers"]), str(arch["hidden"]), str(arch["ffn"]), f"{arch['heads']}/{arch['kv_heads']}"]
    return [*map(Cell, sizes), Cell(figure(shape["params"]))]


def untrained_section(facts: Facts, title: str) -> PageSection | None:
    """What was tried, and the choice. None for the results of earlier versions, which do not name it."""
    if "choice" not in facts:
        return None
    note = _NOTES[facts["method"]]
    if facts["method"] == "trial":
        shapes, samples = len(facts["tried"]), len(facts["tried"][0]["by_sample"])
        note = note.format(f"{shapes} shapes were" if shapes > 1 else "One shape was")
        note += f" on {samples} calibration samples that the refit did not see, in nats per token."
        note += " ± is one standard error." if samples > 1 else ""
    return PageSection(title, note, Table(untrained_head(facts), tuple(untrained_rows(facts))), untrained_words(facts))


_NOTES = {
    "trial": "{} cut, refit and measured, and none was trained. KL to the teacher is measured",
    "additive": "No shape was cut or trained. What each block is worth was measured alone, and an integer program took"
    " the width and the layers with the lowest sum of harms, in nats per token.",
}


def untrained_head(facts: Facts) -> tuple[str, ...]:
    """The head of the table."""
    return ("shape", *SHAPE_HEAD, "KL in the trial" if facts["method"] == "trial" else "sum of harms")


def untrained_rows(facts: Facts) -> list[TableRow]:
    """The shapes, the lowest KL first; of a sum of blocks only the choice."""
    rows = []
    for number, shape in enumerate(_ordered(facts), 1):
        cells = (*shape_cells(shape), estimate({"value": shape["kl"], "stderr": shape.get("stderr")}))
        chosen = shape["arch"] == facts["choice"]["arch"]
        rows.append(TableRow(str(number), cells, SUBJECT if chosen else "teacher", chosen))
    return rows


def untrained_words(facts: Facts) -> str:
    """The choice and its reason."""
    choice = facts["choice"]
    layers = f"It keeps layers {', '.join(map(str, choice['kept_layers']))}, counted from 0."
    if facts["method"] != "trial":
        harm = estimate({"value": choice["kl"]}).value
        return f"Chosen for a predicted harm of {harm}, which is no measurement of the student. {layers}"
    number = 1 + [shape["arch"] for shape in _ordered(facts)].index(choice["arch"])
    words = f"Shape {number} is chosen: it has the lowest KL"
    if number > 1:
        gap = estimate(facts["behind"])
        above = f"{gap.value} ± {gap.error}" if gap.error else gap.value
        words = f"Shape {number} is chosen: it is {above} above the lowest KL, sample by sample"
    if facts["ties"]:
        words += f", and the deepest of {1 + facts['ties']} shapes that count as equal"
    out = facts["candidates"] - len(facts["tried"])
    left = f" {out} of {facts['candidates']} candidates broke the budget with the layers that they keep." if out else ""
    return f"{words}. {layers}{left}"


def _ordered(facts: Facts) -> list[Any]:
    return sorted(facts["tried"], key=lambda shape: shape["kl"]) or [facts["choice"]]
