"""What `check` finds in families whose code is special: what only a run would tell otherwise, hours later."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from halve.preflight.check import check
from halve.recipe.schema import Recipe

FAMILIES: dict[str, dict[str, Any]] = {
    "xglm": {"d_model": 32, "ffn_dim": 64, "attention_heads": 4, "num_layers": 3, "max_position_embeddings": 128},
    "mamba2": {"hidden_size": 32, "num_hidden_layers": 3, "num_heads": 4, "head_dim": 16},
    "olmoe": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
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


@pytest.mark.parametrize(("family", "axis"), [("olmoe", "layers"), ("gptj", "ffn"), ("mamba2", "layers")])
def test_documents_are_kept_apart_by_a_twin_that_runs(recipe_of: Callable[..., Recipe], family: str, axis: str) -> None:
    """OLMoE wants hidden = heads x head_dim, GPT-J heads as wide as its rotary part; of Mamba 2 no twin runs."""
    found = check(recipe_of(family, {"documents": "apart"}, prune={axis: 1 if axis == "layers" else 256}))
    assert {error.what for error in found} == ({"will not cut layers of mamba2"} if family == "mamba2" else set())
