"""What a student can be trained for, and the checks that a teacher must pass before it teaches.

An objective takes the student in two parts and a batch, and gives a loss summed over tokens and
their number. Every position but a sample's last counts: there the next token is known.

Shapes: B batch, S seq, N tokens, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from halve.errors import TrainError
from halve.head import Body, Head
from halve.train import chunked, divergences
from halve.train.batch import Batch

_SANE = 0.9  # a teacher's cross-entropy must be below this share of that of guessing evenly


Objective = Callable[[Body, Head, Batch], tuple[Tensor, int]]
"""(body, head, batch) -> (the losses of all counted tokens summed, how many these are)."""

Heldout = Callable[[Body, Head], Mapping[str, float]]
"""A measurement of the student on text it does not train on: figures by name."""


def cross_entropy() -> Objective:
    """Predict the next token (teacher correction, 2408.11796; conventional training as a baseline)."""

    def objective(body: Body, head: Head, batch: Batch) -> tuple[Tensor, int]:
        hidden_ND, labels = predictions(body, batch), batch.labels()
        target = chunked.cross_entropy(labels)
        return _summed(hidden_ND, head, target, vocab=head.weight.shape[0]), labels.numel()

    return objective


def distillation(
    teacher_body: Body, teacher_head: Head, *, vocab: int, temperature: float = 1.0, ce_share: float = 0.0
) -> Objective:
    """Follow the teacher: `(1 - ce_share) * KL(teacher || student) + ce_share * CE`."""

    def objective(body: Body, head: Head, batch: Batch) -> tuple[Tensor, int]:
        taught_ND = _taught(teacher_body, batch)
        hidden_ND, labels = predictions(body, batch), batch.labels()
        kl = partial(divergences.kl_rows, temperature=temperature)
        target = chunked.follow(taught_ND, teacher_head, kl, vocab=vocab, operand=_operand(taught_ND))
        if ce_share > 0:
            target = chunked.sum_of([(1 - ce_share, target), (ce_share, chunked.cross_entropy(labels))])
        return _summed(hidden_ND, head, target, vocab=vocab), labels.numel()

    return objective


def heldout_loss(samples: Batch, *, micro_batch: int) -> Heldout:
    """Measure `ce`, the mean next-token cross-entropy in nats."""

    def measure(body: Body, head: Head) -> Mapping[str, float]:
        total, count = 0.0, 0
        for part in _parts(samples, head, micro_batch):
            loss_N = _token_losses(body, head, part)
            total, count = total + float(loss_N.sum(dtype=torch.float64)), count + loss_N.numel()
        return {"ce": total / count}

    return measure


def heldout_divergence(
    teacher_body: Body, teacher_head: Head, samples: Batch, *, vocab: int, micro_batch: int
) -> Heldout:
    """Measure `kl` to the teacher, `ce`, and `agreement` on the likeliest token; means over tokens."""

    def measure(body: Body, head: Head) -> Mapping[str, float]:
        sums, count = torch.zeros(3, dtype=torch.float64), 0
        for part in _parts(samples, head, micro_batch):
            with torch.no_grad():
                hidden_ND = predictions(body, part)
            labels = part.labels()
            parts = chunked.divergence(
                hidden_ND,
                head,
                _taught(teacher_body, part),
                teacher_head,
                labels,
                vocab=vocab,
                chunk=chunked.chunk_tokens(vocab, cuda=hidden_ND.is_cuda),
                operand=_operand(hidden_ND),
            )
            sums += torch.stack(list(parts)).cpu()
            count += labels.numel()
        kl, ce, agreement = (sums / count).tolist()
        return {"kl": kl, "ce": ce, "agreement": agreement}

    return measure


def predictions(body: Body, batch: Batch) -> Float[Tensor, "tokens hidden"]:
    """Return the hidden states at every position whose next token is in the sample and in the same document."""
    # from positions that begin anew, transformers makes attention that ends at a document's border
    where = {} if batch.positions is None else {"position_ids": batch.positions}
    hidden_BSD = body(batch.ids, **where)
    return at_predictions(hidden_BSD, batch)


def at_predictions(values: Float[Tensor, "batch seq width"], batch: Batch) -> Float[Tensor, "tokens width"]:
    """Take the positions whose next token is in the sample and in the same document."""
    counted, rows_BSD = batch.counted(), values[:, :-1]
    return rows_BSD.reshape(-1, values.shape[-1]) if counted is None else rows_BSD[counted]


def shared_vocab(student: Head, teacher: Head, *, num_tokens: int) -> int:
    """Return how many rows both heads share: either may be padded beyond the tokenizer's `num_tokens`.

    Raises `TrainError` where a head is smaller than the tokenizer: then their tokens are not the same.
    """
    shared = min(student.weight.shape[0], teacher.weight.shape[0])
    if shared < num_tokens:
        raise TrainError(
            f"student and teacher do not share a vocabulary of {num_tokens} tokens",
            why=f"the student has {student.weight.shape[0]} outputs, the teacher {teacher.weight.shape[0]}",
            fix="distil a student that was cut from this teacher, or one with the same tokenizer",
        )
    return shared


def check_teacher(body: Body, head: Head, samples: Batch, *, vocab: int, micro_batch: int) -> float:
    """Return the teacher's cross-entropy on held-out text, if it is one that can teach.

    It must be clearly below ln(vocab), that of guessing evenly, and the divergence of the teacher from
    itself must be zero. Raises `TrainError`.
    """
    found = heldout_divergence(body, head, samples, vocab=vocab, micro_batch=micro_batch)(body, head)
    even = math.log(vocab)
    if not found["ce"] < _SANE * even:
        raise TrainError(
            "the teacher teaches nothing",
            why=f"its cross-entropy on the held-out text is {found['ce']:.3f} nats a token,"
            f" guessing evenly gives {even:.3f}",
            fix="check that model: has trained weights, and that the tokenizer and data.valid suit it",
        )
    if not abs(found["kl"]) < 1e-4:
        raise TrainError(
            "the teacher disagrees with itself",
            why=f"KL(teacher, teacher) is {found['kl']:.3g} on the held-out text, it must be 0",
            fix="try precision: float32 in the section distill, and check the model's dropout",
        )
    return found["ce"]


def _taught(body: Body, batch: Batch) -> Tensor:
    with torch.inference_mode():
        return predictions(body, batch)


@torch.no_grad()
def _token_losses(body: Body, head: Head, batch: Batch) -> Tensor:
    hidden_ND, vocab = predictions(body, batch), head.weight.shape[0]
    chunk = chunked.chunk_tokens(vocab, cuda=hidden_ND.is_cuda)
    labels = batch.labels()
    return chunked.token_losses(hidden_ND, head, labels, vocab=vocab, chunk=chunk, operand=_operand(hidden_ND))


def _summed(hidden_ND: Tensor, head: Head, target: chunked.Target, *, vocab: int) -> Tensor:
    chunk = chunked.chunk_tokens(vocab, cuda=hidden_ND.is_cuda)
    return chunked.chunked(hidden_ND, head, target, vocab=vocab, chunk=chunk, operand=_operand(hidden_ND))


def _operand(hidden_ND: Tensor) -> torch.dtype | None:
    """Products of the head use the precision that the loop chose for the body's."""
    kind = hidden_ND.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _parts(samples: Batch, head: Head, micro_batch: int) -> Iterator[Batch]:
    return (part.to(head.weight.device) for part in samples.split(micro_batch))
