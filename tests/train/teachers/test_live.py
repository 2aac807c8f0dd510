"""Live teachers: on another device, and with layers that wait elsewhere, they say what the plain one says."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from halve.errors import RecipeError
from halve.model.checkpoint import Checkpoint
from halve.model.head import split
from halve.recipe.schema import Distill
from halve.text.batch import Batch
from halve.train.ranks import blocks
from halve.train.ranks.group import Ranks
from halve.train.teachers import live as teachers
from halve.train.teachers.live import Live, Teacher


@pytest.fixture
def batch(tokenizer: PreTrainedTokenizerFast) -> Batch:
    ids = torch.randint(len(tokenizer), (3, 20), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(9), torch.arange(11)]).expand(3, 20)
    return Batch(ids, (0, 1, 2), positions)


def load(folder: Path, **keys: object) -> Live:
    training = Distill.model_validate({"tokens": 1, **keys})
    return teachers.load_teacher(Checkpoint.open(folder), training, dtype="auto", device="cpu", half=False)[1]


def test_every_live_teacher_says_the_same(tiny_llama: Path, batch: Batch) -> None:
    plain = load(tiny_llama)
    others: list[Teacher[teachers.Hidden]] = [load(tiny_llama, offload_teacher=True)]
    others.append(Live(teachers.away(plain.body, place="cpu", half=False), plain.head))
    want = plain.answer(batch)
    assert len(want.states) == 3 * (8 + 10)
    for other in others:
        found = other.answer(batch)
        assert torch.equal(found.states, want.states)
        assert torch.equal(found.head.weight, want.head.weight)
        assert not found.states.requires_grad


def test_a_body_elsewhere_computes_in_its_own_precision(tiny_llama: Path, batch: Batch) -> None:
    plain = load(tiny_llama)
    away = Live(teachers.away(plain.body, place="cpu", half=True), plain.head)
    exact = plain.answer(batch).states
    with torch.autocast("cpu", torch.bfloat16):
        half = plain.answer(batch).states
    assert torch.equal(away.answer(batch).states, half)  # without an autocast of the caller's
    assert not torch.equal(half, exact)


def test_one_layer_visits_at_a_time(tiny_llama: Path, batch: Batch) -> None:
    model = Checkpoint.open(tiny_llama).load().requires_grad_(False)
    layer_bytes = max(sum(p.nbytes for p in layer.parameters()) for layer in blocks.layers(model))
    present: dict[int, int] = {}
    most = visits = 0

    def fetch(waiting: Tensor) -> Tensor:
        nonlocal most, visits
        copy = waiting.clone()
        storage = copy.untyped_storage()
        present[storage.data_ptr()] = copy.nbytes
        weakref.finalize(storage, present.pop, storage.data_ptr(), None)
        most, visits = max(most, sum(present.values())), visits + 1
        return copy

    waiting = {name: value.data_ptr() for name, value in model.model.layers.named_parameters()}
    teachers.visiting(model, "cpu", fetch=fetch)
    Live(*split(model)).answer(batch)
    assert visits >= 3 * len(waiting)  # both ways of the head's proof, and the answer
    assert 0 < most <= layer_bytes
    assert {name: value.data_ptr() for name, value in model.model.layers.named_parameters()} == waiting


def test_layers_go_home_when_a_forward_pass_fails(tiny_llama: Path) -> None:
    model = Checkpoint.open(tiny_llama).load().requires_grad_(False)
    waiting = {name: value.data_ptr() for name, value in model.named_parameters()}
    teachers.visiting(model, "cpu", fetch=torch.clone)
    blocks.layers(model)[1].mlp.forward = None
    with pytest.raises(TypeError):
        model(torch.zeros(1, 4, dtype=torch.int64))
    assert {name: value.data_ptr() for name, value in model.named_parameters()} == waiting


def test_what_will_be_in_shards_waits_in_main_memory(tiny_llama: Path) -> None:
    training = Distill(tokens=1)
    model, live = teachers.load_teacher(
        Checkpoint.open(tiny_llama), training, dtype="auto", device="meta", half=False, in_shards=True
    )
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert live.head.weight.device.type == "meta"
    assert [Ranks(0, size, "cuda").home("cuda") for size in (1, 2)] == ["cuda", "cpu"]


def test_a_device_that_is_not_there_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(RecipeError, match="teacher_device cuda:99 is not there"):
        load(tiny_llama, teacher_device="cuda:99")
    with pytest.raises(ValidationError, match="teacher_device"):
        load(tiny_llama, teacher_device="abacus")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_asks_a_teacher_that_is_elsewhere(tiny_llama: Path, batch: Batch) -> None:
    def on_gpu(**keys: object) -> Live:
        training = Distill.model_validate({"tokens": 1, **keys})
        return teachers.load_teacher(Checkpoint.open(tiny_llama), training, dtype="auto", device="cuda", half=False)[1]

    plain = on_gpu().answer(batch.to("cuda"))
    visiting = on_gpu(offload_teacher=True).answer(batch.to("cuda"))
    away = on_gpu(teacher_device="cpu").answer(batch.to("cuda"))
    assert torch.equal(visiting.states, plain.states)
    assert torch.allclose(away.states, plain.states, atol=1e-5)
    assert away.states.is_cuda
    assert away.head.weight.is_cuda
