"""Removing layers by leaving them out: the same numbers as from a trimmed model, half the work, nothing left behind."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import pytest
import torch
from families import PROVED, config
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from halve.anatomy import Anatomy, discover
from halve.cut.layers import removal
from halve.cut.plan.plan import select
from halve.cut.proof.twins import RandomScores, random_twin
from halve.cut.surgery.trim import trim
from halve.errors import AnatomyError

LAYERS = 6


def twin_of(family: str, **changes: object) -> tuple[PreTrainedModel, Anatomy]:
    """A float64 model of six layers with order-one weights."""
    anatomy = discover(config(family, **changes))
    return random_twin(anatomy, seed=5), anatomy


def without(model: PreTrainedModel, anatomy: Anatomy, layers: Sequence[int]) -> PreTrainedModel:
    """A really trimmed model."""
    kept = [layer for layer in range(anatomy.sizes.layers) if layer not in layers]
    after = anatomy.sizes.at(layers=len(kept))
    plan = select(anatomy, after, RandomScores(anatomy.sizes, 0), gain="none", kept_layers=kept)
    student = trim(model, plan, anatomy)
    student.config._attn_implementation = "eager"
    return student


def ids(batch: int = 2, seq: int = 12, *, seed: int = 0) -> Tensor:
    return torch.randint(128, (batch, seq), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", PROVED)
def test_a_removal_is_a_trimmed_model(family: str) -> None:
    changes = {"sliding_window": 5} if family in ("gemma2", "gemma3_text", "cohere2") else {}
    model, anatomy = twin_of(family, **changes)
    layers, tokens = removal.layers_of(model, anatomy), ids()
    gone = (1,)
    sets = ((0,), (2, 3), (3, 5), (5,))
    found: dict[tuple[int, ...], Tensor] = {}

    def each(_: int, s: int, hidden: Tensor) -> None:
        found[sets[s]] = hidden

    removal.sweep(layers, [tokens], sets, removed=gone, whole=removal.ignore, each=each)
    for chosen, hidden in found.items():
        student = without(model, anatomy, (*gone, *chosen))
        with torch.no_grad():
            expected = student.base_model(input_ids=tokens, use_cache=False)[0]
        torch.testing.assert_close(hidden, expected, rtol=1e-11, atol=1e-11)


def test_layers_keep_their_own_type() -> None:
    model, anatomy = twin_of("gemma2", sliding_window=4)
    kinds = model.config.layer_types
    assert len(set(kinds)) == 2
    layers, tokens = removal.layers_of(model, anatomy), ids(1, 16)
    whole = removal.trace(layers, tokens)
    hidden = removal.resume(layers, tokens, whole, start=0, removed=(0,))
    own = without(model, anatomy, (0,))
    assert own.config.layer_types == kinds[1:]
    shifted = without(model, anatomy, (0,))
    shifted.config.layer_types = kinds[:-1]
    with torch.no_grad():
        torch.testing.assert_close(hidden, own.base_model(tokens, use_cache=False)[0], rtol=1e-11, atol=1e-11)
        assert (shifted.base_model(tokens, use_cache=False)[0] - hidden).abs().max() > 1e-3


def test_states_are_what_layers_read_and_write() -> None:
    model, anatomy = twin_of("llama")
    tokens = ids()
    seen: list[Tensor] = []
    with ExitStack() as hooks, torch.no_grad():
        for module in model.model.layers:
            handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
            hooks.callback(handle.remove)
        hidden = model.base_model(tokens, use_cache=False)[0]
    found = removal.trace(removal.layers_of(model, anatomy), tokens)
    assert len(found.states) == LAYERS + 1
    assert all(a.equal(b) for a, b in zip(found.states, seen, strict=False))
    assert found.hidden.equal(hidden)
    assert model.model.norm(found.states[-1]).equal(hidden)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_sweep_costs_half_and_counts_what_it_runs(size: int) -> None:
    model, anatomy = twin_of("llama")
    layers = removal.layers_of(model, anatomy)
    calls = [0]

    def count(*_: object) -> None:
        calls[0] += 1

    batches = list(torch.split(ids(5), 2))  # two samples, two samples, one
    sets = [tuple(range(i, i + size)) for i in range(LAYERS - size + 1)]
    with ExitStack() as hooks:
        for module in model.model.layers:
            hooks.callback(module.self_attn.register_forward_hook(count).remove)
        passes = removal.sweep(layers, batches, sets, removed=(), whole=removal.ignore, each=removal.ignore)
    naive = len(sets) * (LAYERS - size)
    assert calls[0] == 3 * (LAYERS + naive // 2)
    assert passes == pytest.approx((LAYERS + naive / 2) / LAYERS)


def test_passes_are_weighed_by_tokens() -> None:
    model, anatomy = twin_of("llama")
    layers = removal.layers_of(model, anatomy)
    batches = [ids(1, 4), ids(1, 12)]
    passes = removal.sweep(layers, batches, [(5,)], removed=(4,), whole=removal.ignore, each=removal.ignore)
    assert passes == pytest.approx(5 / 6)


def test_the_model_is_as_before_also_after_an_exception() -> None:
    model, anatomy = twin_of("llama")
    layers, tokens = removal.layers_of(model, anatomy), ids()
    with torch.no_grad():
        before = model(tokens, use_cache=False).logits
    own = model.model.layers[2].forward

    def wrapped(*args: object, **kwargs: object) -> object:
        return own(*args, **kwargs)

    model.model.layers[2].forward = wrapped

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        removal.sweep(layers, [tokens], [(2,)], removed=(1,), whole=removal.ignore, each=stop)
    handle = model.model.layers[4].mlp.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        removal.sweep(layers, [tokens], [(2,)], removed=(1,), whole=removal.ignore, each=removal.ignore)
    handle.remove()
    assert model.model.layers[2].__dict__["forward"] is wrapped
    assert all("forward" not in model.model.layers[i].__dict__ for i in (0, 1, 3, 4, 5))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with torch.no_grad():
        assert model(tokens, use_cache=False).logits.equal(before)


class _Carries(nn.Module):
    """A layer that changes its input in place, so that a kept state does not stay what it was."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor, **kwargs: object) -> Tensor:
        return hidden.mul_(self.layer(hidden, **kwargs).sigmoid())


def test_a_model_whose_states_cannot_be_kept_is_refused() -> None:
    model, anatomy = twin_of("llama")
    model.model.layers[3] = _Carries(model.model.layers[3])
    with pytest.raises(AnatomyError, match="cannot measure what layers are worth") as caught:
        removal.layers_of(model, anatomy)
    assert "kept state" in caught.value.why


def test_a_layer_that_is_called_twice_is_refused() -> None:
    model, anatomy = twin_of("llama")
    model.model.layers[3] = model.model.layers[2]
    with pytest.raises(AnatomyError, match="cannot measure"):
        removal.layers_of(model, anatomy)


TUPLES = {
    "bloom": {"hidden_size": 48, "n_head": 6, "n_layer": 4},
    "falcon": {"hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 4},
    "gptj": {"n_embd": 48, "n_head": 6, "n_layer": 4, "rotary_dim": 4},
}


@pytest.mark.parametrize("family", TUPLES)
def test_layers_that_return_tuples(family: str) -> None:
    anatomy = discover(AutoConfig.for_model(family, vocab_size=128, **TUPLES[family]))
    model = random_twin(anatomy, seed=5)
    layers, tokens = removal.layers_of(model, anatomy), ids()
    assert layers.arity > 0
    whole = removal.trace(layers, tokens)
    hidden = removal.resume(layers, tokens, whole, start=1, removed=(1, 2))
    with torch.no_grad():
        expected = without(model, anatomy, (1, 2)).base_model(input_ids=tokens, use_cache=False)[0]
    torch.testing.assert_close(hidden, expected, rtol=1e-11, atol=1e-11)
