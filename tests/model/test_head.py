"""The head is proved against the whole model, in every way that families treat their logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from halve.errors import AnatomyError, CheckpointError
from halve.model.head import Head, split

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 61,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "gemma2": SIZES | {"final_logit_softcapping": 3.0},
    "cohere2": SIZES | {"logit_scale": 0.25},
    "granite": SIZES | {"logits_scaling": 4.0},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 61, "n_positions": 64},
    "gpt_neox": {k: v for k, v in SIZES.items() if k not in ("head_dim", "num_key_value_heads")},
    "phi": SIZES | {"num_key_value_heads": 4},  # its head has a bias
}


def tiny(family: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(FAMILIES[family] | {"pad_token_id": 0} | changes))
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_body_and_head_are_the_model(family: str) -> None:
    model = tiny(family)
    body, head = split(model)
    ids_BS = torch.randint(61, (2, 9))
    with torch.no_grad():
        logits_BSV = head.logits(body(ids_BS))
        torch.testing.assert_close(logits_BSV, model(ids_BS).logits, rtol=1e-4, atol=1e-4)
    assert head.weight is model.get_output_embeddings().weight


@pytest.mark.parametrize(
    ("family", "scale", "softcap", "bias"),
    [
        ("llama", 1, None, 0),
        ("gemma2", 1, 3, 0),
        ("cohere2", 0.25, None, 0),
        ("granite", 0.25, None, 0),
        ("phi", 1, None, 1),
    ],
)
def test_what_a_family_does_to_its_logits_is_in_the_head(
    family: str, scale: float, softcap: float | None, bias: int
) -> None:
    _, head = split(tiny(family))
    assert (head.scale, head.softcap, head.bias is not None) == (scale, softcap, bool(bias))


def test_a_head_that_the_config_does_not_tell_is_refused() -> None:
    model = tiny("llama")
    model.config.logits_scaling = 2.0  # Llama's code never reads it
    with pytest.raises(AnatomyError, match="cannot split LlamaForCausalLM"):
        split(model)


def test_logits_that_are_not_finite_are_told_as_such() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(3e38)
    with pytest.raises(CheckpointError, match="the logits of this LlamaForCausalLM are not finite"):
        split(model)


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(AnatomyError, match="no output matrix"):
        split(tiny("llama").model)


def test_splitting_leaves_the_model_in_its_mode() -> None:
    model = tiny("gpt2").train()
    split(model)
    assert model.training


def test_logits_of_half_precision_are_not_rounded_to_it() -> None:
    torch.manual_seed(0)
    weight, hidden = torch.randn(11, 16, dtype=torch.bfloat16), torch.randn(2, 3, 16, dtype=torch.bfloat16)
    logits = Head(weight).logits(hidden)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), hidden.double() @ weight.double().t(), rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(Head(weight).logits(hidden), logits)
