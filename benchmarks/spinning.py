"""How fast PyTorch's threads compute beside other programs, by how long they spin for each other (decision 0036).

    python benchmarks/spinning.py [--model FOLDER] [--samples 8] [--seconds 3] [--rounds 2]

Tokens a second of a forward and backward pass of samples of 256 tokens, and of passes of 16 tokens, in float32. Each
setting is a process of its own; they take turns, and a line has the median of the rounds. Busy means beside as many
other processes as there are cores, which compute without end.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

SETTINGS: tuple[dict[str, str], ...] = (
    {},
    {"GOMP_SPINCOUNT": "10000"},
    {"GOMP_SPINCOUNT": "3000"},
    {"GOMP_SPINCOUNT": "1000"},
    {"OMP_WAIT_POLICY": "PASSIVE"},
    {"OMP_NUM_THREADS": "1"},
)
CONTEXT, FEW, PASSES = 256, 16, 10


def main() -> None:
    """Print a table, or the two figures of this process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="", help="default: the demo's teacher")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        print(*speeds(args.model, args.samples, args.seconds))
        return
    found = {busy: measured(args.rounds, busy=busy) for busy in (True, False)}
    print("| setting | training, busy | small passes, busy | training, idle | small passes, idle |")
    print("|---|---:|---:|---:|---:|")
    for number, setting in enumerate(SETTINGS):
        name = " ".join(f"{key}={value}" for key, value in setting.items()) or "default"
        print(f"| {name} | {' | '.join(f'{value:,.0f}' for busy in found for value in found[busy][number])} |")


def measured(rounds: int, *, busy: bool) -> list[tuple[float, float]]:
    """The medians of every setting."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range((os.cpu_count() or 1) * busy)]
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    try:
        lines = [
            [
                subprocess.check_output([sys.executable, *sys.argv, "--alone"], env=clean | setting, text=True).split()
                for setting in SETTINGS
            ]
            for _ in range(rounds)
        ]
    finally:
        for other in others:
            other.kill()
    medians = [
        [statistics.median(float(line[i][part]) for line in lines) for part in (0, 1)] for i in range(len(lines[0]))
    ]
    return [(training, few) for training, few in medians]


def speeds(model: str, samples: int, seconds: float) -> tuple[float, float]:
    """Tokens a second of training passes, and of passes of few tokens."""
    import torch

    import halve.demo
    from halve.model.checkpoint import Checkpoint

    its = Checkpoint.open(model or str(Path(halve.demo.__file__).parent / "teacher")).load(dtype="float32")
    ids_BS = torch.randint(0, its.config.vocab_size, (samples, CONTEXT))

    def training() -> None:
        its(input_ids=ids_BS, labels=ids_BS, use_cache=False).loss.backward()
        its.zero_grad()

    @torch.no_grad()
    def few() -> None:
        for _ in range(PASSES):
            its(input_ids=ids_BS[:1, :FEW], use_cache=False)

    return rate(training, ids_BS.numel(), seconds), rate(few, PASSES * FEW, seconds)


def rate(work: Callable[[], None], tokens: int, seconds: float) -> float:
    """Tokens a second, once it has run."""
    work()
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        work()
        count += 1
    return count * tokens / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
