"""How far are times that are interpolated from a few layers from those of whole models?

    python benchmarks/latency.py MODEL [--batch 1] [--context 128] [--shapes 20] [--seed 0] [--rounds 6]

Layers of the table's widths are timed as `halve search` does it. Random legal shapes of none of these widths are built
whole, with random weights, and timed end to end, with the same pace and as often (`halve.search.timing`). The target is
an error of at most 10 % for each. One thread, whose own time is taken on a CPU.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from halve.anatomy import Anatomy, Arch
from halve.cut.plan.sizes import is_legal
from halve.model.checkpoint import Checkpoint, resolve_device
from halve.model.speed import prefill_and_decode
from halve.recipe.searching import Search
from halve.search.latency import TimeTable, nodes
from halve.search.space import Space, legal_shapes
from halve.search.timing import Condition, Pace, random_model, time_blocks

TARGET, REPEATS = 0.10, 3


def main() -> None:
    """Fit, time and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--shapes", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    torch.set_num_threads(1)
    anatomy = Checkpoint.open(str(args.model)).anatomy
    limits = {"max": "1s", "batch": args.batch, "context": args.context}
    search = Search.model_validate({"budget": {"decode_latency": limits, "prefill_latency": limits}})
    space, condition = legal_shapes(anatomy, search), Condition(args.batch, args.context)
    shapes = drawn(anatomy, space, args.shapes, seed=args.seed)
    device = resolve_device("auto")
    pace = Pace(anatomy, condition, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    shares = wholes(anatomy, shapes, pace, args.rounds)
    table = TimeTable(anatomy.sizes, {condition: time_blocks(anatomy, nodes(anatomy, space), pace, rounds=args.rounds)})
    print("| layers | hidden | ffn | heads/kv | prefill ms | said | off by | decode ms | said | off by |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    errors: list[tuple[float, float]] = []
    for arch, share in shares.items():
        times = (share[0] * pace.prefill, share[1] * pace.decode)  # the pace's least, as the table's times have it
        alone, asked = Space.alone(anatomy, arch), {"batch": args.batch, "context": args.context}
        said = (
            float(table.prefill_seconds(alone, arch.layers, **asked)[0, 0]),
            float(table.decode_seconds(alone, arch.layers, **asked)[0, 0]),
        )
        off = (said[0] / times[0] - 1, said[1] / times[1] - 1)
        errors.append(off)
        cells = [
            f"{real * 1e3:.2f} | {guess * 1e3:.2f} | {error:+.1%}"
            for real, guess, error in zip(times, said, off, strict=True)
        ]
        sizes = f"{arch.layers} | {arch.hidden} | {arch.ffn} | {arch.heads}/{arch.kv_heads}"
        print(f"| {sizes} | {' | '.join(cells)} |", flush=True)
    for name, of_name in zip(("prefill", "decode"), zip(*errors, strict=True), strict=True):
        sizes_of = sorted(abs(error) for error in of_name)
        inside = sum(error <= TARGET for error in sizes_of)
        print(
            f"\n{name}: {inside} of {len(sizes_of)} within {TARGET:.0%}; median {statistics.median(sizes_of):.1%},"
            f" largest {sizes_of[-1]:.1%}"
        )


def drawn(anatomy: Anatomy, space: Space, count: int, *, seed: int) -> list[Arch]:
    """Random shapes at least a quarter as large as the model on every axis, of widths that the table does not have."""
    chance, whole = random.Random(seed), anatomy.sizes
    known = {(arch.hidden, arch.ffn, arch.heads, arch.kv_heads) for arch in nodes(anatomy, space)}
    found: dict[Arch, None] = {}
    while len(found) < count:
        arch = space.arch(
            chance.choice(space.depths), chance.randrange(len(space.widths)), chance.randrange(len(space.ffns))
        )
        large = all(4 * getattr(arch, axis) >= getattr(whole, axis) for axis in ("layers", "hidden", "ffn"))
        if large and (arch.hidden, arch.ffn, arch.heads, arch.kv_heads) not in known and is_legal(anatomy, arch):
            found[arch] = None
    return list(found)


def wholes(anatomy: Anatomy, shapes: Sequence[Arch], pace: Pace, rounds: int) -> dict[Arch, tuple[float, float]]:
    """Of whole models the times of a prompt and of one more token, as shares of the pace's."""
    shares: dict[Arch, list[tuple[float, float]]] = {arch: [] for arch in shapes}
    for _ in range(rounds):
        for arch in shapes:
            model = random_model(anatomy, arch, device=pace.model.device.type, dtype=pace.model.dtype)
            prefill_and_decode(model, pace.prompt_BS, 1)
            for _ in range(REPEATS):
                beats, seconds = pace.beat(), pace.seconds(model)
                shares[arch].append((seconds[0] / beats[0], seconds[1] / beats[1]))
    return {
        arch: (statistics.median(prefill for prefill, _ in listed), statistics.median(decode for _, decode in listed))
        for arch, listed in shares.items()
    }


if __name__ == "__main__":
    main()
