"""Does the tournament choose the shape that is best once all are trained, and is that better than the baselines?

    python benchmarks/search.py WORK [--seed 0] [--tokens 2000000] [--lr 2e-3] [--finalists 8] [--only STEP ...]
    python benchmarks/search.py WORK --seed 9 --only finalists rates --rates 5e-4 1e-3 2e-3
    python benchmarks/search.py WORK --model FOLDER --name NAME --train FILE ... --valid FILE ... [--context 512]
        [--shapes 28x576x1024 26x576x1152] [--refit-tokens N] [--held-out 176 --chosen-on 96]

On the demo's teacher, corrected as in the demo, or on a model folder as it is. Steps, each resumable, each adding lines
of JSON to benchmarks/results/search/NAME-SEED-TOKENS.jsonl:

    finalists    every shape within the budget is tried; the best go on, of at least three depths. With --shapes (layers
                 x hidden x ffn) these are tried, with the layers that a cut without a search keeps
    tournament   successive halving, up to two fifths of the tokens
    baselines    BI's contiguous block, greedy removal, the additive program: at the same budget
    field        every finalist and every baseline trained to the end, on the same samples in the same order
    verdict      the choice against the best of the field and against each baseline, paired by sample; flips
    rates        the first and the last finalist trained to the end at each of --rates: for another seed

The tournament chooses, and a rate is chosen, on the first --chosen-on held-out samples. The verdict is on the others.
A kill loses at most the steps since the last checkpoint. Speed is printed by the training itself (metrics.jsonl).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from teachers import add_arguments, parsed, recipe_of
from torch import Tensor

from halve.anatomy import Arch
from halve.cut.plan.sizes import Candidate
from halve.cut.trial import Tried
from halve.cut.trial import best as best_tried
from halve.disk.files import read_json, write_json
from halve.model.checkpoint import Checkpoint
from halve.model.measure import average, difference
from halve.pipeline import run as pipeline
from halve.progress import RichProgress
from halve.recipe.schema import Distill, Prune, Recipe, Search
from halve.search.agreement import rank_agreement
from halve.search.blocks import additive_choice
from halve.search.candidates import Found
from halve.search.finalists import choose_finalists
from halve.search.halving import TIE, Ladder, ladder
from halve.search.outcome import outcome
from halve.search.searched import seen_by, shapes_of
from halve.search.settled import is_cut
from halve.search.tournament import Played, School, play
from halve.search.workshop import Workshop
from halve.stages import cache as cache_stage
from halve.text.batch import Batch
from halve.text.opened import open_text
from halve.train.ranks.group import ALONE
from halve.train.teachers import answers

RESULTS = Path(__file__).with_name("results") / "search"
STEPS = ("finalists", "tournament", "baselines", "field", "verdict")
ELSE = ("rates",)
SHARE, RUNGS, KEEP = 0.4, 3, 0.5
"""A tournament's winner trains on this share of the tokens. With eight finalists and room for ties that is a quarter of
what training all of them takes."""


def main() -> None:
    """Run the steps that are asked for."""
    parser = argparse.ArgumentParser(description="The tournament against the whole field, and against baselines.")
    parser.add_argument("work", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=2_000_000, help="of each training to the end")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--precision", default="float32", help="of the products in training")
    parser.add_argument("--finalists", type=int, default=8)
    parser.add_argument("--ratio", type=float, default=0.5, help="of the non-embedding parameters")
    parser.add_argument("--only", nargs="+", choices=STEPS + ELSE, default=list(STEPS))
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3], help="of the step rates")
    parser.add_argument("--held-out", type=int, default=176, help="held-out samples in all")
    parser.add_argument("--chosen-on", type=int, default=96, help="held-out samples that choose")
    add_arguments(parser)
    parser.add_argument("--shapes", nargs="+", help="finalists as layers x hidden x ffn, 28x576x1024")
    parser.add_argument("--refit-tokens", type=int, help="of the trial and the cuts")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parsed(parser)
    bench = Bench(args)
    for step in args.only:
        getattr(bench, step)()


@dataclass(frozen=True)
class Entry:
    """A shape of the field, and who proposed it."""

    name: str
    tried: Tried
    folder: Path

    @property
    def checkpoint(self) -> Checkpoint:
        """Its model after the cut."""
        return Checkpoint.open(self.folder)


class Bench:
    """One seed."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.progress = args, RichProgress(Console(stderr=True))
        self.place: Path = args.work / f"seed-{args.seed}-{args.tokens}"
        self.place.mkdir(parents=True, exist_ok=True)
        recipe = recipe_of(args)
        assert recipe.distill is not None
        self.distill: Distill = recipe.distill.model_copy(
            update={
                "tokens": args.tokens,
                "batch": args.batch,
                "micro_batch": min(args.micro_batch, args.batch),
                "precision": args.precision,
                "lr": args.lr,
                "min_lr": args.lr / 20,
                "cache": "hidden",
                "eval_samples": args.held_out,
                "eval_every": 10**9,  # rungs alone
                "baselines": (),
                "checkpoint_every": 32,
            }
        )
        search = Search.model_validate(
            {"budget": {"non_embedding": f"{100 * args.ratio:g}%"}, "candidates": args.finalists}
        )
        prune = Prune() if args.refit_tokens is None else Prune(refit_tokens=args.refit_tokens)
        update = {"seed": args.seed, "prune": prune, "search": search, "distill": self.distill}
        self.recipe: Recipe = recipe.model_copy(update=update)
        self.run: Path = args.work / f"run-{args.seed}"
        for stage in ("correct", "score")[recipe.correct is None :]:
            pipeline.run(self.recipe, self.run, only=stage, cache=args.work / "data", console=None)
        self.teacher = Checkpoint.open(args.model or self.run / "correct" / "model")

    # ---- steps

    def finalists(self) -> None:
        """Try every shape within the budget, and cut the best."""
        began, archs = time.monotonic(), self.candidates
        depths = {arch.layers for arch in archs}
        own = self.args.shapes is not None
        kept = self.workshop.compared(depths, self.recipe.score) if own else self.workshop.layers(depths)
        tried = self.workshop.tried(archs, kept, path=self.place / "trial.jsonl")
        chosen = choose_finalists(tried, self.args.finalists)
        for i, finalist in enumerate(chosen):
            self._cut(f"finalist-{i}", finalist)
        self._tell(
            "finalists",
            candidates=len(archs),
            seconds=time.monotonic() - began,
            finalists=[{**one.arch.sizes, "trial_kl": one.kl} for one in chosen],
        )

    def tournament(self) -> None:
        """Play it, and write what it found."""
        began, entries = time.monotonic(), self.entries("finalist")
        school = self.school(self._short, self.args.chosen_on)
        plan = self.plan(len(entries))
        played = play(
            [entry.checkpoint for entry in entries],
            plan,
            school,
            out=self._folder("tournament"),
            progress=self.progress,
        )
        pairs = [(self._candidate(entry.tried), entry.tried) for entry in entries]
        about = {"trial": self._of_the_trial, "seed": self.args.seed, "end": self.args.tokens}
        found = outcome(pairs, plan, played, answered=None, **about)
        write_json(self.place / "outcome.json", found)
        whole = len(entries) * self.args.tokens
        self._tell(
            "tournament",
            seconds=time.monotonic() - began,
            tokens=found["tokens"],
            share=found["tokens"] / whole,
            last_two=[_gap(*reversed(played.kl(rung, played.last[:2]))) for rung in range(len(plan.tokens))],
            **{key: found[key] for key in ("chosen", "overtakes", "second", "straight", "agreement", "rises", "rungs")},
        )

    def baselines(self) -> None:
        """Cut what the baselines choose, at the budget nearest to that of the finalists."""
        shop, sizes = self.workshop, self.teacher.anatomy.sizes
        depth = min(range(1, sizes.layers), key=lambda n: abs(self._non_embedding(sizes.at(layers=n)) - self._budget))
        sets = {"bi-block": ("bi", "block"), "greedy": ("bi", "greedy")}
        chosen: dict[str, Tried] = {}
        for name, (criterion, pattern) in sets.items():
            asked = self.recipe.score.model_copy(update={"depth": criterion, "depth_pattern": pattern})
            chosen[name] = Tried(sizes.at(layers=depth), shop.compared({depth}, asked)[depth], float("nan"))
        pairs = [self._candidate(Tried(arch, tuple(range(arch.layers)), 0.0)) for arch in self.candidates]
        chosen["additive"] = additive_choice(shop.calibration, shop.scores, pairs, self._seen)
        for name, baseline in chosen.items():
            self._cut(f"baseline-{name}", baseline)
            counted = self._candidate(baseline).counts
            layers = list(baseline.kept_layers)
            self._tell("baseline", name=name, **baseline.arch.sizes, kept=layers, non_embedding=counted.non_embedding)

    def field(self) -> None:
        """Train everything to the end: finalists first."""
        entries = [*self.entries("finalist"), *self.entries("baseline")]
        school = self.school(self.distill, self.args.held_out)
        for entry in entries:
            began = time.monotonic()
            played = play(
                [entry.checkpoint], self._alone, school, out=self._folder(f"field/{entry.name}"), progress=self.progress
            )
            kl = [average(_row(played, rung)[self.args.chosen_on :]).as_dict() for rung in (0, 1)]
            self._tell("trained", name=entry.name, seconds=time.monotonic() - began, before=kl[0], after=kl[1])

    def verdict(self) -> None:
        """The choice against the field, and flips."""
        field = {name: self._trained(name) for name in self._finished()}
        names = sorted(name for name in field if name.startswith("finalist"))
        before, after = (torch.stack([field[name][i] for name in names]) for i in (0, 1))
        found = read_json(self.place / "outcome.json")
        chosen, best = f"finalist-{found['chosen']}", names[int(after.mean(1).argmin())]
        straight = names[int(before.mean(1).argmin())]
        trial = f"finalist-{self._of_the_trial}"
        agreement = rank_agreement(before, after, seed=self.args.seed)
        self._tell(
            "verdict",
            complete=len(names) == self.args.finalists,
            chosen=chosen,
            best=best,
            chosen_minus_best=_gap(field[chosen][1], field[best][1]) if chosen in field else None,
            straight=straight,
            straight_minus_best=_gap(field[straight][1], field[best][1]),
            trial=trial,
            trial_minus_best=[_gap(field[trial][i], field[best][i]) for i in (0, 1)] if trial in field else None,
            flip=_clear(field[straight][1], field[best][1]) and _clear(field[best][0], field[straight][0]),
            agreement=None if agreement is None else vars(agreement),
            chosen_minus_baseline={
                name: _gap(field[chosen][1], field[name][1])
                for name in field
                if name.startswith("baseline") and chosen in field
            },
        )

    def rates(self) -> None:
        """What each learning rate reaches. The verdicts of other seeds use the best."""
        entries = self.entries("finalist")
        for lr in self.args.rates:
            school = self.school(self.distill.model_copy(update={"lr": lr, "min_lr": lr / 20}), self.args.chosen_on)
            for entry in (entries[0], entries[-1]):
                out = self._folder(f"rates/{lr:g}/{entry.name}")
                played = play([entry.checkpoint], self._alone, school, out=out, progress=self.progress)
                self._tell("rate", name=entry.name, rate=lr, after=average(_row(played, 1)).as_dict())

    # ---- what they need

    @property
    def _of_the_trial(self) -> int:
        """The finalist that the trial's own rule takes."""
        tries = [entry.tried for entry in self.entries("finalist")]
        return tries.index(best_tried(tries))

    @property
    def _short(self) -> Distill:
        return self.distill.model_copy(update={"tokens": self.plan(self.args.finalists).tokens[-1]})

    @property
    def _step(self) -> int:
        return self.distill.batch * self.recipe.data.context

    def plan(self, count: int) -> Ladder:
        """The rungs of the tournament."""
        return ladder(count, tokens=round(SHARE * self.args.tokens), rungs=RUNGS, keep=KEEP, step=self._step)

    @cached_property
    def candidates(self) -> list[Arch]:
        """The shapes that the search of this recipe tries, or those that were asked for."""
        if self.args.shapes:
            return [self.teacher.anatomy.sizes.at(**_sizes(shape)) for shape in self.args.shapes]
        return [candidate.arch for candidate in shapes_of(self.recipe, self._seen)]

    @cached_property
    def _seen(self) -> Found:
        return seen_by(self.recipe, self.teacher.anatomy)

    @cached_property
    def _budget(self) -> float:
        return float(self.args.ratio) * self._non_embedding(self.teacher.anatomy.sizes)

    @cached_property
    def workshop(self) -> Workshop:
        """The teacher, opened once."""
        scores = self.run / "score" / "scores.safetensors"
        return Workshop.open(
            self.recipe,
            self.teacher,
            scores=scores,
            archs=self.candidates,
            cache=self.args.work / "data",
            progress=self.progress,
        )

    @property
    def _alone(self) -> Ladder:
        return ladder(1, tokens=self.args.tokens, rungs=1, keep=KEEP, step=self._step)

    def school(self, training: Distill, held_out: int) -> School:
        """The answers of the teacher for a training, made once, and its text with this many held-out samples."""
        recipe = self.recipe.model_copy(update={"distill": self.distill})
        stored, data = self.args.work / f"answers-{self.args.seed}-{self.args.tokens}", self.args.work / "data"
        if not (stored / "index.json").exists():
            cache_stage.run(recipe, teacher=self.teacher, cache=data, out=stored, progress=self.progress)
        recipe = self.recipe.model_copy(update={"distill": training})
        text = open_text(recipe, training, self.teacher, cache=data, progress=self.progress)
        digest = self.teacher.fingerprint
        store = answers.open_store(stored, recipe, training, teacher=digest, text=text)
        heldout = text.heldout if self.args.model is None else _shuffled(text.heldout)
        return School(recipe, training, replace(text, heldout=heldout[:held_out]), store, "cpu", ALONE)

    def entries(self, kind: str) -> list[Entry]:
        """What was cut, by its name."""
        found = sorted(self.place.glob(f"cut/{kind}-*/tried.json"))
        return [Entry(path.parent.name, Tried.from_json(read_json(path)), path.parent / "model") for path in found]

    def _cut(self, name: str, tried: Tried) -> None:
        folder = self._folder(f"cut/{name}")
        if not is_cut(tried, folder / "model"):
            self.workshop.cut(tried, folder / "model", extra_from=self.teacher.files, record={})
        write_json(folder / "tried.json", tried.to_json())

    def _candidate(self, tried: Tried) -> Candidate:
        counts = self.teacher.anatomy.ledger.count(tried.arch, kept_layers=tried.kept_layers)
        return Candidate(tried.arch, counts, tried.kept_layers)

    def _non_embedding(self, arch: Arch) -> int:
        return self.teacher.anatomy.ledger.count(arch).non_embedding

    def _finished(self) -> Sequence[str]:
        return [path.parent.name for path in sorted(self.place.glob("field/*/rungs.jsonl")) if len(_lines(path)) == 2]

    def _trained(self, name: str) -> tuple[Tensor, Tensor]:
        """KL before and after of each sample that chose nothing."""
        before, after = (
            torch.tensor(line["by_sample"]) for line in _lines(self.place / "field" / name / "rungs.jsonl")
        )
        return before.double()[self.args.chosen_on :], after.double()[self.args.chosen_on :]

    def _folder(self, name: str) -> Path:
        folder = self.place / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _tell(self, step: str, **found: Any) -> None:
        about = {key: getattr(self.args, key) for key in ("seed", "tokens", "lr", "ratio", "batch")}
        line = json.dumps({"step": step, **about, **found})
        print(line, flush=True)
        self.args.out.mkdir(parents=True, exist_ok=True)
        path = self.args.out / f"{self.args.name}-{self.args.seed}-{self.args.tokens}.jsonl"
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def _shuffled(samples: Batch) -> Batch:
    """The same samples in an order that every seed has, so that those that choose are of every file."""
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0)).tolist()
    return Batch.joined([samples[i : i + 1] for i in order])


def _sizes(shape: str) -> dict[str, int]:
    """Sizes written as layers x hidden x ffn."""
    return dict(zip(("layers", "hidden", "ffn"), map(int, shape.split("x")), strict=True))


def _row(played: Played, rung: int) -> Tensor:
    return played.kl(rung, [0])[0]


def _lines(path: Path) -> list[Mapping[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _gap(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    return difference(ours, theirs).as_dict()


def _clear(ours: Tensor, theirs: Tensor) -> bool:
    """Whether ours is higher beyond two paired standard errors."""
    gap = difference(ours, theirs)
    return gap.value > TIE * gap.stderr


if __name__ == "__main__":
    main()
