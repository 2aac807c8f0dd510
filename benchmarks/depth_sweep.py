"""What reusing the untouched prefix saves when layers are judged by leaving them out.

    python benchmarks/depth_sweep.py [--model FOLDER] [--text FILE.jsonl] [--sizes 1 2 4] [--out FILE]

Every position of a block of n layers is measured twice: from the kept input of the block's first layer (as
`halve.cut.layers.depth` does), and naively, each position a pass of its own through the layers that stay. Both give
nats per token, head included; the two are checked to give the same numbers. Without `--model`, a Llama with random
weights and the given sizes. Both ways alternate, so that a busy machine slows both; times are medians, ratios are
medians over pairs: of wall-clock time, and of processor time, which other programs disturb less. The layers that ran
are counted in a pass of their own by listening to a module inside every layer.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel

from halve.anatomy import discover
from halve.cut.layers import depth_values, removal
from halve.cut.score.calibration import Calibration
from halve.model.head import split
from halve.model.measure import sample_nll


def main() -> None:
    """Measure every block size and print one table; `--out` keeps it as JSON."""
    parser = argparse.ArgumentParser(description="What reusing the prefix saves in a removal sweep.")
    parser.add_argument("--model", help="a folder; default: a random Llama")
    parser.add_argument("--text", type=Path, help="JSON lines with a field text; default: random tokens")
    for name, default in (
        ("hidden", 512), ("ffn", 1408), ("heads", 8), ("kv-heads", 4), ("layers", 12), ("vocab", 2048),
        ("seq", 256), ("samples", 16), ("micro-batch", 8), ("pairs", 5),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own choice")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    model = load(args)
    samples_BS = samples(args, model)
    rows = [benchmark(model, samples_BS, size, args) for size in args.sizes]
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    about = {
        **{key: value for key, value in vars(args).items() if key not in ("out", "model", "text")},
        "machine": torch.cuda.get_device_name() if args.device == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "layers": discover(model.config).sizes.layers,
    }
    if args.out:
        args.out.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")


def load(args: argparse.Namespace) -> PreTrainedModel:
    """The model of the folder, or a Llama with random weights."""
    torch.manual_seed(0)
    if args.model:
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval().to(args.device)
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.ffn,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        vocab_size=args.vocab,
        max_position_embeddings=args.seq,
    )
    return AutoModelForCausalLM.from_config(config).eval().to(args.device)


def samples(args: argparse.Namespace, model: PreTrainedModel) -> Tensor:
    """Token ids [samples, seq] from the text, or drawn at random."""
    if not args.text:
        return torch.randint(model.config.vocab_size, (args.samples, args.seq))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids: list[int] = []
    with args.text.open(encoding="utf-8") as lines:
        for line in lines:
            ids += tokenizer(json.loads(line)["text"]).input_ids
            if len(ids) >= args.samples * args.seq:
                return torch.tensor(ids[: args.samples * args.seq]).view(args.samples, args.seq)
    raise SystemExit(f"{args.text} has only {len(ids)} tokens")


def benchmark(model: PreTrainedModel, samples_BS: Tensor, size: int, args: argparse.Namespace) -> dict[str, Any]:
    """One block size at every position, both ways."""
    anatomy = discover(model.config)
    total = anatomy.sizes.layers
    sets = [tuple(range(start, start + size)) for start in range(total - size + 1)]
    batches = torch.split(samples_BS, args.micro_batch)
    layers, (_, head) = removal.layers_of(model, anatomy), split(model)
    compare = depth_values.nll(Calibration(model, anatomy, samples_BS, args.micro_batch))

    def reused() -> list[float]:
        return list(compare(sets, ()).values)

    def naive() -> list[float]:
        sums = torch.zeros(len(sets), dtype=torch.float64)
        for s, chosen in enumerate(sets):
            for ids_BS in batches:
                ids_BS = ids_BS.to(args.device)
                everything = removal.Trace((), torch.empty(0, 0, 0))
                hidden_BSD = removal.resume(layers, ids_BS, everything, start=0, removed=chosen)
                sums[s] += sample_nll(head, hidden_BSD, ids_BS).sum().cpu()
        return list((sums / len(samples_BS)).tolist())

    difference = max(abs(a - b) for a, b in zip(reused(), naive(), strict=True))
    if difference > 1e-5:
        raise SystemExit(f"the two ways differ by {difference}")
    runs = {way.__name__: count_layers(layers, way) / len(batches) for way in (reused, naive)}
    pairs = []
    for turn in range(args.pairs):
        order = (reused, naive) if turn % 2 else (naive, reused)
        took = {way.__name__: seconds(way, args.device) for way in order}
        pairs.append((took["reused"], took["naive"]))
    ratios = {kind: [ours[kind] / theirs[kind] for ours, theirs in pairs] for kind in ("wall", "cpu")}
    return {
        "removed": size,
        "positions": len(sets),
        "layers_run_reused": runs["reused"],
        "layers_run_naive": runs["naive"],
        "layers_ratio": round(runs["reused"] / runs["naive"], 3),
        "wall_reused_s": round(statistics.median(ours["wall"] for ours, _ in pairs), 3),
        "wall_naive_s": round(statistics.median(theirs["wall"] for _, theirs in pairs), 3),
        **{
            f"{kind}_ratio{suffix}": round(pick(found), 3)
            for kind, found in ratios.items()
            for suffix, pick in (("", statistics.median), ("_min", min), ("_max", max))
        },
        "largest_difference": difference,
    }


def count_layers(layers: removal.Layers, call: Callable[[], object]) -> int:
    """How often a layer really ran: a removed or skipped one does not call what is inside it."""
    count = [0]

    def add(*_: Any) -> None:
        count[0] += 1

    with ExitStack() as hooks:
        for module in layers.modules:
            hooks.callback(next(module.children()).register_forward_hook(add).remove)
        call()
    return count[0]


def seconds(call: Callable[[], object], device: str) -> dict[str, float]:
    """Wall-clock and processor time of one call, the device's queue drained."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


if __name__ == "__main__":
    main()
