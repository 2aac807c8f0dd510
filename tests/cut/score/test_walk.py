"""How layers are called is found without running them."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from families import config
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from halve.anatomy import discover
from halve.cut.proof.twins import random_twin
from halve.cut.score.walk import Call, layer_modules, record_calls, run_layer
from halve.model.hooks import first_input

FAMILIES = ["llama", "gemma2", "gemma3_text", "cohere2", "smollm3", "gpt2", "gpt_neox", "stablelm", "glm4", "phi"]


@pytest.mark.parametrize("family", [*FAMILIES, "mixtral"])
def test_calls_are_those_of_a_whole_pass(family: str) -> None:
    anatomy = discover(config(family))
    model = random_twin(anatomy, seed=0).requires_grad_(False)
    layers = layer_modules(model, anatomy)
    ids_BS = torch.randint(anatomy.sizes.vocab, (2, 9), generator=torch.Generator().manual_seed(0))
    whole: list[Call] = []
    states: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(first_input(args, kwargs))
        whole.append(Call(args[1:], {name: value for name, value in kwargs.items() if args or value is not states[-1]}))

    with ExitStack() as hooks, torch.no_grad():
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(note, with_kwargs=True).remove)
        model.base_model(input_ids=ids_BS, use_cache=False)
    ran: list[nn.Module] = []
    with ExitStack() as hooks:
        for layer in layers:
            inner = next(layer.children())  # runs only where its layer does
            hooks.callback(inner.register_forward_hook(lambda module, _args, _output: ran.append(module)).remove)
        found, first_BSD = record_calls(model, anatomy, ids_BS)
    assert len(found) == len(whole) == anatomy.sizes.layers
    assert len(ran) == len({type(layer) for layer in layers})
    assert torch.equal(first_BSD, states[0])
    for mine, theirs in zip(found, whole, strict=True):
        (mine_leaves, its), (their_leaves, form) = (tree_flatten((c.positional, c.keywords)) for c in (mine, theirs))
        assert its == form
        for a, b in zip(mine_leaves, their_leaves, strict=True):
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
    assert all("forward" not in vars(layer) for layer in layers), "modules are as they were"
    x_BSD = first_BSD
    for layer, call, state in zip(layers, found, states, strict=True):
        assert torch.equal(x_BSD, state)
        x_BSD = run_layer(layer, call, x_BSD)
