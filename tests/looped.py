"""Small models in the training loop, and what it left."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from halve.model.head import split
from halve.recipe.schema import Training
from halve.text.batch import Batch
from halve.text.course import Course
from halve.train.loop import loop
from halve.train.loop.optimizers import make_optimizer
from halve.train.loop.step import Trained, apply, gradients
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
