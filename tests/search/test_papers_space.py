"""The search spaces of 2407.14679 (Table 12) against the candidates that it found (Sec. 4.3, those of 8B in Table 19).

Within 5 % of 4B the space has 18 shapes, as many as the paper says. Within 5 % of 8B it has 18 as well, the paper has
15: thirteen are the same. The paper leaves out five shapes of 7.69B to 7.77B, and has two of 8.43B and 8.49B, which are
5.4 % and 6.1 % above 8B. Its fifteen are exactly the shapes between 7.8B and 8.5B. The table prints an embedding of
4680, which is no multiple of its heads; all of its candidates have 4608.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from transformers import CONFIG_MAPPING

from halve.anatomy import Anatomy, discover
from halve.cut.plan.sizes import format_count
from halve.recipe.searching import Search
from halve.search.budgets import resolve
from halve.search.quantities import Prices
from halve.search.space import legal_shapes

FACTORS = (2.5, 3.0, 3.5, 4.0)
EMBEDDINGS = {"8B": (4096, 4608, 5120, 5632, 6144), "4B": (2560, 3072, 3584, 4096, 4608)}
HEADS = {"8B": (32, 48), "4B": (24, 32, 48)}
Shape = tuple[int, int, int, int]

TABLE_19 = {  # layers, heads, ffn, hidden
    *((32, 32, 12800, 5120), (32, 32, 13824, 4608), (32, 48, 11520, 4608), (32, 48, 16384, 4096)),
    *((31, 32, 12800, 5120), (31, 32, 16128, 4608), (31, 48, 13824, 4608), (31, 48, 16384, 4096)),
    *((30, 32, 12800, 5120), (30, 32, 16128, 4608), (30, 48, 13824, 4608), (30, 48, 16384, 4096)),
    *((29, 32, 12800, 5120), (29, 32, 16128, 4608), (29, 48, 13824, 4608)),
}


@cache
def nemotron_4_15b() -> Anatomy:
    return discover(
        CONFIG_MAPPING["nemotron"](
            hidden_size=6144,
            intermediate_size=24576,
            num_hidden_layers=32,
            num_attention_heads=48,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=256000,
            tie_word_embeddings=False,
        )
    )


def within(target: str, total: Any) -> dict[Shape, float]:
    """The shapes of Table 12's space whose parameters are in a range, with their parameters."""
    embeddings = EMBEDDINGS[target]
    axes: dict[str, Any] = {
        "hidden": embeddings,
        "ffn": sorted({int(factor * embedding) for factor in FACTORS for embedding in embeddings}),
        "heads": HEADS[target],
        "kv_heads": "frozen",
    }
    search = Search.model_validate({"budget": {"total": total}, "axes": axes, "layers": {"min": 29}})
    assert search.budget is not None
    space = legal_shapes(nemotron_4_15b(), search)
    (wanted,) = resolve(nemotron_4_15b(), search.budget)
    found: dict[Shape, float] = {}
    for layers in space.depths:
        values = Prices(space).values("total", wanted.limits, layers)
        for width, ffn in np.argwhere(wanted.holds(values)):
            arch = space.arch(layers, int(width), int(ffn))
            if arch.ffn / arch.hidden in FACTORS:
                found[layers, arch.heads, arch.ffn, arch.hidden] = float(values[width, ffn])
    return found


def test_eighteen_candidates_of_4b_are_within_five_percent() -> None:
    found = within("4B", "4B")
    assert len(found) == 18
    assert (32, 24, 9216, 3072) in found, "Minitron-4B"


def test_the_fifteen_candidates_of_8b_are_those_between_seven_point_eight_and_eight_and_a_half_billion() -> None:
    assert set(within("8B", {"min": "7.8B", "max": "8.5B"})) == TABLE_19
    found = within("8B", "8B")
    assert len(found) == 18
    assert len(set(found) & TABLE_19) == 13
    assert sorted(round(found[shape] / 1e9, 2) for shape in set(found) - TABLE_19) == [7.69, 7.7, 7.73, 7.73, 7.77]
    assert TABLE_19 - set(found) == {(32, 32, 12800, 5120), (31, 32, 16128, 4608)}


@pytest.mark.parametrize(
    ("heads", "ffn", "hidden", "printed"),
    [(48, 24576, 6144, ("15.6B", 12.5)), (48, 16384, 4096, ("8.27B", 6.2)), (24, 9216, 3072, ("4.19B", 2.6))],
    ids=["Nemotron-4 15B", "Minitron-8B", "Minitron-4B"],
)
def test_the_papers_models_have_its_printed_counts(heads: int, ffn: int, hidden: int, printed: Any) -> None:
    """2407.14679, Table 5: all and non-embedding parameters."""
    anatomy = nemotron_4_15b()
    counts = anatomy.ledger.count(anatomy.sizes.at(heads=heads, ffn=ffn, hidden=hidden))
    assert (format_count(counts.params), round(counts.non_embedding / 1e9, 1)) == printed
