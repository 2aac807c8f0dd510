"""Relations of heads' vectors against their plain formula in float64, and the memory that they do without.

Shapes: B batch, S seq, H heads, E head_dim.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from halve.train.losses.relations import relation_divergence

F64 = torch.float64
B, S = 3, 9
HEADS = (4, 6)  # of the student, of the teacher: two relation heads


def vectors(seed: int = 0, size: float = 1.0, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    student, teacher = (size * torch.randn(B, S, num, 5, generator=random, dtype=F64) for num in HEADS)
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


def seen(*, apart: bool) -> dict[str, Tensor]:
    """Two documents, the first of four tokens, or one; the last of each predicts nothing."""
    documents = (torch.arange(S) >= 4).long() if apart else torch.zeros(S, dtype=torch.int64)
    counted = (torch.arange(S) < S - 1) & ~((torch.arange(S) == 3) & apart)
    return {"documents": documents.expand(B, S), "counted": counted.expand(B, S)}


def plain(student: Tensor, teacher: Tensor, *, documents: Tensor, counted: Tensor) -> Tensor:
    total, num = torch.zeros((), dtype=F64), math.gcd(*HEADS)
    for row in range(B):
        for place in counted[row].nonzero().flatten().tolist():
            near = [i for i in range(place + 1) if documents[row, i] == documents[row, place]]
            for head in range(num):
                parts = (x[row].flatten(1).chunk(num, dim=-1)[head] for x in (student, teacher))
                q, p = (torch.softmax(x[near] @ x[place] / math.sqrt(x.shape[-1]), 0) for x in parts)
                total = total + (p * (p.log() - q.log())).sum() / num
    return total


@pytest.mark.parametrize("apart", [False, True])
def test_relations_are_the_plain_formula(apart: bool) -> None:
    student, teacher = vectors()
    have, want = (compare(student, teacher, **seen(apart=apart)) for compare in (relation_divergence, plain))
    torch.testing.assert_close(have, want)
    ours, theirs = (torch.autograd.grad(0.7 * loss, student)[0] for loss in (have, want))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("size", [0.01, 1.0, 3.0])
def test_equal_relations_diverge_by_exactly_nothing_and_others_by_more(size: float) -> None:
    student, teacher = vectors(size=size, dtype=torch.float32)
    same = student.detach().clone()
    loss = relation_divergence(student, same, **seen(apart=True))
    assert loss == 0
    assert not torch.autograd.grad(loss, student)[0].any()
    assert relation_divergence(student, teacher, **seen(apart=True)) > 0


def test_half_precision_vectors_are_compared_in_float32() -> None:
    student, teacher = vectors(dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = relation_divergence(student, teacher, **seen(apart=False))
    assert loss.dtype == torch.float32
    want = plain(student.double(), teacher.double(), **seen(apart=False))
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=0)
    assert torch.autograd.grad(loss, student)[0].dtype == torch.bfloat16


def test_no_array_holds_more_than_one_relation_head() -> None:
    class Largest(TorchDispatchMode):
        entries = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                self.entries = max(self.entries, result.untyped_storage().nbytes() // result.element_size())
            return result

    long = 64
    student, teacher = (torch.randn(2, long, num, 2) for num in HEADS)
    counted = torch.ones(2, long, dtype=torch.bool)
    with Largest() as largest:
        documents = torch.zeros(2, long, dtype=torch.int64)
        relation_divergence(student.requires_grad_(), teacher, documents=documents, counted=counted).backward()
    assert largest.entries == long * long
