"""The factor on the final norm of a student whose head is tied, beside a search by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from halve.cut.repair.temper import FACTORS, MOST_TOKENS, TiedHead, best_factor
from halve.model.head import Head

VOCAB, WIDTH = 40, 12


def made(seed: int, *, softcap: float | None, biased: bool) -> tuple[Tensor, Tensor, Tensor | None, Head]:
    random = torch.Generator().manual_seed(seed)
    weight, read = torch.randn(VOCAB, WIDTH, generator=random), torch.randn(300, WIDTH, generator=random)
    bias = 0.3 * torch.randn(VOCAB, generator=random) if biased else None
    norm_bias = 0.3 * torch.randn(WIDTH, generator=random) if biased else None
    wanted = 0.75 * read + 0.4 * torch.randn(300, WIDTH, generator=random)
    return read, wanted, norm_bias, Head(weight, bias, scale=0.5, softcap=softcap)


@pytest.mark.parametrize(("softcap", "biased"), [(None, False), (None, True), (3.0, True)])
def test_it_is_the_factor_with_the_lowest_divergence(softcap: float | None, biased: bool) -> None:
    read, wanted, norm_bias, head = made(0, softcap=softcap, biased=biased)
    found = best_factor([(read[:100], wanted[:100]), (read[100:], wanted[100:])], TiedHead(head, norm_bias), head)
    goal = head.logits(wanted).softmax(-1)

    def divergence(factor: float) -> float:
        scaled = factor * read if norm_bias is None else factor * (read - norm_bias) + norm_bias
        return -(goal * head.logits(scaled).log_softmax(-1)).sum(-1).mean().item()

    best = min((step / 500 for step in range(250, 600)), key=divergence)
    assert 0.5 < best < 1
    assert found == pytest.approx(best, abs=0.01)


def test_it_stays_within_what_was_tried_and_at_one_where_nothing_is_gained() -> None:
    read, _, norm_bias, head = made(1, softcap=None, biased=True)
    tied = TiedHead(head, norm_bias)
    assert best_factor([(read, read)], tied, head) == 1.0
    assert best_factor([(read, 0.0 * read)], tied, head) == FACTORS[0]
    assert best_factor([], tied, head) == 1.0


def test_few_tokens_are_enough() -> None:
    read, wanted, _, head = made(2, softcap=None, biased=False)
    many = [(read, wanted)] * 20
    assert len(read) * len(many) > MOST_TOKENS
    other = [(read, -wanted)] * 20
    assert best_factor([*many, *other], TiedHead(head, None), head) == best_factor(many, TiedHead(head, None), head)
