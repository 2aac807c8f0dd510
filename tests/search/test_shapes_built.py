"""The counts of a search against models that are built: random shapes of random families, on the meta device."""

from __future__ import annotations

import json
import random
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from families import ALSO, PROVED, config
from scripted import script
from transformers import AutoConfig, PreTrainedModel

from halve.anatomy import Anatomy, Arch, discover
from halve.anatomy.configs import build, quiet, resized
from halve.cut.plan.sizes import config_sizes, is_legal
from halve.recipe.searching import ByteLimits, FlopsLimits, Limits, MemoryLimits, Search
from halve.search.quantities import Prices
from halve.search.space import Space, legal_shapes

WALK = script("families")
EVERY = [*PROVED, *ALSO]
RANDOM = random.Random(15).sample(EVERY, 10)
WALKED: dict[str, dict[str, Any]] = json.loads(WALK.RESULTS.read_text(encoding="utf-8"))
"""What the proof refuses, of every family of transformers."""
CUT = sorted(name for name, found in WALKED.items() if len(found.get("refused", WALK.AXES)) < len(WALK.AXES))
WINDOW, CONTEXT, BATCH = 8, 13, 3
FREE = Search.model_validate({"budget": {"total": 1}, "axes": {"heads": "allowed", "hidden": 4, "ffn": 4}})
FREE_TOGETHER = FREE.model_copy(update={"axes": {}})


@pytest.fixture
def family(request: pytest.FixtureRequest) -> str:
    name = str(request.param)
    if name not in RANDOM and not request.config.getoption("--every-family"):
        pytest.skip("make long looks at every family")
    return name


@cache
def anatomy_of(family: str) -> Anatomy:
    plain = config(family)
    windowed = hasattr(plain, "sliding_window") and getattr(plain, "sliding_window", None) is not None
    return discover(config(family, sliding_window=WINDOW) if windowed else plain)


def built(anatomy: Anatomy, arch: Arch) -> PreTrainedModel:
    kept = tuple(range(arch.layers))
    return build(resized(anatomy.config, config_sizes(anatomy, arch), kept_layers=kept), device="meta")


def drawn(anatomy: Anatomy, space: Space, count: int) -> list[tuple[int, int, int, Arch]]:
    """Places and sizes of random shapes that the family accepts."""
    chance, found = random.Random(anatomy.family), []
    for _ in range(40 * count):
        layers = chance.choice(space.depths)
        width, ffn = chance.randrange(len(space.widths)), chance.randrange(len(space.ffns))
        arch = space.arch(layers, width, ffn)
        if is_legal(anatomy, arch):
            found.append((layers, width, ffn, arch))
        if len(found) == count:
            break
    return found


def cached_bytes(model: PreTrainedModel) -> int:
    """Bytes of the cache of one sequence in 16 bits while the last of the context's tokens is computed."""
    model.config._attn_implementation = "eager"
    ids = torch.zeros(1, CONTEXT - 1, dtype=torch.int64, device="meta")
    with torch.no_grad(), quiet():
        layers = model(input_ids=ids, use_cache=True).past_key_values.layers
    tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
    return sum(2 * tensor.numel() // tensor.shape[-2] * (tensor.shape[-2] + 1) for tensor in tensors)


def counted(anatomy: Anatomy, model: PreTrainedModel) -> tuple[int, int]:
    """Parameters of a model: all, and without embeddings."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    total = sum(sizes.values())
    return total, total - sum(sizes.get(name, 0) for name in anatomy.embeddings)


@pytest.mark.parametrize("family", EVERY, indirect=True)
def test_counts_are_those_of_the_built_model(family: str) -> None:
    anatomy = anatomy_of(family)
    space = legal_shapes(anatomy, FREE_TOGETHER if anatomy.coupled else FREE)
    prices, some = Prices(space), Limits(max="1B")
    shapes = drawn(anatomy, space, 4)
    assert len({arch for *_, arch in shapes}) > 2
    for layers, width, ffn, arch in shapes:
        model = built(anatomy, arch)
        total, non_embedding = counted(anatomy, model)

        def priced(quantity: str, limits: Limits, layers: int = layers, place: tuple[int, int] = (width, ffn)) -> float:
            return float(prices.values(quantity, limits, layers)[place])  # type: ignore[arg-type]

        assert priced("total", some) == priced("active", some) == total
        assert priced("non_embedding", some) == non_embedding
        assert priced("weight_bytes", ByteLimits(max="1GB", dtype="float32")) == 4 * total
        memory = priced("memory", MemoryLimits(max="1GB", batch=BATCH, context=CONTEXT))
        assert memory == 2 * total + BATCH * cached_bytes(model)
        counts = anatomy.ledger.count(arch, context=CONTEXT)
        assert priced("flops", FlopsLimits(max="1G", context=CONTEXT)) == counts.flops_per_token


@pytest.mark.parametrize("family", CUT)
def test_counts_are_those_of_the_built_model_in_every_family_that_is_cut(
    family: str, request: pytest.FixtureRequest
) -> None:
    """A small twin of each family, in the axes that its proof allows."""
    if not request.config.getoption("--every-family"):
        pytest.skip("make long looks at every family")
    with quiet():
        anatomy = discover(AutoConfig.for_model(family, **WALK.CHANGES.get(family, {}))).twin()
        free = {axis: step for axis, step in {"hidden": 4, "ffn": 4, "heads": "allowed"}.items() if not anatomy.coupled}
        refused = dict.fromkeys(WALKED[family]["refused"], "frozen")
        space = legal_shapes(anatomy, FREE.model_copy(update={"axes": free | refused}))
        prices, some = Prices(space), Limits(max="1B")
        shapes = drawn(anatomy, space, 3)
        assert shapes
        for layers, width, ffn, arch in shapes:
            total, active, rest = (
                float(prices.values(name, some, layers)[width, ffn]) for name in ("total", "active", "non_embedding")
            )
            assert (total, rest) == counted(anatomy, built(anatomy, arch))
            assert active <= total


def test_a_window_bounds_the_cache() -> None:
    """Of six layers of Gemma 2 every second one has a window: three hold eight tokens, three the whole context."""
    anatomy = anatomy_of("gemma2")
    sizes = anatomy.sizes
    cached = Space.whole(anatomy).tabulated.cached_numbers(6, context=1000)
    assert cached is not None
    assert np.all(cached == 3 * (WINDOW + 1000) * 2 * sizes.kv_heads * sizes.head_dim)


def test_of_a_mixture_only_the_experts_of_a_token_are_active() -> None:
    """Two of eight experts: the weights of six are idle. Their neurons cannot be cut, hidden and layers can."""
    mixture = discover(
        AutoConfig.for_model(
            "mixtral",
            vocab_size=128,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=8,
            num_experts_per_tok=2,
            sliding_window=None,
        )
    )
    space = legal_shapes(mixture, FREE_TOGETHER)
    assert space.ffns == (96,)
    prices, some = Prices(space), Limits(max="1B")
    for layers, width, ffn, arch in drawn(mixture, space, 3):
        total, active = (float(prices.values(name, some, layers)[width, ffn]) for name in ("total", "active"))
        assert total == sum(parameter.numel() for parameter in built(mixture, arch).parameters())
        assert total - active == layers * 6 * 3 * 96 * arch.hidden
