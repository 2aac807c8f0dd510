"""Head residual merge: pairs by rank inside groups, hand-computed weights, nothing at coefficient 0."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import config
from torch import Tensor
from transformers import PreTrainedModel

from halve.anatomy import Anatomy, discover
from halve.cut.plan.heads import merge_heads, merged, pairs
from halve.cut.plan.plan import Plan, select
from halve.cut.proof.twins import RandomScores, logits, random_twin
from halve.cut.surgery.trim import trim

FAMILIES = ["llama", "gpt2", "phi3", "gpt_neox", "olmo2", "gemma2"]


def twin(family: str, **changes: Any) -> tuple[PreTrainedModel, Anatomy]:
    anatomy = discover(config(family, **changes)).twin()
    return random_twin(anatomy, seed=0), anatomy


def fewer_heads(anatomy: Anatomy) -> tuple[Plan, Any]:
    sizes, heads = anatomy.sizes, anatomy.sizes.heads // 2
    after = sizes.at(heads=heads, kv_heads=heads if sizes.heads == sizes.kv_heads else sizes.kv_heads)
    after = after.at(hidden=heads * sizes.head_dim) if anatomy.coupled else after
    scores = RandomScores(sizes, 1)
    if sizes.heads == sizes.kv_heads:  # one ranking of both
        scores.kv_heads = scores.heads
    return select(anatomy, after, scores, gain="none"), scores


@pytest.mark.parametrize(
    ("kept", "removed", "expected"),
    [
        ([0], [1], [(0, 1)]),  # K = 1, L = 2
        ([0, 1], [2, 3], [(1, 2), (0, 3)]),  # L = 2K: head i meets 2K - i + 1
        ([0, 1, 2], [3], [(2, 3)]),
        ([0], [1, 2, 3], [(0, 1)]),  # L > 2K: the others meet none
        ([0, 1], [], []),
    ],
)
def test_pairs(kept: list[int], removed: list[int], expected: list[tuple[int, int]]) -> None:
    assert pairs(kept, removed) == expected


def test_merging_weights_by_hand() -> None:
    kept, removed = torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 4.0]])
    assert merged(kept, removed, coefficient=1.0).tolist() == [[-1.0, -8.0]]
    assert merged(kept, removed, coefficient=0.5).tolist() == [[0.0, -5.0]]
    assert merged(kept, removed, coefficient=-1.0).tolist() == removed.tolist()
    assert merged(kept.bfloat16(), removed.bfloat16(), coefficient=0.25).dtype == torch.bfloat16


@pytest.mark.parametrize("family", FAMILIES)
def test_coefficient_0_changes_nothing(family: str) -> None:
    model, anatomy = twin(family)
    plan, scores = fewer_heads(anatomy)
    found = merge_heads(model, plan, anatomy, scores, coefficient=0.0)
    assert found is not model
    for (name, mine), theirs in zip(found.state_dict().items(), model.state_dict().values(), strict=True):
        assert mine.view(torch.int64).equal(theirs.view(torch.int64)), name
    assert torch.equal(logits(trim(found, plan, anatomy), anatomy), logits(trim(model, plan, anatomy), anatomy))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_given_model_stays_and_only_kept_heads_move(family: str) -> None:
    model, anatomy = twin(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan, scores = fewer_heads(anatomy)
    found = dict(merge_heads(model, plan, anatomy, scores, coefficient=1.0).named_parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    changed = {name for name, value in found.items() if not torch.equal(value, before[name])}
    assert changed
    assert all(any("heads" in expr.axes or "kv_heads" in expr.axes for expr in anatomy.params[n]) for n in changed)
    assert not any("norm" in name for name in changed)
    nothing = select(anatomy, anatomy.sizes, scores, gain="none")
    same = dict(merge_heads(model, nothing, anatomy, scores, coefficient=1.0).named_parameters())
    assert all(torch.equal(value, before[name]) for name, value in same.items())


def test_a_llama_by_hand() -> None:
    """Two groups of three heads of 20 channels; two stay in each. Ranks in group 0: 2 0 | 1, in group 1: 3 5 | 4."""
    anatomy = discover(config("llama", num_attention_heads=6, num_key_value_heads=2, num_hidden_layers=2))
    model = random_model(anatomy)
    scores = SimpleNamespace(
        hidden=None, ffn=None, heads=torch.tensor([[2.0, 1.0, 3.0, 9.0, 7.0, 8.0]] * 2), kv_heads=None, layers=None
    )
    plan = select(anatomy, anatomy.sizes.at(heads=4), scores, gain="none")
    assert plan.heads == ((0, 2, 3, 5),) * 2
    found = merge_heads(model, plan, anatomy, scores, coefficient=1.0)
    for layer in range(2):
        mine, theirs = (m.get_submodule(f"model.layers.{layer}.self_attn") for m in (found, model))
        q = theirs.q_proj.weight.detach().view(6, 20, 96)
        o = theirs.o_proj.weight.detach().view(96, 6, 20)
        expected_q, expected_o = q.clone(), o.clone()
        for kept, removed in ((0, 1), (5, 4)):  # the last kept by rank meets the first removed
            expected_q[kept] = 2 * q[kept] - q[removed]
            expected_o[:, kept] = 2 * o[:, kept] - o[:, removed]
        torch.testing.assert_close(mine.q_proj.weight.detach().view(6, 20, 96), expected_q)
        torch.testing.assert_close(mine.o_proj.weight.detach().view(96, 6, 20), expected_o)
        for name in ("k_proj", "v_proj"):
            assert torch.equal(mine.get_submodule(name).weight, theirs.get_submodule(name).weight)


def test_groups_that_go_are_merged_into_none() -> None:
    anatomy = discover(config("llama", num_attention_heads=6, num_key_value_heads=3, num_hidden_layers=1))
    model = random_model(anatomy)
    scores = RandomScores(anatomy.sizes, 0)
    scores.kv_heads = torch.tensor([[1.0, 3.0, 2.0]])
    scores.heads = torch.tensor([[9.0, 8.0, 1.0, 2.0, 4.0, 3.0]])
    plan = select(anatomy, anatomy.sizes.at(kv_heads=2, heads=2), scores, gain="none")
    assert plan.heads == ((3, 4),)
    q = "model.layers.0.self_attn.q_proj.weight"
    merged = merge_heads(model, plan, anatomy, scores, coefficient=1.0)
    mine = dict(merged.named_parameters())[q].detach().view(6, 20, 96)
    old = dict(model.named_parameters())[q].detach().view(6, 20, 96)
    torch.testing.assert_close(mine[3], 2 * old[3] - old[2])
    torch.testing.assert_close(mine[4], 2 * old[4] - old[5])
    assert all(torch.equal(mine[head], old[head]) for head in (0, 1, 2, 5))


def test_heads_with_keys_of_their_own_take_them_along() -> None:
    anatomy = discover(config("llama", num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=1))
    model = random_model(anatomy)
    scores = RandomScores(anatomy.sizes, 0)
    scores.heads = scores.kv_heads = torch.tensor([[1.0, 4.0, 3.0, 2.0]])
    plan = select(anatomy, anatomy.sizes.at(heads=2, kv_heads=2), scores, gain="none")
    found = merge_heads(model, plan, anatomy, scores, coefficient=1.0)
    for name in ("q", "k", "v"):
        mine, old = (
            m.get_submodule(f"model.layers.0.self_attn.{name}_proj").weight.detach().view(4, 20, 96)
            for m in (found, model)
        )
        torch.testing.assert_close(mine[2], 2 * old[2] - old[3])  # rank 2 meets rank 3
        torch.testing.assert_close(mine[1], 2 * old[1] - old[0])  # rank 1 meets rank 4


def test_fused_and_interleaved_weights() -> None:
    """gpt_neox: head h has rows h*3*head_dim .. of one matrix; all of them move together."""
    model, anatomy = twin("gpt_neox")
    plan, scores = fewer_heads(anatomy)
    sizes = anatomy.sizes
    order = scores.heads[0].argsort(descending=True).tolist()
    kept, removed = order[: sizes.heads // 2], order[sizes.heads // 2 :]
    assert sorted(kept) == list(plan.heads[0])
    name = f"{anatomy.layers_path}.0.attention.query_key_value"

    def weights(m: PreTrainedModel) -> Tensor:
        return m.get_submodule(name).weight.detach().view(sizes.heads, 3 * sizes.head_dim, sizes.hidden)

    mine, old = weights(merge_heads(model, plan, anatomy, scores, coefficient=0.5)), weights(model)
    for k, r in zip(reversed(kept), removed, strict=True):
        torch.testing.assert_close(mine[k], 1.5 * old[k] - 0.5 * old[r])


def random_model(anatomy: Anatomy) -> PreTrainedModel:
    return random_twin(anatomy, seed=3)
