"""The loop: what it computes does not depend on micro-batches, kills or interruptions."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from halve.disk import folders
from halve.errors import DiskError, RunError, Stopped, TrainError
from halve.model.head import Body, Head, split
from halve.recipe.schema import Training
from halve.text.batch import Batch, predictions
from halve.text.course import Course
from halve.train.loop import checkpoints, loop
from halve.train.loop.optimizers import make_optimizer
from halve.train.loop.step import Trained, apply, gradients
from halve.train.losses import divergences
from halve.train.objectives import logits as objectives
from halve.train.teachers.live import Live

VOCAB, CONTEXT = 37, 12
TIMES = ("tokens_per_second", "data_wait", "peak_memory_bytes", "mfu")


def tiny(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        **(sizes | {"vocab_size": VOCAB, "max_position_embeddings": 32, "tie_word_embeddings": True} | changes)
    )
    model: PreTrainedModel = LlamaForCausalLM(config).to(dtype)
    return model


@dataclass(frozen=True)
class Fake:
    """Text in which a token's successor is mostly the same; batches by step."""

    context: int = CONTEXT

    def batch(self, step: int, batch: int) -> Batch:
        random = torch.Generator().manual_seed(step)
        first_B1 = torch.randint(VOCAB, (batch, 1), generator=random)
        ids_BS = (first_B1 + 5 * torch.arange(self.context)) % VOCAB
        noise_BS = torch.rand(ids_BS.shape, generator=random) < 0.1
        ids_BS = torch.where(noise_BS, torch.randint(VOCAB, ids_BS.shape, generator=random), ids_BS)
        return Batch(ids_BS, self.numbers(step, batch))

    def numbers(self, step: int, batch: int) -> tuple[int, ...]:
        return tuple(range(step * batch, (step + 1) * batch))


def training(**changes: Any) -> Training:
    values = {
        "tokens": 6 * 8 * CONTEXT,
        "batch": 8,
        "lr": 1e-2,
        "min_lr": 1e-3,
        "warmup_steps": 2,
        "weight_decay": 0.1,
        "checkpoint_every": 2,
        "eval_every": 3,
    }
    return Training(**(values | changes))


def taught(teacher: PreTrainedModel) -> objectives.Objective:
    return objectives.distillation(Live(*split(teacher.eval())), vocab=VOCAB)


def run(
    folder: Path, model: PreTrainedModel, *, objective: objectives.Objective | None = None, **options: Any
) -> loop.TrainResult:
    folder.mkdir(exist_ok=True)
    recipe = options.pop("recipe", training())
    files = loop.TrainFiles(folder / "work", folder / "metrics.jsonl", seed=0, name=options.pop("name", "train"))
    until = options.pop("until", None)
    lesson = loop.Lesson(objective or taught(tiny(seed=1)), **options)
    return loop.train(model, lesson, Course(recipe, Fake()), files, device="cpu", until=until)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(model: PreTrainedModel) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class Killed(BaseException):
    """Stands for a kill: nothing in the loop may catch it."""


def killing(objective: objectives.Objective, after: int) -> objectives.Objective:
    calls = iter(range(after))

    def killed(*args: Any) -> Any:
        if next(calls, None) is None:
            raise Killed
        return objective(*args)

    return killed


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


# 6 steps, a checkpoint after 2 and 4, two parts a step
@pytest.mark.parametrize(("after", "resumed"), [(0, 0), (1, 0), (3, 0), (5, 2), (7, 2), (9, 4), (11, 4)])
def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path, after: int, resumed: int) -> None:
    recipe, objective = training(micro_batch=4), taught(tiny(seed=1))
    whole, model = tiny(), tiny()
    run(tmp_path / "whole", whole, objective=objective, recipe=recipe)
    with pytest.raises(Killed):
        run(tmp_path / "killed", model, objective=killing(objective, after), recipe=recipe)
    model = tiny()
    result = run(tmp_path / "killed", model, objective=objective, recipe=recipe)
    assert result.resumed_from == resumed
    assert same(weights(model), weights(whole))
    timeless = [
        [{k: v for k, v in line.items() if k not in TIMES} for line in lines(tmp_path / name)]
        for name in ("whole", "killed")
    ]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize("pauses", [[0, 3], [1, 5], [4], [6], [2, 2]])
def test_pauses_change_no_bit(tmp_path: Path, pauses: list[int]) -> None:
    """6 steps, a checkpoint after 2 and 4. A pause after step 0 trains nothing, one after the last is the end."""
    heldout = objectives.heldout_loss(Fake().batch(99, 4), micro_batch=4)
    whole, model = tiny(), tiny()
    told = run(tmp_path / "whole", whole, heldout=heldout)
    for pause in pauses:
        model = tiny()
        result = run(tmp_path / "paused", model, heldout=heldout, until=pause)
        assert (result.steps, result.tokens) == (pause, pause * 8 * CONTEXT)
        assert result.heldout == heldout(*split(model))
    model = tiny()
    result = run(tmp_path / "paused", model, heldout=heldout)
    assert same(weights(model), weights(whole))
    assert result.as_dict() == told.as_dict()
    steps = [line["step"] for line in lines(tmp_path / "paused")]
    assert steps == list(range(7))


def test_a_checkpoint_holds_what_is_trained_and_its_state(tmp_path: Path) -> None:
    model = tiny()
    model.model.layers[0].requires_grad_(False)
    frozen = [name for name, _ in model.model.layers[0].named_parameters()]
    run(tmp_path, model)
    (kept,) = checkpoints.complete(tmp_path / "work")
    trained = {name for name, _ in model.named_parameters()} - {f"model.layers.0.{name}" for name in frozen}
    assert checkpoints.parameters(kept, "student").keys() == trained
    with safe_open(next(kept.glob("*.safetensors")), framework="pt") as file:
        names = {name.partition(".student.")[::2] for name in list(file.keys())}
    moments = {("exp_avg", name) for name in trained} | {("exp_avg_sq", name) for name in trained}
    assert names == moments | {("param", name) for name in trained} | {("step", name) for name in trained}
    assert {path.suffix for path in kept.iterdir()} == {".safetensors", ".json"}  # no pickle


def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path: Path) -> None:
    objective = taught(tiny(seed=1))
    with pytest.raises(Killed):
        run(tmp_path, tiny(), objective=killing(objective, 3))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "lo')
    run(tmp_path, tiny(), objective=objective)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("where", ["write", "sync_tree", "os.replace", "sync"])
def test_a_kill_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: Any, where: str) -> None:
    whole, model = tiny(), tiny()
    run(tmp_path / "whole", whole)
    calls = []

    def killed(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == 2:  # the second checkpoint, after step 4
            raise Killed
        original(*args, **kwargs)

    holder = {"os.replace": os, "sync": folders}.get(where, checkpoints)
    original = getattr(holder, where.removeprefix("os."))
    with monkeypatch.context() as patch:
        patch.setattr(holder, where.removeprefix("os."), killed)
        # metrics.jsonl is begun by a rename too, which is the first
        with pytest.raises(Killed):
            run(tmp_path / "killed", model, recipe=training(checkpoint_every=2))
    assert len(calls) == 2
    model = tiny()
    run(tmp_path / "killed", model)
    assert same(weights(model), weights(whole))


@pytest.mark.parametrize(("keep", "kept"), [(1, [4]), (2, [3, 4]), (9, [1, 2, 3, 4])])
def test_the_last_checkpoints_are_kept(tmp_path: Path, keep: int, kept: list[int]) -> None:
    recipe = training(checkpoint_every=1, keep_checkpoints=keep, tokens=5 * 8 * CONTEXT)
    run(tmp_path, tiny(), recipe=recipe)
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == [f"step-{step:08d}" for step in kept]


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: Any) -> None:
    write, going_on, objective, steps = checkpoints.write, threading.Event(), taught(tiny(seed=1)), iter(range(1, 100))

    def waiting(*args: Any) -> None:
        assert going_on.wait(timeout=60), "the third step did not begin before the checkpoint of the second was written"
        write(*args)

    def noted(*args: Any) -> tuple[Tensor, int]:
        if next(steps) == 3:
            going_on.set()
        return objective(*args)

    monkeypatch.setattr(checkpoints, "write", waiting)
    run(tmp_path, tiny(), objective=noted, recipe=training(checkpoint_every=2))
    assert [path.name[-1] for path in checkpoints.complete(tmp_path / "work")] == ["4"]


@dataclass(frozen=True)
class Second:
    """Another model that learns from the same samples."""

    model: PreTrainedModel
    trained: Trained

    def step(self, parts: Sequence[Batch], *, step: int) -> Mapping[str, float]:
        objective, halves = objectives.cross_entropy(), split(self.model)
        found = gradients(self.trained, lambda batch: objective(*halves, batch), parts)
        apply(self.trained, found, lr=1e-2 / step, clip=1.0)
        return {"second_loss": found.loss}

    def work(self, context: int, *, step: int) -> float:
        return float(context * step)


def second(seed: int = 5) -> Second:
    model = tiny(seed=seed).eval()
    return Second(model, Trained({"second": model}, make_optimizer(model.parameters(), training())))


def test_what_learns_beside_resumes_with_the_same_bits(tmp_path: Path) -> None:
    objective, recipe = taught(tiny(seed=1)), training(micro_batch=4)
    whole, other = tiny(), second()
    run(tmp_path / "whole", whole, objective=objective, recipe=recipe, beside=other)
    assert [line["second_loss"] > 0 for line in lines(tmp_path / "whole")] == [True] * 6
    with pytest.raises(Killed):
        run(tmp_path / "killed", tiny(), objective=killing(objective, 9), recipe=recipe, beside=second())
    model, again = tiny(), second(seed=6)
    result = run(tmp_path / "killed", model, objective=objective, recipe=recipe, beside=again)
    assert result.resumed_from == 4
    assert same(weights(model), weights(whole))
    assert same(weights(again.model), weights(other.model))


def test_a_checkpoint_of_another_recipe_is_not_taken(tmp_path: Path) -> None:
    run(tmp_path, tiny())
    assert run(tmp_path, tiny(), recipe=training(lr=2e-2)).resumed_from == 0
    assert run(tmp_path, tiny(), recipe=training(lr=2e-2)).resumed_from == 4
    assert run(tmp_path, tiny(), recipe=training(lr=2e-2), name="other").resumed_from == 0


@pytest.mark.parametrize("what", ["cut", "gone", "facts", "flipped"])
def test_a_damaged_checkpoint_is_not_taken_but_the_one_before_it(tmp_path: Path, what: str) -> None:
    whole, model, recipe = tiny(), tiny(), training(checkpoint_every=1, keep_checkpoints=2)
    objective = taught(tiny(seed=1))
    run(tmp_path / "whole", whole, objective=objective, recipe=recipe)
    with pytest.raises(Killed):
        run(tmp_path / "killed", tiny(), objective=killing(objective, 4), recipe=recipe)
    *_, before, newest = checkpoints.complete(tmp_path / "killed" / "work")

    def damage(folder: Path) -> None:
        (weights_file,) = folder.glob("*.safetensors")
        if what == "cut":
            weights_file.write_bytes(weights_file.read_bytes()[:500])
        elif what == "gone":
            weights_file.unlink()
        elif what == "flipped":
            content = bytearray(weights_file.read_bytes())
            content[-100] ^= 1
            weights_file.write_bytes(content)
        else:
            (folder / checkpoints.FACTS).write_text("")

    damage(newest)
    with pytest.warns(UserWarning, match=newest.name):
        result = run(tmp_path / "killed", model, objective=objective, recipe=recipe)
    assert result.resumed_from == int(before.name[-2:])
    assert same(weights(model), weights(whole))

    with pytest.raises(Killed):
        run(tmp_path / "lost", tiny(), objective=killing(objective, 2), recipe=recipe)
    for kept in checkpoints.complete(tmp_path / "lost" / "work"):
        damage(kept)
    with pytest.warns(UserWarning, match="cannot be read"), pytest.raises(RunError, match="can be read") as caught:
        run(tmp_path / "lost", tiny(), objective=objective, recipe=recipe)
    assert "remove that folder" in caught.value.fix


def test_a_sigterm_in_the_last_step_is_heeded(tmp_path: Path) -> None:
    objective, whole, model = taught(tiny(seed=1)), tiny(), tiny()
    wanted = run(tmp_path / "whole", whole, objective=objective)
    steps = iter(range(1, 100))

    def ending(*args: Any) -> tuple[Tensor, int]:
        if next(steps) == 6:
            signal.raise_signal(signal.SIGTERM)
        return objective(*args)

    with pytest.raises(Stopped, match="stopped by SIGTERM after step 6"):
        run(tmp_path / "ended", tiny(), objective=ending)
    assert run(tmp_path / "ended", model, objective=objective) == replace(wanted, resumed_from=6)
    assert same(weights(model), weights(whole))
    assert len(lines(tmp_path / "ended")) == len(lines(tmp_path / "whole"))


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "write", full)
    with pytest.raises(DiskError, match="no room left while writing"):
        run(tmp_path, tiny())
    assert not list((tmp_path / "work").iterdir())


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
