"""Which parameters a correction trains: all, only the norms, or low-rank adapters that are merged afterwards.

2408.11796 corrects the whole teacher and names the other two as cheaper ways (Sec. 3.2). Each function here sets in
place which parameters need gradients. An optimizer that is made afterwards, and a checkpoint, hold state only for
these.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from halve.anatomy import Anatomy, discover
from halve.errors import RecipeError
from halve.recipe.schema import Correct

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ADAPTER = "default"  # peft's name for the only adapter


def choose_trained(model: PreTrainedModel, section: Correct, *, seed: int) -> None:
    """Let `model` train what the recipe's section says. `merge` removes what this adds to it.

    Raises what `require_trainable` raises.
    """
    require_trainable(discover(model.config), section)
    if section.method == "lora":
        add_lora(model, rank=section.lora_rank, alpha=section.lora_alpha, seed=seed)
    elif section.method == "norms":
        norms_alone(model)
    else:
        model.requires_grad_(True)


def require_trainable(anatomy: Anatomy, section: Correct) -> None:
    """Raise `RecipeError` if the method finds nothing to train in this model, or its package is missing."""
    if section.method == "norms" and not _has_norms(anatomy):
        raise RecipeError(
            f"correct.method: norms finds nothing to train in a {anatomy.family}",
            why="its norms have no parameters",
            fix="method: full or lora in the section correct",
        )
    if section.method == "lora":
        keys = {"key": "correct.method", "rank_key": "correct.lora_rank", "instead": "method: full or norms"}
        require_lora(anatomy, section.lora_rank, **keys)


def require_lora(anatomy: Anatomy, rank: int, *, key: str, rank_key: str, instead: str) -> None:
    """Raise `RecipeError` if adapters of this rank cannot be added.

    The keys are those of the recipe that ask for it, and `instead` is what else they can ask for.
    """
    require_peft(key=key, instead=instead)
    if rank > (hidden := anatomy.sizes.hidden):
        raise RecipeError(
            f"{rank_key} {rank} is larger than the model's hidden {hidden}",
            why="no matrix that reads or writes hidden states has a higher rank than that",
            fix=f"set {rank_key} to {hidden} or less; 16 is usual",
        )


def require_peft(*, key: str, instead: str) -> None:
    """Raise `RecipeError` if the package that adds adapters is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise RecipeError(
            f"{key}: lora needs the package peft",
            why="it is not installed; its adapters are an extra of halve",
            fix=f"pip install 'halve[lora]', or {instead}",
        )


def norms_alone(model: PreTrainedModel) -> None:
    """Train only the parameters of norms, including those of queries and keys."""
    model.requires_grad_(False)
    for name in norms(model):
        model.get_submodule(name).requires_grad_(True)


def norms(model: PreTrainedModel) -> list[str]:
    """Norms with parameters: those over `hidden` by the anatomy, and others by their class."""
    known = discover(model.config).norms
    return [
        name
        for name, module in model.named_modules()
        if (name in known or "norm" in type(module).__name__.lower())
        and not any(module.children())
        and any(True for _ in module.parameters())
    ]


def linears(model: PreTrainedModel) -> list[str]:
    """The matrix products of the body, by the anatomy. Not the head, which losses use without running it."""
    anatomy = discover(model.config)
    return [name for name in anatomy.modules if f"{name}.weight" not in anatomy.embeddings]


def add_lora(model: PreTrainedModel, *, rank: int, alpha: float, seed: int) -> None:
    """Add an adapter to every matrix of the body, and train only the adapters.

    A matrix's product with x becomes `W x + alpha / rank * B A x`, where A [rank, inputs] is drawn from the seed and
    B [outputs, rank] is zero (LoRA, 2106.09685, Sec. 4.1). So at first the outputs of the model do not change.
    """
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    names = linears(model)
    transposed = any(isinstance(model.get_submodule(name), Conv1D) for name in names)
    config = LoraConfig(target_modules=names, r=rank, lora_alpha=alpha, lora_dropout=0.0, fan_in_fan_out=transposed)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        LoraModel(model, config, _ADAPTER)


@torch.no_grad()
def merge(model: PreTrainedModel) -> None:
    """Merge every adapter into its matrix and remove it. A model without adapters is not changed.

    Also works on shards, if every rank calls it.
    """
    adapted = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    for name, module in adapted.items():
        plain: nn.Module = module.get_base_layer()
        change = module.get_delta_weight(_ADAPTER)
        weight = plain.get_parameter("weight")
        if isinstance(weight, DTensor):
            change = change.redistribute(weight.device_mesh, weight.placements)
        weight.add_(change.to(weight.dtype))
        model.set_submodule(name, plain)
    if adapted:
        del model.peft_config


def _has_norms(anatomy: Anatomy) -> bool:
    return any(parameter.rpartition(".")[0] in anatomy.norms for parameter in anatomy.params)
