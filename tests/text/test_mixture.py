"""Mixtures: whose turn it is, in which order each part is drawn, and what a sample's number stands for."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halve.errors import CorpusError, RecipeError
from halve.recipe import read as reading
from halve.recipe.schema import Recipe, Source
from halve.text.corpus import Samples, Tokens
from halve.text.mixture import Mixture, Texts, shares, turns

WEIGHTS = st.lists(st.floats(0.001, 1000), min_size=1, max_size=5)
CONTEXT = 4


def tokens(folder: Path, count: int, first: int = 0) -> Tokens:
    path = folder / f"{first}-{count}.tokens"
    np.arange(first, first + count, dtype=np.uint16).tofile(path)
    return Tokens(path=path, count=count, dtype="uint16", fingerprint=path.name, text_bytes=count)


def mixture(folder: Path, sizes: dict[int, float], *, seed: int = 0, offset: int = 0) -> Mixture:
    """Parts of so many samples with these weights; part i holds the tokens from 1000 i on."""
    parts = [Samples(tokens(folder, size * CONTEXT, 1000 * i), CONTEXT, seed, None, i) for i, size in enumerate(sizes)]
    return Mixture(tuple(parts), tuple(sizes.values()), offset)


# Shares


def greedy(weights: list[float], draws: int) -> list[int]:
    """The rule as it is told: each draw to the part with the smallest (had + 1/2) / weight."""
    exact, counts, order = [Fraction(repr(weight)) for weight in weights], [0] * len(weights), []
    for _ in range(draws):
        part = min(range(len(weights)), key=lambda i: Fraction(2 * counts[i] + 1, 2) / exact[i])
        counts[part] += 1
        order.append(part)
    return order


@given(WEIGHTS, st.integers(0, 120), st.integers(0, 40))
def test_turns_may_begin_anywhere(weights: list[float], first: int, count: int) -> None:
    whole = greedy(weights, first + count)
    assert shares(weights, first) == [whole[:first].count(part) for part in range(len(weights))]
    assert [part for part, _ in turns(weights, first, count)] == whole[first:]
    had = [whole[: first + i].count(part) for i, part in enumerate(whole[first:])]
    assert [had for _, had in turns(weights, first, count)] == had


@given(WEIGHTS, st.integers(0, 10**12))
def test_every_part_has_its_share(weights: list[float], draws: int) -> None:
    found = shares(weights, draws)
    assert sum(found) == draws
    total = sum(map(Fraction, map(repr, weights)))
    for weight, count in zip(weights, found, strict=True):
        assert abs(count - draws * Fraction(repr(weight)) / total) <= max(1, len(weights) / 2)


def test_weights_count_as_they_are_written() -> None:
    assert shares([0.1, 0.2, 0.7], 10**18) == [10**17, 2 * 10**17, 7 * 10**17]
    assert shares([0.1, 0.2], 3 * 10**18 + 3) == shares([1.0, 2.0], 3 * 10**18 + 3)


def test_a_part_of_no_weight_is_not_drawn() -> None:
    assert shares([0.0, 1.0, 0.0], 1000) == [0, 1000, 0]
    assert {part for part, _ in turns([0.0, 1.0, 3.0], 7, 100)} == {1, 2}


# Samples


def test_a_mixture_of_one_text_is_that_text(tmp_path: Path) -> None:
    alone = Samples(tokens(tmp_path, 52), CONTEXT, 3)
    mixed = Mixture((alone,), (0.3,))
    assert len(mixed) == len(alone) == 13
    for step in range(5):
        one, other = alone.batch(step, 5), mixed.batch(step, 5)
        assert one.numbers == other.numbers
        assert torch.equal(one.ids, other.ids)
    assert torch.equal(mixed.calibration(5), alone.calibration(5))


def test_parts_are_drawn_in_their_shares_each_in_epochs_of_its_own(tmp_path: Path) -> None:
    mixed = mixture(tmp_path, {7: 3.0, 11: 1.0})
    batches = [mixed.batch(step, 4) for step in range(22)]
    for one in batches:
        parts = (one.ids[:, 0] // 1000).tolist()
        assert (parts.count(0), parts.count(1)) == (3, 1)
    for part, size in enumerate((7, 11)):
        drawn = [n for one in batches for n, row in zip(one.numbers, one.ids, strict=True) if row[0] // 1000 == part]
        epochs = [drawn[start : start + size] for start in range(0, len(drawn) - size + 1, size)]
        assert len(epochs) >= 2
        for epoch in epochs:
            assert sorted(epoch) == list(range(7 * part, 7 * part + size))
        assert epochs[0] != epochs[1]


def test_a_number_stands_for_one_sample(tmp_path: Path) -> None:
    mixed = mixture(tmp_path, {5: 1.0, 3: 2.0, 4: 1.0}, offset=100)
    assert len(mixed) == 12
    everything = mixed.numbered(range(100, 112))
    firsts = [1000 * i + CONTEXT * j for i, size in enumerate((5, 3, 4)) for j in range(size)]
    assert everything.ids[:, 0].tolist() == firsts
    drawn = mixed.batch(2, 12)
    assert set(drawn.numbers) <= set(everything.numbers)
    assert torch.equal(mixed.numbered(drawn.numbers).ids, drawn.ids)


def test_the_order_is_a_function_of_the_step_and_the_seed(tmp_path: Path) -> None:
    mixed = mixture(tmp_path, {50: 1.0, 30: 2.0})
    assert mixed.batch(9, 8).numbers == mixture(tmp_path, {50: 1.0, 30: 2.0}).batch(9, 8).numbers
    assert mixed.batch(9, 8).numbers != mixture(tmp_path, {50: 1.0, 30: 2.0}, seed=1).batch(9, 8).numbers
    by_ones = [mixed.batch(step, 1).numbers[0] for step in range(16)]
    by_eights = [number for step in range(2) for number in mixed.batch(step, 8).numbers]
    assert by_ones == by_eights, "draws, not steps, are what is ordered"


def test_parts_of_one_size_have_orders_of_their_own(tmp_path: Path) -> None:
    first, second = (Samples(tokens(tmp_path, 120), CONTEXT, 0, None, stream) for stream in (0, 1))
    assert first.batch(0, 30).numbers != second.batch(0, 30).numbers


def test_calibration_samples_have_the_shares_from_the_first_on(tmp_path: Path) -> None:
    mixed = mixture(tmp_path, {100: 3.0, 40: 1.0})
    ids = mixed.calibration(40)
    parts = (ids[:, 0] // 1000).tolist()
    assert [parts[:n].count(1) for n in (4, 8, 20, 40)] == [1, 2, 5, 10]
    assert torch.equal(ids[torch.tensor(parts) == 0], mixed.parts[0].calibration(30))
    assert torch.equal(ids[torch.tensor(parts) == 1], mixed.parts[1].calibration(10))


def test_a_part_that_is_too_small_for_its_share_gives_all_it_has(tmp_path: Path) -> None:
    ids = mixture(tmp_path, {100: 1.0, 3: 1.0}).calibration(40)
    assert len(ids) == 23
    assert int((ids[:, 0] >= 1000).sum()) == 3


def test_more_calibration_samples_than_there_are_is_all_of_them(tmp_path: Path) -> None:
    mixed = mixture(tmp_path, {30: 1.0, 3: 1.0})
    assert torch.equal(mixed.calibration(10**15), mixed.calibration(3000))
    assert len(mixed.calibration(10**15)) == 33


def test_a_part_with_too_little_text_is_named(tmp_path: Path) -> None:
    texts = Texts(("web", "code"), (tokens(tmp_path, 100), tokens(tmp_path, 9)), (1.0, 1.0))
    assert len(texts.cut(9, seed=0, separator=None)) == 2
    with pytest.raises(CorpusError, match=r"part code of data\.train has fewer tokens than one sample: 9 of 10"):
        texts.cut(10, seed=0, separator=None)


# In a recipe


def parsed(train: object) -> Recipe:
    raw = {"name": "a", "model": "m", "prune": {"ffn": 8}, "data": {"train": train, "valid": ["v.txt"]}}
    return reading.parse(raw, folder=Path("/x"), source="r.yaml")


def test_paths_of_parts_become_absolute() -> None:
    recipe = parsed({"web": {"sources": ["b.txt", "hub:o/n"], "weight": 2}, "code": {"sources": ["/c"], "weight": 1}})
    assert isinstance(recipe.data.train, dict)
    assert recipe.data.train["web"] == Source(sources=("/x/b.txt", "hub:o/n"), weight=2)
    assert recipe.data.train_sources == ("/x/b.txt", "hub:o/n", "/c")
    assert parsed(["a.txt"]).data.train_sources == ("/x/a.txt",)
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize(
    ("train", "what", "hint"),
    [
        ({}, "bad value for data.train in", "at least 1 item"),
        ({"web": {"sources": ["a"]}}, "r.yaml lacks data.train.web.weight", "add data.train.web.weight"),
        (
            {"web": {"sources": ["a"], "weight": 0}},
            "bad value for data.train.web.weight",
            r"greater than 0 \(given: 0\)",
        ),
        ({"web": {"sources": [], "weight": 1}}, "bad value for data.train.web.sources", "at least 1 item"),
        ({"web": {"sources": ["a"], "weight": 1, "wieght": 2}}, "unknown key data.train.web.wieght", "mean weight"),
        ({"web": ["a"]}, "bad value for data.train.web", "Source"),
        (5, "bad value for data.train in", "given: 5"),
    ],
)
def test_a_mixture_that_is_not_one_is_refused_at_its_key(train: object, what: str, hint: str) -> None:
    with pytest.raises(RecipeError, match=what) as caught:
        parsed(train)
    assert re.search(hint, str(caught.value))
