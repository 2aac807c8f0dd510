"""The loop: what it computes does not depend on micro-batches, kills or interruptions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from looped import VOCAB, Fake, lines, run, same, taught, tiny, training, weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from halve.errors import TrainError
from halve.model.head import Body, Head, split
from halve.text.batch import Batch, predictions
from halve.text.course import Course
from halve.train.loop.optimizers import make_optimizer
from halve.train.loop.step import Trained, apply, gradients
from halve.train.losses import divergences
from halve.train.objectives import logits as objectives
from halve.train.teachers.live import Live


@pytest.mark.parametrize("kind", ["kl", "ce", "mix"])
def test_accumulation_changes_neither_loss_nor_gradient(tmp_path: Path, kind: str) -> None:
    master = Live(*split(tiny(seed=1, dtype=torch.float64)))
    found = {}
    for parts in (1, 2, 4, 8):
        share = {"kl": 0.0, "mix": 0.3, "ce": 0.0}[kind]
        objective = objectives.distillation(master, vocab=VOCAB, terms=[(1 - share, divergences.kl_rows)], ce=share)
        model = tiny(dtype=torch.float64)
        run(
            tmp_path / str(parts),
            model,
            objective=objectives.cross_entropy() if kind == "ce" else objective,
            recipe=training(micro_batch=8 // parts),
        )
        found[parts] = [(line["loss"], line["grad_norm"]) for line in lines(tmp_path / str(parts))], weights(model)
    want, want_weights = found[1]
    for parts in (2, 4, 8):
        have, have_weights = found[parts]
        torch.testing.assert_close(torch.tensor(have), torch.tensor(want), rtol=1e-9, atol=0)
        torch.testing.assert_close(have_weights, want_weights, rtol=1e-6, atol=1e-9)


def test_accumulation_is_over_tokens_not_over_parts(tmp_path: Path) -> None:
    """Parts with unequal numbers of counted tokens: the mean of means would be another loss."""

    def masked(body: Any, head: Head, batch: Batch) -> tuple[Tensor, int]:
        hidden_ND = predictions(body, batch)
        nats_N = torch.nn.functional.cross_entropy(head.logits(hidden_ND), batch.labels(), reduction="none")
        keep_N = batch.labels() < 20
        return nats_N[keep_N].sum(), int(keep_N.sum())

    for size in (8, 1):
        recipe = training(micro_batch=size)
        run(tmp_path / str(size), tiny(dtype=torch.float64), objective=masked, recipe=recipe)
    whole, parts = ([line["loss"] for line in lines(tmp_path / size)] for size in ("8", "1"))
    assert whole == pytest.approx(parts, rel=1e-9)


def test_a_student_learns(tmp_path: Path) -> None:
    teacher, student = tiny(seed=1), tiny(seed=2, hidden_size=8)
    run(tmp_path / "teacher", teacher, objective=objectives.cross_entropy(), recipe=training(tokens=150 * 96))
    result = run(tmp_path / "student", student, objective=taught(teacher), recipe=training(tokens=150 * 96))
    course = [line["loss"] for line in lines(tmp_path / "student")]
    assert course[-1] < 0.5 * course[0]
    assert (result.steps, result.tokens) == (150, 150 * 96)


def test_the_teacher_is_left_alone(tmp_path: Path) -> None:
    teacher = tiny(seed=1)
    before = weights(teacher)
    run(tmp_path, tiny(), objective=taught(teacher))
    assert same(weights(teacher), before)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    model = tiny()
    run(tmp_path, model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_half_precision_weights_train_as_float32_masters(tmp_path: Path) -> None:
    model = tiny(dtype=torch.bfloat16)
    run(tmp_path, model)
    assert model.dtype == torch.float32


def test_bfloat16_compute_stays_near_float32(tmp_path: Path) -> None:
    courses = {}
    for precision in ("float32", "bfloat16"):
        run(tmp_path / precision, tiny(), recipe=training(precision=precision))
        courses[precision] = [line["loss"] for line in lines(tmp_path / precision)]
    assert courses["float32"] == pytest.approx(courses["bfloat16"], rel=0.05)
    assert courses["float32"] != courses["bfloat16"]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    steps = iter(range(100))
    objective = taught(tiny(seed=1))

    def breaking(*args: Any) -> tuple[Tensor, int]:
        loss, count = objective(*args)
        return (loss * math.nan if next(steps) == 4 else loss), count

    with pytest.raises(TrainError) as caught:
        run(tmp_path, tiny(), objective=breaking)
    assert caught.value.what == "the loss is not finite at step 5"
    assert "step-00000004" in caught.value.why
    assert "lower lr (now 0.01)" in caught.value.fix


def test_a_student_that_is_not_finite_is_refused_before_the_first_step(tmp_path: Path) -> None:
    student = tiny()
    heldout = objectives.heldout_loss(Fake().batch(0, 4), micro_batch=2)

    def broken(body: Any, head: Head) -> Any:
        return dict.fromkeys(heldout(body, head), math.nan)

    with pytest.raises(TrainError, match="not finite before the first step"):
        run(tmp_path, student, heldout=broken)


def test_heldout_figures_stand_at_the_start_at_every_interval_and_at_the_end(tmp_path: Path) -> None:
    teacher = tiny(seed=1)
    samples = Fake().batch(99, 5)
    heldout = objectives.heldout_divergence(Live(*split(teacher)), samples, vocab=VOCAB, micro_batch=2)
    student = tiny()
    result = run(tmp_path, student, objective=taught(teacher), heldout=heldout, recipe=training(eval_every=4))
    found = {line["step"]: line["heldout"] for line in lines(tmp_path) if "heldout" in line}
    assert list(found) == [0, 4, 6]
    assert result.heldout == found[6]
    with torch.no_grad():
        q, p = (model(samples.ids).logits[:, :-1].double().log_softmax(-1) for model in (student, teacher))
    labels = samples.ids[:, 1:, None]
    assert found[6]["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert found[6]["ce"] == pytest.approx(float(-q.gather(-1, labels).mean()), rel=1e-5)
    assert found[6]["agreement"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()))
    alone = objectives.heldout_loss(samples, micro_batch=3)(*split(student))
    assert alone["ce"] == pytest.approx(found[6]["ce"], rel=1e-5)


@pytest.mark.parametrize("zero", [True, False])
def test_a_teacher_that_teaches_nothing_is_refused(zero: bool) -> None:
    teacher = tiny()
    with torch.no_grad():
        for parameter in teacher.parameters() if zero else ():
            parameter.zero_()
    with pytest.raises(TrainError, match="the teacher teaches nothing") as caught:
        _check(*_parts(teacher), Fake().batch(0, 4))
    assert f"uniform guessing gives {math.log(VOCAB):.3f}" in caught.value.why


def test_a_teacher_that_teaches_is_taken(tmp_path: Path) -> None:
    teacher = tiny()
    run(tmp_path, teacher, objective=objectives.cross_entropy(), recipe=training(tokens=100 * 96))
    ce = _check(*_parts(teacher), Fake().batch(999, 4))
    assert ce < 0.9 * math.log(VOCAB)


def test_a_teacher_that_is_not_itself_is_refused(tmp_path: Path) -> None:
    teacher = tiny()
    run(tmp_path, teacher, objective=objectives.cross_entropy(), recipe=training(tokens=100 * 96))
    body, head = split(teacher)
    torch.manual_seed(0)

    class Noisy(nn.Module):
        def forward(self, **inputs: Any) -> tuple[Tensor]:
            hidden_BSD = body.module(**inputs)[0]
            return (hidden_BSD + 0.1 * torch.randn_like(hidden_BSD),)

    with pytest.raises(TrainError, match="the teacher disagrees with itself"):
        _check(Body(Noisy()), head, Fake().batch(0, 4))


def test_vocabularies_may_be_padded_but_not_smaller_than_the_tokenizer() -> None:
    small, large = (Head(torch.zeros(rows, 4)) for rows in (40, 48))
    assert objectives.shared_vocab(small, large, num_tokens=37) == 40
    assert objectives.shared_vocab(large, small, num_tokens=40) == 40
    with pytest.raises(TrainError, match="do not share a vocabulary of 41 tokens"):
        objectives.shared_vocab(large, small, num_tokens=41)


def test_the_rate_warms_up_and_ends_at_its_minimum() -> None:
    course = Course(training(warmup_steps=4, lr=1.0, min_lr=0.1, tokens=10 * 96), Fake())
    rates = [course.lr(step) for step in range(1, 11)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[6] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1)
    assert rates[3:] == sorted(rates[3:], reverse=True)


def test_only_matrices_decay() -> None:
    model = tiny()
    optimizer = make_optimizer(model.parameters(), training(weight_decay=0.1))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decay[id(p)] for name, p in model.named_parameters()} == {
        name: 0.0 if "norm" in name else 0.1 for name, _ in model.named_parameters()
    }


@pytest.mark.parametrize(("clip", "bound"), [(1e-3, True), (1e3, False)])
def test_gradients_are_clipped_to_the_norm(clip: float, bound: bool) -> None:
    model, objective = tiny(), taught(tiny(seed=1))
    parts, optimizer, seen = split(model), make_optimizer(model.parameters(), training()), []

    def look(*_: Any) -> None:
        seen.append(float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])))

    optimizer.register_step_pre_hook(look)
    batches = [Fake().batch(0, 4)]
    trained = Trained({"student": model}, optimizer)
    found = gradients(trained, lambda batch: objective(*parts, batch), batches)
    apply(trained, found, lr=1e-3, clip=clip)
    assert found.norm > 2e-3  # what is reported is the norm before the clip
    assert seen == [pytest.approx(clip if bound else found.norm, rel=1e-2)]


def _parts(model: PreTrainedModel) -> tuple[Any, Head]:
    return split(model.eval())


def _check(body: Body, head: Head, samples: Batch) -> float:
    return objectives.check_teacher(Live(body, head), body, head, samples, vocab=VOCAB, micro_batch=2)
