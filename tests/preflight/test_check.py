"""What `check` finds in families whose code is special: what only a run would tell otherwise, hours later."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from halve.model.checkpoint import Checkpoint
from halve.preflight.check import check
from halve.preflight.sizes import planned_rounds
from halve.preflight.work import trials
from halve.recipe.schema import Recipe

FAMILIES: dict[str, dict[str, Any]] = {
    "xglm": {"d_model": 32, "ffn_dim": 64, "attention_heads": 4, "num_layers": 3, "max_position_embeddings": 128},
    "bloom": {"hidden_size": 32, "n_head": 4, "n_layer": 4},
    "mamba2": {"hidden_size": 32, "num_hidden_layers": 3, "num_heads": 4, "head_dim": 16},
    "olmoe": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128},
    "gptj": {"n_embd": 128, "n_layer": 2, "n_head": 2, "rotary_dim": 64, "n_positions": 128},
}


@pytest.fixture
def recipe_of(make_recipe: Callable[..., Recipe], tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Any:
    """`recipe_of("xglm", prune={...})`: a recipe on a small random model of the family."""

    def made(family: str, data: dict[str, Any] | None = None, **sections: Any) -> Recipe:
        config = AutoConfig.for_model(
            family, vocab_size=320, pad_token_id=None, bos_token_id=0, eos_token_id=0, **FAMILIES[family]
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / family)
        tokenizer.save_pretrained(tmp_path / family)
        text = {**make_recipe().data.model_dump(), **(data or {})}
        return make_recipe(model=str(tmp_path / family), data=text, **sections)

    return made


def test_every_round_is_proved(recipe_of: Callable[..., Recipe]) -> None:
    distill = {"tokens": 512, "batch": 4}
    later = {"prune": {"hidden": 24, "heads": 3}, "distill": distill}
    found = check(recipe_of("xglm", prune={"ffn": 48}, distill=distill, then=[later]))
    assert [error.what for error in found] == ["will not cut hidden of xglm"]


def test_a_search_that_no_shape_meets_is_told_before_weights_are_read(recipe_of: Callable[..., Recipe]) -> None:
    """XGLM's hidden is not proved: it stays whole, and what the others can save is named."""
    errors = check(recipe_of("xglm", search={"budget": {"non_embedding": {"max": "1k"}}}, prune={}))
    (met,) = (error for error in errors if "no legal shape" in error.what)
    assert met.what == "no legal shape has non_embedding <= 1k"
    assert met.why.startswith("non_embedding of legal shapes is between")
    assert met.fix.count("hidden 32") == 3
    assert not any("no legal shape" in e.what for e in check(recipe_of("xglm", search={"targets": ["90%"]}, prune={})))


def test_a_budget_is_spent_on_what_is_proved(recipe_of: Callable[..., Recipe]) -> None:
    """XGLM's hidden and heads fail their proof: sizes and listings are of what a run may try."""
    recipe = recipe_of("xglm", prune={"non_embedding_ratio": 0.8})
    assert check(recipe) == ()
    rounds = planned_rounds(recipe, Checkpoint.open(recipe.model))
    (tried,) = trials(recipe, rounds)
    found = [rounds[0].after, *tried]
    assert len(found) > 1
    assert {(arch.hidden, arch.heads) for arch in found} == {(32, 4)}


def test_the_nearest_to_a_budget_are_proved(recipe_of: Callable[..., Recipe]) -> None:
    """Of Bloom only layers can be cut, and no number of them of four makes so many parameters."""
    found = check(recipe_of("bloom", prune={"non_embedding_ratio": 0.6}))
    assert [re.sub(r"[\d.]+k", "N", error.fix) for error in found] == [
        "nearest: N (layers 2); N (layers 3); N (layers 1)"
    ]


@pytest.mark.parametrize(("family", "axis"), [("olmoe", "layers"), ("gptj", "ffn"), ("mamba2", "layers")])
def test_documents_are_kept_apart_by_a_twin_that_runs(recipe_of: Callable[..., Recipe], family: str, axis: str) -> None:
    """OLMoE wants hidden = heads x head_dim, GPT-J heads as wide as its rotary part; of Mamba 2 no twin runs."""
    found = check(recipe_of(family, {"documents": "apart"}, prune={axis: 1 if axis == "layers" else 256}))
    assert {error.what for error in found} == ({"will not cut layers of mamba2"} if family == "mamba2" else set())


@pytest.mark.parametrize("later", [False, True])
def test_a_rotation_that_the_family_does_not_allow(recipe_of: Callable[..., Recipe], *, later: bool) -> None:
    distill = {"tokens": 512, "batch": 4}
    turned = {"hidden": 24, "heads": 3, "rotation": "pca"}
    then = [{"prune": turned, "distill": distill}] if later else []
    (error,) = check(recipe_of("gpt2", prune={"ffn": 48} if later else turned, distill=distill, then=then))
    assert error.what.startswith("cannot rotate")
    search = {"budget": {"non_embedding": "60%"}, "method": "trial"}
    assert not later or [e.what for e in check(recipe_of("gpt2", prune={"rotation": "pca"}, search=search))] == [
        error.what
    ]
