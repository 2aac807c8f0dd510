"""Shapes that share a budget between depth and width, and the trial that chooses among them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import config

from halve.anatomy import Anatomy, discover
from halve.cut.apply import turn
from halve.cut.scores import random_scores
from halve.cut.sizes import budget_of, shapes
from halve.cut.trial import best, try_shapes
from halve.cut.twins import random_twin
from halve.errors import CorpusError
from halve.recipe import Prune

LLAMA = {"hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 6}


def _samples(anatomy: Anatomy, num: int) -> torch.Tensor:
    return torch.randint(anatomy.sizes.vocab, (num, 32), generator=torch.Generator().manual_seed(1))


def test_shapes_meet_the_budget_with_one_for_each_depth() -> None:
    anatomy = discover(config("llama", **LLAMA))
    budget = budget_of(anatomy, Prune(non_embedding_ratio=0.5))
    assert budget is not None
    found = shapes(anatomy, budget[0], total=budget[1])
    depths = [arch.layers for arch in found]
    assert depths == sorted(set(depths), reverse=True)
    assert len(depths) >= 3
    assert found[-1].layers == 3
    assert (found[-1].hidden, found[-1].ffn) == (192, 384)  # half of the layers, whole
    away = [abs(anatomy.ledger.count(arch).non_embedding / budget[0] - 1) for arch in found]
    assert max(away) <= max(0.01, 2 * min(away))


def test_sizes_by_hand_are_no_budget() -> None:
    anatomy = discover(config("llama", **LLAMA))
    assert budget_of(anatomy, Prune(hidden=64)) is None
    assert budget_of(anatomy, Prune(params="100k")) == (100_000, True)


def _tried(model: Any, anatomy: Anatomy, num: int = 72) -> Any:
    prune = Prune(non_embedding_ratio=0.5)
    budget = budget_of(anatomy, prune)
    assert budget is not None
    samples = _samples(anatomy, num)
    return try_shapes(
        model,
        anatomy,
        random_scores(anatomy, 0),
        prune,
        shapes(anatomy, budget[0], total=budget[1]),
        samples,
        turned=turn(model, anatomy, prune, samples, micro_batch=24),
        micro_batch=24,
    )


def test_layers_that_do_nothing_are_found_and_dropped() -> None:
    """Three of six layers write nothing: the trial takes them and leaves the width."""
    anatomy = discover(config("llama", **LLAMA))
    model = random_twin(anatomy, seed=0).requires_grad_(False)
    scores = random_scores(anatomy, 0)
    idle = set(scores.layers.argsort()[:3].tolist())
    with torch.no_grad():
        for layer in idle:
            model.model.layers[layer].self_attn.o_proj.weight.zero_()
            model.model.layers[layer].mlp.down_proj.weight.zero_()
    tried = _tried(model, anatomy)
    chosen = best(tried)
    assert idle.isdisjoint(chosen.kept_layers)
    assert chosen.kl == pytest.approx(0, abs=0.05)
    assert chosen.kl < 0.5 * tried[0].kl
    assert chosen.to_json()["arch"]["layers"] == chosen.arch.layers


def test_too_few_samples_are_refused() -> None:
    anatomy = discover(config("llama", **LLAMA))
    model = random_twin(anatomy, seed=0).requires_grad_(False)
    with pytest.raises(CorpusError, match="2 calibration samples are too few") as caught:
        _tried(model, anatomy, num=2)
    assert len(str(caught.value).splitlines()) == 3
