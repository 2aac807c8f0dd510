"""The section of the report about a search: every finalist's quality against tokens, and how sure the choice is.

Nothing here reads a file. The facts are those of `halve.search.outcome`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from halve.report import plots
from halve.report.plots import Series, figure
from halve.report.sections import SUBJECT, Cell, Facts, Figure, PageSection, Table, TableRow, estimate, share
from halve.report.untrained import (
    SHAPE_HEAD,
    shape_cells,
    untrained_head,
    untrained_rows,
    untrained_section,
    untrained_words,
)

_PARTS: Final = {
    "layers": "the comparison of layers",
    "trial": "the trial",
    "cache": "the teacher's answers",
    "finalists": "the cuts of finalists",
    "rungs": "the rungs",
}
"""Of what a search costs, as they are named on the page."""
_RANKED: Final = 4
"""That of `halve.search.agreement`, which needs torch."""
_OTHERS, _TRIAL = "teacher", "pruned"
"""Classes of colors: finalists that are not chosen, and the one that a trial alone would have chosen."""


def searched(facts: Facts, recipe: Facts, *, title: str = "Which shape") -> PageSection | None:
    """What a search found."""
    if facts.get("method") != "tournament":
        return untrained_section(facts, title)
    finalists, rungs = facts["finalists"], facts["rungs"]
    note = (
        f"{len(finalists)} finalists of {_listed_depths(finalists)} were cut from the teacher, and trained on the same"
        f" samples in the same order. After each rung the better ones went on."
        f" KL to the teacher is measured on {_measured(facts['samples'])}"
    )
    words = _words(facts, recipe)
    table = Table(_head(facts), tuple(_row(i, facts) for i in range(len(finalists))))
    order = sorted(range(len(finalists)), key=lambda i: (i == facts["chosen"], i == facts["trial"]))
    svg = plots.tracks(
        [_track(i, facts) for i in order],
        title="KL to the teacher of every finalist, against tokens",
        x_label="tokens of each finalist",
        marks=[rung["tokens"] for rung in rungs[1:-1]],
    )
    legend = "Nats per token, on a logarithmic scale, by the number of the finalist. Colored:"
    legend += f" the choice, {facts['chosen'] + 1}"
    if facts["trial"] not in (facts["chosen"], None):
        legend += f", and {facts['trial'] + 1}, which a trial would have chosen"
    drawn = Figure("Quality against tokens", f"{legend}. Dashed: rungs.", svg)
    return PageSection(title, note, table, " ".join(filter(None, words)), figures=(drawn,))


def search_rows(facts: Facts) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The same table as plain text: its head and its rows. The chosen shape has a mark."""
    if facts["method"] == "tournament":
        head, rows = _head(facts), [_row(i, facts) for i in range(len(facts["finalists"]))]
    else:
        head, rows = untrained_head(facts), untrained_rows(facts)

    def text(cell: Cell) -> str:
        return f"{cell.value} ± {cell.error}" if cell.error else cell.value

    return head, [(row.label + (" *" if row.subject else ""), *map(text, row.cells)) for row in rows]


def search_words(facts: Facts, recipe: Facts) -> list[str]:
    """What to say about the choice, a sentence or two each."""
    if facts["method"] != "tournament":
        return [untrained_words(facts)]
    said = _words(facts, recipe)
    return [words for words in said if words]


def _head(facts: Facts) -> tuple[str, ...]:
    rungs = [figure(rung["tokens"]) for rung in facts["rungs"][1:]]
    asked = (f"{facts['choices']['name']}, %",) if facts["choices"] else ()
    return ("finalist", *SHAPE_HEAD, "after the cut", *rungs, *asked)


def _row(number: int, facts: Facts) -> TableRow:
    finalist = facts["finalists"][number]
    curve, cells = finalist["curve"], shape_cells(finalist)
    cells += [estimate({"value": point["kl"], "stderr": point["stderr"]}) for point in curve]
    cells += [Cell("")] * (len(facts["rungs"]) - len(curve))
    if facts["choices"]:
        cells.append(estimate(facts["choices"]["accuracies"].get(str(number)), percent=True))
    return TableRow(str(number + 1), tuple(cells), _color(number, facts), number == facts["chosen"])


def _track(number: int, facts: Facts) -> Series:
    points = tuple((point["tokens"], point["kl"]) for point in facts["finalists"][number]["curve"])
    return Series(str(number + 1), _color(number, facts), points)


def _color(number: int, facts: Facts) -> str:
    if number == facts["chosen"]:
        return SUBJECT
    return _TRIAL if number == facts["trial"] else _OTHERS


def _measured(count: int) -> str:
    if count == 1:
        return "one held-out sample, in nats per token."
    return f"{count} held-out samples, in nats per token. ± is one standard error."


def _listed_depths(finalists: Sequence[Facts]) -> str:
    depths = sorted({finalist["arch"]["layers"] for finalist in finalists})
    return f"{depths[0]} layers" if len(depths) == 1 else f"{', '.join(map(str, depths[:-1]))} or {depths[-1]} layers"


def _words(facts: Facts, recipe: Facts) -> list[str]:
    """Sentences about a tournament; an empty one says nothing."""
    before = [_choice(facts), _closing(facts, recipe), _trial(facts), _agreement(facts), _choices(facts)]
    return [*before, _rises(facts), _cost(facts, recipe)]


def _choice(facts: Facts) -> str:
    name, second = f"Finalist {facts['chosen'] + 1}", facts["second"]
    if second is None:
        return f"{name} is the only one."
    gap = estimate(second["gap"])
    overtakes = facts.get("overtakes")  # earlier versions chose by the last rung alone
    if overtakes is not None:
        behind = _spelled(estimate(overtakes["behind"]))
        return (
            f"{name} is chosen because it trains faster than finalist {overtakes['finalist'] + 1}, which has the lowest"
            f" KL at the last rung. There it is {behind} behind, sample by sample. From the last two rungs on,"
            f" extrapolated over the logarithm of the tokens, it is {_spelled(gap)} ahead after"
            f" {figure(overtakes['tokens'])} tokens."
        )
    words = f"{name} has the lowest KL. Finalist {second['finalist'] + 1} is {_spelled(gap)} behind"
    if facts["samples"] == 1:
        return f"{words}. One sample has no standard error, so nothing tells whether this is chance."
    words += ", sample by sample"
    return f"{words}." if second["clear"] else f"{words}, which two standard errors do not tell apart."


def _closing(facts: Facts, recipe: Facts) -> str:
    """A warning where the lead shrinks so fast that another finalist may be ahead after the distillation.

    From the last two rungs on, KL less that of the choice is continued as a line over the logarithm of the tokens.
    """
    rungs, whole = [rung["tokens"] for rung in facts["rungs"]], (recipe.get("distill") or {}).get("tokens")
    chosen, caught = facts["finalists"][facts["chosen"]]["curve"], []
    if not whole or len(rungs) < 3 or whole <= rungs[-1]:
        return ""
    steps = math.log(whole / rungs[-1]) / math.log(rungs[-1] / rungs[-2])
    for number, finalist in enumerate(facts["finalists"]):
        curve = finalist["curve"]
        if number == facts["chosen"] or len(curve) < len(rungs):
            continue
        before, now = (curve[i]["kl"] - chosen[i]["kl"] for i in (-2, -1))
        if now < before and now + (now - before) * steps < 0:
            caught.append(f"{number + 1} from {before:.2g} to {now:.2g}")
    if not caught:
        return ""
    return (
        f"The lead shrinks. Between {figure(rungs[-2])} and {figure(rungs[-1])} tokens, that over finalist"
        f" {', '.join(caught)}. If it goes on like this, the choice is behind after the {figure(whole)} tokens of the"
        " distillation: raise search.tournament.tokens, or distill both."
    )


def _trial(facts: Facts) -> str:
    if facts["trial"] == facts["chosen"]:
        return "A trial without training would have chosen it as well."
    if facts["trial"] is None:
        return "A trial without training would have chosen a shape that is none of the finalists."
    trial, chosen = (facts["finalists"][facts[key]]["curve"] for key in ("trial", "chosen"))
    shared = min(len(trial), len(chosen)) - 1
    return (
        f"A trial without training would have chosen finalist {facts['trial'] + 1}, which had a KL of"
        f" {figure(trial[0]['kl'])} against {figure(chosen[0]['kl'])} straight after the cut, and"
        f" {figure(trial[shared]['kl'])} against {figure(chosen[shared]['kl'])} after"
        f" {figure(trial[shared]['tokens'])} tokens."
    )


def _agreement(facts: Facts) -> str:
    ranked = [rank for rank in facts["agreement"] if rank["candidates"] > 2]
    if not ranked:
        return ""
    each = "; ".join(_ranked(rank, facts) for rank in ranked)
    spread = any(_has_interval(rank) for rank in ranked)
    interval = ", with a 95 % interval over the held-out samples" if spread else ""
    if facts["samples"] == 1:
        interval = ", on one held-out sample"
    words = f"Kendall's tau between the ranks straight after the cut and later{interval}: {each}."
    without = [rank["candidates"] for rank in ranked if not _has_interval(rank)]
    if facts["samples"] == 1 or not without:
        return words
    words += f" The number of finalists is too small for an interval{' where none is given' if spread else ''}"
    return f"{words}." if max(without) < _RANKED else f"{words}: the samples, drawn anew, give one value."


def _ranked(rank: Facts, facts: Facts) -> str:
    tau, tokens = f"{rank['tau']:.2f}", facts["rungs"][rank["rung"]]["tokens"]
    if _has_interval(rank):
        tau += f" ({rank['low']:.2f} to {rank['high']:.2f})"
    return f"{tau} after {figure(tokens)} tokens, {rank['candidates']} finalists"


def _has_interval(rank: Facts) -> bool:
    """Results of earlier versions give intervals of three finalists, and of one value."""
    return rank["candidates"] >= _RANKED and rank["low"] is not None and rank["low"] < rank["high"]


def _choices(facts: Facts) -> str:
    asked = facts["choices"]
    if not asked:
        return ""
    some = len(asked["accuracies"]) < len(facts["finalists"])  # by earlier versions
    when = " Asked were those that reached the last rung." if some else " Each was asked at the last rung it reached."
    if asked["agrees"]:
        return f"No finalist answers more of the {asked['items']} items of {asked['name']} than the choice.{when}"
    gap, tokens = estimate(asked["gap"], percent=True), facts["finalists"][asked["best"]]["curve"][-1]["tokens"]
    return (
        f"By {asked['name']} the winner is another: finalist {asked['best'] + 1}, after {figure(tokens)} tokens,"
        f" answers {_spelled(gap)} percentage points more of its {asked['items']} items than finalist"
        f" {facts['chosen'] + 1}. The choice is by KL.{when}"
    )


def _rises(facts: Facts) -> str:
    if not facts["rises"]:
        return ""
    each = [
        f"{rise['finalist'] + 1} by {_spelled(estimate(rise))} until {figure(facts['rungs'][rise['rung']]['tokens'])}"
        " tokens"
        for rise in facts["rises"]
    ]
    return f"Warning: KL rose during the training of finalist {', '.join(each)}. Their learning rate may be too high."


def _cost(facts: Facts, recipe: Facts) -> str:
    words = f"In the rungs, all finalists together trained on {figure(facts['tokens'])} tokens"
    if tokens := (recipe.get("distill") or {}).get("tokens"):
        field = tokens * len(facts["finalists"])
        words += f", {share(facts['tokens'], tokens)} of those of the distillation and {share(facts['tokens'], field)}"
        words += " of what distilling every finalist would have taken"
    flops: Mapping[str, Any] = facts.get("flops") or {}
    if "rungs" in flops:
        return f"{words}. {_whole_cost(flops, recipe)}"
    if flops.get("run"):  # by earlier versions, of the rungs alone
        words += f"; in FLOPs these rungs alone are {share(flops['search'], flops['run'])} of the distillation"
    return f"{words}."


def _whole_cost(flops: Mapping[str, Any], recipe: Facts) -> str:
    """All parts of a search as shares of the distillation, or of each other if there is none."""
    total = sum(flops[part] for part in _PARTS)
    each = ", ".join(f"{name} {share(flops[part], flops['run'] or total)}" for part, name in _PARTS.items())
    if len((recipe.get("search") or {}).get("targets") or ()) > 1:
        each = each.replace(_PARTS["cache"], f"{_PARTS['cache']} for all sizes")
    if flops["run"]:
        words = (
            f"In FLOPs the rungs alone take {share(flops['rungs'], flops['run'])} of the distillation, and the whole"
        )
        words += f" search {share(total, flops['run'])}: {each}"
    else:
        words = f"In FLOPs the rungs alone take {share(flops['rungs'], total)} of the whole search: {each}"
    return f"{words}. Measurements on held-out samples, and questions, are not counted."


def _spelled(cell: Cell) -> str:
    return f"{cell.value} ± {cell.error}" if cell.error else cell.value
