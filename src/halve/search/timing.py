"""The time that the layers of a model take, and the rest of it, in prefill and in decode.

Shape suffixes: `B` batch, `S` tokens of the prompt.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from halve.anatomy import Anatomy, Arch
from halve.anatomy.configs import build, resized
from halve.cut.plan.sizes import config_sizes
from halve.model.speed import prefill_and_decode

_DECODED = 8
_ROUNDS, _REPEATS = 3, 3
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

    def least(self, other: BlockTimes) -> BlockTimes:
        """The smaller of each."""
        return BlockTimes(**{part: min(mine, vars(other)[part]) for part, mine in vars(self).items()})


def time_blocks(
    anatomy: Anatomy, archs: Sequence[Arch], condition: Condition, *, device: str, dtype: torch.dtype
) -> dict[Arch, BlockTimes]:
    """Time layers at these widths, the least of all repeats. Widths take turns, so that all see the same machine."""
    found: dict[Arch, BlockTimes] = {}
    models: dict[Arch, PreTrainedModel] = {}
    kept_bytes = 0
    for _ in range(_ROUNDS):
        for arch in archs:
            model = models.get(arch)
            if model is None:
                model = random_model(anatomy, arch.at(layers=_timed_layers(anatomy)), device=device, dtype=dtype)
                size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
                if kept_bytes + size <= _TOGETHER:
                    models[arch] = model
                    kept_bytes += size
            layers = model.get_submodule(anatomy.layers_path)
            assert isinstance(layers, nn.ModuleList)
            prompt_BS = prompt_of(condition, anatomy.sizes.vocab)
            prefill_and_decode(model, prompt_BS, 1)  # the first pass allocates
            for _ in range(_REPEATS):
                times = _once(model, layers, prompt_BS)
                found[arch] = times.least(found[arch]) if arch in found else times
    return found


def random_model(anatomy: Anatomy, arch: Arch, *, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """A model of these sizes with the first layers of the anatomy's, and with small random weights."""
    config = resized(anatomy.config, config_sizes(anatomy, arch), kept_layers=tuple(range(arch.layers)))
    model = build(config, device=device, dtype=dtype)
    some = torch.empty(_RANDOM).normal_(0.0, 0.02, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            repeats = -(-parameter.numel() // _RANDOM)
            parameter.copy_(some.repeat(repeats)[: parameter.numel()].view(parameter.shape))
    return model


def prompt_of(condition: Condition, vocab: int) -> Tensor:
    """Token ids of a prompt, always the same."""
    ids = torch.arange(condition.batch * condition.context, dtype=torch.int64) * 7919 % vocab
    return ids.view(condition.batch, condition.context)


def _timed_layers(anatomy: Anatomy) -> int:
    """About half of the layers: so many that they do not all stay in the processor's cache."""
    return max(1, anatomy.sizes.layers // 2)


def _once(model: PreTrainedModel, layers: nn.ModuleList, prompt_BS: Tensor) -> BlockTimes:
    clock = _Clock(cuda=model.device.type == "cuda")
    hooks = [
        layers[0].register_forward_pre_hook(lambda *_: clock.stamp()),
        layers[len(layers) - 1].register_forward_hook(lambda *_: clock.stamp()),
    ]
    try:
        prefill, decode = prefill_and_decode(model, prompt_BS, _DECODED)
    finally:
        for hook in hooks:
            hook.remove()
    first, *others = clock.spans()
    return BlockTimes(
        prefill_block=first / len(layers),
        prefill_rest=max(0.0, prefill - first),
        decode_block=sum(others) / len(others) / len(layers),
        decode_rest=max(0.0, (decode - sum(others)) / len(others)),
    )


class _Clock:
    """Stamps of time, in pairs; on CUDA those of the device, which does not wait for them."""

    def __init__(self, *, cuda: bool) -> None:
        self.cuda = cuda
        self.events: list[torch.cuda.Event] = []
        self.moments: list[float] = []

    def stamp(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self.events.append(event)
        else:
            self.moments.append(time.perf_counter())

    def spans(self) -> list[float]:
        """The seconds between the two stamps of each pair."""
        if self.cuda:
            torch.cuda.synchronize()
            pairs = zip(self.events[::2], self.events[1::2], strict=True)
            return [start.elapsed_time(end) / 1000 for start, end in pairs]
        return [end - start for start, end in zip(self.moments[::2], self.moments[1::2], strict=True)]
