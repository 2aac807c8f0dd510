"""What a system's loss is worth: how near it is to that of float64, and in which precision it was made.

The precisions are those that PyTorch's own operations have while a loss is computed, not what anybody says of them.

Shapes: B batch, S seq, V vocab.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from distill_peers import Loss, Pair, halve
from distill_timing import llama
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

TOLERANCE = 1e-4
_VOCAB = 32000
_PRODUCTS = ("mm", "addmm", "bmm", "linear", "_scaled_dot_product_flash_attention_for_cpu")
_EXPONENTIALS = ("exp", "exp_", "exp2", "_softmax", "_log_softmax", "logsumexp")
_NAMES = {torch.float32: "float32", torch.bfloat16: "bf16", torch.float64: "float64"}


@dataclass(frozen=True)
class Exactness:
    """The relative error of a loss, and the precisions of the bodies' products, the logits and the exponentials."""

    error: float
    bodies: str
    head: str
    loss: str

    @property
    def exact(self) -> bool:
        """Whether the system counts."""
        return self.error < TOLERANCE

    @property
    def precision(self) -> str:
        """As a table has it: bodies / head / loss."""
        return f"{self.bodies} / {self.head} / {self.loss}"


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the precisions of products and exponentials, of those with logits apart from the others."""

    def __init__(self, vocab: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.vocab = vocab
        self.found: dict[str, set[torch.dtype]] = {"bodies": set(), "head": set(), "loss": set()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name, first = func.overloadpacket.__name__, result[0] if isinstance(result, tuple) else result
        wide = isinstance(first, Tensor) and first.shape[-1:] == (self.vocab,)
        if name in _PRODUCTS:
            self.found["head" if wide else "bodies"].add(first.dtype)
        elif name in _EXPONENTIALS and wide:
            self.found["loss"].add(first.dtype)
        return result

    def named(self) -> dict[str, str]:
        """The precisions by part, as words."""
        return {part: " and ".join(sorted(_NAMES[one] for one in found)) for part, found in self.found.items()}


def exactness(make: Callable[[Pair], Loss], made_of: Callable[[Pair], Pair] | None, *, half: bool) -> Exactness:
    """How far a loss is from float64's of the same hidden states, those of `made_of` the models.

    In bfloat16 the factors may be rounded: the reference is the nearer of those from whole and rounded factors.
    Precisions are recorded on the uncompiled models, because compiled code shows no operations.
    """
    teacher, student = _near(_VOCAB)
    ids_BS = torch.randint(_VOCAB, (1, 256), generator=torch.Generator().manual_seed(2))
    whole = Pair(teacher, student, half, 255)
    pair = whole if made_of is None else made_of(whole)
    with torch.no_grad():
        found = float(make(pair)(ids_BS))
        with pair.autocast():
            states = [model.base_model(ids_BS, use_cache=False)[0][0, :-1] for model in (pair.teacher, pair.student)]
        watched = make(whole)
        with _Watch(_VOCAB) as watch:
            watched(ids_BS)
    weights = [model.get_output_embeddings().weight.detach() for model in (teacher, student)]
    wanted = [_kl(states, weights)]
    if half:
        wanted.append(_kl([h.bfloat16() for h in states], [w.bfloat16() for w in weights]))
    return Exactness(min(abs(found / want - 1) for want in wanted), **watch.named())


def _near(vocab: int) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A teacher with logits of the size of a trained one's, and a student a little beside it."""
    torch.manual_seed(3)
    teacher = llama(vocab, 256, 384, 1024, 6, layers=2).requires_grad_(False)
    teacher.get_output_embeddings().weight.mul_(8.0)
    student = copy.deepcopy(teacher)
    for parameter in student.parameters():
        parameter.mul_(1 + 0.03 * torch.randn_like(parameter))
    return teacher, student.requires_grad_()


def _kl(states: Sequence[Tensor], weights: Sequence[Tensor]) -> float:
    log_p, log_q = (torch.log_softmax(h.double() @ w.double().t(), -1) for h, w in zip(states, weights, strict=True))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def parity_of_half(steps: int) -> tuple[float, float]:
    """The mean loss of the last tenth of a short run in float32 and in bfloat16: a pair 128 and 96 wide, 2 deep."""
    found = []
    for half in (False, True):
        torch.manual_seed(0)
        teacher, student = llama(4096, 128, 128, 352, 2, layers=2), llama(4096, 128, 96, 256, 2, layers=2)
        teacher.requires_grad_(False).get_output_embeddings().weight.mul_(8.0)
        loss = halve(Pair(teacher, student, half, 4 * 127))
        optimizer, losses = torch.optim.AdamW(student.parameters(), lr=2e-3, fused=True), []
        for ids_BS in _samples(steps):
            value = loss(ids_BS)
            torch.autograd.backward(value)
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(value.detach()))
        found.append(statistics.mean(losses[-max(1, steps // 10) :]))
    return found[0], found[1]


def _samples(steps: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (torch.randint(4096, (4, 128), generator=generator) for _ in range(steps))
