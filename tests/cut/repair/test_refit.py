"""Refit: nothing cut, nothing changed; what can be repaired is; what cannot gets closer."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import config
from torch import Tensor

from halve.anatomy import Anatomy, discover
from halve.cut.plan.plan import Plan, select
from halve.cut.proof.twins import RandomScores, logits, random_twin
from halve.cut.repair import refit as refit_module
from halve.cut.repair import taught
from halve.cut.repair.gram import SingularGramWarning
from halve.cut.repair.refit import refit
from halve.cut.score import walk
from halve.cut.score.calibration import Calibration
from halve.cut.score.sites import find_sites
from halve.cut.surgery.gain import norm_kind
from halve.cut.surgery.trim import trim
from halve.errors import CheckpointError
from halve.model.reference import Reference

FAMILIES = ("llama", "qwen2", "phi3", "gpt2", "gpt_neox", "phi", "gemma2", "olmo2", "granite", "cohere", "gemma")


def _samples(anatomy: Anatomy, num: int = 24, seq: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(anatomy.sizes.vocab, (num, seq), generator=generator)


def _twin(family: str, **changes: object) -> tuple[object, Anatomy]:
    anatomy = discover(config(family, **changes)).twin()
    return random_twin(anatomy, seed=0), anatomy


def _plan(anatomy: Anatomy, kept_layers: Sequence[int] | None = None, **sizes: int) -> Plan:
    scores = RandomScores(anatomy.sizes, 0)
    return select(anatomy, anatomy.sizes.at(**sizes), scores, gain="none", kept_layers=kept_layers)


def _refit(model, plan: Plan, anatomy: Anatomy, samples: Tensor, *, everything: bool, micro_batch: int = 8):  # type: ignore[no-untyped-def]
    student = trim(model, plan, anatomy)
    taught = Calibration(model, anatomy, samples, micro_batch)
    return student, refit(student, taught, plan, strength=1e-4, everything=everything)


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_with_nothing_cut_the_weights_come_back(family: str, everything: bool) -> None:
    model, anatomy = _twin(family)
    student, again = _refit(model, _plan(anatomy), anatomy, _samples(anatomy, 16), everything=everything)
    for (name, old), new in zip(student.named_parameters(), again.parameters(), strict=True):
        assert (old - new).abs().max() < 1e-5, name


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_read_and_written_as_the_code_does(family: str) -> None:
    model, anatomy = _twin(family)
    found = find_sites(model, anatomy)
    for layer, sites in enumerate(found.layers):
        written = [site.modules[0] for site in sites if site.kind == "write"]
        assert len(written) == 2, sites
        read = [name for site in sites if site.kind == "read" for name in site.modules]
        assert sorted(read) == sorted(anatomy.readers("hidden")[layer])
    post_norm = family in ("gemma2", "olmo2")
    assert all((scale is None) == post_norm for scale in found.scales)
    if family == "granite":
        assert found.scales[0] == pytest.approx(anatomy.config.residual_multiplier)
    if family == "llama":
        assert [site.kind for site in found.layers[0]] == ["read", "write", "read", "write"]
        assert [name.split(".")[-1] for name in found.layers[0][2].modules] == ["gate_proj", "up_proj"]


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_comes_closer_to_its_teacher(family: str, everything: bool) -> None:
    model, anatomy = _twin(family)
    plan = _plan(anatomy, ffn=anatomy.sizes.ffn - 16)
    samples = _samples(anatomy, 48)
    student, again = _refit(model, plan, anatomy, samples, everything=everything)

    def gap(cut) -> float:  # type: ignore[no-untyped-def]
        with torch.no_grad():
            ours, theirs = cut(samples).logits, model(samples).logits
        return float((ours - theirs).square().mean())

    assert gap(again) < 0.9 * gap(student)


def test_neurons_that_repeat_others_are_cut_without_loss() -> None:
    """Half of the neurons say what the other half says: the refit puts their weights together."""
    model, anatomy = _twin("llama")
    half = anatomy.sizes.ffn // 2
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight[half:] = layer.mlp.gate_proj.weight[:half]
            layer.mlp.up_proj.weight[half:] = layer.mlp.up_proj.weight[:half]
    plan = replace(_plan(anatomy, ffn=half), ffn=tuple(tuple(range(half)) for _ in range(anatomy.sizes.layers)))
    samples = _samples(anatomy, 64)
    student = trim(model, plan, anatomy)
    again = refit(student, Calibration(model, anatomy, samples, 8), plan, strength=1e-12, everything=False)
    reference = logits(model, anatomy)
    assert (logits(student, anatomy) - reference).abs().max() > 0.1
    assert (logits(again, anatomy) - reference).abs().max() < 1e-4


def test_a_dropped_layer_that_adds_a_linear_part_is_made_up_for() -> None:
    """The writer in front of the gap aims at the stream behind it."""
    model, anatomy = _twin("llama")
    last = anatomy.sizes.layers - 1
    with torch.no_grad():  # small enough that a part of it is linear
        model.model.layers[last].mlp.down_proj.weight.mul_(0.3)
        model.model.layers[last].self_attn.o_proj.weight.mul_(0.3)
    plan = _plan(anatomy, kept_layers=tuple(range(last)), layers=last)
    samples = _samples(anatomy, 64)
    student, again = _refit(model, plan, anatomy, samples, everything=False)

    def gap(cut) -> float:  # type: ignore[no-untyped-def]
        with torch.no_grad():
            return float((cut(samples).logits - model(samples).logits).square().mean())

    assert gap(again) < 0.95 * gap(student)
    changed = {
        n
        for (n, old), new in zip(student.named_parameters(), again.parameters(), strict=True)
        if not torch.allclose(old, new, atol=1e-6)
    }
    assert changed == {f"model.layers.{last - 1}.mlp.down_proj.weight"}  # all before it is exact and stays


def test_the_micro_batch_does_not_matter_nor_do_files(monkeypatch: pytest.MonkeyPatch) -> None:
    model, anatomy = _twin("llama")
    plan = _plan(anatomy, ffn=anatomy.sizes.ffn - 16, hidden=anatomy.sizes.hidden - 8)
    samples = _samples(anatomy, 20)
    _, one = _refit(model, plan, anatomy, samples, everything=True, micro_batch=20)
    monkeypatch.setattr(walk, "IN_MEMORY_BYTES", 0)
    _, two = _refit(model, plan, anatomy, samples, everything=True, micro_batch=8)  # the last batch has four
    for old, new in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(old, new, rtol=1e-5, atol=1e-6)


def test_what_it_says_of_its_states_is_what_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    model, anatomy = _twin("llama")
    plan, samples = _plan(anatomy, ffn=anatomy.sizes.ffn - 16, hidden=anatomy.sizes.hidden - 8), _samples(anatomy, 20)
    most, said = 0, []

    class Counted(walk.States):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            nonlocal most
            super().__init__(*args, **kwargs)
            alive[id(self)] = self.values.nbytes
            weakref.finalize(self, alive.pop, id(self))
            most = max(most, sum(alive.values()))

    alive: dict[int, int] = {}
    size = refit_module.states_bytes
    for module in (refit_module, taught):
        monkeypatch.setattr(module, "States", Counted)
    monkeypatch.setattr(refit_module, "states_bytes", lambda *a, **k: said.append(size(*a, **k)) or said[-1])
    _refit(model, plan, anatomy, samples, everything=True)
    assert said == [most]


def test_neither_model_is_changed() -> None:
    model, anatomy = _twin("llama")
    plan = _plan(anatomy, ffn=anatomy.sizes.ffn - 16)
    student = trim(model, plan, anatomy)
    before = [{n: v.clone() for n, v in m.state_dict().items()} for m in (model, student)]
    refit(student, Calibration(model, anatomy, _samples(anatomy), 8), plan, strength=1e-3, everything=True)
    for one, old in zip((model, student), before, strict=True):
        assert all(torch.equal(value, old[name]) for name, value in one.state_dict().items())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in one.modules())


def test_few_tokens_are_warned_about_and_survived() -> None:
    model, anatomy = _twin("llama")
    plan = _plan(anatomy, ffn=anatomy.sizes.ffn - 16)
    with pytest.warns(SingularGramWarning, match="refit_samples"):
        _, again = _refit(model, plan, anatomy, _samples(anatomy, 1, 4), everything=False)
    assert all(bool(parameter.isfinite().all()) for parameter in again.parameters())


def test_activations_that_are_not_finite_are_refused() -> None:
    model, anatomy = _twin("llama")
    plan = _plan(anatomy, ffn=anatomy.sizes.ffn - 16)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"not finite at model.layers.1") as caught:
        _refit(model, plan, anatomy, _samples(anatomy), everything=True)
    assert len(str(caught.value).splitlines()) == 3


def test_a_teacher_that_is_kept_teaches_many_students_the_same() -> None:
    model, anatomy = _twin("llama")
    samples = Calibration(model, anatomy, _samples(anatomy), 8)
    kept = taught.Taught(samples, taught.micro_batches(24, 8), most_bytes=2**30)
    for layers in (range(anatomy.sizes.layers), (1,), (0,)):
        plan = _plan(anatomy, tuple(layers), layers=len(layers), ffn=anatomy.sizes.ffn - 16)
        student = trim(model, plan, anatomy)
        alone = refit(student, samples, plan, strength=1e-3, everything=True)
        again = refit(student, samples, plan, strength=1e-3, everything=True, taught=kept)
        for one, two in zip(alone.parameters(), again.parameters(), strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("samples", [2, 6])
def test_few_tokens_do_no_harm_where_others_choose_the_ridge(samples: int) -> None:
    model, anatomy = _twin("llama")
    plan = _plan(anatomy, ffn=anatomy.sizes.ffn - 16, hidden=anatomy.sizes.hidden - 8)
    student = trim(model, plan, anatomy)
    few = Calibration(model, anatomy, _samples(anatomy, samples, 8), 8)
    chosen = refit(student, few, plan, everything=True, held=samples // 2)
    with pytest.warns(SingularGramWarning):
        fixed = refit(student, few.first(samples - samples // 2), plan, everything=True)
    unseen = _samples(anatomy, 200)[100:]
    goal = model(unseen).logits
    plain, careful, careless = ((m(unseen).logits - goal).square().mean() for m in (student, chosen, fixed))
    assert careful < 1.02 * plain
    assert careful < careless


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_one_factor_on_the_final_norm_takes_the_place_of_a_tied_head(family: str) -> None:
    """The student's logits are too large for what it knows; the factor is the best one on the held samples."""
    model, anatomy = _twin(family, tie_word_embeddings=True)
    plan = _plan(anatomy, ffn=anatomy.sizes.ffn - 16)
    samples = Calibration(model, anatomy, _samples(anatomy), 8)
    student = trim(model, plan, anatomy)
    done = refit(student, samples, plan, everything=True, held=8)
    name, held = f"{anatomy.final_norm}.weight", samples.samples_BS[-8:]
    offset = norm_kind(done.get_submodule(anatomy.final_norm)).offset
    before, after = ((m.get_parameter(name) + offset).detach() for m in (student, done))
    factor = (after / before).mean().item()
    assert torch.allclose(after, factor * before, rtol=1e-5)
    assert 0.5 < factor < 1

    def divergence(other: float) -> float:
        with torch.no_grad():
            done.get_parameter(name).copy_(other * before - offset)
        return Reference(model, held, micro_batch=8).divergences(done).mean().item()

    found, *others = (divergence(other) for other in (factor, 1.0, factor - 0.01, factor + 0.01))
    assert found < 1.001 * min(others)
    assert found < 0.9 * others[0]
    whole = _plan(anatomy)
    same = refit(trim(model, whole, anatomy), samples, whole, everything=True, held=8)
    assert torch.equal(same.get_parameter(name), model.get_parameter(name))
