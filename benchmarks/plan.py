"""How fast are the legal shapes of a budget counted, and is each count that of the built model?

    python benchmarks/plan.py [MODEL ...]

MODEL is a folder with a config; without one, the public sizes of Llama 3.1 8B and Qwen 2.5 7B. On one thread: every
legal shape (heads inside their groups too) is counted in parameters, memory of a context of 8,192 and FLOPs per token,
and the front under half of the memory is listed. Then random shapes are built on the meta device and compared.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from transformers import CONFIG_MAPPING, PretrainedConfig

from halve.anatomy import Anatomy, discover
from halve.anatomy.configs import build, resized
from halve.cut.plan.sizes import config_sizes, is_legal
from halve.model.checkpoint import Checkpoint
from halve.recipe.searching import Search
from halve.search.budgets import resolve
from halve.search.front import front
from halve.search.quantities import Prices
from halve.search.space import Space, legal_shapes

LEAST_SHAPES, MOST_SECONDS, BUILT = 100_000, 5.0, 10
PUBLIC = {
    "Llama 3.1 8B": ("llama", 4096, 14336, 32, 32, 8, 128256),
    "Qwen 2.5 7B": ("qwen2", 3584, 18944, 28, 28, 4, 152064),
}
SEARCH = Search.model_validate(
    {
        "budget": {"total": "50%", "memory": {"max": "50%", "context": 8192}, "flops": "60%"},
        "axes": {"heads": "allowed"},
    }
)


def main() -> None:
    """Count, compare and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="*", type=Path)
    torch.set_num_threads(1)
    given = parser.parse_args().models
    models = {path.name: Checkpoint.open(str(path)).config for path in given} or {name: public(name) for name in PUBLIC}
    print("| model | legal shapes | counted in | shapes a second | front | listed in | built and equal |")
    print("|---|---|---|---|---|---|---|")
    for name, config in models.items():
        print(f"| {name} | {' | '.join(row(discover(config)))} |", flush=True)


def public(name: str) -> PretrainedConfig:
    """A config of public sizes."""
    kind, hidden, ffn, layers, heads, kv_heads, vocab = PUBLIC[name]
    made: PretrainedConfig = CONFIG_MAPPING[kind](
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        tie_word_embeddings=False,
    )
    return made


def row(anatomy: Anatomy) -> list[str]:
    """What the table says of one model. An assertion fails if a target is missed."""
    assert SEARCH.budget is not None
    ranges = resolve(anatomy, SEARCH.budget)
    began = time.perf_counter()
    space = legal_shapes(anatomy, SEARCH)
    prices = Prices(space)
    for layers in space.depths:
        for wanted in ranges:
            prices.values(wanted.quantity, wanted.limits, layers)
    counted = time.perf_counter() - began
    assert counted / len(space) * LEAST_SHAPES < MOST_SECONDS
    began = time.perf_counter()
    shapes = front(prices, ranges)
    listed = time.perf_counter() - began
    equal = compared(anatomy, space)
    rate = f"{len(space) / counted:,.0f}"
    return [f"{len(space):,}", f"{counted:.2f} s", rate, f"{len(shapes)}", f"{listed:.2f} s", f"{equal} of {equal}"]


def compared(anatomy: Anatomy, space: Space) -> int:
    """Build random shapes and compare their parameters; how many there were."""
    chance, built = random.Random(0), 0
    while built < BUILT:
        layers = chance.choice(space.depths)
        width, ffn = chance.randrange(len(space.widths)), chance.randrange(len(space.ffns))
        arch = space.arch(layers, width, ffn)
        if not is_legal(anatomy, arch):
            continue
        config = resized(anatomy.config, config_sizes(anatomy, arch), kept_layers=tuple(range(layers)))
        model = build(config, device="meta")
        counted = int(space.tabulated.counts(layers).params[width, ffn])
        assert counted == sum(parameter.numel() for parameter in model.parameters()), arch
        built += 1
    return built


if __name__ == "__main__":
    main()
