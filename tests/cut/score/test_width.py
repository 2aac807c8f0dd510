"""Every method through the one interface: right numbers, right shapes, dead parts last, any micro-batch."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from families import config
from torch import Tensor
from transformers import PreTrainedModel

from halve.anatomy import Anatomy, discover
from halve.cut.plan.plan import select
from halve.cut.proof.twins import random_twin
from halve.cut.score import baselines
from halve.cut.score.calibration import Calibration
from halve.cut.score.importance import rank
from halve.cut.score.scores import Scores
from halve.cut.score.structures import places
from halve.cut.score.width import METHODS, score
from halve.cut.surgery.trim import trim

FAMILIES = ["llama", "gpt2", "phi3", "gpt_neox", "olmo2", "gemma2"]
MEASURED = ["activation", "wanda", "taylor", "fluctuation"]
DEAD_LAST = ["activation", "magnitude", "wanda", "taylor", "fluctuation"]


@cache
def twin(family: str) -> tuple[PreTrainedModel, Anatomy]:
    anatomy = discover(config(family)).twin()
    return random_twin(anatomy, seed=0), anatomy


def samples(anatomy: Anatomy, num: int = 6) -> Tensor:
    return torch.randint(anatomy.sizes.vocab, (num, 9), generator=torch.Generator().manual_seed(3))


def scored(model: PreTrainedModel, anatomy: Anatomy, *, micro_batch: int = 4, **changes: Any) -> Scores:
    about: dict[str, Any] = {
        "method": "activation",
        "ffn_point": "down_input",
        "batch_agg": "l2",
        "seq_agg": "mean",
        "seed": 5,
        "model_fingerprint": "m",
        "samples_fingerprint": "s",
    }
    return score(Calibration(model, anatomy, samples(anatomy), micro_batch), **{**about, **changes})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_scores_every_axis(family: str, method: str, tmp_path: Path) -> None:
    model, anatomy = twin(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    found = scored(model, anatomy, method=method)
    sizes = anatomy.sizes
    shapes = {
        "hidden": (sizes.hidden,),
        "ffn": (sizes.layers, sizes.ffn),
        "heads": (sizes.layers, sizes.heads),
        "kv_heads": (sizes.layers, sizes.kv_heads),
        "layers": (sizes.layers,),
    }
    assert {axis: tuple(tensor.shape) for axis, tensor in found.by_axis().items()} == shapes
    for axis, tensor in found.by_axis().items():
        assert bool((tensor.isfinite() & (tensor >= 0)).all()), axis
        assert axis == "layers" or len(tensor.unique()) > tensor.numel() // 2, axis
    assert (found.method, found.model) == (method, "m")
    assert (found.layer_scores is not None) == (method == "taylor")
    # the model is as before
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    # and the file says the same
    found.save(tmp_path / "scores.safetensors")
    loaded = Scores.load(tmp_path / "scores.safetensors", batch_agg="l2", seq_agg="mean", model="m")
    assert all(loaded.by_axis()[axis].equal(tensor) for axis, tensor in found.by_axis().items())
    assert (loaded.method, loaded.samples) == (found.method, found.samples)
    for name in ("hidden_layers", "layer_scores"):
        mine, theirs = getattr(found, name), getattr(loaded, name)
        assert (mine is None and theirs is None) or mine.equal(theirs)


@pytest.mark.parametrize("method", MEASURED)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_micro_batch_does_not_matter(family: str, method: str) -> None:
    model, anatomy = twin(family)
    whole = scored(model, anatomy, method=method, micro_batch=6)
    for micro_batch in (1, 4):
        parts = scored(model, anatomy, method=method, micro_batch=micro_batch)
        for axis, tensor in whole.by_axis().items():
            torch.testing.assert_close(parts.by_axis()[axis], tensor, rtol=1e-5, atol=1e-7)


def kill(model: PreTrainedModel, anatomy: Anatomy, axis: str, entry: int, layer: int) -> PreTrainedModel:
    """A copy in which one structure of a layer (of hidden: of the network) is zero."""
    dead = copy.deepcopy(model)
    parameters = dict(dead.named_parameters())
    with torch.no_grad():
        for place in places(anatomy, axis):
            if axis == "hidden" or place.layer == layer:
                parameters[place.name].movedim(place.dim, 0)[place.positions[entry]] = 0
    return dead


@pytest.mark.parametrize("method", DEAD_LAST)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("axis", ["ffn", "heads", "hidden"])
def test_what_is_dead_scores_zero(family: str, axis: str, method: str) -> None:
    model, anatomy = twin(family)
    dead = kill(model, anatomy, axis, 3, 1)
    if axis == "heads" and method == "activation":  # without a query it still averages its group's values
        dead = kill(dead, anatomy, "kv_heads", 3 * anatomy.sizes.kv_heads // anatomy.sizes.heads, 1)
    found = scored(dead, anatomy, method=method).by_axis()[axis]
    row = found if axis == "hidden" else found[1]
    assert float(row[3]) < 1e-6 * float(row.max())
    assert int(rank(row)[-1]) == 3


def test_a_dead_group_scores_zero() -> None:
    model, anatomy = twin("llama")
    dead = kill(model, anatomy, "kv_heads", 1, 0)
    per_group = anatomy.sizes.heads // anatomy.sizes.kv_heads
    for head in range(per_group, 2 * per_group):
        dead = kill(dead, anatomy, "heads", head, 0)
    for method in DEAD_LAST:
        groups = scored(dead, anatomy, method=method).kv_heads
        assert groups is not None
        assert float(groups[0, 1]) < 1e-6 * float(groups[0].max()), method


def reads(model: PreTrainedModel, anatomy: Anatomy, name: str) -> Tensor:
    """What a module reads of the samples: [tokens, channels]."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=samples(anatomy), use_cache=False)
    handle.remove()
    return seen[0].flatten(0, 1)


def layer_name(anatomy: Anatomy, layer: int, rest: str) -> str:
    return f"{anatomy.layers_path}.{layer}.{rest}"


def test_wanda_and_fluctuation_read_what_the_matrices_read() -> None:
    model, anatomy = twin("llama")
    sizes = anatomy.sizes
    wanda, flap = (scored(model, anatomy, method=method) for method in ("wanda", "fluctuation"))
    hidden = {"wanda": torch.zeros(sizes.hidden).double(), "flap": torch.zeros(sizes.hidden).double()}
    for layer in range(sizes.layers):
        for rest, mine, theirs, per in (
            ("mlp.down_proj", wanda.ffn, flap.ffn, 1),
            ("self_attn.o_proj", wanda.heads, flap.heads, sizes.head_dim),
        ):
            x = reads(model, anatomy, layer_name(anatomy, layer, rest))
            w = model.get_submodule(layer_name(anatomy, layer, rest)).weight.detach()
            assert mine is not None
            assert theirs is not None
            expected = (x.norm(dim=0) * w.abs().sum(0)).view(-1, per).sum(1)
            torch.testing.assert_close(mine[layer], expected.float())
            expected = (x.var(0) * w.square().sum(0)).view(-1, per).sum(1)
            torch.testing.assert_close(theirs[layer], expected.float())
        for rest in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
            x = reads(model, anatomy, layer_name(anatomy, layer, rest))
            w = model.get_submodule(layer_name(anatomy, layer, rest)).weight.detach()
            hidden["wanda"] += x.norm(dim=0) * w.abs().sum(0)
            hidden["flap"] += x.var(0) * w.square().sum(0)
    torch.testing.assert_close(wanda.hidden, hidden["wanda"].float())
    torch.testing.assert_close(flap.hidden, hidden["flap"].float())
    torch.testing.assert_close(flap.kv_heads, flap.heads.view(sizes.layers, sizes.kv_heads, -1).sum(-1))  # type: ignore[union-attr]


def test_a_transposed_weight_is_read_by_its_input() -> None:
    model, anatomy = twin("gpt2")
    name = layer_name(anatomy, 0, "mlp.c_proj")
    x, w = reads(model, anatomy, name), model.get_submodule(name).weight.detach()  # [ffn, hidden]
    found = scored(model, anatomy, method="wanda").ffn
    assert found is not None
    torch.testing.assert_close(found[0], (x.norm(dim=0) * w.abs().sum(1)).float())


def full_gradients(model: PreTrainedModel, anatomy: Anatomy) -> dict[str, Tensor]:
    """By plain autograd from the model's own loss, on a copy."""
    mine = copy.deepcopy(model)
    ids = samples(anatomy)
    logits = mine(input_ids=ids, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    return {name: p.grad for name, p in mine.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_taylor_and_magnitude_count_rows_and_columns(family: str) -> None:
    model, anatomy = twin(family)
    taylor, magnitude = (scored(model, anatomy, method=method) for method in ("taylor", "magnitude"))
    gradients, parameters = full_gradients(model, anatomy), dict(model.named_parameters())
    assert gradients.keys() == parameters.keys()
    # hidden: the sum over every parameter that carries it, counted another way: all that masking channel 2 would zero
    for found, value in (
        (taylor, lambda name: (parameters[name] * gradients[name]).abs()),
        (magnitude, lambda name: parameters[name].square()),
    ):
        expected = sum(
            float(value(place.name).detach().movedim(place.dim, 0)[place.positions[2]].sum())
            for place in places(anatomy, "hidden")
        )
        assert found.hidden is not None
        assert float(found.hidden[2]) == pytest.approx(expected, rel=1e-5)


def test_taylor_of_a_llama_by_hand() -> None:
    model, anatomy = twin("llama")
    found = scored(model, anatomy, method="taylor")
    gradients = full_gradients(model, anatomy)
    salience = {name: (p.detach() * gradients[name]).abs() for name, p in model.named_parameters()}
    sizes, mlp, attention = anatomy.sizes, "model.layers.1.mlp.", "model.layers.1.self_attn."
    ffn = sum(salience[f"{mlp}{name}_proj.weight"].sum(1) for name in ("gate", "up"))
    assert found.ffn is not None
    torch.testing.assert_close(found.ffn[1], (ffn + salience[f"{mlp}down_proj.weight"].sum(0)).float())
    heads = salience[f"{attention}q_proj.weight"].sum(1) + salience[f"{attention}o_proj.weight"].sum(0)
    heads = heads.view(sizes.heads, -1).sum(1)
    assert found.heads is not None
    torch.testing.assert_close(found.heads[1], heads.float())
    own = sum(salience[f"{attention}{name}_proj.weight"].sum(1) for name in ("k", "v"))
    groups = own.view(sizes.kv_heads, -1).sum(1) + heads.view(sizes.kv_heads, -1).sum(1)  # type: ignore[union-attr]
    assert found.kv_heads is not None
    torch.testing.assert_close(found.kv_heads[1], groups.float())
    matrices = [s.sum() for name, s in salience.items() if name.startswith("model.layers.1.") and s.ndim == 2]
    assert found.layer_scores is not None
    assert float(found.layer_scores[1]) == pytest.approx(float(sum(matrices)), rel=1e-5)


def test_bi_comes_from_the_pass_that_is_made_anyway() -> None:
    model, anatomy = twin("olmo2")
    expected = scored(model, anatomy).layers
    for method in ("wanda", "taylor", "fluctuation"):
        torch.testing.assert_close(scored(model, anatomy, method=method).layers, expected, rtol=1e-5, atol=1e-6)
    assert scored(model, anatomy, method="magnitude").layers.tolist() == [1.0] * anatomy.sizes.layers


def test_hidden_has_parts_by_layer() -> None:
    model, anatomy = twin("llama")
    for method in MEASURED:
        found = scored(model, anatomy, method=method)
        assert found.hidden_layers is not None
        assert found.hidden is not None
        outside = found.hidden - found.hidden_layers.sum(0)
        if method == "taylor":  # embeddings and the final norm stand outside of the layers
            assert bool((outside > 0).all())
        else:
            assert float(outside.abs().max()) < 1e-5 * float(found.hidden.max())


def test_scores_span_the_network_once_standardized() -> None:
    found = scored(*twin("llama"), method="fluctuation").network()
    assert set(found) == {"hidden", "ffn", "heads", "kv_heads"}
    for tensor in found.values():
        torch.testing.assert_close(tensor.mean(1), torch.zeros(len(tensor)), rtol=0, atol=1e-5)
        torch.testing.assert_close(tensor.std(1), torch.ones(len(tensor)))


@pytest.mark.parametrize("method", METHODS)
def test_a_cut_by_any_method_is_an_ordinary_model(method: str) -> None:
    model, anatomy = twin("llama")
    after = anatomy.sizes.at(ffn=anatomy.sizes.ffn // 2, heads=anatomy.sizes.heads // 2)
    plan = select(anatomy, after, scored(model, anatomy, method=method), gain="none")
    student = trim(model, plan, anatomy)
    assert sum(p.numel() for p in student.parameters()) == anatomy.ledger.count(after).params


def test_random_depends_on_the_seed_alone() -> None:
    model, anatomy = twin("llama")
    one, two = (scored(model, anatomy, method="random", seed=seed) for seed in (1, 2))
    assert one.hidden is not None
    assert two.hidden is not None
    assert not one.hidden.equal(two.hidden)
    assert one.samples == "random numbers, seed 1"
    assert one.hidden.equal(baselines.random(anatomy.sizes.hidden, generator=torch.Generator().manual_seed(1)))
