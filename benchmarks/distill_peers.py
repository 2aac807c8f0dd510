"""The loss of a distillation step as halve and others compute it, each by its own package's code.

A peer is what its trainer runs between a batch and `backward`; optimizer, clipping and accumulation are
the benchmark's and the same for all. A trainer's object is made without its `__init__`, which would want
data sets and folders: the method that makes the loss reads only what is set here.

Shapes: B batch, S seq, V vocab.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from halve.model.head import split
from halve.text.batch import Batch
from halve.train.objectives import logits as objectives
from halve.train.ranks import blocks
from halve.train.teachers.live import Live

Loss = Callable[[Tensor], Tensor]
"""Token ids [B, S] -> the divergence of each predicted token, summed and divided by the tokens of a whole step."""


@dataclass(frozen=True)
class Pair:
    """Who teaches and who learns, in which precision, and how many tokens one step predicts."""

    teacher: PreTrainedModel
    student: PreTrainedModel
    half: bool
    num_tokens: int

    def autocast(self) -> torch.autocast:
        """The precision of the products of both."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.half)


def summed(pair: Pair) -> Callable[[Batch], tuple[Tensor, int]]:
    """This repository's objective, as its loop asks for it: the losses' sum and the number of tokens."""
    return _summed(pair, accumulates=True)


def _summed(pair: Pair, *, accumulates: bool) -> Callable[[Batch], tuple[Tensor, int]]:
    student_body, own_head = split(pair.student)
    student_head = replace(own_head, accumulates=accumulates)
    body, head = split(pair.teacher)
    objective = objectives.distillation(Live(body, head), vocab=head.weight.shape[0])

    def of_batch(batch: Batch) -> tuple[Tensor, int]:
        with pair.autocast():
            return objective(student_body, student_head, batch)

    return of_batch


def halve(pair: Pair) -> Loss:
    """The same as a mean, as the others give it."""
    of_batch = _summed(pair, accumulates=False)
    return lambda ids_BS: of_batch(batch_of(ids_BS))[0] / pair.num_tokens


def compiled(pair: Pair) -> Pair:
    """Copies of both whose layers are compiled, as a recipe's `compile: true` has them."""
    teacher, student = copy.deepcopy(pair.teacher), copy.deepcopy(pair.student)
    for model in (teacher, student):
        blocks.compiled(model)
    return replace(pair, teacher=teacher, student=student)


def batch_of(ids_BS: Tensor) -> Batch:
    """Samples with some numbers."""
    return Batch(ids_BS, tuple(range(len(ids_BS))))


def plain(pair: Pair) -> Loss:
    """The loop that one writes by hand: full logits, `kl_div` in float32."""

    def loss(ids_BS: Tensor) -> Tensor:
        with pair.autocast():
            with torch.no_grad():
                taught_BSV = pair.teacher(input_ids=ids_BS, use_cache=False).logits[:, :-1]
            logits_BSV = pair.student(input_ids=ids_BS, use_cache=False).logits[:, :-1]
        log_p, log_q = F.log_softmax(taught_BSV.float(), -1), F.log_softmax(logits_BSV.float(), -1)
        return F.kl_div(log_q, log_p, reduction="sum", log_target=True) / pair.num_tokens

    return loss


def plain_float_head(pair: Pair) -> Loss:
    """The same with the bodies in bfloat16 and the logits in float32: what a careful hand writes."""

    def logits(model: PreTrainedModel, ids_BS: Tensor) -> Tensor:
        with pair.autocast():
            hidden_BSD = model.base_model(input_ids=ids_BS, use_cache=False)[0][:, :-1]
        return F.linear(hidden_BSD.float(), model.get_output_embeddings().weight)

    def loss(ids_BS: Tensor) -> Tensor:
        with torch.no_grad():
            log_p = F.log_softmax(logits(pair.teacher, ids_BS), -1)
        log_q = F.log_softmax(logits(pair.student, ids_BS), -1)
        return F.kl_div(log_q, log_p, reduction="sum", log_target=True) / pair.num_tokens

    return loss


def trl_gkd(pair: Pair) -> Loss:
    """trl.experimental.gkd.gkd_trainer: `GKDTrainer.compute_loss` with beta 0, the forward divergence."""
    trainer = _bare("trl.experimental.gkd.gkd_trainer", "GKDTrainer")
    trainer.teacher_model, trainer.beta = _prepared(pair.teacher, pair), 0.0
    student = _prepared(pair.student, pair)

    def loss(ids_BS: Tensor) -> Tensor:
        inputs = {"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS), "labels": ids_BS}
        found: Tensor = trainer.compute_loss(student, inputs, num_items_in_batch=pair.num_tokens)
        return found

    return loss


def trl_kernel(pair: Pair) -> Loss:
    """trl.trainer.distillation_trainer: `_get_last_hidden_state` and `_chunked_divergence_loss` with beta 0."""
    module = importlib.import_module("trl.trainer.distillation_trainer")
    trainer = _bare("trl.trainer.distillation_trainer", "DistillationTrainer")
    trainer.model_kwarg_keys, trainer._is_vlm = set(), False
    teacher, student = pair.teacher, pair.student

    def loss(ids_BS: Tensor) -> Tensor:
        mask_BS, keep = torch.ones_like(ids_BS), ids_BS.shape[1] - 1
        with pair.autocast():
            hidden = trainer._get_last_hidden_state(student, ids_BS, mask_BS, keep)
            with torch.no_grad():
                taught = trainer._get_last_hidden_state(teacher, ids_BS, mask_BS, keep)
            found, _, _ = module._chunked_divergence_loss(
                hidden,
                taught,
                student.get_output_embeddings().weight,
                teacher.get_output_embeddings().weight,
                mask_BS[:, 1:],
                0.0,
                num_items_in_batch=pair.num_tokens,
            )
        result: Tensor = found
        return result

    return loss


def model_optimizer(pair: Pair) -> Loss:
    """modelopt.torch.distill.plugins.huggingface: `KDTrainer.compute_loss`, without Liger's kernels (CUDA)."""
    criterion = importlib.import_module("modelopt.torch.distill.losses").LogitsDistillationLoss
    trainer = _bare("modelopt.torch.distill.plugins.huggingface", "KDTrainer")
    trainer._teacher_model, trainer._teacher_prepared = _prepared(pair.teacher, pair), True
    trainer._kd_criterion, trainer.use_liger_kernel = criterion(temperature=1.0, reduction="none"), False
    student = _prepared(pair.student, pair).train()

    def loss(ids_BS: Tensor) -> Tensor:
        # the trainer takes the mean of a micro-batch; its share of the step's tokens makes the step's mean of it
        mean: Tensor = trainer.compute_loss(student, {"input_ids": ids_BS, "labels": ids_BS})
        return mean * (ids_BS[:, 1:].numel() / pair.num_tokens)

    return loss


OURS, COMPILED = "halve", "halve, compiled layers"


@dataclass(frozen=True)
class System:
    """How a loss is made; `only_half` where there is no such thing in float32."""

    make: Callable[[Pair], Loss]
    only_half: bool = False


SYSTEMS: dict[str, System] = {
    OURS: System(halve),
    "plain PyTorch": System(plain),
    "plain PyTorch, float32 head": System(plain_float_head, only_half=True),
    "TRL GKD": System(trl_gkd),
    "TRL kernel": System(trl_kernel),
    "Model Optimizer": System(model_optimizer),
}
"""Those that always run. DistillKit is in no package index; it is named in the results as absent."""


def versions() -> dict[str, str]:
    """What was compared."""
    names = ("torch", "transformers", "trl", "nvidia-modelopt", "accelerate")
    return {name: metadata.version(name) for name in names}


def _bare(module: str, name: str) -> Any:
    """A trainer whose methods can be called: no `__init__`, no DeepSpeed, nothing wrapped."""
    kind = getattr(importlib.import_module(module), name)
    bare: Any = type(name, (kind,), {"is_deepspeed_enabled": False, "is_fsdp_enabled": False})
    trainer = bare.__new__(bare)
    trainer.accelerator = SimpleNamespace(unwrap_model=lambda model, **_: model, is_main_process=False)
    trainer.args = SimpleNamespace(report_to=[])
    return trainer


def _prepared(model: PreTrainedModel, pair: Pair) -> Any:
    """The model as accelerate's `prepare_model` leaves it: autocast inside, outputs raised to float32."""
    shared = copy.copy(model)  # the same parameters under another forward
    if not pair.half:
        return shared
    operations = importlib.import_module("accelerate.utils.operations")
    forward = type(model).forward

    def within(self: Any, *args: Any, **kwargs: Any) -> Any:
        context: AbstractContextManager[Any] = pair.autocast()
        with context:
            return forward(self, *args, **kwargs)

    shared.forward = operations.convert_outputs_to_fp32(within).__get__(shared)
    return shared
