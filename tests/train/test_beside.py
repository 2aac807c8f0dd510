"""A teacher that learns while it teaches."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from halve.errors import TrainError
from halve.model.head import split
from halve.recipe.schema import Correct, Distill
from halve.text.batch import Batch
from halve.text.course import Course
from halve.train.beside import Correction, correction
from halve.train.loop import adapters, checkpoints, loop
from halve.train.loop.step import Beside
from halve.train.objectives import logits as objectives
from halve.train.teachers.live import Live, Teacher

VOCAB, CONTEXT, STEPS = 37, 12, 6
ALL = STEPS * 8 * CONTEXT
RATES = {"lr": 1e-2, "min_lr": 1e-3, "warmup_steps": 2, "weight_decay": 0.1}


class Text:
    """A token's successor is mostly the same."""

    context = CONTEXT

    def batch(self, step: int, batch: int) -> Batch:
        random = torch.Generator().manual_seed(step)
        ids_BS = (torch.randint(VOCAB, (batch, 1), generator=random) + 5 * torch.arange(CONTEXT)) % VOCAB
        noise_BS = torch.rand(ids_BS.shape, generator=random) < 0.1
        ids_BS = torch.where(noise_BS, torch.randint(VOCAB, ids_BS.shape, generator=random), ids_BS)
        return Batch(ids_BS, self.numbers(step, batch))

    def numbers(self, step: int, batch: int) -> tuple[int, ...]:
        return tuple(range(step * batch, (step + 1) * batch))


def tiny(seed: int, layers: int = 2) -> PreTrainedModel:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "max_position_embeddings": 32}
    config = LlamaConfig(**sizes, num_hidden_layers=layers, vocab_size=VOCAB, tie_word_embeddings=True)
    return LlamaForCausalLM(config).eval()


def course(**changes: Any) -> Course:
    values = {"tokens": ALL, "batch": 8, "checkpoint_every": 2, "eval_every": 3, **RATES}
    return Course(Distill(**(values | changes)), Text())


def learning(over: Course, *, seed: int = 1, **changes: Any) -> tuple[PreTrainedModel, Correction]:
    """A teacher and what corrects it."""
    section = Correct(**({"tokens": ALL, **RATES} | changes))
    model = tiny(seed)
    adapters.choose_trained(model, section, seed=0)
    assert isinstance(over.training, Distill)
    return model, correction(model, section, over.training, over, device="cpu")


def distil(
    folder: Path, student: PreTrainedModel, by: Correction, over: Course, *, kill_at: int | None = None
) -> list[dict[str, Any]]:
    folder.mkdir(exist_ok=True)
    follow, calls = objectives.distillation(by, vocab=VOCAB), iter(range(1, 1000))

    def objective(*args: Any) -> Any:
        if next(calls) == kill_at:
            raise KeyboardInterrupt
        return follow(*args)

    held = Text().batch(999, 4)
    figures = objectives.heldout_divergence(by, held, vocab=VOCAB, micro_batch=2)
    measured = by.measuring(figures, objectives.heldout_loss(held, micro_batch=2))
    files = loop.TrainFiles(folder / "work", folder / "metrics.jsonl", seed=0)
    loop.train(student, loop.Lesson(objective, beside=by, heldout=measured), over, files, device="cpu")
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(model: PreTrainedModel) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


def test_it_is_a_teacher_and_it_learns_beside() -> None:
    _, by = learning(course())
    assert isinstance(by, Teacher)
    assert isinstance(by, Beside)
    answer = by.answer(Text().batch(0, 4))
    assert not answer.states.requires_grad


def test_it_learns_what_it_would_have_learned_alone(tmp_path: Path) -> None:
    """With the same rates on the same samples, to the bit: the student does not touch it."""
    over = course(micro_batch=4)
    teacher, by = learning(over)
    lines = distil(tmp_path, tiny(0, layers=1), by, over)
    alone = tiny(1)
    (tmp_path / "alone").mkdir()
    files = loop.TrainFiles(tmp_path / "alone" / "work", tmp_path / "alone" / "metrics.jsonl", seed=0)
    loop.train(alone, loop.Lesson(objectives.cross_entropy()), over, files, device="cpu")
    assert same(teacher, alone)
    steps = [json.loads(line) for line in files.metrics.read_text().splitlines()]
    assert [line["teacher_loss"] for line in lines[1:]] == [line["loss"] for line in steps]
    assert [line["teacher_grad_norm"] for line in lines[1:]] == [line["grad_norm"] for line in steps]
    held = [line["heldout"]["teacher_ce"] for line in lines if "heldout" in line]
    assert held[0] > held[1] > held[2]


def test_the_student_follows_the_teacher_of_the_moment(tmp_path: Path) -> None:
    """Step n's loss is the divergence from a teacher that was corrected n - 1 times."""
    found = {}
    for tokens in (8 * CONTEXT, ALL):
        over = course()
        _, by = learning(over, tokens=tokens, warmup_steps=0, lr=3e-2)
        found[tokens] = [line["loss"] for line in distil(tmp_path / str(tokens), tiny(0), by, over)[1:]]
    _, by = learning(over)
    (tmp_path / "fixed").mkdir()
    files = loop.TrainFiles(tmp_path / "fixed" / "work", tmp_path / "fixed" / "metrics.jsonl", seed=0)
    follow = objectives.distillation(Live(*split(tiny(1))), vocab=VOCAB)
    loop.train(tiny(0), loop.Lesson(follow), over, files, device="cpu")
    fixed = [json.loads(line)["loss"] for line in (tmp_path / "fixed" / "metrics.jsonl").read_text().splitlines()]
    once, always = found.values()
    assert fixed[0] == once[0] == always[0]
    assert fixed[1] != once[1]
    # one step's cosine ends at once, that of all steps has hardly begun
    assert once[1] != always[1]


def test_it_stops_learning_after_its_tokens(tmp_path: Path) -> None:
    over = course()
    teacher, by = learning(over, tokens=2 * 8 * CONTEXT - 1, warmup_steps=1)
    assert by.steps == 2
    assert (by.rate(1), by.rate(2)) == (1e-2, 1e-3)
    lines = distil(tmp_path / "two", tiny(0), by, over)
    assert ["teacher_loss" in line for line in lines[1:]] == [True] * 2 + [False] * 4
    other, again = learning(over, tokens=2 * 8 * CONTEXT, warmup_steps=1)
    distil(tmp_path / "short", tiny(0), again, course(tokens=2 * 8 * CONTEXT))
    assert same(teacher, other)
    assert learning(over, tokens=100 * ALL)[1].steps == STEPS


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_kill_changes_neither_model(tmp_path: Path, method: str) -> None:
    over = course(micro_batch=4)
    student, (teacher, by) = tiny(0), learning(over, method=method, lora_rank=2)
    distil(tmp_path / "whole", student, by, over)
    with pytest.raises(KeyboardInterrupt):
        distil(tmp_path / "killed", tiny(0), learning(over, method=method, lora_rank=2)[1], over, kill_at=10)
    kept = checkpoints.complete(tmp_path / "killed" / "work")[-1]
    assert kept.name == "step-00000004"
    with safe_open(next(kept.glob("*.safetensors")), framework="pt") as file:
        names = [name for name in file.keys() if name.startswith("param.teacher.")]  # noqa: SIM118
    moved = [name for name, parameter in teacher.named_parameters() if parameter.requires_grad]
    assert sorted(names) == sorted(f"param.teacher.{name}" for name in moved)
    again, (other, by) = tiny(0), learning(over, method=method, lora_rank=2)
    distil(tmp_path / "killed", again, by, over)
    assert same(again, student)
    assert same(other, teacher)


def test_how_a_step_is_split_does_not_matter(tmp_path: Path) -> None:
    found = {}
    for size in (8, 2):
        over = course(micro_batch=size)
        lines = distil(tmp_path / str(size), tiny(0), learning(over)[1], over)
        found[size] = torch.tensor([[line["loss"], line["teacher_loss"]] for line in lines[1:]])
    torch.testing.assert_close(found[2], found[8], rtol=1e-5, atol=0)


def test_the_teachers_loss_must_be_finite(tmp_path: Path) -> None:
    over = course()
    teacher, by = learning(over)
    before = weights(teacher)

    def broken(batch: Batch) -> Any:
        with torch.no_grad():
            teacher.model.norm.weight.fill_(math.nan)
        return Live(*split(tiny(1))).answer(batch)

    follow = objectives.distillation(type("Breaking", (), {"answer": staticmethod(broken)})(), vocab=VOCAB)
    files = loop.TrainFiles(tmp_path / "work", tmp_path / "metrics.jsonl", seed=0)
    with pytest.raises(TrainError) as caught:
        loop.train(tiny(0), loop.Lesson(follow, beside=by), over, files, device="cpu")
    assert caught.value.what == "the teacher's loss is not finite at step 1"
    assert "lower lr (now 0.01) in the section correct" in caught.value.fix
    assert not checkpoints.complete(tmp_path / "work")
    assert torch.equal(teacher.model.embed_tokens.weight, before[0])
