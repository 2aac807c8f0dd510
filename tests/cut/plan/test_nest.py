"""Sorting and slicing: sorted is the same function, a slice is the physical cut, and what does not nest is refused."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import config
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from halve.anatomy import Anatomy, discover
from halve.cut.plan.nest import nested_axes, nested_layers, nested_sizes, prefix_plan, sorting_plan
from halve.cut.surgery.trim import cut_parts, trim
from halve.errors import PlanError
from halve.recipe.nesting import Nest

WIDTHS = ("hidden", "ffn", "heads", "kv_heads")


def scores(anatomy: Anatomy) -> Any:
    """Random scores of every axis."""
    draw = torch.Generator().manual_seed(1)
    sizes, layers = anatomy.sizes, anatomy.sizes.layers

    def some(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=draw)

    return SimpleNamespace(
        hidden=some(sizes.hidden),
        ffn=some(layers, sizes.ffn),
        heads=some(layers, sizes.heads),
        kv_heads=some(layers, sizes.kv_heads),
        layers=some(layers),
    )


def random_model(family: str, **changes: object) -> tuple[PreTrainedModel, Anatomy]:
    """A small model of the family in float64, every parameter drawn at random."""
    asked = config(family, **changes)
    model = AutoModelForCausalLM.from_config(asked, dtype=torch.float64, attn_implementation="sdpa").eval()
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64) / 8)
    return model, discover(asked)


class Float64Norm(nn.Module):
    """An RMS norm that stays in float64, where the family's own rounds to float32."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def exact(model: PreTrainedModel, anatomy: Anatomy) -> torch.Tensor:
    """Its logits with norms in float64."""
    for name in anatomy.norms:
        norm = model.get_submodule(name)
        if not isinstance(norm, nn.LayerNorm):
            model.set_submodule(name, Float64Norm(norm.weight))
    with torch.no_grad():
        return model(torch.arange(24).view(2, 12), use_cache=False).logits


@pytest.mark.parametrize("family", ["llama", "qwen2", "starcoder2", "phi3"])
def test_the_sorted_model_is_the_same_function(family: str) -> None:
    """To 1e-12 of the largest logit in float64; its entries are sorted, and another order of one weight is not it."""
    model, anatomy = random_model(family)
    given = scores(anatomy)
    plan = sorting_plan(anatomy, given, axes=WIDTHS)
    ordered = trim(model, plan, anatomy)
    assert plan.hidden != tuple(range(anatomy.sizes.hidden))
    assert given.hidden[list(plan.hidden)].diff().le(0).all()
    assert all(row[list(order)].diff().le(0).all() for row, order in zip(given.ffn, plan.ffn, strict=True))
    spoiled = trim(model, plan, anatomy)
    spoiled.get_submodule(anatomy.readers("ffn")[0][0]).weight.data.copy_(  # type: ignore[union-attr]
        model.get_submodule(anatomy.readers("ffn")[0][0]).weight.data  # type: ignore[union-attr]
    )
    want, have, other = (exact(one, anatomy) for one in (model, ordered, spoiled))
    size = want.abs().max()
    assert (have - want).abs().max() <= 1e-12 * size
    assert (other - want).abs().max() > 1e-3 * size


def test_axes_that_no_size_cuts_stay_where_they_are() -> None:
    model, anatomy = random_model("llama")
    plan = sorting_plan(anatomy, scores(anatomy), axes={"ffn"})
    ordered = dict(trim(model, plan, anatomy).named_parameters())
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, ordered[name])}
    assert moved
    assert all(".mlp." in name for name in moved)


@pytest.mark.parametrize("family", ["llama", "gemma", "phi3", "starcoder2", "qwen2"])
def test_a_slice_is_the_physical_cut_of_the_unsorted_model(family: str) -> None:
    """What is best by score in the model is the first part of the sorted one, weight for weight."""
    from halve.cut.plan.plan import select

    model, anatomy = random_model(family)
    given = scores(anatomy)
    after = anatomy.sizes.at(hidden=64, ffn=96, heads=2, kv_heads=2)
    ordered = trim(model, sorting_plan(anatomy, given, axes=WIDTHS), anatomy)
    plan = prefix_plan(anatomy, after, layers=range(anatomy.sizes.layers))
    names = [name for name, _ in model.named_parameters()]
    gained = {name for norm in anatomy.norms for name in names if name.startswith(f"{norm}.")}
    inside = {name: part.of(dict(ordered.named_parameters())) for name, part in cut_parts(anatomy, plan, names).items()}
    by_prefix = dict(trim(ordered, plan, anatomy).named_parameters())
    for name in set(names) - gained:
        assert torch.equal(inside[name], by_prefix[name]), name
    chosen = trim(model, select(anatomy, after, given, gain="none"), anatomy)
    small = trim(ordered, plan, anatomy)
    shrunk = discover(small.config)
    want, have = (exact(one, shrunk) for one in (chosen, small))
    assert (have - want).abs().max() <= 1e-12 * want.abs().max()


def test_gradients_of_a_slice_reach_the_entries_that_it_has() -> None:
    _, anatomy = random_model("llama")
    plan = prefix_plan(anatomy, anatomy.sizes.at(heads=2, kv_heads=2), layers=range(6))
    name = "model.layers.0.self_attn.q_proj.weight"
    weight = torch.zeros(120, 96, requires_grad=True)
    cut_parts(anatomy, plan, [name])[name].of({name: weight}).sum().backward()
    assert weight.grad is not None
    reached = weight.grad.view(6, 20, 96)[:, 0, 0]  # of each group of two heads the first, of the first two groups
    assert reached.tolist() == [1, 0, 1, 0, 0, 0]


def test_kept_layers_are_a_chain() -> None:
    chain = nested_layers(torch.tensor([0.3, 0.9, 0.1, 0.5]), [4, 3, 1])
    assert chain == [(0, 1, 2, 3), (0, 1, 3), (1,)]


def sizes(family: str, *inside: dict[str, int]) -> list[Any]:
    return [*nested_sizes(discover(config(family)), Nest.model_validate({"sizes": inside}))]


def test_sizes_follow_from_those_before() -> None:
    large, middle, small = sizes("llama", {"ffn": 96, "hidden": 48}, {"layers": 4, "ffn": 64})
    assert large.ffn == 160
    assert middle == large.at(ffn=96, hidden=48)
    assert small == middle.at(layers=4, ffn=64)
    assert nested_axes([large, middle, small]) == {"ffn", "hidden", "layers"}


def test_heads_without_groups_are_cut_with_their_keys() -> None:
    assert sizes("phi", {"heads": 3, "kv_heads": 3})[1].kv_heads == 3


@pytest.mark.parametrize(
    ("family", "inside", "what"),
    [
        ("gpt2", [{"hidden": 64}], "cannot nest hidden of gpt2"),
        ("gpt_neox", [{"heads": 3}], "cannot nest heads of gpt_neox"),
        ("llama", [{"ffn": 64}, {"ffn": 96}], "student 3 of nest.sizes has ffn 96"),
        ("llama", [{"ffn": 200}], "student 2 of nest.sizes has ffn 200"),
        ("llama", [{"ffn": 160}], "student 2 of nest.sizes is not smaller"),
        ("llama", [{"heads": 3}, {"kv_heads": 1, "heads": 2}], "student 3 of nest.sizes has more query heads"),
        ("llama", [{"heads": 5}], "cannot keep 5 query heads in 3"),
    ],
)
def test_what_does_not_nest_is_refused(family: str, inside: list[dict[str, int]], what: str) -> None:
    with pytest.raises(PlanError) as refused:
        sizes(family, *inside)
    assert refused.value.what.startswith(what)
    assert refused.value.why
    assert refused.value.fix


def test_an_ffn_of_its_own_in_each_layer_is_not_nested() -> None:
    anatomy = replace(discover(config("llama")), refusals={"ffn": "each layer has another size"})
    with pytest.raises(PlanError) as refused:
        nested_sizes(anatomy, Nest.model_validate({"sizes": [{"ffn": 64}]}))
    assert (refused.value.what, refused.value.why) == ("cannot cut ffn of llama", "each layer has another size")
    assert nested_sizes(anatomy, Nest.model_validate({"sizes": [{"hidden": 48}]}))[1].hidden == 48


def test_coupled_families_nest_in_what_is_not_coupled() -> None:
    assert sizes("gpt2", {"layers": 4})[1].layers == 4
