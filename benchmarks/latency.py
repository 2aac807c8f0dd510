"""How far are times that are interpolated from a few layers from those of whole models?

    python benchmarks/latency.py MODEL [--batch 1] [--context 128] [--shapes 20] [--seed 0] [--table FILE]

The table of layer times is fitted as `halve search` does it. Then random legal shapes that are none of its widths are
built whole, with random weights, and timed end to end. Shapes take turns, and the least of several repeats counts. The
target is an error of at most 10 % for each. Run it on a machine that does nothing else: what other work adds to one
side and not to the other counts as error here.
"""

from __future__ import annotations

import argparse
import random
import statistics
from pathlib import Path

import torch

from halve.anatomy import Anatomy, Arch
from halve.cut.plan.sizes import is_legal
from halve.model.checkpoint import Checkpoint, resolve_device
from halve.model.speed import prefill_and_decode
from halve.recipe.searching import Search
from halve.search.latency import TimeTable, nodes
from halve.search.space import Space, legal_shapes
from halve.search.timing import Condition, prompt_of, random_model

TARGET, DECODED, ROUNDS, REPEATS = 0.10, 8, 4, 3


def main() -> None:
    """Fit, time and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--shapes", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", type=Path, default=None, help="keep the table's times here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    anatomy = Checkpoint.open(str(args.model)).anatomy
    limits = {"max": "1s", "batch": args.batch, "context": args.context}
    search = Search.model_validate({"budget": {"decode_latency": limits, "prefill_latency": limits}})
    space, condition = legal_shapes(anatomy, search), Condition(args.batch, args.context)
    shapes = drawn(anatomy, space, args.shapes, seed=args.seed)
    table = TimeTable.measured(anatomy, search, path=args.table)
    measured = end_to_end(anatomy, shapes, condition)
    print("| layers | hidden | ffn | heads/kv | prefill ms | said | off by | decode ms | said | off by |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    errors: list[tuple[float, float]] = []
    for arch, times in measured.items():
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


def end_to_end(anatomy: Anatomy, shapes: list[Arch], condition: Condition) -> dict[Arch, tuple[float, float]]:
    """Seconds of a prompt and of one more token, whole models, the least of all repeats."""
    device = resolve_device("auto")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    prompt_BS = prompt_of(condition, anatomy.sizes.vocab)
    least: dict[Arch, tuple[float, float]] = {}
    for _ in range(ROUNDS):
        for arch in shapes:
            model = random_model(anatomy, arch, device=device, dtype=dtype)
            prefill_and_decode(model, prompt_BS, 1)
            for _ in range(REPEATS):
                prefill, decode = prefill_and_decode(model, prompt_BS, DECODED)
                before = least.get(arch, (prefill, decode / DECODED))
                least[arch] = (min(before[0], prefill), min(before[1], decode / DECODED))
    return least


if __name__ == "__main__":
    main()
