"""Layers that keep less, or are compiled, compute the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from halve.train.ranks import blocks

VOCAB = 37
IDS = torch.randint(VOCAB, (4, 12), generator=torch.Generator().manual_seed(0))


def tiny(layers: int = 2) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    model: PreTrainedModel = LlamaForCausalLM(config).eval()
    return model


def kept_bytes(model: PreTrainedModel) -> tuple[int, list[Tensor]]:
    """What a forward pass keeps for the way back beside parameters, and the gradients that the way back gives."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(input_ids=IDS, use_cache=False).logits.square().sum()
    num_bytes = sum(kept.values())
    loss.backward()
    return num_bytes, [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def test_layers_that_are_computed_again_keep_less_and_give_the_same_gradients() -> None:
    found: dict[str, Any] = {}
    for kind in ("none", "selective", "full"):
        model = tiny(layers=6)
        names = [name for name, _ in model.named_parameters()]
        blocks.recompute(model, kind)
        assert [name for name, _ in model.named_parameters()] == names
        found[kind] = kept_bytes(model)
    assert found["full"][0] < 0.3 * found["none"][0]
    assert all(torch.equal(a, b) for a, b in zip(found["full"][1], found["none"][1], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(found["selective"][1], found["none"][1], strict=True))


def test_selective_computes_no_product_again() -> None:
    def products(kind: str) -> int:
        model = tiny()
        blocks.recompute(model, kind)
        loss = model(input_ids=IDS, use_cache=False).logits.square().sum()
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        return counter.get_total_flops()

    none, selective, full = (products(kind) for kind in ("none", "selective", "full"))
    assert selective == none < full


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_compiled_layers_compute_the_same() -> None:
    plain, made = tiny(), tiny()
    blocks.recompute(made, "full")
    blocks.compiled(made)
    (_, want), (_, have) = kept_bytes(plain), kept_bytes(made)
    torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)
