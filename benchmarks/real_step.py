"""A distillation step on a real model's pair: halve beside others, the floor, and its memory beside the plan.

    python benchmarks/real_step.py MODEL --student layers=28 ffn=1024 [--half] [--rounds 3] [--threads N]

MODEL is a folder with a Llama's config; the student is that config with other sizes. Both have random weights, which
take the same time. Systems are those of `distill_step.py`, whose page says who is exact; as there, they share models,
samples, clipping and AdamW, take turns, and each has the micro-batch that is fastest for it. Start it with the
allocator's settings that docs/concepts/distillation.md recommends. The peers need an environment of their own
(benchmarks/README.md).

Memory is that of two steps in halve's own loop, by the allocator's record, beside the memory plan of `--dry-run`.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import warnings
from functools import partial
from pathlib import Path

import torch
from distill_peers import OURS, Pair, summed, versions
from distill_timing import LR, SAMPLES, Timing, measure, most_bytes, own_step
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from halve.anatomy import discover
from halve.anatomy.configs import resized
from halve.model.checkpoint import Checkpoint
from halve.preflight.memory import Distillation, Hardware, Sized
from halve.recipe.schema import Distill
from halve.train.loop.step import Trained


def main() -> None:
    """Measure and print a page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--student", nargs="+", required=True, metavar="AXIS=SIZE")
    parser.add_argument("--half", action="store_true", help="products in bfloat16; default: float32")
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    its = Checkpoint.open(args.model).config
    own = resized(its, {axis: int(size) for axis, _, size in (pair.partition("=") for pair in args.student)})
    teacher, student = _drawn(its).requires_grad_(False), _drawn(own)
    print(f"# A distillation step of {Path(args.model).name}, {datetime.date.today()}\n")
    print(
        f"{args.threads} threads of {os.cpu_count()} cores, {'bfloat16' if args.half else 'float32'} products;", end=" "
    )
    print(
        f"{SAMPLES} samples of {args.seq} tokens a step, student {' '.join(args.student)}; {args.rounds} rounds.",
        end=" ",
    )
    print(", ".join(f"{name} {version}" for name, version in versions().items()) + "\n")
    found = measure(
        teacher, student, seq=args.seq, rounds=args.rounds, micro_batches=args.micro_batches, halves=[args.half]
    )
    _tell(found, args.half, args.seq)
    planned, took = _planned(its, own, args.half, args.seq), _taken(teacher, student, args.half, args.seq)
    print(f"\nPeak of tensors in two steps of {SAMPLES} samples, one at a time: {took / 1e9:.2f} GB,", end=" ")
    print(f"by the plan {planned / 1e9:.2f} GB ({planned / took - 1:+.1%}).")


def _drawn(config: PretrainedConfig) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()


def _tell(found: Timing, half: bool, seq: int) -> None:
    cases, floors = found.of(half), found.floors[half]
    print("| system | micro-batch | s/step | tokens/s | halve's speed over it | of the floor | working MB |")
    print("|---|---|---|---|---|---|---|")
    for name, case in sorted(cases.items(), key=lambda item: item[1].median):
        ratios = [theirs / mine for theirs, mine in zip(case.times, cases[OURS].times, strict=False)]
        share = statistics.median(least / took for least, took in zip(floors, case.times, strict=False))
        memory = "" if case.bytes is None else f"{case.bytes / 1e6:.0f}"
        print(
            f"| {name} | {case.micro_batch} | {case.median:.2f} ({min(case.times):.2f} to {max(case.times):.2f}) |"
            f" {SAMPLES * seq / case.median:.0f} | {statistics.median(ratios):.2f} ({min(ratios):.2f} to"
            f" {max(ratios):.2f}) | {share:.0%} | {memory} |"
        )


def _planned(its: PretrainedConfig, own: PretrainedConfig, half: bool, seq: int) -> int:
    precision = "bfloat16" if half else "float32"
    training = Distill(tokens=SAMPLES * seq, batch=SAMPLES, micro_batch=1, precision=precision)
    place = Hardware(cuda=False, half=half)
    planned: int = Distillation(training, _sized(own), _sized(its), place, seq, torch.float32).memory().total_bytes
    return planned


def _sized(config: PretrainedConfig) -> Sized:
    anatomy = discover(config)
    return Sized(config, anatomy.sizes, anatomy.ledger.count(anatomy.sizes))


def _taken(teacher: PreTrainedModel, student: PreTrainedModel, half: bool, seq: int) -> int:
    """The models' weights and the most that two steps add to them."""
    pair = Pair(teacher, student, half, SAMPLES * (seq - 1))
    trained = Trained({"student": student}, torch.optim.AdamW(student.parameters(), lr=LR, fused=True))
    ids_BS = torch.randint(teacher.config.vocab_size, (SAMPLES, seq))
    step = partial(own_step, summed(pair), trained, ids_BS, 1)

    def two_steps() -> None:
        step()
        step()

    weights: int = sum(p.nbytes for model in (student, teacher) for p in model.parameters())
    return weights + most_bytes(two_steps)


if __name__ == "__main__":
    main()
