"""A real model cut: how close halve's default, plain cuts and every baseline start to their teacher.

    python benchmarks/real_text.py DATA TEXT
    python benchmarks/real_model.py MODEL TEXT --work FOLDER --results FILE [--rows NAME ...] [--ratios 0.7 0.5]
    python benchmarks/real_page.py FILE --out PAGE

A row and a ratio are one line of FILE: sizes, KL to the teacher and perplexity on held-out documents with standard
errors over them, seconds, machine, date and seed. What has a line is not measured again, so that a row is a command
that can be repeated after a kill; `--work` keeps scores, token files and the run folders of halve's default.

Methods see samples in the number and length of their papers, drawn from one mixture of six kinds of text. Width methods
are cut in several shapes of full depth; the one that starts closest on documents that are not reported is the method's.
Depth methods take the nearest number of layers. halve's default is the run of a recipe that gives text and ratio alone.

A run in seconds, on a tiny model and the docstrings of the standard library, whose figures say nothing:

    python benchmarks/real_text.py --docstrings TEXT
    python benchmarks/real_model.py TINY TEXT --work FOLDER --results FILE --most-samples 16 --context 128 --of-each 2
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import time
import warnings
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from cut_methods import Depth, Setting, scores_of
from real_cuts import DEFAULT, OWN, ROWS, Row, cut_to, shapes_of, solves
from real_held import Held
from real_text import KINDS, held_documents
from transformers import PreTrainedModel

from halve.anatomy import Arch, discover
from halve.cut.repair.gram import SingularGramWarning
from halve.cut.score.scores import Scores
from halve.model.checkpoint import Checkpoint
from halve.pipeline import run as pipeline
from halve.progress import SILENT
from halve.recipe.schema import Data, Method, Prune, Recipe, Score, Source
from halve.text.boundary import bounded, settled
from halve.text.mixture import Mixture, open_mixture

CONTEXT = 512
"""Of a sample of halve's default; a paper's longer samples are cut into such."""
HELD_CONTEXT, OF_EACH, CHOOSING = 256, 15, 3
"""Tokens read of a held-out document, and documents of each kind: those reported, and those that choose shapes."""
MICRO_BATCH = 8


def main() -> None:
    """Measure what is not known yet."""
    parser = arguments("How close cuts of a real model start to their teacher.")
    parser.add_argument(
        "--keep", action="store_true", help="leave each student in the work folder, for real_distill.py"
    )
    args = parser.parse_args()
    bench, book = prepared(args)
    if book.find(row="teacher", seed=args.seed) is None:
        book.add({"row": "teacher", "seed": args.seed, **bench.held.about(), **where()})
    for ratio in args.ratios:
        for name in args.rows:
            key = {"row": name, "ratio": ratio, "seed": args.seed}
            if book.find(**key) is None:
                student, line = bench.measure(name, ratio)
                if args.keep:
                    student.save_pretrained(bench.place(name, ratio))
                book.add({**key, **line, **where()})


def arguments(description: str) -> argparse.ArgumentParser:
    """What the benchmarks on a real model are given."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="scores, token files and runs")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", choices=[DEFAULT, *ROWS, *OWN], default=[DEFAULT, *ROWS])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.7, 0.5])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--context", type=int, default=CONTEXT, help="longest calibration sample")
    parser.add_argument("--most-samples", type=int, default=1024, help="of a row")
    parser.add_argument("--of-each", type=int, default=OF_EACH, help="held-out documents of each kind of text")
    return parser


def prepared(args: argparse.Namespace) -> tuple[Bench, Lines]:
    """The teacher with its text, and the results that are there."""
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore", SingularGramWarning)
    args.work.mkdir(parents=True, exist_ok=True)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    return Bench(args), Lines(args.results)


class Lines:
    """Results on disk, one JSON line each."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def lines(self) -> list[dict[str, Any]]:
        """All lines; other processes may add to them."""
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def find(self, **key: Any) -> dict[str, Any] | None:
        """The line with these values."""
        return next((line for line in self.lines if key.items() <= line.items()), None)

    def add(self, line: dict[str, Any]) -> None:
        """Append and say it."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print({name: value for name, value in line.items() if "document" not in name}, flush=True)


def where() -> dict[str, Any]:
    """The day, the machine and how busy it is."""
    return {
        "date": f"{datetime.date.today()}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "load": round(os.getloadavg()[1], 1),
        "torch": torch.__version__,
    }


class Bench:
    """The teacher, its text, and what was already computed of both."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.work, self.seed = args, args.work, args.seed
        self.teacher = Checkpoint.open(args.model, home=self.work / "data")
        self.model, self.anatomy = self.teacher.load().requires_grad_(False), self.teacher.anatomy
        recipe = self.recipe(0.5)
        self.boundary = settled(recipe, self.teacher, cache=self.work / "data", progress=SILENT)
        self.held = self._documents(args.of_each, skip=CHOOSING)
        self._mixtures: dict[int, Mixture] = {}

    @cached_property
    def choosing(self) -> Held:
        """Documents that no row reports."""
        return self._documents(CHOOSING, skip=0)

    def recipe(self, ratio: float, context: int | None = None) -> Recipe:
        """What a user would write: text and ratio, nothing else."""
        text, args = self.args.text, self.args
        parts = {kind: Source(sources=(str(text / f"{kind}-train.jsonl"),), weight=1) for kind in KINDS}
        return Recipe(
            name=f"{Path(args.model).stem}-{100 * ratio:.0f}",
            model=args.model,
            seed=args.seed,
            data=Data(
                train=parts,
                valid=tuple(str(text / f"{kind}-held.jsonl") for kind in KINDS),
                context=context or args.context,
            ),
            score=Score(samples=min(Score().samples, args.most_samples)),
            prune=Prune(non_embedding_ratio=ratio),
        )

    def measure(self, name: str, ratio: float) -> tuple[PreTrainedModel, dict[str, Any]]:
        """One row at one ratio: its student, and what is found of it."""
        began, cpu = time.perf_counter(), time.process_time()
        student, line = self.student(name, ratio)
        line["seconds"] = {
            **line.get("seconds", {}),
            "cut_wall": time.perf_counter() - began,
            "cut_cpu": time.process_time() - cpu,
        }
        ledger, arch = self.anatomy.ledger, discover(student.config).sizes
        kept = discover(student.config).ledger.count(arch).non_embedding
        share = kept / ledger.count(self.anatomy.sizes).non_embedding
        sizes = {"sizes": arch.sizes, "non_embedding": kept, "share": share}
        return student, {**line, **sizes, **self._figures(student)}

    def place(self, name: str, ratio: float) -> Path:
        """The folder of a row's student."""
        folder: Path = self.work / "students" / slug(name, ratio)
        return folder

    def student(self, name: str, ratio: float) -> tuple[PreTrainedModel, dict[str, Any]]:
        """The student of a row, and how it came about."""
        return self._default(ratio) if name == DEFAULT else self._row((ROWS | OWN)[name], ratio)

    def _figures(self, student: PreTrainedModel) -> dict[str, Any]:
        began = time.perf_counter()
        figures = self.held.line(self.held.measured(student))
        return {**figures, "measuring_wall": time.perf_counter() - began}

    def _default(self, ratio: float) -> tuple[PreTrainedModel, dict[str, Any]]:
        """halve's default: score and prune of a run, whose stages are timed when they are carried out."""
        out = self.work / f"default-{100 * ratio:.0f}"
        recipe, times = self.recipe(ratio), out.with_suffix(".times.json")
        spent = json.loads(times.read_text()) if times.exists() else {}
        for stage in ("score", "prune"):
            began, cpu = time.perf_counter(), time.process_time()
            pipeline.run(recipe, out, only=stage)
            if stage not in spent:
                spent[stage] = {"wall": time.perf_counter() - began, "cpu": time.process_time() - cpu}
                times.write_text(json.dumps(spent))
        metrics = json.loads((out / "prune/manifest.json").read_text())["metrics"]
        tried = [{"sizes": one["arch"], "kl": one["kl"]} for one in metrics["shapes"]]
        figures = {name: metrics[name] for name in ("kept", "refit_kl", "plain_kl") if name in metrics}
        line = {"calibration": f"{recipe.score.samples} x {recipe.data.context}", "seconds": spent, "tried": tried}
        return Checkpoint.open(str(out / "prune/model")).load().requires_grad_(False), line | figures

    def _row(self, row: Row, ratio: float) -> tuple[PreTrainedModel, dict[str, Any]]:
        setting = self._setting(row)
        timed = {"solves": 0.0, "seconds": 0.0}
        line: dict[str, Any] = {
            "source": row.method.source,
            "calibration": f"{len(setting.calibration_BS)} x {setting.calibration_BS.shape[1]}",
            "paper": row.paper,
        }
        if isinstance(row.method, Depth):
            if row.method.criterion == "taylor":
                self._scores("taylor", setting)
            student = row.method.cut(ratio, setting, timed)
            return student, line
        self._scores(row.method.method, setting)
        line["seconds"] = {"scores_cpu": setting.scored[row.method.method][1]}
        shapes = shapes_of(row, self.anatomy, ratio)
        after, tried = self._best(row, ratio, shapes, setting)
        began = time.process_time()
        made = cut_to(row, ratio, after, setting, timed)
        line["seconds"]["last_cut_cpu"] = time.process_time() - began
        return made.student, line | made.figures | {"tried": tried}

    def _best(
        self, row: Row, ratio: float, shapes: dict[str, Arch], setting: Setting
    ) -> tuple[Arch, list[dict[str, Any]]]:
        """The shape whose student starts closest on the documents that choose, and what all shapes read there."""
        if len(shapes) == 1:
            return next(iter(shapes.values())), []
        timed = {"solves": 0.0, "seconds": 0.0}
        tried: list[dict[str, Any]] = []
        for shape, arch in shapes.items():
            student = cut_to(row, ratio, arch, setting, timed, few=solves(row)).student
            tried.append({"shape": shape, "sizes": arch.sizes, "kl": self.choosing.mean_kl(student)})
            print(tried[-1], flush=True)
        return shapes[min(tried, key=lambda one: one["kl"])["shape"]], tried

    def _setting(self, row: Row) -> Setting:
        length = min(row.length, self.args.context)
        samples_BS = self.mixture(length).calibration(min(row.samples, self.args.most_samples))
        return Setting(
            model=self.model,
            anatomy=self.anatomy,
            calibration_BS=samples_BS,
            seed=self.seed,
            refit_samples=len(samples_BS),
            micro_batch=MICRO_BATCH,
        )

    def _scores(self, method: Method, setting: Setting) -> None:
        """Scores of these samples, from the work folder if they were taken before."""
        samples, length = setting.calibration_BS.shape
        path = self.work / f"scores-{method}-{samples}x{length}-{self.seed}.safetensors"
        seconds = path.with_suffix(".json")
        if not seconds.exists():
            timed = {"solves": 0.0, "seconds": 0.0}
            scores = scores_of(method, setting, timed)
            scores.save(path)
            seconds.write_text(json.dumps(setting.scored[method][1]))
        loaded = replace(Scores.load(path), method=method)
        setting.scored[method] = loaded, json.loads(seconds.read_text())

    def mixture(self, length: int) -> Mixture:
        """The training text in samples of this length."""
        if length not in self._mixtures:
            recipe = bounded(self.recipe(0.5, length), self.boundary)
            self._mixtures[length] = open_mixture(recipe, cache=self.work / "data", tokenizer=self.teacher.tokenizer)
        return self._mixtures[length]

    def _documents(self, of_each: int, *, skip: int) -> Held:
        tokenizer = self.teacher.tokenizer
        context = min(HELD_CONTEXT, self.args.context)
        found = held_documents(self.args.text, tokenizer, of_each=of_each, context=context, skip=skip)
        return Held(self.model, found, self.work / "data" / f"held-{skip}-{of_each}x{context}.pt")


def slug(name: str, ratio: float) -> str:
    """A row's name as a folder's."""
    return "-".join([*"".join(c if c.isalnum() else " " for c in name).split(), f"{100 * ratio:.0f}"])


if __name__ == "__main__":
    main()
