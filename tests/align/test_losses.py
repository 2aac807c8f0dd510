"""The losses of RPO beside float64 references, their limits, and the same losses in TRL's installed code."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import expit, rel_entr
from torch import Tensor
from trl import DPOTrainer

from halve.align.losses import PAIR_LOSSES, rpo_backward, rpo_forward, rpo_squared

BETA, ETA = 0.3, 0.7


def pairs(num: int = 64, *, scale: float = 4.0) -> tuple[Tensor, Tensor]:
    """Margins and gaps, a tenth of them ties."""
    draw = torch.Generator().manual_seed(0)
    margins, gaps = scale * torch.randn(2, num, generator=draw, dtype=torch.float64)
    gaps[::10] = 0.0
    return margins, gaps


def by_hand(form: str, margins: Tensor, gaps: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Values and gradients by the margin, in float64 without torch."""
    logit_b, logit_a = BETA * margins.numpy(), ETA * gaps.numpy()
    a, b = expit(logit_a), expit(logit_b)
    if form == "squared":
        return (logit_b - logit_a) ** 2, 2 * BETA * (logit_b - logit_a)
    if form == "backward":
        return rel_entr(a, b) + rel_entr(1 - a, 1 - b), BETA * (b - a)
    return rel_entr(b, a) + rel_entr(1 - b, 1 - a), BETA * b * (1 - b) * (logit_b - logit_a)


@pytest.mark.parametrize("form", sorted(PAIR_LOSSES))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_values_and_gradients_are_those_of_the_formula(form: Any, dtype: torch.dtype, tolerance: float) -> None:
    margins, gaps = pairs()
    want, want_gradient = by_hand(form, margins, gaps)
    given = margins.to(dtype).requires_grad_()
    found = PAIR_LOSSES[form](given, gaps.to(dtype), beta=BETA, eta=ETA)
    (gradient,) = torch.autograd.grad(found.sum(), given)
    assert found.dtype == dtype
    np.testing.assert_allclose(found.detach().double().numpy(), want, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(gradient.double().numpy(), want_gradient, rtol=tolerance, atol=tolerance)


def test_the_forms_differ() -> None:
    margins, gaps = pairs()
    backward, forward, squared = (loss(margins, gaps, beta=BETA, eta=ETA) for loss in PAIR_LOSSES.values())
    assert not torch.allclose(backward, forward, rtol=1e-3)
    assert not torch.allclose(backward, squared, rtol=1e-3)


# ---- limits


def test_a_large_eta_gives_dpo() -> None:
    margins, gaps = pairs()
    clear = gaps != 0
    margins, gaps = margins[clear], gaps[clear].abs().clamp_min(0.01)
    dpo = -torch.nn.functional.logsigmoid(BETA * margins)
    far, near = ((rpo_backward(margins, gaps, beta=BETA, eta=eta) - dpo).abs().max() for eta in (1.0, 1e4))
    assert near < 1e-12 < far


def test_squared_with_a_constant_gap_is_ipo_up_to_scale() -> None:
    margins, _ = pairs()
    ipo = (margins - 1 / (2 * BETA)) ** 2
    half = torch.full_like(margins, 0.5)
    torch.testing.assert_close(rpo_squared(margins, half, beta=BETA, eta=1.0), BETA**2 * ipo)


def test_a_constant_gap_is_conservative_dpo_but_for_a_constant() -> None:
    margins, _ = pairs()
    smoothing = 0.1
    gap = torch.full_like(margins, float(np.log((1 - smoothing) / smoothing)))
    log_b, log_not_b = (torch.nn.functional.logsigmoid(sign * BETA * margins) for sign in (1, -1))
    conservative = -(1 - smoothing) * log_b - smoothing * log_not_b
    constant = conservative - rpo_backward(margins, gap, beta=BETA, eta=1.0)
    entropy = -smoothing * np.log(smoothing) - (1 - smoothing) * np.log(1 - smoothing)
    torch.testing.assert_close(constant, torch.full_like(margins, float(entropy)))


@pytest.mark.parametrize("form", sorted(PAIR_LOSSES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [0.0, 1e-30, 50.0, -50.0, 1e4, -1e4])
def test_ties_and_extremes_stay_finite(form: Any, dtype: torch.dtype, gap: float) -> None:
    margins = torch.tensor([-1e4, -3.0, 0.0, 3.0, 1e4], dtype=dtype, requires_grad=True)
    found = PAIR_LOSSES[form](margins, torch.full_like(margins, gap), beta=BETA, eta=ETA)
    found.sum().backward()
    assert margins.grad is not None
    assert torch.isfinite(found).all()
    assert torch.isfinite(margins.grad).all()
    assert (found >= -1e-6).all()


def test_a_tie_pulls_the_model_to_no_preference() -> None:
    margins = torch.tensor([-2.0, 0.0, 2.0], dtype=torch.float64, requires_grad=True)
    for loss in PAIR_LOSSES.values():
        (gradient,) = torch.autograd.grad(loss(margins, torch.zeros(3).double(), beta=BETA, eta=ETA).sum(), margins)
        assert gradient.sign().tolist() == [-1.0, 0.0, 1.0]


# ---- TRL's own code


def trl_loss(loss_type: str, margin: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """The loss of one pair by the installed trainer, whose model gives this margin."""
    zero = torch.zeros_like(margin)
    two_answers = torch.stack([margin, zero])[:, None]  # chosen, rejected: one token each
    figures = {name: torch.zeros(2, 1) for name in ("entropy", "mean_logits")}
    outputs = SimpleNamespace(log_probs=two_answers, is_top1=torch.zeros(2, 1, dtype=torch.bool), **figures)
    model: Any = SimpleNamespace(training=True)
    same: Callable[[Tensor], Tensor] = lambda value: value  # noqa: E731
    accelerator = SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same)
    trainer: Any = SimpleNamespace(
        model=model,
        accelerator=accelerator,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=label_smoothing,
        use_weighting=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": torch.zeros(2, 2, dtype=torch.long),
        "attention_mask": torch.ones(2, 2, dtype=torch.long),
        "completion_mask": torch.tensor([[0, 1], [0, 1]]),
        "ref_chosen_logps": zero[None].detach(),
        "ref_rejected_logps": zero[None].detach(),
    }
    loss: Tensor = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, return_outputs=False)
    return loss


def clear_pairs() -> list[tuple[Tensor, Tensor]]:
    margins, gaps = pairs(24)
    return [(margin, gap) for margin, gap in zip(margins, gaps, strict=True) if gap != 0]


def test_the_stub_runs_trls_dpo() -> None:
    for margin, _ in clear_pairs():
        want = -torch.nn.functional.logsigmoid(BETA * margin)
        torch.testing.assert_close(trl_loss("sigmoid", margin, beta=BETA, label_smoothing=0.0), want)


def test_backward_is_trls_robust_loss_minus_the_entropy_of_the_rewards() -> None:
    """Its label smoothing is (1 - a) / (1 - 2 a) then, which has no value for a tie."""
    for margin, gap in clear_pairs():
        a = float(torch.sigmoid(ETA * gap))
        smoothing = (1 - a) / (1 - 2 * a)
        theirs_at, ours_at = (margin.clone().requires_grad_() for _ in range(2))
        theirs = trl_loss("robust", theirs_at, beta=BETA, label_smoothing=smoothing)
        ours = rpo_backward(ours_at[None], gap[None], beta=BETA, eta=ETA).sum()
        entropy = -a * np.log(a) - (1 - a) * np.log(1 - a)
        assert theirs.item() - entropy == pytest.approx(ours.item(), abs=1e-6)
        want, found = torch.autograd.grad(theirs, theirs_at)[0], torch.autograd.grad(ours, ours_at)[0]
        assert want.item() == pytest.approx(found.item(), abs=1e-6)


def test_forward_is_trls_exo_pair() -> None:
    for margin, gap in clear_pairs():
        smoothing = float(torch.sigmoid(-ETA * gap))
        theirs_at, ours_at = (margin.clone().requires_grad_() for _ in range(2))
        theirs = trl_loss("exo_pair", theirs_at, beta=BETA, label_smoothing=smoothing)
        ours = rpo_forward(ours_at[None], gap[None], beta=BETA, eta=ETA).sum()
        assert theirs.item() == pytest.approx(ours.item(), abs=1e-6)
        want, found = torch.autograd.grad(theirs, theirs_at)[0], torch.autograd.grad(ours, ours_at)[0]
        assert want.item() == pytest.approx(found.item(), abs=1e-6)
