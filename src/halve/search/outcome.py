"""What a search found, as plain data: the choice, how sure it is, and what it cost. The report is made from this.

finalists   [{arch, kept_layers, params, non_embedding, trial_kl, curve [{tokens, kl, stderr}]}]
rungs       [{tokens, kept, gone, ties, forced}] by finalist, counted from 0; the first and the last select nobody
chosen      the finalist with the lowest KL at the last rung, or one that overtakes it
overtakes   {finalist, behind, ahead, tokens}: the finalist with the lowest KL, how far the choice is behind it at the
            last rung, and how far ahead after so many tokens, extrapolated; null where nobody clearly overtakes
second      {finalist, gap {value, stderr}, clear}: the next one, and how far it is behind at the last rung, or after
            those tokens; null for one finalist
straight    the finalist with the lowest KL straight after the cut
trial       the finalist that a trial would take by its samples and its rule for ties; null if it is none of them
agreement   [{rung, tau, low, high, candidates}]: Kendall's tau of the ranks straight after the cut and at a rung
rises       [{finalist, rung, value, stderr}]: where a finalist's KL rose
choices     {name, items, accuracies {finalist: estimate}, best, gap {value, stderr}, agrees}; null without a file
samples     held-out samples
tokens      that all finalists trained on together
flops       {layers, trial, cache, finalists, rungs, run}: of the search's parts (`search.counted`), and of the recipe's
            distillation of the choice; run may be null

Of a search without a tournament (`untrained`):

tried       [{arch, kept_layers, params, non_embedding, kl, by_sample, stderr}]; empty if an integer program chose
choice      {arch, kept_layers, params, non_embedding, kl}; after an integer program kl is the sum of harms
candidates  how many there were, with those that break the budget with their layers
behind      how much higher the choice's KL in the trial is than the lowest; null after an integer program
ties        how many more shapes count as equal
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from halve.anatomy import Counts
from halve.cut.plan.sizes import Candidate
from halve.cut.trial import Tried, num_ties
from halve.model.measure import average, difference, proportion
from halve.search.agreement import rank_agreement, rises
from halve.search.extrapolation import Overtaking, overtaking
from halve.search.halving import Ladder, leader
from halve.search.tournament import Played

RightItems = Mapping[int, Tensor]
"""By finalist, which items of a multiple-choice file it answered correctly."""


def outcome(
    finalists: Sequence[tuple[Candidate, Tried]],
    plan: Ladder,
    played: Played,
    *,
    trial: int | None,
    answered: tuple[str, RightItems] | None,
    seed: int,
    end: int | None = None,
) -> dict[str, Any]:
    """The outcome of a tournament.

    `trial` is the finalist that a trial would take. `end` are the tokens of the distillation, if there is one.
    `answered` are the name of a multiple-choice file and the answers
    of the finalists, each as it was at the last rung that it reached. The bootstrap of the agreement draws from the
    seed.
    """
    everyone, last = range(len(finalists)), len(plan.tokens) - 1
    lead = leader(played.kl(last, played.last))
    chosen, second, overtakes = played.last[lead.row], None, None
    if lead.second is not None and lead.gap is not None:
        second = {"finalist": played.last[lead.second], "gap": lead.gap.as_dict(), "clear": lead.clear}
    found = _overtaking(plan, played, end)
    if found is not None:
        chosen, other = played.last[found.row], played.last[found.other]
        overtakes = {"finalist": other, **found.as_dict()}
        second = {"finalist": other, "gap": found.ahead.as_dict(), "clear": True}
    return {
        "finalists": [_finalist(i, *finalist, plan, played) for i, finalist in enumerate(finalists)],
        "rungs": _rungs(plan, played),
        "chosen": chosen,
        "overtakes": overtakes,
        "second": second,
        "straight": leader(played.kl(0, everyone)).row,
        "trial": trial,
        "agreement": _agreements(plan, played, seed),
        "rises": _rises(plan, played, len(finalists)),
        "choices": None if answered is None else _choices(*answered, chosen=chosen),
        "samples": len(played.showings[0].by_sample),
        "tokens": sum(showing.tokens for showing in _furthest(played).values()),
    }


def _overtaking(plan: Ladder, played: Played, end: int | None) -> Overtaking | None:
    """Who overtakes the finalist with the lowest KL, of those that reached the last rung."""
    last = len(plan.tokens) - 1
    if end is None or last < 2:  # the rung before the last one is the cut itself
        return None
    before_CS, last_CS = (played.kl(rung, played.last) for rung in (last - 1, last))
    return overtaking(before_CS, last_CS, (plan.tokens[last - 1], plan.tokens[last]), end=end)


def untrained(
    method: str, tried: Sequence[Tried], chosen: Tried, count: Callable[[Tried], Counts], *, candidates: int
) -> dict[str, Any]:
    """The outcome of a search that trained nothing."""

    def shown(shape: Tried) -> dict[str, Any]:
        counts = count(shape)
        sizes = {"arch": shape.arch.sizes, "kept_layers": list(shape.kept_layers)}
        return {**sizes, "params": counts.params, "non_embedding": counts.non_embedding, "kl": shape.kl}

    def measured(shape: Tried) -> dict[str, Any]:
        error = average(torch.tensor(shape.by_sample, dtype=torch.float64)).stderr
        return {**shown(shape), "by_sample": list(shape.by_sample), "stderr": error}

    behind = None
    if tried:
        value, stderr = chosen.behind(min(tried, key=lambda one: one.kl))
        behind = {"value": value, "stderr": stderr}
    return {
        "method": method,
        "tried": [measured(shape) for shape in tried],
        "choice": shown(chosen),
        "candidates": candidates,
        "behind": behind,
        "ties": num_ties(tried) if tried else 0,
    }


def _finalist(number: int, candidate: Candidate, tried: Tried, plan: Ladder, played: Played) -> dict[str, Any]:
    shown = sorted(
        (showing for showing in played.showings if showing.finalist == number), key=lambda showing: showing.rung
    )
    estimates = [average(torch.tensor(showing.by_sample, dtype=torch.float64)) for showing in shown]
    return {
        "arch": candidate.arch.sizes,
        "kept_layers": list(tried.kept_layers),
        "params": candidate.counts.params,
        "non_embedding": candidate.counts.non_embedding,
        "trial_kl": tried.kl,
        "curve": [
            {"tokens": plan.tokens[showing.rung], "kl": estimate.value, "stderr": estimate.stderr}
            for showing, estimate in zip(shown, estimates, strict=True)
        ],
    }


def _rungs(plan: Ladder, played: Played) -> list[dict[str, Any]]:
    selections: list[dict[str, Any]] = [{} for _ in plan.tokens]
    for rung, selection in enumerate(played.selections, 1):
        selections[rung] = {key: list(value) for key, value in vars(selection).items()}
    return [{"tokens": tokens, **selected} for tokens, selected in zip(plan.tokens, selections, strict=True)]


def _agreements(plan: Ladder, played: Played, seed: int) -> list[dict[str, Any]]:
    """How far the ranks straight after the cut agree with those at each rung, among those that reached it."""
    listed = []
    for rung in range(1, len(plan.tokens)):
        there = _there(played, rung)
        agreement = rank_agreement(played.kl(0, there), played.kl(rung, there), seed=seed)
        if agreement is not None:
            listed.append({"rung": rung, **vars(agreement)})
    return listed


def _rises(plan: Ladder, played: Played, count: int) -> list[dict[str, Any]]:
    absent = [torch.nan] * len(played.showings[0].by_sample)
    shown = {(showing.rung, showing.finalist): list(showing.by_sample) for showing in played.showings}
    rows = [[shown.get((rung, i), absent) for i in range(count)] for rung in range(len(plan.tokens))]
    return [
        {"finalist": rise.row, "rung": rise.rung, **rise.by.as_dict()}
        for rise in rises(torch.tensor(rows, dtype=torch.float64))
    ]


def _choices(name: str, answered: RightItems, *, chosen: int) -> dict[str, Any]:
    """Who answers most items, and how far ahead of the choice by KL it is, item by item."""
    best = max(answered, key=lambda finalist: (int(answered[finalist].sum()), finalist == chosen))
    gap = difference(answered[best].double(), answered[chosen].double())
    return {
        "name": name,
        "items": len(answered[best]),
        "accuracies": {str(finalist): proportion(right).as_dict() for finalist, right in answered.items()},
        "best": best,
        "gap": gap.as_dict(),
        "agrees": best == chosen,
    }


def _there(played: Played, rung: int) -> list[int]:
    return sorted(showing.finalist for showing in played.showings if showing.rung == rung)


def _furthest(played: Played) -> dict[int, Any]:
    """The last showing of every finalist."""
    return {showing.finalist: showing for showing in sorted(played.showings, key=lambda showing: showing.rung)}
