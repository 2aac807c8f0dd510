"""How fast a distillation step is: halve beside the loss code of others, all against the floor of their products.

    pip install -r benchmarks/requirements-peers.txt      (in an environment of its own, with halve)
    python benchmarks/distill_step.py [--vocab 32000 128000] [--rounds 3] [--threads N] [--compile] [--out FOLDER]

Two Llamas with random weights, the teacher 512 wide and the student 384, 8 layers each; 4096 tokens a step in
samples of 1024. All systems share models, samples, clipping and AdamW, and differ in what makes the loss; each
takes the micro-batch that is fastest for it. They take turns within a round, and so do the matrix products of the
floor, so that a busy machine slows all of them alike; ratios are medians over rounds. Who is more than twice as
slow as the fastest rival in the first round sits the others out.

Everything is measured twice, in processes of their own: with the settings of the memory allocator that
docs/concepts/distillation.md recommends, given to every system, and without. Targets are judged with them.

A system counts where its loss is that of float64 within 1e-4, on a pair of models that are near each other and
as sure of themselves as trained ones are: there rounded logits show. The page says in which precision each runs.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from distill_exact import exactness, parity_of_half
from distill_page import WITH, WITHOUT, Findings, page
from distill_peers import COMPILED, OURS, SYSTEMS, compiled
from distill_timing import SEQ, Timing, measure, models

_DOCS = Path(__file__).parents[1] / "docs" / "concepts" / "distillation.md"
_ALLOCATORS = {"set": WITH, "default": WITHOUT}


def main() -> None:
    """Measure, print, and write one dated page."""
    args = _arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    if args.into:
        (vocab,) = args.vocab
        measure(
            *models(vocab, args.seq),
            seq=args.seq,
            rounds=args.rounds,
            micro_batches=args.micro_batches,
            with_compiled=args.compile,
        ).save(args.into)
        return
    began, settings = time.perf_counter(), recommended()
    systems = {**SYSTEMS, **({COMPILED: SYSTEMS[OURS]} if args.compile else {})}
    exact = {
        (half, name): exactness(system.make, compiled if name == COMPILED else None, half=half)
        for half in (False, True)
        for name, system in systems.items()
        if half or not system.only_half
    }
    timings = {
        _ALLOCATORS[allocator]: [_apart(vocab, settings if allocator == "set" else {}) for vocab in args.vocab]
        for allocator in args.allocator
    }
    found = Findings(
        timings=timings,
        exactness=exact,
        parity=parity_of_half(args.parity_steps),
        parity_steps=args.parity_steps,
        settings=settings,
        seq=args.seq,
        rounds=args.rounds,
        minutes=(time.perf_counter() - began) / 60,
    )
    text = "\n".join(page(found)) + "\n"
    print(text, end="")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"distill-step-{datetime.date.today()}.md").write_text(text)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--vocab", type=int, nargs="+", default=[32000, 128000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seq", type=int, default=SEQ)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--parity-steps", type=int, default=200)
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--compile", action="store_true", help="halve once more with compiled layers, for the floor")
    parser.add_argument(
        "--allocator",
        nargs="+",
        choices=list(_ALLOCATORS),
        default=list(_ALLOCATORS),
        help="measure with the recommended settings (set), without (default), or both",
    )
    parser.add_argument("--out", type=Path, help="a folder for the page; default: it is only printed")
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def recommended() -> dict[str, str]:
    """The allocator's settings in the environment that halve's documentation gives."""
    found = dict(re.findall(r"(MALLOC_\w+)=(\d+)", _DOCS.read_text(encoding="utf-8")))
    assert found, f"{_DOCS} recommends no settings"
    return found


def _apart(vocab: int, settings: Mapping[str, str]) -> Timing:
    """Time all systems at one vocabulary in a process of its own, since glibc reads its settings when one starts."""
    others = {name: value for name, value in os.environ.items() if not re.match("MALLOC_|GLIBC_TUNABLES", name)}
    with tempfile.TemporaryDirectory() as folder:
        into = Path(folder, "timing.json")
        # what comes later on a command line wins
        own = ["--vocab", str(vocab), "--into", str(into)]
        subprocess.run([sys.executable, *sys.argv, *own], env={**others, **settings}, check=True)
        return Timing.load(into)


if __name__ == "__main__":
    main()
