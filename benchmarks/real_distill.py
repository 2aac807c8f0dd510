"""Students of a real model distilled: KL and perplexity by the number of tokens, each row at its own learning rate.

    python benchmarks/real_distill.py MODEL TEXT --work FOLDER --results FILE --rows default "plain Minitron width" \\
        --ratios 0.7 [--tokens 250000]

Rows are those of `real_model.py`. Of each, three learning rates are tried on few tokens and compared on documents that
are not reported, and further ones while the best is the lowest or the highest; the best one trains all tokens.
What has a line in FILE is not trained again. A killed training resumes from its checkpoint in FOLDER.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from real_held import Held
from real_model import Bench, Lines, arguments, prepared, slug, where
from transformers import AutoModelForCausalLM, PreTrainedModel

from halve.model import measure
from halve.model.head import Body, Head, split
from halve.recipe.schema import Distill
from halve.text.course import Course
from halve.train.loop import loop
from halve.train.objectives import logits as objectives
from halve.train.teachers.live import Live

RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
FIRST = range(2, 5)
"""The places in `RATES` of those that every row is trained at."""
BATCH, MEASUREMENTS = 4, 8


def main() -> None:
    """Train what was not trained yet."""
    parser = arguments("Students of a real model after distillation.")
    parser.add_argument("--tokens", type=int, default=250_000)
    parser.add_argument("--sweep-tokens", type=int, default=25_000)
    parser.add_argument("--precision", choices=["bfloat16", "float32"], default="bfloat16", help="of the products")
    parser.add_argument("--lr", type=float, help="train at this rate, without a sweep")
    parser.add_argument("--batch", type=int, default=BATCH, help="samples of a step")
    args = parser.parse_args()
    bench, book = prepared(args)
    for ratio in args.ratios:
        for name in args.rows:
            rate = args.lr or best_rate(bench, book, name, ratio)
            key = {"distilled": name, **training_key(args, ratio, rate, args.tokens)}
            if book.find(**key) is None:
                trained, line = retrained(bench, name, ratio, lr=rate, tokens=args.tokens, held=bench.held)
                trained.save_pretrained(place(bench, name, ratio, lr=rate, tokens=args.tokens) / "model")
                book.add({**key, **line, **bench.held.line(bench.held.measured(trained)), **where()})


def best_rate(bench: Bench, book: Lines, name: str, ratio: float) -> float:
    """The rate whose student is closest to the teacher after few tokens, on documents that choose."""
    found = {i: swept(bench, book, name, ratio, RATES[i]) for i in FIRST}
    while True:
        best = min(found, key=lambda i: found[i])
        further = [i for i in (best - 1, best + 1) if 0 <= i < len(RATES) and i not in found]
        if not further:
            return RATES[best]
        found |= {i: swept(bench, book, name, ratio, RATES[i]) for i in further}


def training_key(args: argparse.Namespace, ratio: float, lr: float, tokens: int) -> dict[str, Any]:
    """What tells a row's trainings apart."""
    about = {"ratio": ratio, "seed": args.seed, "lr": lr, "tokens": tokens}
    return {**about, "precision": args.precision, "batch": args.batch}


def swept(bench: Bench, book: Lines, name: str, ratio: float, rate: float) -> float:
    """KL to the teacher after few tokens at this rate, on documents that choose."""
    tokens = bench.args.sweep_tokens
    key = {"swept": name, **training_key(bench.args, ratio, rate, tokens)}
    line = book.find(**key)
    if line is None:
        trained, spent = retrained(bench, name, ratio, lr=rate, tokens=tokens, held=bench.choosing)
        line = {**key, **spent, "kl": bench.choosing.mean_kl(trained), **where()}
        book.add(line)
    return float(line["kl"])


def retrained(
    bench: Bench, name: str, ratio: float, *, lr: float, tokens: int, held: Held
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A row's student after so many tokens, and its KL on the way."""
    student = start(bench, name, ratio).requires_grad_(True)
    mixture = bench.mixture(bench.args.context)
    batch = bench.args.batch
    steps = max(1, tokens // (batch * mixture.context))
    training = Distill(
        tokens=tokens,
        batch=batch,
        micro_batch=min(batch, BATCH),
        lr=lr,
        min_lr=lr / 20,
        warmup_steps=min(5 * BATCH // batch, steps // 4),
        eval_every=max(1, steps // MEASUREMENTS),
        checkpoint_every=max(1, steps // MEASUREMENTS),
        precision=bench.args.precision,
    )
    teacher = Live(*split(bench.model))
    vocab = bench.anatomy.sizes.vocab
    folder = place(bench, name, ratio, lr=lr, tokens=tokens)
    folder.mkdir(parents=True, exist_ok=True)
    files = loop.TrainFiles(folder / "checkpoints", folder / "metrics.jsonl", bench.seed)
    lesson = loop.Lesson(objectives.distillation(teacher, vocab=vocab), heldout=figures(held))
    began, cpu = time.perf_counter(), time.process_time()
    loop.train(student, lesson, Course(training, mixture), files, device="cpu")
    spent = {"wall": time.perf_counter() - began, "cpu": time.process_time() - cpu}
    lines = [json.loads(line) for line in files.metrics.read_text().splitlines()]
    curve = [
        [line["tokens"], line["heldout"]["kl"], line["heldout"]["perplexity"]] for line in lines if "heldout" in line
    ]
    return student.requires_grad_(False), {"curve": curve, "seconds": spent}


def place(bench: Bench, name: str, ratio: float, *, lr: float, tokens: int) -> Path:
    """The folder of a training. What trained all tokens is left there as `model`."""
    args = bench.args
    about = f"{slug(name, ratio)}-{lr:g}-{tokens}-{bench.seed}-{args.precision}-batch{args.batch}"
    folder: Path = bench.work / "trained" / about
    return folder


def figures(held: Held) -> objectives.Heldout:
    """KL and perplexity on these documents, as a training measures them."""

    def measured(body: Body, head: Head) -> Mapping[str, float]:
        found = held.of(body, head)
        kl = measure.average(found.kl, held.predictions_D)
        return {"kl": kl.value, "perplexity": measure.perplexity(found.nll, held.predictions_D).value}

    return measured


def start(bench: Bench, name: str, ratio: float) -> PreTrainedModel:
    """A row's student before training; cut once and kept in the work folder."""
    folder = bench.place(name, ratio)
    if not (folder / "config.json").exists():
        bench.student(name, ratio)[0].save_pretrained(folder)
    student: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    return student


if __name__ == "__main__":
    main()
