"""The time that the layers of a model take, and the rest of it, in prefill and in decode.

A machine is faster at one moment than at another: other work shares its caches, clocks change. So a model of the
teacher's widths, the pace, runs before each measurement, and what counts is the median of the two times' ratio. The
least time of the pace turns ratios into seconds. On a CPU with one thread all times are the thread's own, to which
other work adds little. Otherwise they are the time that passes.

Shape suffixes: `B` batch, `S` tokens of the prompt.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from halve.anatomy import Anatomy, Arch
from halve.anatomy.configs import build, lengthen_context, resized
from halve.cut.plan.sizes import config_sizes
from halve.model.speed import prefill_and_decode, weight_bytes

DECODED = 12
"""Tokens that are generated in a measurement."""
_REPEATS = 3
_TOGETHER = 2**30
"""Bytes of models that stay in memory from one round to the next; larger ones are made again."""
_RANDOM = 2**16


@dataclass(frozen=True)
class Condition:
    """How many sequences of how many tokens run at once."""

    batch: int
    context: int


@dataclass(frozen=True)
class BlockTimes:
    """Seconds of one layer and of all that is outside of layers, for a prompt and for one more token."""

    prefill_block: float
    prefill_rest: float
    decode_block: float
    decode_rest: float

    def scaled(self, prefill: float, decode: float) -> BlockTimes:
        """All times multiplied by these factors."""
        return BlockTimes(
            self.prefill_block * prefill,
            self.prefill_rest * prefill,
            self.decode_block * decode,
            self.decode_rest * decode,
        )

    def with_beside(self, prefill: float, decode: float, *, layers: int) -> BlockTimes:
        """With seconds that each of the timed layers takes outside of itself counted to the layers."""
        return BlockTimes(
            prefill_block=self.prefill_block + prefill,
            prefill_rest=max(0.0, self.prefill_rest - layers * prefill),
            decode_block=self.decode_block + decode,
            decode_rest=max(0.0, self.decode_rest - layers * decode),
        )


class Pace:
    """A model that runs before each measurement, so that slow moments of the machine do not count."""

    def __init__(self, anatomy: Anatomy, condition: Condition, *, device: str, dtype: torch.dtype) -> None:
        whole = anatomy.sizes.at(layers=_timed_layers(anatomy))
        self.prompt_BS = timed_prompt(condition, anatomy.sizes.vocab)
        self.model = random_model(anatomy, whole, device=device, dtype=dtype)
        prefill_and_decode(self.model, self.prompt_BS, 1)
        self.prefill = self.decode = math.inf
        """The least seconds so far."""

    def beat(self) -> tuple[float, float]:
        """The seconds of a prompt and of one more token at this moment."""
        prefill, decode = self.seconds(self.model)
        self.prefill, self.decode = min(self.prefill, prefill), min(self.decode, decode)
        return prefill, decode

    def seconds(self, model: PreTrainedModel) -> tuple[float, float]:
        """The seconds of a prompt and of one more token of a model."""
        clock = clock_of(cuda=model.device.type == "cuda")
        prefill, decode = prefill_and_decode(model, self.prompt_BS, DECODED, clock=clock)
        return prefill, decode / DECODED


def time_blocks(anatomy: Anatomy, archs: Sequence[Arch], pace: Pace, *, rounds: int = 3) -> dict[Arch, BlockTimes]:
    """Time layers at these widths; widths take turns."""
    shares: dict[Arch, list[BlockTimes]] = {arch: [] for arch in archs}
    models: dict[Arch, PreTrainedModel] = {}
    kept_bytes = 0
    for _ in range(rounds):
        for arch in archs:
            model = models.get(arch)
            if model is None:
                place, dtype = pace.model.device.type, pace.model.dtype
                model = random_model(anatomy, arch.at(layers=_timed_layers(anatomy)), device=place, dtype=dtype)
                size = weight_bytes(model)
                if kept_bytes + size <= _TOGETHER:
                    models[arch] = model
                    kept_bytes += size
            layers = model.get_submodule(anatomy.layers_path)
            assert isinstance(layers, nn.ModuleList)
            prefill_and_decode(model, pace.prompt_BS, 1)  # the first pass allocates
            for _ in range(_REPEATS):
                prefill, decode = pace.beat()
                shares[arch].append(_once(model, layers, pace).scaled(1 / prefill, 1 / decode))
    times_of = {arch: _median(listed).scaled(pace.prefill, pace.decode) for arch, listed in shares.items()}
    beside = _beside_layers(anatomy, pace, rounds=rounds * len(archs) // 2)
    return {arch: times.with_beside(*beside, layers=_timed_layers(anatomy)) for arch, times in times_of.items()}


def _beside_layers(anatomy: Anatomy, pace: Pace, *, rounds: int) -> tuple[float, float]:
    """Seconds of a prompt and of one more token that each layer takes outside of itself, such as in the cache's code.

    It does not depend on widths: the pace is compared with a model of the same widths and a third of its layers.
    """
    most, least = _timed_layers(anatomy), max(1, _timed_layers(anatomy) // 3)
    if most == least:
        return 0.0, 0.0
    device, dtype = pace.model.device.type, pace.model.dtype
    shallow = random_model(anatomy, anatomy.sizes.at(layers=least), device=device, dtype=dtype)
    prefill_and_decode(shallow, pace.prompt_BS, 1)
    rests: list[list[BlockTimes]] = [[], []]
    for _ in range(rounds):
        for model, listed in zip((pace.model, shallow), rests, strict=True):
            layers = model.get_submodule(anatomy.layers_path)
            assert isinstance(layers, nn.ModuleList)
            prefill, decode = pace.beat()
            listed.append(_once(model, layers, pace).scaled(1 / prefill, 1 / decode))
    deep, flat = (_median(listed).scaled(pace.prefill, pace.decode) for listed in rests)
    each = [getattr(deep, part) - getattr(flat, part) for part in ("prefill_rest", "decode_rest")]
    return max(0.0, each[0] / (most - least)), max(0.0, each[1] / (most - least))


def _median(listed: Sequence[BlockTimes]) -> BlockTimes:
    return BlockTimes(**{part: statistics.median(vars(entry)[part] for entry in listed) for part in vars(listed[0])})


def random_model(anatomy: Anatomy, arch: Arch, *, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """A model of these sizes with the first layers of the anatomy's, and with small random weights.

    It has room for the tokens that are timed behind a prompt of the model's whole context.
    """
    config = resized(anatomy.config, config_sizes(anatomy, arch), kept_layers=tuple(range(arch.layers)))
    lengthen_context(config, DECODED)
    model = build(config, device=device, dtype=dtype)
    some = torch.empty(_RANDOM).normal_(0.0, 0.02, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            repeats = -(-parameter.numel() // _RANDOM)
            parameter.copy_(some.repeat(repeats)[: parameter.numel()].view(parameter.shape))
    return model


def timed_prompt(condition: Condition, vocab: int) -> Tensor:
    """Token ids of a prompt, always the same."""
    ids = torch.arange(condition.batch * condition.context, dtype=torch.int64) * 7919 % vocab
    return ids.view(condition.batch, condition.context)


def _timed_layers(anatomy: Anatomy) -> int:
    """About half of the layers: so many that they do not all stay in the processor's cache."""
    return max(1, anatomy.sizes.layers // 2)


def _once(model: PreTrainedModel, layers: nn.ModuleList, pace: Pace) -> BlockTimes:
    clock = _Clock(cuda=model.device.type == "cuda")
    hooks = [
        layers[0].register_forward_pre_hook(lambda *_: clock.stamp()),
        layers[len(layers) - 1].register_forward_hook(lambda *_: clock.stamp()),
    ]
    try:
        prefill, decode = pace.seconds(model)
    finally:
        for hook in hooks:
            hook.remove()
    first, *others = clock.spans()
    layers_decode = sum(others) / len(others)
    return BlockTimes(
        prefill_block=first / len(layers),
        prefill_rest=max(0.0, prefill - first),
        decode_block=layers_decode / len(layers),
        decode_rest=max(0.0, decode - layers_decode),
    )


def clock_of(*, cuda: bool) -> Callable[[], float]:
    """The clock by which shapes are timed."""
    return time.thread_time if not cuda and torch.get_num_threads() == 1 else time.perf_counter


class _Clock:
    """Stamps of time, in pairs; on CUDA those of the device, which does not wait for them."""

    def __init__(self, *, cuda: bool) -> None:
        self.cuda, self.now = cuda, clock_of(cuda=cuda)
        self.events: list[torch.cuda.Event] = []
        self.moments: list[float] = []

    def stamp(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self.events.append(event)
        else:
            self.moments.append(self.now())

    def spans(self) -> list[float]:
        """The seconds between the two stamps of each pair."""
        if self.cuda:
            torch.cuda.synchronize()
            pairs = zip(self.events[::2], self.events[1::2], strict=True)
            return [start.elapsed_time(end) / 1000 for start, end in pairs]
        return [end - start for start, end in zip(self.moments[::2], self.moments[1::2], strict=True)]
