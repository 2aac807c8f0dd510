"""What a step changes on held-out examples: nats of what the assistant says, and which answer the model prefers.

Shapes: B samples, S tokens, T predictions (S - 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor
from transformers import PreTrainedModel

from halve.align.examples import Dialogue, Preference
from halve.model import measure
from halve.model.head import split

_TOKENS = 4096  # of one forward pass


def dialogue_logps(model: PreTrainedModel, talks: Sequence[Dialogue]) -> Float64[Tensor, " samples"]:
    """The log-probability of what the assistant says in each conversation, in nats."""
    return _logps(model, [(talk.ids, talk.counts) for talk in talks])


def pair_logps(model: PreTrainedModel, pairs: Sequence[Preference]) -> Float64[Tensor, "2 samples"]:
    """The log-probabilities of the chosen and of the rejected answers, in nats."""
    rows = [_row(pair.prompt, pair.chosen) for pair in pairs] + [_row(pair.prompt, pair.rejected) for pair in pairs]
    return _logps(model, rows).view(2, -1)


def told_of_dialogues(
    talks: Sequence[Dialogue], before: Float64[Tensor, " samples"], after: Float64[Tensor, " samples"]
) -> dict[str, Any]:
    """Nats per counted token before and after, and their difference, each with its standard error."""
    counts = torch.tensor([int(talk.counts[1:].sum()) for talk in talks])
    was, now = -before / counts, -after / counts
    return {
        "heldout": len(talks),
        "nats_before": measure.average(was, counts).as_dict(),
        "nats_after": measure.average(now, counts).as_dict(),
        "nats_gain": measure.difference(now, was, counts).as_dict(),
    }


def told_of_pairs(
    pairs: Sequence[Preference],
    before: Float64[Tensor, "2 samples"],
    after: Float64[Tensor, "2 samples"],
    *,
    beta: float,
) -> dict[str, Any]:
    """Of pairs whose rewards differ, how often the model agrees with them, with standard errors.

    `accuracy` is the share of pairs in which the chosen answer gained more log-probability than the rejected one. A tie
    counts half, so that the accuracy of the step's start is 1/2. `likelier` is the share in which the chosen answer is
    the more probable one, before and after. `margin` is the mean of `beta D` (see `losses`). All are left out where no
    pair has a better answer.
    """
    clear = torch.tensor([pair.gap > 0 for pair in pairs])
    if not clear.any():
        return {"heldout": 0}
    was, now = (logps[0, clear] - logps[1, clear] for logps in (before, after))
    first, last = _better(was), _better(now)
    return {
        "heldout": int(clear.sum()),
        "accuracy": measure.average(_better(now - was)).as_dict(),
        "likelier_before": measure.average(first).as_dict(),
        "likelier_after": measure.average(last).as_dict(),
        "likelier_gain": measure.difference(last, first).as_dict(),
        "margin": measure.average(beta * (now - was)).as_dict(),
    }


def _better(differences: Tensor) -> Tensor:
    return (differences.sign() + 1) / 2


def _row(prompt: list[int], answer: list[int]) -> tuple[np.ndarray, np.ndarray]:
    counts = np.zeros(len(prompt) + len(answer), dtype=np.bool_)
    counts[len(prompt) :] = True
    return np.array([*prompt, *answer], dtype=np.int32), counts


@torch.no_grad()
def _logps(model: PreTrainedModel, rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> Tensor:
    """The sum over the counted tokens of each row. Padding stands behind, where causal attention does not see it."""
    body, head = split(model)
    logps = torch.zeros(len(rows), dtype=torch.float64)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    while order:
        longest = len(rows[order[0]][0])
        number = max(1, _TOKENS // longest)
        part, order = order[:number], order[number:]
        ids_BS = torch.zeros(len(part), longest, dtype=torch.long)
        counts_BS = torch.zeros(len(part), longest, dtype=torch.bool)
        for place, i in enumerate(part):
            ids, counts = rows[i]
            ids_BS[place, : len(ids)] = torch.from_numpy(ids)
            counts_BS[place, : len(ids)] = torch.from_numpy(counts)
        ids_BS = ids_BS.to(model.device)
        nats_BT = measure.token_nll(head, body(ids_BS), ids_BS).cpu()
        logps[part] = -torch.where(counts_BS[:, 1:], nats_BT, 0.0).sum(1)
    return logps
