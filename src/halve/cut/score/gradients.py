"""The gradient of the calibration loss with respect to every weight: the only backward pass in scoring.

Legend: B batch, S seq, D hidden, N predicted tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn

from halve.cut.score.calibration import Calibration
from halve.cut.score.taps import on_layers
from halve.model.finite import require_finite
from halve.model.head import Head, split
from halve.model.measure import row_chunks, token_log_probs


@dataclass(frozen=True, eq=False)
class Gradients:
    """The results of one forward and backward pass over the samples."""

    by_name: dict[str, Tensor]
    """The gradient of `nll` by parameter, in float32 (float64 for float64 weights). Zero if there is none."""
    block_sums: Float64[Tensor, " layers"]
    """`importance.block_importance` of every layer, summed over samples, from the same forward pass."""
    nll: float
    """Mean nats of the predicted tokens."""


def measure_gradients(calibration: Calibration) -> Gradients:
    """Differentiate the mean next-token cross-entropy over all samples with respect to every parameter.

    Samples go through in micro-batches and their gradients are summed, so the result does not depend on `micro_batch`
    except for rounding. Logits are computed one chunk of tokens at a time. Memory: the activations of one micro-batch,
    a float32 copy of all weights for the sums, and one in the weights' own type. Weights, their `grad` and
    `requires_grad` are unchanged on return.

    Raises `CheckpointError` if a weight or a gradient is not finite.
    """
    model, samples_BS = calibration.model, calibration.samples_BS
    assert not model.training, "differentiate a model in eval mode"
    assert samples_BS.shape[1] > 1, "a sample of one token predicts nothing"
    parameters = dict(model.named_parameters())
    _check_finite("weights", parameters)
    body, head = split(model)
    sums = {name: torch.zeros_like(p, dtype=_wide(p), requires_grad=False) for name, p in parameters.items()}
    num_targets = len(samples_BS) * (samples_BS.shape[1] - 1)
    nll = 0.0
    with (
        _differentiable(list(parameters.values())),
        torch.enable_grad(),
        on_layers(model, calibration.anatomy) as block_sums,
        calibration.progress.task("score by gradients", samples_BS.numel()) as task,
    ):
        for part_BS in calibration.batches:
            ids_BS = part_BS.to(model.device)
            hidden_BSD = body(ids_BS)
            loss, into_hidden_BSD, into_head = _head_gradients(head, hidden_BSD.detach(), ids_BS, num_targets)
            gradients = torch.autograd.grad(
                hidden_BSD, list(parameters.values()), into_hidden_BSD, allow_unused=True, materialize_grads=False
            )
            for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
                if gradient is not None:
                    sums[name] += gradient
                for head_parameter, head_gradient in into_head:
                    if head_parameter is parameter:
                        sums[name] += head_gradient
            nll += loss
            task.advance(part_BS.numel(), loss=loss * num_targets / (part_BS.numel() - len(part_BS)))
    _check_finite("gradients", sums)
    return Gradients(sums, block_sums.cpu(), nll)


def _wide(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


@contextmanager
def _differentiable(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    before = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in zip(parameters, before, strict=True):
            parameter.requires_grad_(flag)


def _head_gradients(
    head: Head, hidden_BSD: Float[Tensor, "batch seq hidden"], ids_BS: Int64[Tensor, "batch seq"], num_targets: int
) -> tuple[float, Tensor, list[tuple[Tensor, Tensor]]]:
    """The loss over `num_targets`, its gradient in the hidden states, and in the head's own parameters."""
    rows_ND = hidden_BSD[:, :-1].flatten(0, 1).contiguous().requires_grad_()
    targets_N = ids_BS[:, 1:].flatten()
    parameters = [parameter for parameter in (head.weight, head.bias) if parameter is not None]
    into_rows_ND = torch.empty_like(rows_ND)
    into_own = [torch.zeros_like(parameter, dtype=_wide(parameter), requires_grad=False) for parameter in parameters]
    loss = 0.0
    for rows in row_chunks(len(targets_N), head.weight.shape[0]):
        part_ND = rows_ND[rows].detach().requires_grad_()
        nats = -token_log_probs(head.logits(part_ND), targets_N[rows]).sum() / num_targets
        gradients = torch.autograd.grad(nats, [part_ND, *parameters])
        into_rows_ND.data[rows] = gradients[0]
        for total, gradient in zip(into_own, gradients[1:], strict=True):
            total += gradient
        loss += float(nats.detach())
    into_hidden_BSD = torch.zeros_like(hidden_BSD)
    into_hidden_BSD[:, :-1] = into_rows_ND.detach().view(len(ids_BS), -1, hidden_BSD.shape[-1])
    return loss, into_hidden_BSD, list(zip(parameters, into_own, strict=True))


def _check_finite(what: str, values: Mapping[str, Tensor]) -> None:
    why = "NaN or infinity is in the model, or came out of it on the calibration samples"
    for name, value in values.items():
        require_finite(what, value, where=f", first of {name}", why=why)
