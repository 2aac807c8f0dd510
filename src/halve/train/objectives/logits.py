"""The objectives of a student, and the checks that a teacher must pass before it teaches.

An objective takes the student's body and head and a batch. It returns a loss that is summed over tokens, and their
number. Every position counts except the last of a sample, for which the next token is not known.

Shapes: B batch, S seq, N tokens, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from halve.errors import TrainError
from halve.model.head import Body, Head
from halve.recipe.schema import Distill, LossTerm
from halve.text.batch import Batch, predictions
from halve.train.losses import chunked, divergences
from halve.train.losses.chunked import Target
from halve.train.losses.divergences import Sampled, TeacherRows
from halve.train.teachers.live import Hidden, Teacher

_SANE = 0.9  # a teacher's cross-entropy must be below this share of that of uniform guessing


Objective = Callable[[Body, Head, Batch], tuple[Tensor, int]]
"""(body, head, batch) -> (sum of the losses of all counted tokens, number of these tokens)."""

KL: tuple[tuple[float, TeacherRows], ...] = ((1.0, divergences.kl_rows),)
"""The default: forward KL at temperature 1 over the whole vocabulary (2407.14679, Table 15)."""

Heldout = Callable[[Body, Head], Mapping[str, float]]
"""A measurement of the student on held-out text: metrics by name."""


def cross_entropy() -> Objective:
    """Predict the next token (teacher correction, 2408.11796; conventional training as a baseline)."""

    def objective(body: Body, head: Head, batch: Batch) -> tuple[Tensor, int]:
        hidden_ND, labels = predictions(body, batch), batch.labels()
        target = chunked.cross_entropy_target(labels)
        return _summed(hidden_ND, head, target, vocab=head.weight.shape[0]), labels.numel()

    return objective


def distillation(
    teacher: Teacher[Hidden], *, vocab: int, terms: Sequence[tuple[float, TeacherRows]] = KL, ce: float = 0.0
) -> Objective:
    """Distillation: a weighted sum of divergences from the teacher, plus `ce` times the cross-entropy."""
    rows = divergences.weighted(terms)

    def follow(batch: Batch) -> Target:
        states_ND, head = teacher.answer(batch)
        return chunked.follow(states_ND, head, rows, vocab=vocab, operand=_operand(states_ND))

    return _following(follow, vocab=vocab, ce=ce)


def distillation_from_draws(
    teacher: Teacher[Sampled], *, vocab: int, kl: float = 1.0, temperature: float = 1.0, ce: float = 0.0
) -> Objective:
    """Distillation from draws of the teacher: `kl` times the KL that they estimate, plus `ce` times the CE.

    The draws are those at this temperature.
    """

    def follow(batch: Batch) -> Target:
        return chunked.sum_of([(kl, chunked.follow_draws(teacher.answer(batch), temperature=temperature))])

    return _following(follow, vocab=vocab, ce=ce)


def teacher_terms(training: Distill) -> list[tuple[float, TeacherRows]]:
    """The divergences from the teacher that the recipe's section sums. Empty for cross-entropy alone."""
    tau, k = training.temperature, training.top_k
    kl = partial(divergences.kl_rows, temperature=tau)
    if k is not None:
        top_k = divergences.top_k_tail_kl_rows if training.top_k_tail else divergences.top_k_kl_rows
        kl = partial(top_k, k=k, temperature=tau)
    rows: dict[LossTerm, TeacherRows] = {
        "kl": kl,
        "reverse_kl": partial(divergences.reverse_kl_rows, temperature=tau),
        "jsd": partial(divergences.jsd_rows, beta=training.beta, temperature=tau),
        "mse": divergences.mse_rows,
        "cosine": divergences.cosine_rows,
    }
    return [(weight, rows[term]) for term, weight in training.terms.items() if term != "ce"]


def _following(follow: Callable[[Batch], Target], *, vocab: int, ce: float) -> Objective:
    def objective(body: Body, head: Head, batch: Batch) -> tuple[Tensor, int]:
        target, labels = follow(batch), batch.labels()
        if ce > 0:
            target = chunked.sum_of([(1.0, target), (ce, chunked.cross_entropy_target(labels))])
        return _summed(predictions(body, batch), head, target, vocab=vocab), labels.numel()

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


def heldout_divergence(teacher: Teacher[Hidden], samples: Batch, *, vocab: int, micro_batch: int) -> Heldout:
    """Measure `kl` to the teacher, `ce`, and `agreement` on the likeliest token; means over tokens."""

    def measure(body: Body, head: Head) -> Mapping[str, float]:
        sums, count = torch.zeros(3, dtype=torch.float64), 0
        for part in _parts(samples, head, micro_batch):
            with torch.no_grad():
                hidden_ND = predictions(body, part)
            labels = part.labels()
            parts = chunked.divergence_sums(
                hidden_ND,
                head,
                *teacher.answer(part),
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


def shared_vocab(student: Head, teacher: Head, *, num_tokens: int) -> int:
    """Return how many rows both heads share. Either may be padded beyond the tokenizer's `num_tokens`.

    Raises `TrainError` if a head is smaller than the tokenizer, because then their tokens differ.
    """
    shared = min(student.weight.shape[0], teacher.weight.shape[0])
    if shared < num_tokens:
        raise TrainError(
            f"student and teacher do not share a vocabulary of {num_tokens} tokens",
            why=f"the student has {student.weight.shape[0]} outputs, the teacher {teacher.weight.shape[0]}",
            fix="distil a student that was cut from this teacher, or one with the same tokenizer",
        )
    return shared


def check_teacher(
    teacher: Teacher[Hidden], body: Body, head: Head, samples: Batch, *, vocab: int, micro_batch: int
) -> float:
    """Check that a teacher with this body and head can teach, and return its cross-entropy on held-out text.

    It must be clearly below ln(vocab), which is that of uniform guessing, and the divergence of the teacher from itself
    must be zero. Raises `TrainError`.
    """
    measured = heldout_divergence(teacher, samples, vocab=vocab, micro_batch=micro_batch)(body, head)
    even = math.log(vocab)
    if not measured["ce"] < _SANE * even:
        raise TrainError(
            "the teacher teaches nothing",
            why=f"its cross-entropy on the held-out text is {measured['ce']:.3f} nats per token,"
            f" uniform guessing gives {even:.3f}",
            fix="check that model: has trained weights, and that the tokenizer and data.valid suit it",
        )
    if not abs(measured["kl"]) < 1e-4:
        raise TrainError(
            "the teacher disagrees with itself",
            why=f"KL(teacher, teacher) is {measured['kl']:.3g} on the held-out text, it must be 0",
            fix="try precision: float32 in the section distill, and check the model's dropout",
        )
    return measured["ce"]


@torch.no_grad()
def _token_losses(body: Body, head: Head, batch: Batch) -> Tensor:
    hidden_ND, vocab = predictions(body, batch), head.weight.shape[0]
    chunk = chunked.chunk_tokens(vocab, cuda=hidden_ND.is_cuda)
    labels = batch.labels()
    return chunked.token_losses(hidden_ND, head, labels, vocab=vocab, chunk=chunk, operand=_operand(hidden_ND))


def _summed(hidden_ND: Tensor, head: Head, target: Target, *, vocab: int) -> Tensor:
    chunk = chunked.chunk_tokens(vocab, cuda=hidden_ND.is_cuda)
    return chunked.chunked(hidden_ND, head, target, vocab=vocab, chunk=chunk, operand=_operand(hidden_ND))


def _operand(hidden_ND: Tensor) -> torch.dtype | None:
    """The precision of the head's products, which is that of the body's."""
    kind = hidden_ND.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _parts(samples: Batch, head: Head, micro_batch: int) -> Iterator[Batch]:
    return (part.to(head.weight.device) for part in samples.split(micro_batch))
