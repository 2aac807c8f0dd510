"""The shapes that a trial would try, of the models that people have: by their public sizes, without their weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jaxtyping
import pytest
from transformers import CONFIG_MAPPING, PretrainedConfig

from halve.anatomy import Anatomy, Arch, discover
from halve.anatomy.configs import build, resized
from halve.cut.plan.shapes import to_try
from halve.cut.plan.sizes import budget_of, candidates, config_sizes, is_legal, require_sizes
from halve.recipe.schema import Prune


def sizes(
    kind: str, hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, vocab: int, **more: Any
) -> tuple[str, dict[str, Any]]:
    """A kind of config and its values; more as the published files have it."""
    values = {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
    }
    return kind, values | more


TIED = {"tie_word_embeddings": True}
MODELS = {
    "Llama 3.1 8B": sizes("llama", 4096, 14336, 32, 32, 8, 128256),
    "Llama 3.2 1B": sizes("llama", 2048, 8192, 16, 32, 8, 128256, head_dim=64, **TIED),
    "Qwen 2.5 0.5B": sizes("qwen2", 896, 4864, 24, 14, 2, 151936, **TIED),
    "Qwen 2.5 7B": sizes("qwen2", 3584, 18944, 28, 28, 4, 152064),
    "Qwen 3 0.6B": sizes("qwen3", 1024, 3072, 28, 16, 8, 151936, head_dim=128, **TIED),
    "Qwen 3 8B": sizes("qwen3", 4096, 12288, 36, 32, 8, 151936, head_dim=128),
    "Gemma 2 2B": sizes("gemma2", 2304, 9216, 26, 8, 4, 256000, head_dim=256, **TIED),
    "Gemma 3 1B": sizes("gemma3_text", 1152, 6912, 26, 4, 1, 262144, head_dim=256, **TIED),
    "Mistral NeMo": sizes("mistral", 5120, 14336, 40, 32, 8, 131072, head_dim=128),
    "SmolLM2 135M": sizes("llama", 576, 1536, 30, 9, 3, 49152, **TIED),
    "SmolLM2 1.7B": sizes("llama", 2048, 8192, 24, 32, 32, 49152, **TIED),
    "Phi-3 mini": sizes("phi3", 3072, 8192, 32, 32, 32, 32064, pad_token_id=32000),
}
RATIOS = (0.7, 0.5, 0.3)


def config(name: str) -> PretrainedConfig:
    kind, values = MODELS[name]
    made: PretrainedConfig = CONFIG_MAPPING[kind](**values)
    return made


@pytest.fixture(autouse=True)
def _unchecked() -> Iterator[None]:
    """Hundreds of thousands of counts: their annotations are checked by other tests."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def listed(anatomy: Anatomy, ratio: float) -> list[list[Arch]]:
    return to_try(anatomy, Prune(non_embedding_ratio=ratio))


@pytest.mark.parametrize("name", MODELS)
def test_every_shape_of_a_trial_can_be_built(name: str) -> None:
    """The family accepts each with all its layers; each width is built with one, as neither ffn nor depth decides."""
    anatomy = discover(config(name))
    found = {arch for ratio in RATIOS for family in listed(anatomy, ratio) for arch in family}
    assert len(found) > 50
    built = set()
    for arch in sorted(found, key=str):
        require_sizes(anatomy, arch)
        full = resized(anatomy.config, config_sizes(anatomy, arch), kept_layers=tuple(range(arch.layers)))
        width = arch.at(layers=1, ffn=1)
        if width not in built:
            built.add(width)
            model = build(resized(full, {}, kept_layers=(0,)), device="meta")
            counted = sum(parameter.numel() for parameter in model.parameters())
            assert counted == anatomy.ledger.count(arch.at(layers=1)).params


def test_an_illegal_shape_gives_way_to_the_next_most_even_one() -> None:
    """At 28/7 heads, the most even, a hidden of 4096 is refused by Llama's config."""
    anatomy = discover(config("Llama 3.1 8B"))
    assert not is_legal(anatomy, anatomy.sizes.at(heads=28, kv_heads=7))
    groups = [family for family in listed(anatomy, 0.5) if family[0].kv_heads < 8 and family[0].hidden == 4096]
    assert [(arch.heads, arch.kv_heads) for arch in groups[0][:2]] == [(16, 4), (16, 4)]


@pytest.mark.parametrize("name", ["Llama 3.1 8B", "Gemma 2 2B"])
def test_what_a_plan_lists_can_be_built(name: str) -> None:
    anatomy = discover(config(name))
    asked = budget_of(anatomy, Prune(non_embedding_ratio=0.5))
    assert asked is not None
    found = candidates(anatomy, asked[0], total=asked[1])
    assert found
    for candidate in found:
        require_sizes(anatomy, candidate.arch)


def test_a_refused_axis_is_left_whole_and_the_rest_is_still_tried() -> None:
    anatomy = discover(config("Qwen 3 0.6B"))
    prune = Prune(non_embedding_ratio=0.7)
    for axis in ("hidden", "kv_heads", "layers"):
        found = [arch for family in to_try(anatomy, prune, refused={axis: "not proved"}) for arch in family]
        assert found
        assert {getattr(arch, axis) for arch in found} == {getattr(anatomy.sizes, axis)}
    assert to_try(anatomy, Prune(non_embedding_ratio=0.7, shape="width")) == []
    assert to_try(anatomy, Prune(hidden=512)) == []
