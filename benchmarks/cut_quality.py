"""How close a cut starts to its teacher and how fast it recovers: halve's default beside every baseline.

    python benchmarks/cut_quality.py --out FOLDER [--model DIR --train FILE --valid FILE] [--seeds 3] [--tokens 49152]

All methods on one teacher, on the same calibration samples, at the same sizes; sets of layers are compared on the first
`--refit-samples` of them, LaCo's on 16. Sizes are shares of the non-embedding parameters: width methods share one
architecture a size, depth methods take the nearest whole number of layers.

Learning rates are swept on the first seed at 50 %; the other sizes take the best rate found for each method. The other
seeds are run for the best four at 50 %, our own, plain Minitron and both random cuts. Means are ± one standard error;
which of two is lower is said by Student's t over seeds. A seed draws the calibration samples and the order of training.

Results are appended to FOLDER/results.jsonl as they come, and a second call resumes there; FOLDER/report.md is
written at the end.

Without --model: halve's demo teacher and the prose of the standard library's docstrings.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cut_methods import (
    INNER,
    METHODS,
    MICRO_BATCH,
    OURS,
    PLAIN,
    RANDOM,
    RANDOM_DEPTH,
    Setting,
    depth_arch,
    make_student,
)
from cut_page import RATIOS, SWEPT, Book, report, starts
from transformers import PreTrainedModel

from halve.anatomy import discover
from halve.cut.plan.sizes import target
from halve.cut.repair.gram import SingularGramWarning
from halve.demo.corpus import read_modules, standard_library, write_prose
from halve.demo.run import TEACHER
from halve.model import measure
from halve.model.checkpoint import Checkpoint
from halve.model.head import split
from halve.recipe.schema import Data, Distill, Prune, Recipe
from halve.text import corpus
from halve.text.batch import Batch
from halve.text.corpus import Samples
from halve.text.course import Course
from halve.train.loop import loop
from halve.train.objectives import logits as objectives
from halve.train.teachers.live import Live

RATES = (5e-4, 1e-3, 2e-3, 4e-3)
CONTROLS = (OURS, PLAIN, PLAIN + INNER, RANDOM, RANDOM_DEPTH)


@dataclass(frozen=True, kw_only=True)
class SeedSetting(Setting):
    """A seed's setting with the samples that students are measured and retrained on."""

    heldout: Batch
    choosing: Batch
    """Other held-out samples, that learning rates are chosen on."""
    train: Samples


# ---- measuring


def kl(student: PreTrainedModel, setting: SeedSetting, heldout: Batch) -> float:
    """Mean KL(teacher || student) on held-out text."""
    found = measure.divergence(student, setting.model, heldout.ids, micro_batch=MICRO_BATCH)
    return float(found.kl.mean())


def retrain(student: PreTrainedModel, setting: SeedSetting, *, lr: float, tokens: int) -> list[tuple[int, float]]:
    """KL on held-out text by tokens of distillation."""
    teacher = Live(*split(setting.model))
    training = Distill(
        tokens=tokens,
        batch=16,
        micro_batch=16,
        lr=lr,
        min_lr=lr / 20,
        warmup_steps=3,
        eval_every=4,
        checkpoint_every=10**6,
    )
    vocab = setting.anatomy.sizes.vocab
    student.requires_grad_(True)
    heldout = objectives.heldout_divergence(teacher, setting.heldout, vocab=vocab, micro_batch=MICRO_BATCH)
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "metrics.jsonl"
        lesson = loop.Lesson(objectives.distillation(teacher, vocab=vocab), heldout=heldout)
        files = loop.TrainFiles(Path(scratch) / "work", log, setting.seed)
        loop.train(student, lesson, Course(training, setting.train), files, device="cpu")
        lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [(line["tokens"], line["heldout"]["kl"]) for line in lines if "heldout" in line]


def forward_seconds(setting: SeedSetting) -> float:
    """Processor seconds of one plain forward pass of the body over the calibration samples; median of three."""

    def once() -> float:
        began = time.process_time()
        with torch.inference_mode():
            for part_BS in torch.split(setting.calibration_BS, MICRO_BATCH):
                setting.model.base_model(input_ids=part_BS, use_cache=False)
        return time.process_time() - began

    return statistics.median(once() for _ in range(3))


# ---- the schedule


Students = dict[tuple[str, float, int], PreTrainedModel]


def run_one(
    book: Book, students: Students, setting: SeedSetting, name: str, ratio: float, lr: float | None, tokens: int
) -> dict[str, Any]:
    """One method at one size and seed, with retraining where a rate is given."""
    kind = "start" if lr is None else "retrained"
    key = {"kind": kind, "method": name, "ratio": ratio, "seed": setting.seed, "lr": lr}
    if (known := book.find(**key)) is not None:
        return known
    which = (name, ratio, setting.seed)
    timed: dict[str, float] = {}
    if which not in students:
        students[which], timed = make_student(METHODS[name], ratio, setting)
    student = students[which]
    anatomy = discover(student.config)
    line = {**key, "params": student.num_parameters(), "layers": anatomy.sizes.layers, "hidden": anatomy.sizes.hidden}
    line |= {"ffn": anatomy.sizes.ffn, "non_embedding": anatomy.ledger.count(anatomy.sizes).non_embedding}
    if lr is None:
        line |= {"kl": kl(student, setting, setting.heldout), **timed}
    else:
        trained = copy.deepcopy(student)
        curve = retrain(trained, setting, lr=lr, tokens=tokens)
        line |= {"kl": curve[-1][1], "curve": curve, "choice_kl": kl(trained, setting, setting.choosing)}
    book.add(line)
    return line


def carry_out(
    book: Book, settings: Sequence[SeedSetting], tokens: int, *, starts_alone: bool, leading_alone: bool
) -> None:
    """Everything, the cheapest first; `starts_alone` leaves out what trains, `leading_alone` who does not lead before.

    Leading are the best four starts at 50 % on the first seed, and the controls.
    """
    first, students = settings[0], Students()
    if book.find(kind="forward") is None:
        book.add({"kind": "forward", "seconds": forward_seconds(first), "tokens": first.calibration_BS.numel()})
    for ratio in RATIOS:
        for name in METHODS:
            run_one(book, students, first, name, ratio, None, tokens)
    if starts_alone:
        for setting in settings[1:]:
            for ratio in RATIOS:
                for name in leading({name: starts(book, name, SWEPT)[0] for name in METHODS}):
                    run_one(book, students, setting, name, ratio, None, tokens)
        return
    best: dict[str, float] = {}
    trained = list(METHODS)
    if leading_alone:
        trained = leading({name: starts(book, name, SWEPT)[0] for name in METHODS})
    for name in trained:
        swept = [run_one(book, students, first, name, SWEPT, lr, tokens) for lr in RATES]
        best[name] = min(swept, key=lambda line: line["choice_kl"])["lr"]
    for ratio in RATIOS:
        for name in trained:
            run_one(book, students, first, name, ratio, best[name], tokens)
    finals = {name: _line(book, "retrained", name, best[name])["kl"] for name in trained}
    for name in leading(finals):
        for setting in settings[1:]:
            for ratio in RATIOS:
                run_one(book, students, setting, name, ratio, None, tokens)
                run_one(book, students, setting, name, ratio, best[name], tokens)


def leading(found: Mapping[str, float]) -> list[str]:
    """The four methods with the lowest KL, our own, plain Minitron and both random cuts."""
    return list(dict.fromkeys([*sorted(found, key=lambda name: found[name])[:4], *CONTROLS]))


def _line(book: Book, kind: str, name: str, lr: float) -> dict[str, Any]:
    """What was found of a method at 50 % on the first seed."""
    line = book.find(kind=kind, method=name, ratio=SWEPT, seed=0, lr=lr)
    assert line is not None
    return line


# ---- the command


def main() -> None:
    """Measure, print as it comes, and write the report."""
    parser = argparse.ArgumentParser(description="How close a cut starts to its teacher and how fast it recovers.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default=str(TEACHER))
    parser.add_argument("--train", help="text; default: the standard library's docstrings")
    parser.add_argument("--valid")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--samples", type=int, default=512, help="calibration samples")
    parser.add_argument("--refit-samples", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=49152, help="tokens of retraining")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--starts", action="store_true", help="straight after the cut alone; nothing trains")
    parser.add_argument("--leading", action="store_true", help="retrain the best four starts and the controls alone")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore", SingularGramWarning)
    args.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    settings = [make_setting(args, seed) for seed in range(args.seeds)]
    book = Book(args.out / "results.jsonl")
    carry_out(book, settings, args.tokens, starts_alone=args.starts, leading_alone=args.leading)
    book.add({"kind": "time", "seconds": time.perf_counter() - began})
    anatomy = settings[0].anatomy
    whole = anatomy.ledger.count(anatomy.sizes).non_embedding
    text = report(book, describe(args, book, settings[0]), args.tokens, whole)
    (args.out / "report.md").write_text(text, encoding="utf-8")
    print(text)


def make_setting(args: argparse.Namespace, seed: int) -> SeedSetting:
    """Load the teacher and the samples of one seed."""
    train, valid = args.train, args.valid
    if train is None:
        texts = args.out / "texts"
        texts.mkdir(exist_ok=True)
        train, valid = (str(path) for path in write_prose(texts, list(read_modules(standard_library()))))
    recipe = Recipe(
        name="cut-quality",
        model=args.model,
        seed=seed,
        data=Data(train=(train,), valid=(valid,), context=args.context),
        prune=Prune(non_embedding_ratio=0.5),
    )
    teacher = Checkpoint.open(args.model)
    model, tokenizer = teacher.load(dtype="float32").requires_grad_(False), teacher.tokenizer
    cache = args.out / "data"
    tokens = corpus.open_split(recipe, "train", cache=cache, tokenizer=tokenizer)
    heldout = corpus.open_split(recipe, "valid", cache=cache, tokenizer=tokenizer)
    samples = corpus.Samples(tokens, args.context, seed)
    spread = corpus.Samples(heldout, args.context, 0).heldout(64)
    return SeedSetting(
        model=model,
        anatomy=teacher.anatomy,
        calibration_BS=samples.calibration(args.samples),
        heldout=spread[::2],
        choosing=spread[1::2],
        train=samples,
        seed=seed,
        refit_samples=args.refit_samples,
    )


def describe(args: argparse.Namespace, book: Book, setting: SeedSetting) -> str:
    """What was run, where and for how long."""
    anatomy = setting.anatomy
    archs = []
    for ratio in RATIOS:
        wide, _ = target(anatomy, Prune(non_embedding_ratio=ratio))
        whole = anatomy.ledger.count(anatomy.sizes).non_embedding
        share = anatomy.ledger.count(wide).non_embedding / whole
        deep = depth_arch(anatomy, ratio)
        archs.append(
            f"{ratio:.0%}: hidden {wide.hidden}, ffn {wide.ffn} ({share:.1%}), or"
            f" {deep.layers} of {anatomy.sizes.layers} layers ({anatomy.ledger.count(deep).non_embedding / whole:.1%})"
        )
    seconds = sum(line["seconds"] for line in book.lines if line["kind"] == "time")
    flags = f"--samples {args.samples} --refit-samples {args.refit_samples} --seeds {args.seeds} --tokens {args.tokens}"
    return "\n".join(
        [
            f"# Cut quality, {time.strftime('%Y-%m-%d')}",
            "",
            f"`python benchmarks/cut_quality.py {flags} --threads {args.threads}`, {seconds / 60:.0f} minutes,"
            f" torch {torch.__version__}, {platform.machine()}. Teacher: {anatomy.family},"
            f" {anatomy.ledger.count(anatomy.sizes).params:,} parameters. KL in nats a token on"
            f" {len(setting.heldout)} held-out samples of {args.context} tokens. Sizes: {'; '.join(archs)}.",
        ]
    )


if __name__ == "__main__":
    main()
