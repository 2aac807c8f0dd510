"""What scoring costs: one forward pass that scores every axis, beside a plain pass over the same batches.

    python benchmarks/score.py [--hidden 768 --ffn 2048 --heads 12 --layers 6 --seq 512 ...] [--out FILE]

A Llama with random weights; neither pass makes logits. Plain and scored passes alternate, so that a busy
machine slows both; times are medians, and the ratios are medians over pairs: of wall-clock time, and on a
CPU of processor time, which other programs disturb less. The byte floor is the time to read every scored
activation once and both sides of every layer, at the rate at which this machine sums such activations.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from halve.anatomy import discover
from halve.cut.score.calibration import Calibration
from halve.cut.score.taps import find_points, measure_activations, width


def main() -> None:
    """Measure and print one table; `--out` keeps it as JSON."""
    parser = argparse.ArgumentParser(description="What scoring costs beside a plain forward pass.")
    for name, default in (
        ("hidden", 768), ("ffn", 2048), ("heads", 12), ("kv-heads", 12), ("layers", 6), ("seq", 512),
        ("samples", 16), ("micro-batch", 8), ("repeats", 5),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own choice")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    result = benchmark(args)
    for name, value in result.items():
        print(f"{name:28} {value}")
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """The settings and what was measured under them."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.ffn,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        vocab_size=512,
        max_position_embeddings=args.seq,
    )
    dtype = getattr(torch, args.dtype)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().to(args.device)
    anatomy = discover(config)
    samples_BS = torch.randint(config.vocab_size, (args.samples, args.seq))

    def plain() -> None:
        with torch.inference_mode():
            for part_BS in torch.split(samples_BS, args.micro_batch):
                model.base_model(input_ids=part_BS.to(args.device), use_cache=False)

    def scored() -> None:
        measure_activations(Calibration(model, anatomy, samples_BS, args.micro_batch))

    plain()
    scored()
    pairs = [(seconds(plain, args.device), seconds(scored, args.device)) for _ in range(args.repeats)]
    plain_s = statistics.median(before.wall for before, _ in pairs)
    scored_s = statistics.median(after.wall for _, after in pairs)
    ratios = [after.wall / before.wall for before, after in pairs]
    cpu_ratios = [after.cpu / before.cpu for before, after in pairs]

    channels = sum(len(found) * width(anatomy, axis) for axis, found in find_points(model, anatomy).items())
    num_bytes = samples_BS.numel() * (channels + 2 * args.layers * args.hidden) * dtype.itemsize
    floor_s = num_bytes / read_rate(args, dtype)
    return {
        **{key: value for key, value in vars(args).items() if key != "out"},
        "machine": torch.cuda.get_device_name() if args.device == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "plain_s": round(plain_s, 4),
        "scored_s": round(scored_s, 4),
        "ratio_median": round(statistics.median(ratios), 4),
        "ratio_min": round(min(ratios), 4),
        "ratio_max": round(max(ratios), 4),
        "cpu_ratio_median": round(statistics.median(cpu_ratios), 4),
        "cpu_ratio_min": round(min(cpu_ratios), 4),
        "cpu_ratio_max": round(max(cpu_ratios), 4),
        "floor_bytes": num_bytes,
        "floor_s": round(floor_s, 4),
        "floor_ratio": round(1 + floor_s / plain_s, 4),
        "overhead_over_floor": round((scored_s - plain_s) / floor_s, 2),
    }


class Seconds(NamedTuple):
    """What one call took."""

    wall: float
    cpu: float


def seconds(call: Callable[[], object], device: str) -> Seconds:
    """Wall-clock and processor time of one call, the device's queue drained."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def read_rate(args: argparse.Namespace, dtype: torch.dtype) -> float:
    """Bytes per second at which a micro-batch's ffn activation is summed."""
    act = torch.ones(args.micro_batch, args.seq, args.ffn, dtype=dtype, device=args.device)
    act.sum()
    times = [seconds(lambda: act.sum().item(), args.device).wall for _ in range(9)]
    return act.numel() * act.itemsize / statistics.median(times)


if __name__ == "__main__":
    main()
