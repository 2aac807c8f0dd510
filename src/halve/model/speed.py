"""Prefill speed, decode speed and peak memory of a model in plain transformers.

Shape suffixes: `B` batch, `S` tokens of the prompt.
"""

from __future__ import annotations

import inspect
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Speed:
    """Medians over the repeats; memory in bytes."""

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    weight_bytes: int
    peak_memory_bytes: int


def compare_speed(
    models: Mapping[str, PreTrainedModel],
    prompt: Int[Tensor, "batch seq"],
    *,
    num_new_tokens: int,
    repeats: int,
) -> dict[str, Speed]:
    """Time models against each other on one prompt.

    Prefill is one forward pass over the prompt that fills the key-value cache. Decode is `num_new_tokens` greedy steps
    of one token on that cache. Tokens of all sequences in the batch count. Models take turns within each repeat, so
    that other work on the machine slows all of them alike. A first repeat is thrown away.
    """
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for repeat in range(repeats + 1):
        for name, model in models.items():
            timing = prefill_and_decode(model, prompt, num_new_tokens)
            if repeat:
                seconds[name].append(timing)
    num_prompt, num_new = prompt.numel(), len(prompt) * num_new_tokens
    return {
        name: Speed(
            num_prompt / statistics.median(prefill for prefill, _ in seconds[name]),
            num_new / statistics.median(decode for _, decode in seconds[name]),
            weight_bytes(model),
            weight_bytes(model) + working_bytes(model, prompt),
        )
        for name, model in models.items()
    }


def weight_bytes(model: PreTrainedModel, stored: torch.dtype | None = None) -> int:
    """Bytes of the parameters in memory; tied ones count once.

    With `stored`, parameters in the model's precision count in this one, in which they lie on disk.
    """
    sizes = {model.dtype: (stored or model.dtype).itemsize}
    return sum(
        parameter.numel() * sizes.get(parameter.dtype, parameter.element_size()) for parameter in model.parameters()
    )


def working_bytes(model: PreTrainedModel, prompt: Int[Tensor, "batch seq"]) -> int:
    """The peak bytes of tensors during prefill and four decode steps, without the weights.

    On CUDA this is the allocator's own peak. On a CPU it comes from the profiler's record of every allocation. The
    resident size of the process would mostly show the cost of importing torch, tens of times the weights of a small
    model.
    """
    if model.device.type == "cuda":
        before = torch.cuda.memory_allocated(model.device)
        torch.cuda.reset_peak_memory_stats(model.device)
        prefill_and_decode(model, prompt, 4)
        return torch.cuda.max_memory_allocated(model.device) - before
    with (
        _quiet_stderr(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        prefill_and_decode(model, prompt, 4)
    with tempfile.TemporaryDirectory() as folder, _quiet_stderr():
        trace = Path(folder, "trace.json")
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    allocations = [event for event in events if event["name"] == "[memory]"]
    live = peak = 0
    for event in sorted(allocations, key=lambda event: event["ts"]):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak


@torch.no_grad()
def prefill_and_decode(
    model: PreTrainedModel,
    prompt_BS: Tensor,
    num_new_tokens: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, float]:
    """Seconds of one prefill and of this many decode steps."""
    prompt_BS = prompt_BS.to(model.device)
    # like generation, ask only for the logits of the last position, if the model's class can do that
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    began = _now(model, clock)
    out = model(input_ids=prompt_BS, use_cache=True, **last)
    filled = _now(model, clock)
    for _ in range(num_new_tokens):
        token_B1 = out.logits[:, -1:].argmax(-1)
        out = model(input_ids=token_B1, past_key_values=out.past_key_values, use_cache=True, **last)
    return filled - began, _now(model, clock) - filled


def _now(model: PreTrainedModel, clock: Callable[[], float]) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return clock()


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Silence stderr: the C++ part of the profiler writes lines to it, and no setting stops that."""
    saved = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
