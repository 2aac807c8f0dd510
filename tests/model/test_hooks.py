"""Hooks that go with their block: what they hand over, what they may change, and that nothing stays."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from halve.model.hooks import Reached, hooked, on_input, on_output, on_passage


class Layer(nn.Module):
    """Takes its state by place or by name, and gives it in front of something else."""

    def forward(self, state: Tensor, mask: Tensor | None = None) -> tuple[Tensor, str]:
        return state + 1, "cache"


STATE, MASK = torch.zeros(2), torch.ones(2)


def hooks_of(module: nn.Module) -> int:
    return len(module._forward_hooks) + len(module._forward_pre_hooks)


@pytest.mark.parametrize("by_name", [False, True])
def test_the_first_input_and_output_are_handed_over(by_name: bool) -> None:
    layer = Layer()
    seen: dict[str, Any] = {}
    with (
        on_input(layer, lambda x: seen.update(input=x)),
        on_output(layer, lambda y: seen.update(output=y)),
        on_passage(layer, lambda x, y: seen.update(passage=(x, y))),
    ):
        given = layer(state=STATE, mask=MASK) if by_name else layer(STATE, MASK)
    assert seen["input"] is STATE
    assert seen["output"] is given[0]
    assert seen["passage"][0] is STATE
    assert seen["passage"][1] is given[0]
    assert hooks_of(layer) == 0


def test_an_input_is_handed_over_before_the_module_runs() -> None:
    layer, ran = Layer(), []

    def leave(_: Tensor) -> None:
        raise Reached

    with hooked([layer], after=lambda *_: ran.append(1)), on_input(layer, leave), suppress(Reached):
        layer(STATE)
    assert ran == []
    assert hooks_of(layer) == 0


def test_what_a_hook_returns_takes_the_place_of_what_it_saw() -> None:
    layers = nn.Sequential(nn.Identity(), nn.Identity())
    with hooked(layers, before=lambda _, args, kwargs: ((args[0] + 1,), kwargs), after=lambda *call: 10 * call[-1]):
        assert layers(torch.ones(1)).item() == 10 * (10 * (1 + 1) + 1)
    assert layers(torch.ones(1)).item() == 1


def test_nothing_stays_where_the_block_fails() -> None:
    layers = [Layer(), Layer()]
    with pytest.raises(KeyboardInterrupt), hooked(layers, before=lambda *_: None, after=lambda *_: None):  # noqa: PT012
        assert [hooks_of(layer) for layer in layers] == [2, 2]
        raise KeyboardInterrupt
    assert [hooks_of(layer) for layer in layers] == [0, 0]
