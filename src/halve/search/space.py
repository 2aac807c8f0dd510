"""The legal shapes of a search: every number of layers with every width, from the anatomy and the recipe's axes.

A shape is legal here by arithmetic: groups keep equally many query heads, coupled widths move together, refused axes
stay whole. What a family's config refuses beyond that is found where a shape is chosen (`sizes.is_legal`).

Legend: D numbers of layers, W choices of hidden and heads, F choices of ffn.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import lcm

import numpy as np

from halve.anatomy import Anatomy, Arch
from halve.anatomy.many import Integers, Tabulated
from halve.cut.plan.sizes import can, step_of
from halve.errors import PlanError
from halve.recipe.searching import Freedom, Search, SearchedAxis


@dataclass(frozen=True, eq=False)
class Space:
    """The legal shapes of a model: `depths` x `widths` x `ffns`."""

    anatomy: Anatomy
    depths: tuple[int, ...]
    """Numbers of layers, the largest first."""
    widths: tuple[tuple[int, int, int], ...]
    """hidden, heads and kv_heads, the widest hidden first."""
    ffns: tuple[int, ...]
    """Sizes of ffn, the largest first."""
    keep: tuple[int, ...] = ()
    """Layers that every shape keeps."""

    def __len__(self) -> int:
        return len(self.depths) * len(self.widths) * len(self.ffns)

    @cached_property
    def sizes(self) -> dict[str, Integers]:
        """The sizes of all axes but layers: [W, 1], and [1, F] for ffn."""
        widths = np.array(self.widths, dtype=np.int64)
        hidden, heads, kv_heads = (widths[:, column, None] for column in range(3))
        before = self.anatomy.sizes
        fixed = {axis: np.full((1, 1), getattr(before, axis), dtype=np.int64) for axis in ("head_dim", "vocab")}
        ffn = np.array(self.ffns, dtype=np.int64)[None, :]
        return {"hidden": hidden, "heads": heads, "kv_heads": kv_heads, "ffn": ffn, **fixed}

    @property
    def order(self) -> tuple[int, ...]:
        """The layers in the order in which shapes take them up: those that stay, then the first others."""
        others = (layer for layer in range(self.anatomy.sizes.layers) if layer not in self.keep)
        return (*self.keep, *others)

    @cached_property
    def tabulated(self) -> Tabulated:
        """What one layer costs at every width, the layers in `order`."""
        ledger = self.anatomy.ledger
        return Tabulated.of(replace(ledger, layers=tuple(ledger.layers[i] for i in self.order)), self.sizes)

    def arch(self, layers: int, width: int, ffn: int) -> Arch:
        """The shape with so many layers, the width and the ffn of these places."""
        hidden, heads, kv_heads = self.widths[width]
        return self.anatomy.sizes.at(layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, ffn=self.ffns[ffn])

    @classmethod
    def whole(cls, anatomy: Anatomy) -> Space:
        """The space of the model itself alone."""
        return cls.alone(anatomy, anatomy.sizes)

    @classmethod
    def alone(cls, anatomy: Anatomy, arch: Arch, keep: Sequence[int] = ()) -> Space:
        """The space of one shape, which keeps these layers."""
        return cls(anatomy, (arch.layers,), ((arch.hidden, arch.heads, arch.kv_heads),), (arch.ffn,), tuple(keep))


def legal_shapes(anatomy: Anatomy, search: Search) -> Space:
    """The space that `search.axes` and `search.layers` leave.

    Without a word about an axis: hidden and ffn shrink in steps of `sizes.step_of`, key-value groups go together with
    their query heads, every number of layers is allowed. Raises `PlanError` for an axis that cannot be cut, a size that
    the model does not have, and layers that are not there.
    """
    before = anatomy.sizes
    for axis, freedom in search.axes.items():
        _require_free(anatomy, axis, freedom)
    hiddens = _sizes(anatomy, search, "hidden", _hidden_step(anatomy))
    widths = [
        (hidden, heads, kv_heads)
        for hidden in hiddens
        for heads, kv_heads in _heads(anatomy, search)
        if not anatomy.coupled or hidden == heads * before.head_dim
    ]
    if not widths:
        raise _no_width(anatomy)
    ffns = _sizes(anatomy, search, "ffn", step_of(before.ffn))
    return Space(anatomy, _depths(anatomy, search), tuple(widths), tuple(ffns), search.layers.keep)


def _no_width(anatomy: Anatomy) -> PlanError:
    before = anatomy.sizes
    what = f"search.axes leaves no width of {anatomy.family}"
    if anatomy.coupled:
        return PlanError(
            what,
            why=f"its code computes head_dim as hidden / heads, and head_dim {before.head_dim} is never cut",
            fix=f"allow heads and hidden together, hidden in multiples of {before.head_dim}",
        )
    return PlanError(
        what,
        why="no heads that are allowed divide into the groups that are allowed"
        f" (this model: {before.heads} heads / {before.kv_heads} groups = {before.heads // before.kv_heads})",
        fix="leave search.axes.heads out, so that heads go with their groups",
    )


def _require_free(anatomy: Anatomy, axis: SearchedAxis, freedom: Freedom) -> None:
    whole = getattr(anatomy.sizes, axis)
    in_ones = axis == "kv_heads" and anatomy.sizes.heads == anatomy.sizes.kv_heads and can(anatomy, "heads")
    if freedom != "frozen" and not can(anatomy, axis) and not in_ones:
        raise PlanError(
            f"search.axes.{axis} cannot be cut in {anatomy.family}",
            why=anatomy.refusals[axis],
            fix=f"leave search.axes.{axis} out, or set it to frozen",
        )
    if isinstance(freedom, tuple) and max(freedom) > whole:
        raise PlanError(
            f"search.axes.{axis} lists {max(freedom)}, this {anatomy.family} has {whole}",
            why="pruning can only remove",
            fix=f"list sizes from 1 to {whole}",
        )
    if isinstance(freedom, int) and freedom > whole:
        raise PlanError(
            f"search.axes.{axis} in steps of {freedom} leaves nothing of {whole}",
            why="sizes are multiples of the step, or the whole",
            fix=f"give a step of {whole} or less, or frozen",
        )


def _sizes(anatomy: Anatomy, search: Search, axis: SearchedAxis, usual_step: int) -> list[int]:
    """The sizes of an axis, the largest first. The whole size is among them unless a list leaves it out."""
    whole, freedom = getattr(anatomy.sizes, axis), search.axes.get(axis, "allowed")
    if freedom == "frozen" or not can(anatomy, axis):
        return [whole]
    if isinstance(freedom, tuple):
        return sorted(set(freedom), reverse=True)
    step = freedom if isinstance(freedom, int) else usual_step
    return _multiples(whole, step)


def _multiples(whole: int, step: int) -> list[int]:
    """
    >>> _multiples(10, 4)
    [10, 8, 4]
    """
    return list(dict.fromkeys((whole, *range(whole // step * step, 0, -step))))


def _hidden_step(anatomy: Anatomy) -> int:
    """Widths stay multiples that kernels and quantization like, and that config validation accepts."""
    before = anatomy.sizes
    return lcm(step_of(before.hidden), before.head_dim if anatomy.coupled else before.heads)


def _heads(anatomy: Anatomy, search: Search) -> list[tuple[int, int]]:
    """The choices of heads and kv_heads: groups with all their query heads, or with fewer where heads are allowed.

    Heads that are frozen by name keep their number, and with it all groups: a group never gets more heads.
    """
    before = anatomy.sizes
    per_group = before.heads // before.kv_heads
    of_heads, of_groups = search.axes.get("heads"), search.axes.get("kv_heads", "allowed")
    in_ones = before.heads == before.kv_heads
    if in_ones:
        return [(count, count) for count in _heads_in_ones(anatomy, search)]
    groups = _counts(of_groups, before.kv_heads) if can(anatomy, "kv_heads") else [before.kv_heads]
    if of_heads == "frozen":
        return [(before.heads, group) for group in groups if group == before.kv_heads]
    if of_heads is None and anatomy.coupled:
        of_heads = "allowed"
    if of_heads is None or not can(anatomy, "heads"):
        return [(group * per_group, group) for group in groups]
    allowed = set(_counts(of_heads, before.heads))
    pairs = ((group * inside, group) for group in groups for inside in range(per_group, 0, -1))
    return [(heads, group) for heads, group in pairs if heads in allowed]


def _heads_in_ones(anatomy: Anatomy, search: Search) -> list[int]:
    """The choices where every group has one head: the two are one axis, and what is said under either name holds."""
    whole = anatomy.sizes.heads
    if not can(anatomy, "heads"):
        return [whole]
    named = [search.axes[axis] for axis in ("kv_heads", "heads") if axis in search.axes]
    usual: Freedom = "allowed" if anatomy.coupled or can(anatomy, "kv_heads") else "frozen"
    of_each = [_counts(freedom, whole) for freedom in named or [usual]]
    counts = [count for count in of_each[0] if all(count in others for others in of_each)]
    if not counts:
        kv_heads, heads = map(_some, of_each)
        raise PlanError(
            f"search.axes.heads and search.axes.kv_heads leave no number of heads of {anatomy.family}",
            why=f"each of its groups has one head, and heads leaves {heads}, kv_heads leaves {kv_heads}",
            fix="leave one of the two out, or give them a size in common",
        )
    return counts


def _counts(freedom: Freedom, whole: int) -> list[int]:
    if isinstance(freedom, tuple):
        return sorted(set(freedom), reverse=True)
    return [whole] if freedom == "frozen" else _multiples(whole, 1 if freedom == "allowed" else freedom)


def _depths(anatomy: Anatomy, search: Search) -> tuple[int, ...]:
    whole, wanted = anatomy.sizes.layers, search.layers
    missing = [layer for layer in wanted.keep if layer >= whole]
    if missing or (wanted.min or 0) > whole:
        asked = f"keeps layer {missing[0]}" if missing else f"wants at least {wanted.min} layers"
        raise PlanError(
            f"search.layers {asked}, this {anatomy.family} has {whole}",
            why=f"its layers have the numbers 0 to {whole - 1}",
            fix=f"name layers from 0 to {whole - 1}, and a min of at most {whole}",
        )
    least, most = max(wanted.min or 1, len(wanted.keep)), wanted.max or whole
    depths = [size for size in _sizes(anatomy, search, "layers", 1) if least <= size <= most]
    if not depths:
        raise PlanError(
            f"search allows no number of layers of {anatomy.family}",
            why=f"search.layers leaves {least} to {most}, search.axes.layers leaves"
            f" {_some(_sizes(anatomy, search, 'layers', 1))}",
            fix="give the two a number in common",
        )
    return tuple(depths)


def _some(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes[:6])) + (", ..." if len(sizes) > 6 else "")


def cut_axes(before: Arch, arch: Arch, axes: Iterable[str] = ("hidden", "ffn", "kv_heads", "heads")) -> frozenset[str]:
    """The axes of width that a shape cuts.

    >>> whole = Arch(layers=2, hidden=8, ffn=16, heads=4, kv_heads=2, head_dim=2, vocab=9)
    >>> sorted(cut_axes(whole, whole.at(ffn=8, heads=2, kv_heads=1)))
    ['ffn', 'heads', 'kv_heads']
    """
    return frozenset(axis for axis in axes if getattr(arch, axis) < getattr(before, axis))


def is_part(arch: Arch, whole: Arch) -> bool:
    """Whether a shape has no axis larger than another one's, and a smaller one.

    >>> whole = Arch(layers=2, hidden=8, ffn=16, heads=4, kv_heads=2, head_dim=2, vocab=9)
    >>> is_part(whole.at(ffn=8), whole), is_part(whole, whole), is_part(whole.at(ffn=8), whole.at(heads=2, kv_heads=1))
    (True, False, False)
    """
    return arch != whole and all(size <= whole.sizes[axis] for axis, size in arch.sizes.items())
