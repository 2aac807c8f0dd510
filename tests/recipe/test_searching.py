"""The section search: how a budget may be written, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from halve.errors import RecipeError
from halve.recipe import read as reading
from halve.recipe.amounts import Amount, Unit, parse_amount
from halve.recipe.rounds import cuts_original, learns_from_previous, rounds, scored_in
from halve.recipe.schema import Recipe, Search

BASE: dict[str, Any] = {"name": "s", "model": "m", "data": {"train": ["t"], "valid": ["v"]}}


def parsed(search: dict[str, Any], **more: Any) -> Recipe:
    return reading.parse({**BASE, "search": search, **more}, folder=Path("/"), source="r.yaml")


def section(search: dict[str, Any]) -> Search:
    searched = parsed(search).search
    assert searched is not None
    return searched


def test_a_value_alone_is_about_for_parameters_at_most_for_costs_and_at_least_for_throughput() -> None:
    budget = section({"budget": {"total": 4.5e9, "memory": "8GB", "decode_latency": "20ms", "throughput": 50}}).budget
    assert budget is not None
    assert {quantity: bound.given for quantity, bound in budget.bounds.items()} == {
        "total": {"about": Amount(4.5e9)},
        "memory": {"max": Amount(8e9)},
        "decode_latency": {"max": Amount(0.02)},
        "throughput": {"min": Amount(50.0)},
    }


def test_targets_are_shares_or_budgets() -> None:
    first, second = section({"targets": ["70%", {"memory": {"max": "50%", "context": 8192}}]}).targets
    assert first.bounds["non_embedding"].given == {"about": Amount(0.7, is_share=True)}
    assert second.memory is not None
    assert (second.memory.given, second.memory.context) == ({"max": Amount(0.5, is_share=True)}, 8192)


def test_targets_that_differ_in_a_condition_are_two_sizes() -> None:
    memory = [{"memory": {"max": "50%", "context": context}} for context in (4096, 8192)]
    assert len(section({"targets": ["50%", {"total": "50%"}, *memory]}).targets) == 4


def test_an_axis_is_frozen_allowed_stepped_or_listed() -> None:
    axes = {"heads": "frozen", "ffn": "allowed", "hidden": 64, "layers": [12, 16]}
    assert section({"budget": {"total": "1B"}, "axes": axes}).axes == {**axes, "layers": (12, 16)}


def test_the_section_survives_json() -> None:
    recipe = parsed({"budget": {"total": "1B", "memory": {"max": "8GB", "context": 100}}, "axes": {"ffn": [8, 16]}})
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


@pytest.mark.parametrize(
    ("text", "unit", "value"),
    [
        ("4.5B", "parameters", 4.5e9),
        ("12k", "parameters", 12e3),
        ("8GB", "bytes", 8e9),
        ("8 GiB", "bytes", 8 * 2**30),
        ("1e9", "FLOPs", 1e9),
        ("1.5us", "seconds", 1.5e-6),
        ("0.5s", "seconds", 0.5),
        ("40 tokens/s", "tokens/s", 40.0),
    ],
)
def test_amounts_are_read_in_their_unit(text: str, unit: Unit, value: float) -> None:
    assert parse_amount(text, unit).value == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "nan", "inf", "1e99", "8 GBs", "8ms", "1.2.3"])
def test_other_text_is_no_amount(text: str) -> None:
    with pytest.raises(ValueError, match="write 2GB or 70%"):
        parse_amount(text, "bytes")


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({}, "give budget for one size, or targets for several"),
        ({"budget": {"total": "1B"}, "targets": ["50%"]}, "give budget for one size, or targets for several"),
        ({"budget": {}}, r"bad value for search\.budget.*\n.*give at least one of total, .*, throughput"),
        ({"budget": {"memory": "8Gb/s"}}, r"search\.budget\.memory.*\n.*'8Gb/s' is no amount of bytes: write 2GB"),
        ({"budget": {"memory": {"batch": 2}}}, "give min, max or both, or about"),
        ({"budget": {"total": {"about": "1B", "max": "2B"}}}, "about is a range by itself"),
        (
            {"budget": {"total": {"min": "2B", "max": "1B"}}},
            r"min 2B is above max 1B\n  fix: lower \S*budget.total.min, now 2B, or raise \S*budget.total.max, now 1B",
        ),
        ({"budget": {"params": "1B"}}, r"unknown key search\.budget\.params"),
        ({"budget": {"total": {"most": "1B"}}}, r"unknown key search\.budget\.total\.most.*\n.*\n.*\bmax\b"),
        ({"budget": {"total": "1B"}, "axes": {"hiden": 64}}, r"search\.axes\.hiden.*\n.*'hidden', 'ffn'"),
        ({"budget": {"total": "1B"}, "axes": {"hidden": "free"}}, r"search\.axes\.hidden.*\n.*'frozen' or 'allowed'"),
        ({"budget": {"total": "1B"}, "axes": {"hidden": 0}}, r"search\.axes\.hidden.*\n.*greater than 0"),
        (
            {"budget": {"total": "1B"}, "layers": {"min": 9, "max": 8}},
            r"min 9 is above max 8\n  fix: lower search.layers.min, now 9, or raise",
        ),
        ({"budget": {"total": "1B"}, "layers": {"keep": [1, 1]}}, "keep names a layer twice"),
        ({"budget": {"total": "1B"}, "layers": {"keep": [0, 1], "max": 1}}, "keep names 2 layers, more than max 1"),
        ({"targets": ["50%", "50%"]}, r"bad value for search .*\n.*targets 1 and 2 are the same size.*\n  fix: "),
        ({"targets": ["70%", "50%", {"non_embedding": "50.0 %"}]}, "targets 2 and 3 are the same size"),
        ({"targets": ["70 parts"]}, r"search\.targets.*\n.*no amount of parameters"),
    ],
)
def test_mistakes_are_told_in_three_lines(search: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parsed(search)


def test_several_sizes_are_rounds_that_cut_the_teacher() -> None:
    recipe = parsed({"targets": ["70%", "50%"], "method": "trial"})
    budgets = [part.search.budget for part in rounds(recipe) if part.search is not None]
    assert recipe.search is not None
    assert budgets == [*recipe.search.targets]
    assert all(part.search is not None and not part.search.targets for part in rounds(recipe))
    assert [cuts_original(recipe, number) for number in (1, 2)] == [True, True]
    assert [scored_in(recipe, number) for number in (1, 2)] == [1, 1]
    assert not learns_from_previous(recipe, 2)
    with pytest.raises(RecipeError, match="makes a student of the teacher for each size: leave out then"):
        parsed({"targets": ["70%"]}, then=[{"prune": {"ffn": 8}}])


def test_one_section_gives_the_size() -> None:
    with pytest.raises(RecipeError, match="search finds the size: leave out params"):
        parsed({"targets": ["50%"]}, prune={"params": "1B"})
    with pytest.raises(RecipeError, match=r"bad value for prune in r\.yaml\n  why: give exactly one of"):
        reading.parse(BASE, folder=Path("/"), source="r.yaml")
