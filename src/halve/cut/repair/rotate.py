"""Rotation: cut `hidden` in the basis of principal axes, where the removed channels carry the least variance.

SliceGPT (arXiv 2401.15024) uses a different rotation for every layer and needs an extra matrix on every skip
connection. Here one orthogonal matrix serves the whole network, so the result has an ordinary config of the family. RMS
norms commute with a rotation once their weights are folded into the matrices that read them. Norms that subtract the
mean, norms on the outputs of sub-layers, and norms of embeddings do not. Families with these are refused, by a proof on
the random twin.

If the head is tied to the embeddings, it cannot absorb the weight of the final norm and stay tied. So rotation unties
it, which costs vocab x hidden more parameters outside the layers. `tie_head` ties the head of a cut student again. One
factor per channel in the final norm, fitted on the teacher's logits, then replaces the folded weight.

Legend: N tokens, D hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from transformers import PreTrainedModel

from halve.anatomy import Anatomy, discover
from halve.anatomy.axes import Expr
from halve.anatomy.configs import build
from halve.cut.proof.prove import SAME, prove
from halve.cut.proof.twins import logits, random_twin
from halve.cut.repair.gram import Gram
from halve.cut.score.calibration import Calibration
from halve.cut.score.sites import input_dim
from halve.cut.surgery.gain import norm_kind
from halve.errors import AnatomyError, PlanError
from halve.model.hooks import on_input, on_output
from halve.recipe.schema import Prune

_HIDDEN = Expr.parse("hidden")


@dataclass(frozen=True, eq=False)
class Basis:
    """Orthonormal columns in descending order of variance, and the share of the variance that each carries."""

    columns_DD: Float64[Tensor, "hidden hidden"]
    energy_D: Float64[Tensor, " hidden"]


def principal_basis(second_moment_DD: Float[Tensor, "hidden hidden"]) -> Basis:
    """The eigenvectors of a second moment, largest eigenvalue first. The largest entry of each is positive.

    >>> principal_basis(torch.diag(torch.tensor([1.0, 3.0]))).energy_D.tolist()
    [0.75, 0.25]
    """
    values_D, vectors_DD = torch.linalg.eigh(second_moment_DD.double())
    values_D, vectors_DD = values_D.flip(0).clamp_min(0), vectors_DD.flip(1)
    largest_D = vectors_DD.gather(0, vectors_DD.abs().argmax(0)[None])[0]
    return Basis(vectors_DD * largest_D.sign(), values_D / values_D.sum())


def stream_moment(calibration: Calibration) -> Float64[Tensor, "hidden hidden"]:
    """The second moment of the normalized residual stream: sum of `x x^T / |x|^2` over tokens and norms.

    It takes one forward pass. SliceGPT uses the PCA of the states themselves. But norms read only directions, and a few
    tokens have states many times larger than the rest. So every token has the same weight here (LOG.md: 0.46 against
    0.66 nats straight after the cut to 70 %). The input of the final norm is included.
    """
    model, anatomy = calibration.model, calibration.anatomy
    gram = Gram(anatomy.sizes.hidden, device=model.device)

    def see(x: Tensor) -> None:
        gram.add(torch.nn.functional.normalize(x.float(), dim=-1))

    with ExitStack() as hooks, torch.no_grad():
        for name in anatomy.norms:
            hooks.enter_context(on_input(model.get_submodule(name), see))
        task = hooks.enter_context(calibration.progress.task("principal basis", calibration.samples_BS.numel()))
        for part_BS in calibration.batches:
            model.base_model(input_ids=part_BS.to(model.device), use_cache=False)
            task.advance(part_BS.numel())
    gram.check("the residual stream")
    return gram.xx_XX.cpu()


def untied(anatomy: Anatomy) -> Anatomy:
    """The anatomy of the same model with an untied head. Unchanged if the head is not tied."""
    if not anatomy.tied:
        return anatomy
    config = copy.deepcopy(anatomy.config)
    config.tie_word_embeddings = False
    return discover(config)


def student_anatomy(anatomy: Anatomy, prune: Prune) -> Anatomy:
    """The anatomy for a student's sizes and counts: with an untied head if rotation unties it.

    If halve chooses the sizes, the anatomy also refuses what the proof refuses, so that a budget uses only proved axes.
    Sizes by hand are checked by `Proof.demand`. Raises `AnatomyError` for a model that looks ahead and where `untie`
    comes with a rotation that the family does not allow, and `PlanError` where a budget of all parameters would count a
    head that some of the tried shapes do not have.
    """
    student = untied(anatomy) if anatomy.tied and _unties(anatomy, prune) else anatomy
    if student.tied != anatomy.tied and prune.params is not None and prune.shape == "trial":
        raise PlanError(
            "prune.untie is not combined with prune.params where a trial chooses the shape",
            why="the head is untied where hidden is cut and nowhere else, so shapes would be counted unequally",
            fix="give non_embedding_ratio instead of params, or shape: width, or sizes by hand",
        )
    if prune.params is None and prune.non_embedding_ratio is None:
        return student
    refused = prove(anatomy, reopen=False).refusals
    return (
        student
        if refused.keys() <= student.refusals.keys()
        else replace(student, refusals={**refused, **student.refusals})
    )


def _unties(anatomy: Anatomy, prune: Prune) -> bool:
    """Whether a tied head gets its own weights: it does so with a rotation, which comes with a cut of hidden alone."""
    cut = (prune.hidden or anatomy.sizes.hidden) < anatomy.sizes.hidden
    kept = prune.sized_by["sizes by hand"] and not cut
    return prune.untie and not kept and rotates(anatomy, prune)


def rotates(anatomy: Anatomy, prune: Prune) -> bool:
    """Whether a cut of hidden uses another basis.

    Raises `AnatomyError` for `rotation: pca` in a family that does not allow it. `auto` then keeps the basis.
    """
    if prune.rotation == "none" or (prune.rotation == "auto" and prune.steps > 1):
        return False
    try:
        prove_rotation(anatomy)
    except AnatomyError:
        if prune.rotation == "pca":
            raise
        return False
    return True


def prove_rotation(anatomy: Anatomy, *, seed: int = 0) -> float:
    """Rotate the random twin by a random matrix. Returns the largest difference of its logits.

    Raises `AnatomyError` for a family whose logits change: its norms do not commute with a rotation.
    """
    twin = anatomy.twin()
    model = random_twin(twin, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    size = twin.sizes.hidden
    columns_DD = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    try:
        turned, turned_anatomy = rotate(model, twin, columns_DD)
        gap = float((logits(turned, turned_anatomy) - logits(model, twin)).abs().max())
    except AnatomyError:
        raise
    except Exception as error:  # a family's own code may raise anything at sizes that it was not written for
        raise _refused(anatomy, f"its twin does not run: {type(error).__name__}: {error}") from error
    if not gap <= SAME:
        raise _refused(anatomy, f"its twin's logits change by {gap:.2g}: a norm of this family takes the mean off")
    return gap


def rotate(
    model: PreTrainedModel, anatomy: Anatomy, columns_DD: Float[Tensor, "hidden hidden"]
) -> tuple[PreTrainedModel, Anatomy]:
    """A new model with the residual stream in the basis of these orthonormal columns, and its anatomy.

    Its logits agree up to rounding. Norm weights are folded into the matrices that read the norms. (The norm keeps its
    bias, divided by the weight.) Then every dimension made of `hidden` is rotated. Computed in float64 and stored in
    the model's own precision. A tied head is untied.

    Raises `AnatomyError` if a norm over hidden is read by anything but matrices, or if another weight over hidden has
    no rotated form.
    """
    readers = readers_of_norms(model, anatomy)
    result_anatomy = untied(anatomy)
    result = build(result_anatomy.config, device=str(model.device), dtype=model.dtype)
    old = dict(model.named_parameters(remove_duplicate=False))
    folded = _folded(model, anatomy, readers)
    columns_DD = columns_DD.double().to(model.device)
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            source = name if name in old else anatomy.head
            value = old[source].double()
            norm = name.rpartition(".")[0]
            if norm in folded:
                value = _plain_norm(model, norm, name, value, columns_DD)
            else:
                value = _turn(name, value, result_anatomy, columns_DD, folded)
            parameter.data = value.to(parameter.dtype)
        new_buffers, old_buffers = result.state_dict(), model.state_dict()
        for name in new_buffers.keys() - dict(result.named_parameters(remove_duplicate=False)).keys():
            new_buffers[name].copy_(old_buffers[name])
    result.generation_config = model.generation_config
    return result.eval(), result_anatomy


@torch.no_grad()
def tie_head(
    student: PreTrainedModel, calibration: Calibration, *, final_norm: str, strength: float
) -> PreTrainedModel:
    """A new student whose head is again its embedding table E. The final norm compensates for the difference.

    Each channel of the final norm is multiplied by g, which brings the logits closest to the teacher's:

        argmin_g  sum_n |W t_n - E (g * s_n)|^2 + r |g - 1|^2

    W is the teacher's head, t and s are what both heads read. The normal equations need two Gram matrices:
    `((E^T E) * (S^T S)) g = rowsum((E^T W) * (S^T T))`. One pass of both models over the samples.
    """
    teacher = calibration.model
    gram = Gram(student.get_input_embeddings().weight.shape[1], teacher.get_output_embeddings().weight.shape[1])
    for part_BS in calibration.batches:
        read = [m.base_model(input_ids=part_BS.to(m.device), use_cache=False)[0] for m in (student, teacher)]
        gram.add(read[0].cpu(), read[1].cpu())
    gram.check("the head")
    table_VK, head_VD = (
        module.weight.double().cpu() for module in (student.get_input_embeddings(), teacher.get_output_embeddings())
    )
    normal_KK = (table_VK.T @ table_VK) * gram.xx_XX
    goal_K = ((table_VK.T @ head_VD) * gram.yx_YX.T).sum(1)
    r = strength * normal_KK.diagonal().mean()
    factors_K = torch.linalg.solve(normal_KK + r * torch.eye(len(goal_K), dtype=torch.float64), goal_K + r)
    config = copy.deepcopy(student.config)
    config.tie_word_embeddings = True
    result = build(config, device=str(student.device), dtype=student.dtype)
    student_state = student.state_dict()
    names = {name for name, _ in result.named_parameters()}
    for name, value in result.state_dict().items():
        if name in names or name in student_state:
            value.copy_(student_state[name])
    result.get_input_embeddings().weight.copy_(student.get_input_embeddings().weight)
    result.tie_weights()
    module = result.get_submodule(final_norm)
    offset = norm_kind(module).offset
    weight = module.weight
    assert isinstance(weight, Tensor)
    weight.copy_((weight.double() + offset) * factors_K.to(weight.device) - offset)
    result.generation_config = student.generation_config
    return result.eval()


def _turn(
    name: str, value: Tensor, anatomy: Anatomy, columns_DD: Tensor, folded: Mapping[str, tuple[Tensor, tuple[str, ...]]]
) -> Tensor:
    """Rotate every dimension of a matrix, table or writer's bias that is made of hidden."""
    module = name.rpartition(".")[0]
    linear = module in anatomy.modules or name in anatomy.embeddings
    for dim, expr in enumerate(anatomy.params[name]):
        if "hidden" not in expr.axes:
            continue
        if expr != _HIDDEN or not linear:
            raise _refused(anatomy, f"{name}, made of {expr}, has no rotated form")
        if name.endswith(".weight") and anatomy.modules.get(module) == _HIDDEN:
            for gain_D, readers in folded.values():
                if module in readers and input_dim(anatomy, module) == dim:
                    value = value * gain_D.view([-1 if d == dim else 1 for d in range(value.ndim)])
        value = torch.tensordot(value, columns_DD, dims=([dim], [0])).movedim(-1, dim)
    return value


def _folded(
    model: PreTrainedModel, anatomy: Anatomy, readers: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[Tensor, tuple[str, ...]]]:
    """For each norm: the weight that its readers absorb, and the readers."""
    result = {}
    for name in anatomy.norms:
        module = model.get_submodule(name)
        if not readers[name]:
            raise _refused(anatomy, f"{name} hands its output to no matrix: it stands behind a sub-layer")
        weight = getattr(module, "weight", None)
        gain_D = (
            torch.ones(anatomy.sizes.hidden, dtype=torch.float64, device=model.device)
            if weight is None
            else weight.detach().double() + norm_kind(module).offset
        )
        result[name] = (gain_D, readers[name])
    return result


def _plain_norm(model: PreTrainedModel, norm: str, name: str, value: Tensor, columns_DD: Tensor) -> Tensor:
    """Make a norm multiply by one, and rotate its bias, divided by the weight."""
    kind = norm_kind(model.get_submodule(norm))
    if name.endswith(".weight"):
        return torch.full_like(value, 1.0 - kind.offset)
    gain_D = model.get_submodule(norm).weight.detach().double() + kind.offset
    return torch.where(gain_D == 0, torch.zeros_like(value), value / gain_D) @ columns_DD


def readers_of_norms(model: PreTrainedModel, anatomy: Anatomy) -> dict[str, tuple[str, ...]]:
    """For each norm, the matrices that read its unchanged output. Found by running two tokens."""
    made: dict[str, Tensor] = {}
    read: dict[str, Tensor] = {}
    candidates = [name for name, expr in anatomy.modules.items() if expr == _HIDDEN]
    head = anatomy.head.rpartition(".")[0] if not anatomy.tied else _head_module(model)
    with ExitStack() as hooks, torch.no_grad():
        for name in anatomy.norms:
            hooks.enter_context(on_output(model.get_submodule(name), partial(made.__setitem__, name)))
        for name in dict.fromkeys([*candidates, head]):
            hooks.enter_context(on_input(model.get_submodule(name), partial(read.__setitem__, name)))
        model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=model.device), use_cache=False)
    # The head reads a slice of the final norm's output: the address is the same for a slice of everything.
    return {
        norm: tuple(name for name, tensor in read.items() if tensor.data_ptr() == output.data_ptr())
        for norm, output in made.items()
    }


def _head_module(model: PreTrainedModel) -> str:
    wanted = model.get_output_embeddings()
    return next(str(name) for name, module in model.named_modules() if module is wanted)


def _refused(anatomy: Anatomy, why: str) -> AnatomyError:
    return AnatomyError(
        f"cannot rotate hidden of {anatomy.family}", why=why, fix="set prune.rotation: none; refit works there too"
    )
