"""Measure a model without some of its layers, without building it. The states before the removal are reused.

A layer is removed by passing its input on, which equals what `halve.cut.surgery.trim.trim` builds (the proofs of
`halve.cut.proof.prove` compare the two). Every remaining layer keeps its own attention type, mask and rotary table.
Removing layers i.. changes nothing before i. So a micro-batch goes through the model once, and the input of every layer
is kept. A removal then starts from the input of its first removed layer:

    layers run by a sweep of n contiguous layers over all L - n + 1 positions
        each position on its own     (L - n + 1) (L - n)
        with the prefix reused       (L - n + 1) (L - n) / 2  and L for the one whole pass

Each time, the model's own forward is run with the `forward` of some layers replaced. So masks, embeddings, scales and
everything after the last layer are the family's own code. The replacements are undone on every exit.

Legend: B batch, S seq, D hidden, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from halve.anatomy import Anatomy
from halve.errors import AnatomyError
from halve.model.finite import came_out, require_finite
from halve.model.hooks import first_input, hooked, on_input, on_output
from halve.progress import SILENT, Progress

Forward = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class Trace:
    """The states of one pass of one micro-batch."""

    states: tuple[Float[Tensor, "batch seq hidden"], ...]
    """The residual stream before every layer and after the last: L + 1 tensors."""
    hidden: Float[Tensor, "batch seq hidden"]
    """The body's output, after the final norm: what the head reads."""


@dataclass(frozen=True, eq=False)
class Layers:
    """A model's layers, and how many values the call of one returns (0: a bare tensor). `layers_of` makes it."""

    body: nn.Module
    modules: tuple[nn.Module, ...]
    arity: int
    device: torch.device


def layers_of(model: PreTrainedModel, anatomy: Anatomy) -> Layers:
    """The layers of a model, after a test on four tokens that the second half can run from stored states.

    Raises `AnatomyError` if a layer is not called exactly once in a pass, or if more than one tensor goes from layer to
    layer. Raises `CheckpointError` for hidden states that are not finite.
    """
    assert not model.training, "measure a model in eval mode"
    modules = tuple(model.get_submodule(f"{anatomy.layers_path}.{i}") for i in range(anatomy.sizes.layers))
    ids_BS = torch.arange(4, device=model.device)[None] % anatomy.sizes.vocab
    returned: list[Any] = []
    with hooked(modules[:1], after=lambda *call: returned.append(call[-1])), torch.inference_mode():
        model.base_model(input_ids=ids_BS, use_cache=False)
    arity = len(returned[0]) if returned and isinstance(returned[0], tuple) else 0
    layers = Layers(model.base_model, modules, arity, model.device)
    whole = trace(layers, ids_BS)
    again_BSD = resume(layers, ids_BS, whole, start=len(modules) // 2)
    require_finite("the model's hidden states", whole.hidden, why=came_out(on="four plain tokens"))
    if not torch.allclose(again_BSD, whole.hidden, rtol=0, atol=1e-2 * float(whole.hidden.abs().max())):
        raise _unknown(f"run from a kept state, {anatomy.family} comes to another result")
    return layers


@torch.inference_mode()
def trace(layers: Layers, ids_BS: Int64[Tensor, "batch seq"], *, removed: Collection[int] = ()) -> Trace:
    """One pass without the removed layers that stores the input of every layer."""
    states: list[Tensor] = []
    with ExitStack() as hooks:
        hooks.enter_context(_replaced(layers, {layer: _pass_on(layers.arity) for layer in removed}))
        for module in layers.modules:
            hooks.enter_context(on_input(module, states.append))
        last: list[Tensor] = []
        hooks.enter_context(on_output(layers.modules[-1], last.append))
        hidden_BSD = layers.body(input_ids=ids_BS.to(layers.device), use_cache=False)[0]
    if len(states) != len(layers.modules):
        raise _unknown(f"{len(layers.modules)} layers were called {len(states)} times in a pass")
    return Trace((*states, *last), hidden_BSD)


@torch.inference_mode()
def resume(
    layers: Layers, ids_BS: Int64[Tensor, "batch seq"], before: Trace, *, start: int, removed: Collection[int] = ()
) -> Float[Tensor, "batch seq hidden"]:
    """The body's output without the removed layers, running only those from `start` on.

    `before` is a trace of the same tokens; below `start` it has to have the same layers removed.
    """
    forwards: dict[int, Forward] = {layer: _hand_out(before.states[start], layers.arity) for layer in range(start)}
    forwards |= {layer: _pass_on(layers.arity) for layer in removed if layer >= start}
    with _replaced(layers, forwards):
        hidden_BSD: Tensor = layers.body(input_ids=ids_BS.to(layers.device), use_cache=False)[0]
    return hidden_BSD


def sweep(
    layers: Layers,
    batches: Sequence[Tensor],
    sets: Sequence[Sequence[int]],
    *,
    removed: Collection[int],
    whole: Callable[[int, Trace], None],
    each: Callable[[int, int, Tensor], None],
    progress: Progress = SILENT,
) -> float:
    """Run every batch without `removed`, then also without each set. Returns the cost in full passes.

    `batches` holds token ids [batch, seq].

    `whole(batch, trace)` is called for the first, and `each(batch, set, hidden)` for the others. Nothing is kept after
    its batch unless they keep it. Memory: L + 1 states of one batch.

    The result counts layers that were run, by tokens, over L times all tokens.
    """
    total, run = len(layers.modules), 0
    tokens = sum(ids_BS.numel() for ids_BS in batches)
    gone = frozenset(removed)
    with progress.task("layers", tokens * (1 + len(sets))) as task:
        for b, ids_BS in enumerate(batches):
            before = trace(layers, ids_BS, removed=gone)
            run += (total - len(gone)) * ids_BS.numel()
            whole(b, before)
            task.advance(ids_BS.numel())
            for s, chosen in enumerate(sets):
                start, out = min(chosen), gone | set(chosen)
                each(b, s, resume(layers, ids_BS, before, start=start, removed=out))
                run += sum(layer not in out for layer in range(start, total)) * ids_BS.numel()
                task.advance(ids_BS.numel())
    return run / (total * tokens)


def ignore(*_: Any) -> None:
    """A listener for `sweep` that does nothing."""


@contextmanager
def _replaced(layers: Layers, forwards: Mapping[int, Forward]) -> Iterator[None]:
    """In this context, these layers run another function. An own `forward` of an instance is restored."""
    own_forwards = {layer: layers.modules[layer].__dict__.get("forward") for layer in forwards}
    try:
        for layer, forward in forwards.items():
            layers.modules[layer].__dict__["forward"] = forward
        yield
    finally:
        for layer, before in own_forwards.items():
            layers.modules[layer].__dict__.pop("forward", None)
            if before is not None:
                layers.modules[layer].__dict__["forward"] = before


def _pass_on(arity: int) -> Forward:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return _returned(first_input(args, kwargs), arity)

    return forward


def _hand_out(state_BSD: Tensor, arity: int) -> Forward:
    def forward(*_args: Any, **_kwargs: Any) -> Any:
        return _returned(state_BSD, arity)

    return forward


def _returned(state_BSD: Tensor, arity: int) -> Any:
    return (state_BSD, *[None] * (arity - 1)) if arity else state_BSD


def _unknown(why: str) -> AnatomyError:
    return AnatomyError(
        "cannot measure what layers are worth by leaving them out",
        why=why,
        fix="score depth by bi, or name layers with drop_layers; please report the model",
    )
