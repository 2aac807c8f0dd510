"""Optimizers: who moves what, in which state, and a resume with the same bits for each kind."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from looped import CONTEXT, Killed, killing, run, same, taught, tiny, training, weights

from halve.errors import TrainError
from halve.recipe.schema import Training
from halve.train.loop import optimizers
from halve.train.loop.optimizers import make_optimizer
from halve.train.ranks import blocks

# what torch's compiler says of itself
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

LARGE = {"hidden_size": 64, "intermediate_size": 64}  # the 8-bit library keeps small tensors in 32 bits
KINDS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "muon": {"optimizer": "muon"},
    "adamw8bit": {"optimizer": "adamw8bit"},
    "offloaded": {"offload_optimizer": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path, kind: str) -> None:
    recipe, objective = training(**KINDS[kind]), taught(tiny(seed=1))
    whole, model = tiny(**LARGE), tiny(**LARGE)
    start = weights(whole)
    run(tmp_path / "whole", whole, objective=objective, recipe=recipe)
    assert not same(weights(whole), start)
    with pytest.raises(Killed):
        run(tmp_path / "killed", model, objective=killing(objective, 3), recipe=recipe)
    again = tiny(**LARGE)
    assert run(tmp_path / "killed", again, objective=objective, recipe=recipe).resumed_from == 2
    assert same(weights(again), weights(whole))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns(tmp_path: Path, kind: str) -> None:
    recipe = training(tokens=60 * 8 * CONTEXT, **KINDS[kind])
    model = tiny(**LARGE)
    result = run(tmp_path, model, objective=taught(tiny(seed=1)), recipe=recipe)
    first = run(tmp_path / "one", tiny(**LARGE), objective=taught(tiny(seed=1)), recipe=training(tokens=8 * CONTEXT))
    assert result.loss is not None
    assert first.loss is not None
    assert result.loss < 0.7 * first.loss


def test_moments_in_main_memory_move_as_adamw(tmp_path: Path) -> None:
    one, other = tiny(), tiny()
    run(tmp_path / "adamw", one)
    run(tmp_path / "offloaded", other, recipe=training(offload_optimizer=True))
    torch.testing.assert_close(weights(one), weights(other), rtol=1e-6, atol=1e-8)


def test_muon_moves_matrices_between_hidden_states_alone() -> None:
    model = tiny()
    between = [parameter for layer in blocks.layers(model) for parameter in layer.parameters()]
    made = make_optimizer(model.parameters(), training(optimizer="muon"), between=between)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    made.step()
    by_muon = {name for name, p in model.named_parameters() if "momentum_buffer" in made.state[p]}
    matrices = {name for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2}
    assert by_muon == matrices
    assert len(matrices) == 14
    assert sum("exp_avg" in made.state[p] for p in model.parameters()) == len(list(model.parameters())) - 14


@pytest.mark.parametrize(("slow", "apart"), [(True, (0.0, 1e-5)), (False, (1e-3, 5e-2))])
def test_muon_iterates_in_float32_where_bfloat16_is_slow(
    monkeypatch: pytest.MonkeyPatch, slow: bool, apart: tuple[float, float]
) -> None:
    """Against five Newton-Schulz iterations in float64; from zero the first step is the orthogonalized gradient."""
    monkeypatch.setattr(optimizers, "is_slow_here", lambda dtype: slow)
    weight = torch.nn.Parameter(torch.zeros(48, 32))
    weight.grad = torch.randn(48, 32, generator=torch.Generator().manual_seed(0))
    gradient = weight.grad.clone()
    x = gradient.double().T / gradient.double().norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    make_optimizer([weight], training(optimizer="muon", lr=1e-2), between=[weight]).step()
    assert torch.equal(weight.grad, gradient)
    want = -1e-2 * 0.2 * 48**0.5 * x.T
    assert apart[0] <= ((weight.double() - want).norm() / want.norm()).item() < apart[1]


def test_moments_in_8_bits_take_a_byte_an_entry() -> None:
    weight = torch.nn.Parameter(torch.ones(64, 64))
    made = make_optimizer([weight], training(optimizer="adamw8bit"))
    weight.grad = torch.ones_like(weight)
    made.step()
    codes = made.state[weight]["exp_avg"].codes
    assert codes.dtype == torch.uint8
    assert codes.numel() == 64 * 64


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TrainError) as caught:
        optimizers.require(training(optimizer="adamw8bit"))
    assert "pip install 'halve[lowbit]'" in caught.value.fix


def test_moments_in_main_memory_are_adamws() -> None:
    with pytest.raises(ValueError, match="offload_optimizer works only with optimizer: adamw"):
        Training(tokens=1, optimizer="muon", offload_optimizer=True)
