"""The tournament: finalists train on the same samples in the same order, and the worse ones leave at every rung.

    OUT/rungs.jsonl                one line for every finalist and rung (`Showing`), added when it was measured
    OUT/.finalists/0/              a finalist's checkpoints and its metrics.jsonl

Every finalist reads the same cached answers of the teacher. Its training is one run of the loop, with one schedule to
the last rung, that pauses at each rung. So a tournament that was killed goes on from the last line and the last
checkpoint, with the same bits. Where there are several ranks, all of them train each finalist together.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from halve.anatomy.work import by_context, learning
from halve.disk.lines import JsonLines
from halve.model.checkpoint import Checkpoint
from halve.model.head import split
from halve.progress import SILENT, Progress
from halve.recipe.schema import Distill, Recipe
from halve.search.halving import Ladder, Survivors, select_candidates
from halve.text.documents import require_apart
from halve.text.opened import Text
from halve.train.loop import adapters, checkpoints, loop
from halve.train.objectives.logits import shared_vocab
from halve.train.objectives.stored import BySample, from_store
from halve.train.ranks.group import Ranks
from halve.train.teachers.cache import Store

RUNGS: Final = "rungs.jsonl"
FINALISTS: Final = ".finalists"


@dataclass(frozen=True)
class Showing:
    """What a finalist shows at a rung: its KL to the teacher on held-out samples, in nats a token."""

    finalist: int
    rung: int
    tokens: int
    kl: float
    ce: float
    agreement: float
    by_sample: tuple[float, ...]
    """KL of each sample, a mean over its tokens."""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Showing:
        """From the data of a line."""
        return cls(**{**data, "by_sample": tuple(data["by_sample"])})


@dataclass(frozen=True)
class Played:
    """What came out: every showing, and who went on from each rung but the first and the last, by finalist."""

    showings: tuple[Showing, ...]
    selections: tuple[Survivors, ...]
    last: tuple[int, ...]
    """The finalists that reached the last rung, the best first."""

    def kl(self, rung: int, finalists: Sequence[int]) -> Tensor:
        """KL of these finalists at a rung, [finalists, samples]."""
        shown = {(showing.finalist, showing.rung): showing.by_sample for showing in self.showings}
        return torch.tensor([shown[finalist, rung] for finalist in finalists], dtype=torch.float64)


@dataclass(frozen=True)
class LowRank:
    """Adapters that are trained instead of all weights."""

    rank: int
    alpha: float


@dataclass(frozen=True, eq=False)
class School:
    """What all finalists share: the recipe, the training to the last rung, the text and the teacher's answers."""

    recipe: Recipe
    training: Distill
    text: Text
    store: Store
    device: str
    ranks: Ranks
    adapter: LowRank | None = None
    """None: all weights are trained."""


Graduate = Callable[[int, PreTrainedModel], None]
"""Receives a finalist as it was trained, at every rung that it trained to. With several ranks it is in shards."""


def play(
    finalists: Sequence[Checkpoint],
    plan: Ladder,
    school: School,
    *,
    out: Path,
    graduate: Graduate | None = None,
    progress: Progress = SILENT,
) -> Played:
    """Train finalists by successive halving, or go on with a tournament that was killed.

    `plan` is for this many finalists and for steps of `school.training`. Raises what the training loop raises.
    """
    ranks, last = school.ranks, len(plan.tokens) - 1
    kept = JsonLines(out / RUNGS, Showing.from_json) if ranks.leads else None
    told = ranks.lead(lambda: [asdict(showing) for showing in kept.kept] if kept else [])
    shown = {(showing.finalist, showing.rung): showing for showing in map(Showing.from_json, told)}
    alive, spent, selections = list(range(len(finalists))), 0, []
    for rung in range(len(plan.tokens)):
        for finalist in alive:
            if (finalist, rung) not in shown:
                place = out / FINALISTS / str(finalist)
                showing, model = _trained(finalists[finalist], finalist, rung, plan, school, place, progress)
                if graduate is not None and (rung or not last):
                    graduate(finalist, model)
                shown[finalist, rung] = Showing.from_json(ranks.lead(partial(_kept, kept, showing)))
        spent += plan.cost(rung, len(alive))
        kl_CS = torch.tensor([shown[finalist, rung].by_sample for finalist in alive], dtype=torch.float64)
        if rung == last:
            alive = [alive[row] for row in kl_CS.mean(1).argsort(stable=True).tolist()]
        elif rung:
            selection = _by_finalist(select_candidates(kl_CS, plan, rung, spent), alive)
            selections.append(selection)
            alive = sorted(selection.kept)
            progress.say(_words(rung, selection, plan))
            ranks.lead(partial(_forget, out, selection.gone))
    return Played(tuple(shown.values()), tuple(selections), tuple(alive))


def _trained(
    start: Checkpoint, finalist: int, rung: int, plan: Ladder, school: School, place: Path, progress: Progress
) -> tuple[Showing, PreTrainedModel]:
    """Bring a finalist to a rung and measure it there."""
    recipe, training, ranks = school.recipe, school.training, school.ranks
    model = start.load(dtype=recipe.dtype, device=ranks.home(school.device))
    if recipe.data.documents == "apart":
        require_apart(model)
    head = school.store.head(school.device)
    num_tokens = min(1 + max(school.text.tokenizer.get_vocab().values()), head.weight.shape[0])
    vocab = shared_vocab(split(model)[1], head, num_tokens=num_tokens)
    school.store.require_vocab(vocab)
    if school.adapter is not None:
        adapters.add_lora(model, rank=school.adapter.rank, alpha=school.adapter.alpha, seed=recipe.seed)
    measured = BySample(school.store, head, school.text.heldout, vocab=vocab)
    lesson = loop.Lesson(
        from_store(school.store, head, training, vocab=vocab),
        heldout=measured,
        flops=by_context(learning, start.anatomy),
    )
    steps = plan.tokens[rung] // (training.batch * recipe.data.context)
    ranks.lead(partial(_rewound, place / ".checkpoints", steps))
    files = loop.TrainFiles(place / ".checkpoints", place / "metrics.jsonl", recipe.seed, f"finalist {finalist + 1}")
    result = loop.train(
        model, lesson, school.text.course, files, device=school.device, until=steps, ranks=ranks, progress=progress
    )
    assert result.tokens == plan.tokens[rung]
    return Showing(finalist, rung, result.tokens, **result.heldout, by_sample=measured.last), model


def _rewound(work: Path, steps: int) -> None:
    """Remove checkpoints that are later than the rung, of which a line was lost. Training anew gives the same bits."""
    for kept in checkpoints.complete(work):
        if kept.name > checkpoints.folder(work, steps).name:
            shutil.rmtree(kept)


def _kept(lines: JsonLines[Showing] | None, showing: Showing) -> dict[str, Any]:
    """The showing as plain data, once it is on disk."""
    assert lines is not None
    data = asdict(showing)
    lines.add(showing, data)
    return data


def _by_finalist(rows: Survivors, alive: Sequence[int]) -> Survivors:
    def named(some: Sequence[int]) -> tuple[int, ...]:
        return tuple(alive[row] for row in some)

    return Survivors(named(rows.kept), named(rows.gone), named(rows.ties), named(rows.forced))


def _words(rung: int, selection: Survivors, plan: Ladder) -> str:
    """Who leaves after a rung, counted from 1."""

    def listed(some: Sequence[int]) -> str:
        return ", ".join(str(finalist + 1) for finalist in some)

    words = f"rung {rung} ({plan.tokens[rung]:,} tokens each): finalists {listed(selection.kept)} go on"
    if selection.ties:
        words += f" ({listed(selection.ties)} by a tie)"
    if selection.forced:
        words += f"; {listed(selection.forced)} were tied as well, for which the budget has no room"
    return words


def _forget(out: Path, finalists: Sequence[int]) -> None:
    """Remove the checkpoints of those that left."""
    for finalist in finalists:
        shutil.rmtree(out / FINALISTS / str(finalist) / ".checkpoints", ignore_errors=True)
