"""Budgets on one small model: what a search sees of them."""

from __future__ import annotations

from functools import cache
from typing import Any

from transformers import LlamaConfig

from halve.anatomy import Anatomy, Arch, discover
from halve.recipe.searching import Search
from halve.search.candidates import Found, candidates_of, look


@cache
def anatomy() -> Anatomy:
    """A llama of the size of the demo's teacher, with heads of 16 in four groups."""
    return discover(
        LlamaConfig(
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=16,
            vocab_size=512,
            pad_token_id=None,
        )
    )


def search(budget: dict[str, Any], **more: Any) -> Search:
    return Search.model_validate({"budget": budget, **more})


def looked(budget: dict[str, Any], **more: Any) -> Found:
    asked = search(budget, **more)
    assert asked.budget is not None
    return look(anatomy(), asked.budget, asked)


def archs(budget: dict[str, Any], count: int = 8, **more: Any) -> list[Arch]:
    asked = search(budget, **more)
    assert asked.budget is not None
    return [shape.arch for shape in candidates_of(look(anatomy(), asked.budget, asked), count)]
