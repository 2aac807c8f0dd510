"""Shapes that share a budget between depth and width, and the trial that chooses among them."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import config
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from halve.anatomy import Anatomy, Arch, discover
from halve.cut import trial
from halve.cut.apply import Turned, cut_once, turn
from halve.cut.plan.shapes import list_shapes, thinned, to_try
from halve.cut.plan.sizes import budget_of, require_sizes
from halve.cut.proof.twins import random_twin
from halve.cut.score.calibration import Calibration
from halve.cut.score.scores import random_scores
from halve.cut.trial import HOPELESS, Tried, _descend, best, try_shapes
from halve.errors import CorpusError
from halve.progress import RichProgress
from halve.recipe.schema import Prune

LLAMA = {"hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 6}
SIZES = discover(config("llama", **LLAMA)).sizes


def _samples(anatomy: Anatomy, num: int) -> torch.Tensor:
    return torch.randint(anatomy.sizes.vocab, (num, 64), generator=torch.Generator().manual_seed(1))


def test_shapes_meet_the_budget_with_one_for_each_depth() -> None:
    anatomy = discover(config("llama", **LLAMA))
    before = anatomy.sizes
    budget = budget_of(anatomy, Prune(non_embedding_ratio=0.5))
    assert budget is not None
    found = list_shapes(anatomy, budget[0], total=budget[1])
    cut = [
        [
            {axis for axis in ("hidden", "ffn", "kv_heads") if getattr(arch, axis) < getattr(before, axis)}
            for arch in one
        ]
        for one in found
    ]
    assert [family[0] for family in cut] == [
        {"ffn"},
        {"ffn", "kv_heads"},
        {"hidden", "ffn", "kv_heads"},
        {"hidden", "ffn"},
    ]
    for family in found:
        depths = [arch.layers for arch in family]
        assert depths == sorted(set(depths), reverse=True)
        assert all(arch.heads // arch.kv_heads == before.heads // before.kv_heads for arch in family)
    assert found[-1][-1] == before.at(layers=3)  # half of the layers, whole
    over = [anatomy.ledger.count(arch).non_embedding / budget[0] - 1 for family in found for arch in family]
    near = max(0.01, 2 * min(map(abs, over)))
    assert -2 * near <= min(over)
    assert max(over) <= near


@pytest.mark.parametrize("family", ["gpt2", "phi3", "gemma2"])
def test_shapes_cut_what_a_family_allows(family: str) -> None:
    anatomy = discover(config(family))
    total = anatomy.ledger.count(anatomy.sizes).params
    for arch in (arch for family in list_shapes(anatomy, total * 3 // 4) for arch in family):
        require_sizes(anatomy, arch)
        assert arch.kv_heads == anatomy.sizes.kv_heads or "kv_heads" not in anatomy.refusals or anatomy.coupled


def test_every_list_is_begun_and_only_the_hopeful_are_gone_through() -> None:
    anatomy = discover(config("llama", **LLAMA))
    model = random_twin(anatomy, seed=0).requires_grad_(False)
    budget = budget_of(anatomy, Prune(non_embedding_ratio=0.5))
    assert budget is not None
    listed = list_shapes(anatomy, budget[0], total=budget[1])
    tried = _tried(model, anatomy)
    assert len(set(tried)) == len(tried) < sum(map(len, listed))
    begun = {family[len(family) // 2] for family in listed}
    assert {one.arch for one in tried[: len(listed)]} == begun
    best_begun = min(tried[: len(listed)], key=lambda one: one.kl)
    for one in tried[: len(listed)]:
        family = next(family for family in listed if one.arch in family)
        gone_through = sum(other.arch in family for other in tried) > 1
        if one is best_begun:
            assert gone_through or len(family) == 1
        elif one.kl > HOPELESS * best_begun.kl:
            assert not gone_through


@given(
    bottom=st.integers(0, 11),
    left=st.lists(st.floats(1.05, 2), min_size=11, max_size=11),
    right=st.lists(st.floats(1.05, 2), min_size=11, max_size=11),
    length=st.integers(1, 12),
)
def test_a_descent_ends_at_the_bottom_of_a_valley(
    bottom: int, left: list[float], right: list[float], length: int
) -> None:
    bottom = min(bottom, length - 1)
    down = [math.prod(left[: bottom - i]) for i in range(bottom)]  # neighbors differ by more than noise
    up = [math.prod(right[: i + 1]) for i in range(length - bottom - 1)]
    valley = [*down, 1.0, *up]
    seen: list[int] = [length // 2]

    def measured(arch: Arch) -> float:
        seen.append(arch.layers - 1)
        return valley[seen[-1]]

    _descend([SIZES.at(layers=i + 1) for i in range(length)], valley[length // 2], measured)
    assert bottom in seen
    assert len(set(seen)) == len(seen) <= abs(length // 2 - bottom) + 3


def test_sizes_by_hand_are_no_budget() -> None:
    anatomy = discover(config("llama", **LLAMA))
    assert budget_of(anatomy, Prune(hidden=64)) is None
    assert budget_of(anatomy, Prune(params="100k")) == (100_000, True)


def _tried(model: Any, anatomy: Anatomy, num: int = 72, path: Path | None = None) -> Any:
    prune = Prune(non_embedding_ratio=0.5)
    budget = budget_of(anatomy, prune)
    assert budget is not None
    calibration = Calibration(model, anatomy, _samples(anatomy, num), 24)
    listed = list_shapes(anatomy, budget[0], total=budget[1])
    turned = turn(calibration, prune, sizes=[arch for family in listed for arch in family])
    return try_shapes(calibration, random_scores(anatomy, 0), prune, listed, turned=turned, path=path)


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
    assert chosen.kl < 0.5 * max(one.kl for one in tried)
    assert chosen.to_json()["arch"]["layers"] == chosen.arch.layers


def test_a_shape_in_two_lists_is_cut_once_and_the_line_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    anatomy = discover(config("llama", **LLAMA))
    model = random_twin(anatomy, seed=0).requires_grad_(False)
    one, other = anatomy.sizes.at(layers=3), anatomy.sizes.at(ffn=128)
    cuts: list[Arch] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        cuts.append(args[3].arch)
        return cut_once(*args, **kwargs)

    monkeypatch.setattr(trial, "cut_once", counted)
    screen = io.StringIO()
    progress, prune = RichProgress(Console(file=screen, width=200), every_s=0.0), Prune(non_embedding_ratio=0.5)
    calibration = Calibration(model, anatomy, _samples(anatomy, 24), 24)
    turned = turn(calibration, prune, sizes=[one, other])
    shown = replace(calibration, progress=progress)
    tried = try_shapes(shown, random_scores(anatomy, 0), prune, [[one], [other], [one]], turned=turned)
    assert cuts == [one, other] == [shape.arch for shape in tried]
    assert "layers 3  hidden 192  ffn 384  heads 6  kv_heads 3" in screen.getvalue()
    assert f"tried 2 of 2 shapes; chosen: {best(tried).arch} (KL" in screen.getvalue()


def test_a_shape_in_the_file_that_is_not_asked_for_is_not_chosen(tmp_path: Path) -> None:
    anatomy = discover(config("llama", **LLAMA))
    model, path = random_twin(anatomy, seed=0).requires_grad_(False), tmp_path / "trial.jsonl"
    whole = _tried(model, anatomy, num=24, path=path)
    other = Tried(anatomy.sizes, tuple(range(anatomy.sizes.layers)), 0.0, whole[0].by_sample)
    path.write_text(json.dumps(other.to_json()) + "\n" + path.read_text())
    assert _tried(model, anatomy, num=24, path=path) == whole


def test_what_a_killed_trial_measured_is_not_measured_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    anatomy = discover(config("llama", **LLAMA))
    model = random_twin(anatomy, seed=0).requires_grad_(False)
    whole = _tried(model, anatomy, num=24, path=tmp_path / "whole.jsonl")
    path, cuts = tmp_path / "trial.jsonl", 0

    def killed(*args: Any, **kwargs: Any) -> Any:
        nonlocal cuts
        cuts += 1
        if cuts == 3:
            raise KeyboardInterrupt
        return cut_once(*args, **kwargs)

    monkeypatch.setattr(trial, "cut_once", killed)
    with pytest.raises(KeyboardInterrupt):
        _tried(model, anatomy, num=24, path=path)
    path.write_text(path.read_text() + '{"arch": {"layers": 3, "hid')  # a line that was being written
    again = _tried(model, anatomy, num=24, path=path)
    assert again == whole
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert cuts == 3 + len(whole) - 2


@pytest.mark.parametrize("killed", range(1, 5))
def test_a_list_that_was_under_way_is_gone_through_after_a_kill(
    killed: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What a list came to before a kill is so good that its middle would look hopeless beside it."""
    anatomy = discover(config("llama", **{**LLAMA, "num_hidden_layers": 9}))
    model = random_twin(anatomy, seed=0).requires_grad_(False)
    family = [anatomy.sizes.at(layers=n) for n in range(9, 0, -1)]
    kl = {9: 0.50, 8: 0.55, 7: 0.65, 6: 0.78, 5: 1.0}
    left = killed

    def tried(_: Any, arch: Arch) -> Tried:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return Tried(arch, tuple(range(arch.layers)), kl.get(arch.layers, 2.0), (1.0, 1.0))

    monkeypatch.setattr(trial._Bench, "tried", tried)

    def gone_through(path: Path) -> tuple[Tried, ...]:
        calibration = Calibration(model, anatomy, _samples(anatomy, 24), 4)
        turned, scores = Turned(model, anatomy, None), random_scores(anatomy, seed=0)
        return try_shapes(calibration, scores, Prune(hidden=1), [family], turned=turned, path=path)

    with pytest.raises(KeyboardInterrupt):
        gone_through(tmp_path / "killed.jsonl")
    left = 99
    assert gone_through(tmp_path / "killed.jsonl") == gone_through(tmp_path / "whole.jsonl")


def test_of_shapes_that_the_samples_cannot_tell_apart_the_deepest_wins() -> None:
    def shape(layers: int, *by_sample: float) -> Tried:
        return Tried(SIZES.at(layers=layers), tuple(range(layers)), sum(by_sample) / len(by_sample), by_sample)

    low = shape(3, 1.0, 1.1, 0.9, 1.0)
    assert best([low, shape(6, 1.6, 1.7, 1.5, 1.6)]) == low  # higher on every sample alike
    noisy = shape(6, 2.6, 0.3, 1.5, 1.1)
    assert best([low, noisy]) == noisy
    assert low.behind(noisy)[0] == pytest.approx(-0.375)


def test_of_a_deep_model_every_second_depth_is_looked_at() -> None:
    family = [SIZES.at(layers=n) for n in range(30, 0, -1)]
    assert [arch.layers for arch in thinned(family)] == list(range(29, 0, -2))
    assert thinned(family[:10]) == family[:10]


def test_what_is_listed_before_a_run_is_what_a_trial_goes_through() -> None:
    anatomy = discover(config("llama", **{**LLAMA, "num_hidden_layers": 96}))
    prune = Prune(non_embedding_ratio=0.5)
    budget = budget_of(anatomy, prune)
    assert budget is not None
    whole = list_shapes(anatomy, budget[0], total=budget[1])
    assert to_try(anatomy, prune) == [thinned(family) for family in whole] != whole


def test_too_few_samples_are_refused() -> None:
    anatomy = discover(config("llama", **LLAMA))
    model = random_twin(anatomy, seed=0).requires_grad_(False)
    with pytest.raises(CorpusError, match="2 calibration samples are too few") as caught:
        _tried(model, anatomy, num=2)
    assert len(str(caught.value).splitlines()) == 3
