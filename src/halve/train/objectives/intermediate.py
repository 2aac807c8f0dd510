"""Losses on intermediate states of teacher and student (2407.14679, Sec. 3).

    L = L_logits + alpha L_is

States are taken after the norms. A state of the residual stream is what the next layer reads, that is, the input of the
first module in that layer that reads it. In families that normalize the output of a sub-layer instead of its input,
this is the stream itself. So one definition covers all families with a known anatomy:

    embedding   what layer 0 reads
    input       what the layer reads
    output      what the layer after it reads; of the last layer, what the head reads
    attention   the layer's queries, keys and values as its projections make them, by their relations

The first three are compared by their mean squared difference. One linear map, shared by all of them, first brings the
student's states to the teacher's width. It is trained with the student and is not part of it.

Shapes: B batch, S seq, N tokens, D hidden, C channels of a projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from halve.anatomy import Anatomy, Expr, discover
from halve.errors import RecipeError, TrainError
from halve.model.head import Body, Head
from halve.model.hooks import Hear, on_input, on_output
from halve.recipe.schema import State
from halve.text.batch import Batch, at_predictions
from halve.train.losses.relations import relation_divergence
from halve.train.objectives.logits import Objective

_DEFAULT_LAYERS = {-2: -2}  # 2407.14679, Table 17
_HEADS = {"heads", "kv_heads"}


@dataclass(frozen=True, eq=False)
class Ear:
    """Where a state is recorded: at the input of the first of these modules that is called, or at an output."""

    modules: tuple[nn.Module, ...]
    at_output: bool = False


@dataclass(frozen=True, eq=False)
class Pair:
    """A pair of states, and the function of their difference (student, teacher), summed over a batch's tokens."""

    student: Ear
    teacher: Ear
    loss: Callable[[Tensor, Tensor, Batch], Tensor]


@dataclass(frozen=True, eq=False)
class Matching:
    """The states that a student must match, and the trained map (None if no state needs one)."""

    pairs: tuple[Pair, ...]
    map: nn.Linear | None

    def loss(self, learned: Sequence[Tensor], taught: Sequence[Tensor], batch: Batch) -> Float[Tensor, ""]:
        """Return L_is, summed over pairs and over the tokens that count."""
        total = torch.zeros((), device=batch.ids.device)
        for pair, student, teacher in zip(self.pairs, learned, taught, strict=True):
            # a copy, because tensors from inference mode may not enter a graph
            known = teacher.detach().to(student.device, copy=True)
            total = total + pair.loss(student, known, batch)
        return total


def layer_pairs(layers: Mapping[int, int] | None, *, teacher: int, student: int) -> tuple[tuple[int, int], ...]:
    """Return (teacher's layer, student's layer) of models with so many layers, counted from the beginning.

    `layers` may count from the end. None means the second to last layer of both. Raises `RecipeError` for a layer that
    does not exist.

    >>> layer_pairs({-2: -2, 3: 1}, teacher=12, student=6)
    ((10, 4), (3, 1))
    """
    pairs = []
    for of_teacher, of_student in (layers if layers is not None else _DEFAULT_LAYERS).items():
        for who, index, num in (("teacher", of_teacher, teacher), ("student", of_student, student)):
            if not -num <= index < num:
                raise RecipeError(
                    f"distill.intermediate.layers names the {who}'s layer {index}",
                    why=f"the {who} has {num} layers, 0 to {num - 1} or {-num} to -1",
                    fix="change the layers of distill.intermediate; they read teacher's: student's",
                )
        pairs.append((of_teacher % teacher, of_student % student))
    return tuple(pairs)


def match(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    *,
    states: Sequence[State],
    layers: Mapping[int, int] | None,
    seed: int,
) -> Matching:
    """Prepare the comparison of these states.

    The map starts as an isometry drawn from the seed, or as the identity between equal widths. Raises `AnatomyError`
    for an unknown family, `RecipeError` for a layer that does not exist, and `TrainError` if the attention of the two
    models cannot be compared.
    """
    mine, its = discover(student.config), discover(teacher.config)
    chosen = layer_pairs(layers, teacher=its.sizes.layers, student=mine.sizes.layers)
    mapping = _mapping(mine.sizes.hidden, its.sizes.hidden, like=student, seed=seed)

    def mapped(student_BSD: Tensor, teacher_BSD: Tensor, batch: Batch) -> Tensor:
        return state_difference(mapping(student_BSD), teacher_BSD, batch)

    pairs: list[Pair] = []
    for state in states:
        for its_layer, my_layer in chosen if state != "embedding" else ((0, 0),):
            if state == "attention":
                pairs += _attention(student, mine, my_layer, teacher, its, its_layer)
            else:
                after = state == "output"
                ears = _reading(student, mine, my_layer + after), _reading(teacher, its, its_layer + after)
                pairs.append(Pair(*ears, mapped))
    return Matching(tuple(pairs), mapping if any(state != "attention" for state in states) else None)


def with_states(objective: Objective, matching: Matching, *, alpha: float | None) -> Objective:
    """Return `L + alpha L_is`, where L is an objective whose teacher answers live.

    `alpha` None is the paper's dynamic weight: the current `L / L_is` without gradient. Both losses then weigh the
    same, and the total is twice L. The ratio is that of one micro-batch on one rank, because the ratio of a whole step
    would need its passes twice. So, unlike with a fixed `alpha`, the gradient of a step depends slightly on
    `micro_batch` and the number of ranks.
    """

    def both(body: Body, head: Head, batch: Batch) -> tuple[Tensor, int]:
        ears = zip(*((pair.student, pair.teacher) for pair in matching.pairs), strict=True)
        with recorded(next(ears)) as learned, recorded(next(ears)) as taught:
            loss, count = objective(body, head, batch)
        states = matching.loss(learned, taught, batch)
        weight = alpha if alpha is not None else _ratio(loss.detach(), states.detach())
        return loss + weight * states, count

    return both


@contextmanager
def recorded(ears: Sequence[Ear]) -> Iterator[list[Tensor]]:
    """In this context, record the states of one forward pass in the list that is yielded.

    Recomputation under activation checkpointing is not recorded.
    """
    states: dict[int, Tensor] = {}
    result: list[Tensor] = []

    def hear(index: int) -> Hear:
        def keep_first(state: Tensor) -> None:
            states.setdefault(index, state)

        return keep_first

    with ExitStack() as hooks:
        for index, ear in enumerate(ears):
            listen = on_output if ear.at_output else on_input
            for module in ear.modules:
                hooks.enter_context(listen(module, hear(index)))
        yield result
        assert len(states) == len(ears), "a state was not heard: its teacher does not run here"
        result += [states[index] for index in range(len(ears))]


def state_difference(
    student: Float[Tensor, "batch seq hidden"], teacher: Float[Tensor, "batch seq hidden"], batch: Batch
) -> Float[Tensor, ""]:
    """Return the mean squared difference over channels, summed over the tokens that count.

    In float32 (float64 where a state is).
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    mine_ND, its_ND = (at_predictions(state, batch).to(dtype) for state in (student, teacher))
    return (mine_ND - its_ND).square().mean(-1).sum()


def _reading(model: PreTrainedModel, anatomy: Anatomy, layer: int) -> Ear:
    """Where a layer's input from the residual stream is recorded. The layer after the last one is the head."""
    if layer == anatomy.sizes.layers:
        return Ear((model.base_model,), at_output=True)
    return Ear(tuple(model.get_submodule(name) for name in anatomy.readers("hidden")[layer]))


def _attention(
    student: PreTrainedModel, mine: Anatomy, my_layer: int, teacher: PreTrainedModel, its: Anatomy, its_layer: int
) -> Iterator[Pair]:
    """A pair for every projection into heads, compared by the relations of its queries, keys or values."""
    made, taught = _projections(mine, my_layer), _projections(its, its_layer)
    if not made or [_kinds(expr) for expr in made.values()] != [_kinds(expr) for expr in taught.values()]:
        raise TrainError(
            "the attention of student and teacher cannot be compared",
            why=f"the student's layer {my_layer} makes heads by {', '.join(made) or 'nothing'},"
            f" the teacher's layer {its_layer} by {', '.join(taught) or 'nothing'}",
            fix="leave attention out of distill.intermediate.states, or pair layers of one kind",
        )
    for (name, expr), (its_name, its_expr) in zip(made.items(), taught.items(), strict=True):
        yield Pair(
            Ear((student.get_submodule(name),), at_output=True),
            Ear((teacher.get_submodule(its_name),), at_output=True),
            partial(_related, mine=(expr, mine.sizes.sizes), its=(its_expr, its.sizes.sizes)),
        )


def _related(
    student_BSC: Tensor,
    teacher_BSC: Tensor,
    batch: Batch,
    *,
    mine: tuple[Expr, Mapping[str, int]],
    its: tuple[Expr, Mapping[str, int]],
) -> Tensor:
    documents_BS = torch.zeros_like(batch.ids) if batch.positions is None else (batch.positions == 0).cumsum(1)
    inside = batch.counted()
    predicts = torch.ones_like(batch.ids[:, 1:], dtype=torch.bool) if inside is None else inside
    counted_BS = nn.functional.pad(predicts, (0, 1))
    parts = zip(_vectors(student_BSC, *mine), _vectors(teacher_BSC, *its), strict=True)
    divergences = [relation_divergence(*pair, documents=documents_BS, counted=counted_BS) for pair in parts]
    return torch.stack(divergences).sum()


def _projections(anatomy: Anatomy, layer: int) -> dict[str, Expr]:
    """The modules of a layer that project hidden into heads, and which of queries, keys and values they compute."""
    return {
        name: expr
        for name in anatomy.readers("hidden")[layer]
        for expr in anatomy.params[f"{name}.weight"]
        if expr.axes & _HEADS
    }


def _kinds(expr: Expr) -> int:
    """The heads of queries, keys and values that a projection computes."""
    return sum(prod(factor for factor in term if isinstance(factor, int)) for term in expr.terms)


def _vectors(made_BSC: Tensor, expr: Expr, sizes: Mapping[str, int]) -> list[Tensor]:
    """Split a projection's output, in any layout, into [batch, seq, heads, head_dim] of each kind."""
    vectors: list[Tensor] = []
    lengths = [[factor if isinstance(factor, int) else sizes[factor] for factor in term] for term in expr.terms]
    blocks = torch.split(made_BSC, [prod(dims) for dims in lengths], dim=-1)
    for term, dims, block in zip(expr.terms, lengths, blocks, strict=True):
        kinds = [2 + place for place, factor in enumerate(term) if isinstance(factor, int)]
        apart = torch.unflatten(block, -1, dims).movedim(kinds, list(range(len(kinds))))
        vectors += apart.reshape(-1, *apart.shape[len(kinds) :]).unbind(0)
    return vectors


def _mapping(student: int, teacher: int, *, like: PreTrainedModel, seed: int) -> nn.Linear:
    linear = nn.Linear(student, teacher, bias=False, dtype=torch.promote_types(like.dtype, torch.float32))
    if student == teacher:
        nn.init.eye_(linear.weight)
    else:
        nn.init.orthogonal_(linear.weight, generator=torch.Generator().manual_seed(seed))
    return linear if linear.weight.device == like.device else linear.to(like.device)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    return torch.where(below > 0, above / below, 0.0)
