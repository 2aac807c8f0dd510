"""Nested sizes: the axes of a model are sorted by importance, and every smaller size is a prefix of them.

A prefix of `heads` is taken inside each key-value group, because an ordinary config gives every group the same number.
Layers are not moved: of a smaller size those with the best scores stay, in their order, so that the kept layers of the
sizes are nested as well.

Legend: L layers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from jaxtyping import Float
from torch import Tensor

from halve.anatomy import CUT_AXES, Anatomy, Arch
from halve.cut.plan.plan import Importance, Plan
from halve.cut.plan.sizes import target
from halve.cut.score.importance import rank
from halve.errors import PlanError
from halve.recipe.nesting import Nest
from halve.recipe.schema import Gain, Prune


def nested_sizes(anatomy: Anatomy, nest: Nest) -> tuple[Arch, ...]:
    """The sizes of all students inside a model, itself first.

    Raises `PlanError` for sizes that the model cannot be cut to, or that do not lie inside each other.
    """
    listed, before = [anatomy.sizes], anatomy.sizes
    for number, inside in enumerate(nest.sizes, 2):
        last, given = listed[-1], inside.model_dump(exclude_none=True)
        if before.heads == before.kv_heads and given.keys() & {"heads", "kv_heads"}:  # cut together
            given = {"kv_heads": given.get("heads"), "heads": given.get("kv_heads"), **given}
        wanted = {axis: given.get(axis, getattr(last, axis)) for axis in CUT_AXES}
        for axis, size in wanted.items():
            if size > getattr(last, axis):
                raise PlanError(
                    f"student {number} of nest.sizes has {axis} {size}",
                    why=f"each student lies inside the one before it, which has {axis} {getattr(last, axis)}",
                    fix="list them from large to small in every axis",
                )
        cut = {axis: size for axis, size in wanted.items() if size != getattr(before, axis)}
        coupled = [axis for axis in ("hidden", "heads", "kv_heads") if axis in cut]
        if anatomy.coupled and coupled:
            raise PlanError(
                f"cannot nest {coupled[0]} of {anatomy.family}",
                why="its code computes head_dim as hidden / heads, so both change what the other means",
                fix="nest only ffn and layers of this family",
            )
        after = target(anatomy, Prune.model_validate(cut))[0] if cut else before
        if after == last:
            raise PlanError(
                f"student {number} of nest.sizes is not smaller than the one before it",
                why=f"both have {after}",
                fix="leave one of them out",
            )
        if after.heads // after.kv_heads > last.heads // last.kv_heads:
            raise PlanError(
                f"student {number} of nest.sizes has more query heads in a group than the one before it",
                why=f"{after.heads} heads in {after.kv_heads} groups do not lie inside {last.heads} in {last.kv_heads}",
                fix=f"heads {after.kv_heads * (last.heads // last.kv_heads)}, or more kv_heads",
            )
        listed.append(after)
    return tuple(listed)


def nested_axes(sizes: Sequence[Arch]) -> frozenset[str]:
    """The axes in which sizes differ.

    >>> large = Arch(layers=4, hidden=8, ffn=16, heads=2, kv_heads=2, head_dim=4, vocab=9)
    >>> sorted(nested_axes([large, large.at(ffn=8), large.at(ffn=4, layers=2)]))
    ['ffn', 'layers']
    """
    return frozenset(axis for axis in CUT_AXES if len({getattr(arch, axis) for arch in sizes}) > 1)


def sorting_plan(anatomy: Anatomy, scores: Importance, *, axes: Collection[str]) -> Plan:
    """A plan that keeps every entry and sorts those of `axes` by score, best first. For equal scores in the old order.

    `trim` with it gives the same function: permuting the entries of an axis in all weights changes nothing.
    """
    before = anatomy.sizes

    def order(axis: str, row: Tensor | None, size: int) -> tuple[int, ...]:
        if axis not in axes:
            return tuple(range(size))
        assert row is not None, "an axis that is sorted needs scores"
        return tuple(rank(row).tolist())

    def row(scored: Tensor | None, layer: int) -> Tensor | None:
        return None if scored is None else scored[layer]

    per_group = before.heads // before.kv_heads
    ffn, heads, groups = [], [], []
    for layer in range(before.layers):
        ffn.append(order("ffn", row(scores.ffn, layer), before.ffn))
        ranked = order("kv_heads", row(scores.kv_heads, layer), before.kv_heads)
        members: list[int] = []
        for group in ranked:
            first, scored = group * per_group, row(scores.heads, layer)
            inside = None if scored is None else scored[first : first + per_group]
            members += [first + head for head in order("heads", inside, per_group)]
        groups.append(ranked)
        heads.append(tuple(members))
    return Plan(
        family=anatomy.family,
        before=before,
        after=before,
        layers=tuple(range(before.layers)),
        hidden=order("hidden", scores.hidden, before.hidden),
        ffn=tuple(ffn),
        heads=tuple(heads),
        kv_heads=tuple(groups),
        gain="none",
    )


def prefix_plan(anatomy: Anatomy, after: Arch, *, layers: Sequence[int], gain: Gain = "none") -> Plan:
    """The plan that keeps the first entries of every axis of a sorted model, and these layers."""
    before = anatomy.sizes
    per_group, kept = before.heads // before.kv_heads, after.heads // after.kv_heads
    heads = tuple(group * per_group + head for group in range(after.kv_heads) for head in range(kept))
    return Plan(
        family=anatomy.family,
        before=before,
        after=after,
        layers=tuple(layers),
        hidden=tuple(range(after.hidden)),
        ffn=(tuple(range(after.ffn)),) * after.layers,
        heads=(heads,) * after.layers,
        kv_heads=(tuple(range(after.kv_heads)),) * after.layers,
        gain=gain,
    )


def nested_layers(scores_L: Float[Tensor, " layers"], numbers: Sequence[int]) -> list[tuple[int, ...]]:
    """For every number of layers the ones that stay: those with the best scores, in their order.

    >>> import torch
    >>> nested_layers(torch.tensor([0.5, 0.1, 0.9]), [3, 2, 1])
    [(0, 1, 2), (0, 2), (2,)]
    """
    ranked = rank(scores_L).tolist()
    return [tuple(sorted(ranked[:number])) for number in numbers]
