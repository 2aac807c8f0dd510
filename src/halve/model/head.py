"""A language model in two parts: the body computes hidden states, and the head computes logits from them.

Losses and measurements need the two parts, so that logits can be computed one chunk at a time. Everything that a family
does to its logits (a scale, a soft-cap, a bias) is part of the head. `split` compares body and head with the whole
model on real token ids.

Shapes: B batch, S seq, N tokens, D hidden, V vocab.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from halve.errors import AnatomyError
from halve.model.finite import came_out, not_finite
from halve.model.products import product

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The config keys of what a model does between the output matrix and the logits.
_MULTIPLIERS = ("logit_scale",)
_DIVISORS = ("logits_scaling",)
_SOFTCAP = "final_logit_softcapping"

_PROBE_TOKENS = 8
_FIX = "use a causal language model whose logits are output matrix, bias, scale and soft-cap"


@dataclass(frozen=True)
class Head:
    """The map from hidden states to logits: `softcap * tanh(scale * (W h + b) / softcap)`.

    `weight` and `bias` are the model's own parameters, not copies: gradients and optimizer steps reach them.
    Without a soft-cap the outer `tanh` is the identity. With `accumulates`, chunked losses add the weight's gradient to
    `weight.grad` in the forward pass, so that no second tensor of that size is needed. The caller must then call
    `backward` exactly once, on the loss itself and not on a multiple.
    """

    weight: Float[Tensor, "vocab hidden"]
    bias: Float[Tensor, " vocab"] | None = None
    scale: float = 1.0
    softcap: float | None = None
    accumulates: bool = False

    def logits(self, hidden: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows vocab"]:
        """Return logits in float32 (float64 if an operand is float64), for any precision of the weights."""
        z_NV = product(hidden.reshape(-1, hidden.shape[-1]), self.weight.t())
        if self.bias is not None:
            z_NV = z_NV + self.bias
        if self.scale != 1.0:
            z_NV = z_NV * self.scale
        if self.softcap is not None:
            z_NV = self.softcap * torch.tanh(z_NV / self.softcap)
        return z_NV.reshape(*hidden.shape[:-1], -1)


@dataclass(frozen=True)
class Body:
    """Everything of a model below its head: token ids in, last hidden states (after the final norm) out."""

    module: nn.Module

    def __call__(self, input_ids: Int[Tensor, "batch seq"], **kwargs: Any) -> Float[Tensor, "batch seq hidden"]:
        """Run the body. Other keywords (such as `attention_mask`) go to the model's own forward."""
        hidden: Tensor = self.module(input_ids=input_ids, **({"use_cache": False} | kwargs))[0]
        return hidden


def split(model: PreTrainedModel) -> tuple[Body, Head]:
    """Split a causal language model into body and head, and check that together they give its logits.

    Raises `AnatomyError` if the model has no output matrix, or if its logits are not what the config implies. Then
    neither distillation nor measurement can use the parts. Raises `CheckpointError` for logits that are not finite.
    """
    body, head = parts(model)
    error = _difference(model, body, head)
    if math.isnan(error):
        raise not_finite(f"the logits of this {type(model).__name__}", why=came_out(on="a few random tokens"))
    if not error < (1e-3 if head.weight.dtype in (torch.float32, torch.float64) else 5e-2):
        raise AnatomyError(
            f"cannot split {type(model).__name__} into body and head",
            why=f"the head's logits differ from the model's by {error:.2g} of their size",
            fix=_FIX,
        )
    return body, head


def parts(model: PreTrainedModel) -> tuple[Body, Head]:
    """The same without the check, for models without values. Raises `AnatomyError` if there is no output matrix."""
    output = model.get_output_embeddings()
    module = model.base_model
    if module is model or not isinstance(getattr(output, "weight", None), Tensor):
        raise AnatomyError(
            f"cannot split {type(model).__name__} into body and head", why="it has no output matrix", fix=_FIX
        )
    config = model.config.get_text_config()
    scale = 1.0
    for key in _MULTIPLIERS:
        scale *= _number(config, key) or 1.0
    for key in _DIVISORS:
        scale /= _number(config, key) or 1.0
    return Body(module), Head(output.weight, getattr(output, "bias", None), scale, _number(config, _SOFTCAP))


def _number(config: Any, key: str) -> float | None:
    value = getattr(config, key, None)
    return None if value is None else float(value)


def _difference(model: PreTrainedModel, body: Body, head: Head) -> float:
    """Return the largest difference between the logits of both ways, relative to the largest logit."""
    random = torch.Generator().manual_seed(0)
    ids_BS = torch.randint(head.weight.shape[0], (1, _PROBE_TOKENS), generator=random).to(head.weight.device)
    training = model.training
    model.eval()  # dropout would differ between the two passes
    try:
        with torch.no_grad():
            want_BSV = model(input_ids=ids_BS, use_cache=False).logits.float()
            have_BSV = head.logits(body(ids_BS)).float()
    finally:
        model.train(training)
    if want_BSV.shape != have_BSV.shape:
        return float("inf")
    size = want_BSV.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return float((want_BSV - have_BSV).abs().max() / size)
