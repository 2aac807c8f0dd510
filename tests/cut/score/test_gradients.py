"""The backward pass: equal to plain autograd, any micro-batch, and a model left as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from families import config
from torch import Tensor
from transformers import PreTrainedModel

from halve.anatomy import Anatomy, discover
from halve.cut.proof.twins import random_twin
from halve.cut.score import gradients, taps
from halve.cut.score.calibration import Calibration
from halve.errors import CheckpointError
from halve.model import measure as measures

Made = tuple[PreTrainedModel, Anatomy]


def made(family: str) -> Made:
    anatomy = discover(config(family)).twin()
    return random_twin(anatomy, seed=0), anatomy


@pytest.fixture
def samples() -> Tensor:
    return torch.randint(50, (5, 11), generator=torch.Generator().manual_seed(3))


# gemma2: soft-cap and tied table; gpt2: tied, transposed; phi: a bias at the head; granite: scaled logits
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "phi", "granite", "cohere2"])
@pytest.mark.parametrize("micro_batch", [2, 5])
def test_gradients_are_those_of_the_models_own_loss(
    family: str, micro_batch: int, samples: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measures, "CHUNK_ELEMENTS", 1024)  # several chunks of tokens
    model, anatomy = made(family)
    mine = copy.deepcopy(model)
    logits = mine(input_ids=samples, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), samples[:, 1:].flatten())
    loss.backward()
    found = gradients.measure_gradients(Calibration(model, anatomy, samples, micro_batch))
    assert found.nll == pytest.approx(loss.item(), rel=1e-6)
    assert found.by_name.keys() == dict(mine.named_parameters()).keys()
    for name, parameter in mine.named_parameters():
        assert parameter.grad is not None
        # norms are float32 in the families' code
        torch.testing.assert_close(found.by_name[name], parameter.grad, rtol=1e-4, atol=1e-7)
    statistics = taps.measure_activations(Calibration(model, anatomy, samples, micro_batch))
    torch.testing.assert_close(found.block_sums, statistics.block_sums, rtol=1e-5, atol=1e-5)


def test_the_model_is_left_as_it_was(samples: Tensor) -> None:
    model, anatomy = made("llama")
    frozen = next(model.parameters()).requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients.measure_gradients(Calibration(model, anatomy, samples, 2))
    with pytest.raises(IndexError):
        gradients.measure_gradients(Calibration(model, anatomy, samples + 1000, 2))
    assert [p.requires_grad for p in model.parameters()] == [p is not frozen for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_half_precision_is_summed_in_float32(samples: Tensor) -> None:
    model, anatomy = made("llama")
    model = model.to(torch.bfloat16)
    found = gradients.measure_gradients(Calibration(model, anatomy, samples, 1))
    assert {gradient.dtype for gradient in found.by_name.values()} == {torch.float32}
    assert model.dtype == torch.bfloat16


def test_what_is_not_finite_is_refused(samples: Tensor) -> None:
    model, anatomy = made("llama")
    weight = model.get_submodule("model.embed_tokens").weight
    probed = torch.randint(anatomy.sizes.vocab, (1, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # overflows in the norm that reads it, and is not among the tokens that split the model
        weight[next(i for i in samples.flatten().tolist() if i not in probed.tolist()[0])] = 1e308
    with pytest.raises(CheckpointError, match="gradients are not finite, first of model"):
        gradients.measure_gradients(Calibration(model, anatomy, samples, 2))
    with torch.no_grad():
        weight[3] = float("nan")
    with pytest.raises(CheckpointError, match=r"weights are not finite, first of model.embed_tokens.weight"):
        gradients.measure_gradients(Calibration(model, anatomy, samples, 2))
