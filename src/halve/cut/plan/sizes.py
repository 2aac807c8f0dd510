"""Valid sizes: those given by hand, and those near a budget. Reads no weights and builds no model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from math import lcm
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from halve.anatomy import CUT_AXES, Anatomy, Arch, Counts
from halve.anatomy.configs import has_heads, key, resized
from halve.anatomy.kinds import require_same
from halve.errors import PlanError
from halve.recipe.schema import Prune

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Candidate:
    """Valid sizes and their counts."""

    arch: Arch
    counts: Counts
    kept_layers: tuple[int, ...] | None = None


# ---- sizes


def target(anatomy: Anatomy, prune: Prune) -> tuple[Arch, tuple[int, ...] | None]:
    """The valid sizes that a recipe asks for, and the kept layers if it names the layers to drop.

    Raises `PlanError` for invalid sizes (naming valid ones) and for a budget that cannot be met (naming the nearest).
    """
    if (asked_budget := budget_of(anatomy, prune)) is not None:
        return _nearest(anatomy, asked_budget[0], total=asked_budget[1]).arch, None
    before = anatomy.sizes
    kept = None
    if prune.drop_layers is not None:
        dropped = parse_layers(prune.drop_layers, before.layers)
        kept = tuple(layer for layer in range(before.layers) if layer not in dropped)
    asked = {a: getattr(prune, a) for a in ("hidden", "ffn", "heads", "kv_heads", "layers") if getattr(prune, a)}
    if kept is not None:
        asked["layers"] = len(kept)
    for axis in asked:  # an axis in the recipe is refused by its own name, before axes that would follow from it
        _refuse(anatomy, axis, asked[axis])
    after = before.at(**_implied(anatomy, asked))
    require_sizes(anatomy, after, kept_layers=kept)
    if kept is not None:
        require_same(anatomy.config, anatomy.layers_path, kept)
    return after, kept


def require_sizes(anatomy: Anatomy, after: Arch, *, kept_layers: Sequence[int] | None = None) -> None:
    """Refuse sizes to which the model cannot be cut. If the kept layers are not known yet, the first are used."""
    before = anatomy.sizes
    for axis in CUT_AXES:
        _refuse(anatomy, axis, getattr(after, axis))
    _check_groups(before, after)
    if anatomy.coupled and after.hidden != after.heads * after.head_dim:
        raise PlanError(
            f"cannot keep hidden {after.hidden} with {after.heads} heads in {anatomy.family}",
            why=f"its code computes head_dim as hidden / heads: {after.hidden} / {after.heads} is not {after.head_dim}",
            fix=f"--hidden {after.heads * after.head_dim}, or --heads {max(1, after.hidden // after.head_dim)}",
        )
    kept = tuple(range(after.layers)) if kept_layers is None else kept_layers
    resized(anatomy.config, config_sizes(anatomy, after), kept_layers=kept)


def is_legal(anatomy: Anatomy, after: Arch) -> bool:
    """Whether `require_sizes` accepts these sizes. It also runs the family's own validation."""
    try:
        require_sizes(anatomy, after)
    except PlanError:
        return False
    return True


def _refuse(anatomy: Anatomy, axis: str, new: int) -> None:
    old = getattr(anatomy.sizes, axis)
    if new == old:
        return
    if axis in anatomy.refusals and not (axis == "kv_heads" and _grouped_in_ones(anatomy.sizes)):
        raise PlanError(
            f"cannot cut {axis} of {anatomy.family}",
            why=anatomy.refusals[axis],
            fix=f"leave {axis} at {old}; halve inspect lists what can be cut",
        )
    if not 0 < new <= old:
        raise PlanError(
            f"cannot keep {new} of {old} {axis}",
            why="pruning can only remove, and at least one must remain",
            fix=f"--{axis.replace('_', '-')} between 1 and {old}" if old > 1 else f"leave {axis} at 1",
        )


def _grouped_in_ones(arch: Arch) -> bool:
    return arch.heads == arch.kv_heads


def _check_groups(before: Arch, after: Arch) -> None:
    per_group = before.heads // before.kv_heads
    if after.heads % after.kv_heads == 0 and after.heads // after.kv_heads <= per_group:
        return
    legal = [after.kv_heads * n for n in range(1, per_group + 1)]
    groups = [g for g in range(1, before.kv_heads + 1) if after.heads % g == 0 and after.heads // g <= per_group]
    trim = f"; or trim groups as well, e.g. --heads {after.heads} --kv-heads {groups[-1]}" if groups else ""
    raise PlanError(
        f"cannot keep {after.heads} query heads in {after.kv_heads} key-value groups",
        why="every group keeps the same number of query heads"
        f" (this model: {before.heads} heads / {before.kv_heads} groups = {per_group})",
        fix=f"--heads {_either(legal)}{trim}",
    )


def _either(values: Sequence[int]) -> str:
    words = [str(value) for value in values]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]


def _implied(anatomy: Anatomy, asked: dict[str, int]) -> dict[str, int]:
    """Sizes that follow from those given: groups of one are cut with their heads, coupled widths together."""
    before, implied = anatomy.sizes, dict(asked)
    if _grouped_in_ones(before) and "kv_heads" in asked:
        implied.setdefault("heads", asked["kv_heads"])
    if anatomy.coupled:
        if "hidden" in asked and "heads" not in implied and asked["hidden"] % before.head_dim == 0:
            implied["heads"] = asked["hidden"] // before.head_dim
        if "heads" in implied:
            implied.setdefault("hidden", implied["heads"] * before.head_dim)
    if _grouped_in_ones(before) and "heads" in implied:
        implied.setdefault("kv_heads", implied["heads"])
    return implied


def config_sizes(anatomy: Anatomy, arch: Arch) -> dict[str, int]:
    """The sizes that a config of these sizes states; head_dim only where the code reads it."""
    sizes = {axis: size for axis, size in arch.sizes.items() if axis not in ("layers", "vocab")}
    if anatomy.coupled or not has_heads(anatomy.config):
        del sizes["head_dim"]
    return {axis: size for axis, size in sizes.items() if axis == "head_dim" or key(anatomy.config, axis)}


# ---- budgets

BUDGET_TOLERANCE = 0.05  # 2407.14679, Sec. 2.4 searches within 5 % of the budget


def candidates(anatomy: Anatomy, budget: int, *, total: bool = True, context: int = 4096) -> list[Candidate]:
    """Legal sizes within 5 % of a budget of parameters (`total`, or the non-embedding ones), best guess first.

    Width before depth (2407.14679, practice 4), attention heads kept (2408.11796, Sec. 6), hidden and ffn shrunk
    evenly: the order is by distance from the budget beyond half a percent, then by unevenness. The nearest pure
    depth cut follows if it is within reach. Where hidden and heads are coupled, heads follow hidden.
    """

    return list(_candidates(anatomy, budget, total=total, context=context))


def _candidates(anatomy: Anatomy, budget: int, *, total: bool, context: int = 4096) -> Iterator[Candidate]:
    """The same one by one: whether sizes are legal is asked of the family's config, and takes longer than counting."""

    def size(counts: Counts) -> int:
        return counts.params if total else counts.non_embedding

    before = anatomy.sizes
    within, away = [], []
    for arch in _areas(anatomy):
        counts = anatomy.ledger.count(arch, context=context)
        if abs(size(counts) / budget - 1) <= BUDGET_TOLERANCE:
            within.append(Candidate(arch, counts))
            away.append(abs(size(counts) / budget - 1))
    kept = [[getattr(c.arch, axis) / getattr(before, axis) for c in within] for axis in ("hidden", "ffn")]
    within = [within[i] for i in np.argsort(rank_candidates(np.array(away), np.array(kept)), kind="stable")]
    yield from _legal(anatomy, within)
    depth = [Candidate(arch, anatomy.ledger.count(arch, context=context)) for arch in _depths(anatomy)]
    near = [c for c in depth if abs(size(c.counts) / budget - 1) <= BUDGET_TOLERANCE]
    near.sort(key=lambda c: abs(size(c.counts) - budget))
    yield from islice(_legal(anatomy, near), 1)


def _legal(anatomy: Anatomy, found: Iterable[Candidate]) -> Iterator[Candidate]:
    return (candidate for candidate in found if is_legal(anatomy, candidate.arch))


def budget_of(anatomy: Anatomy, prune: Prune) -> tuple[int, bool] | None:
    """The parameters that a recipe allows, and whether the embeddings count; None where it gives sizes by hand."""
    if prune.params is not None:
        return parse_count(prune.params), True
    if prune.non_embedding_ratio is not None:
        kept = round(prune.non_embedding_ratio * anatomy.ledger.count(anatomy.sizes).non_embedding)
        return max(1, kept), False
    return None


def near(anatomy: Anatomy, prune: Prune, *, context: int = 4096) -> list[Candidate]:
    """What `halve plan` lists: candidates near a budget, or the one architecture whose sizes are given.

    Raises what `target` raises.
    """
    arch, kept = target(anatomy, prune)
    if (budget := budget_of(anatomy, prune)) is not None:
        return candidates(anatomy, budget[0], total=budget[1], context=context)
    return [Candidate(arch, anatomy.ledger.count(arch, kept_layers=kept, context=context), kept)]


def rank_candidates(away: Array, kept: Array) -> Array:
    """The lower the better: distance from the budget beyond half a percent, then how unevenly the axes shrink.

    `kept` has the share that is kept of each axis along its first dimension; further ones as `away`.
    """
    shrunk = np.log(kept)
    uneven: Array = shrunk.max(0) - shrunk.min(0)
    return np.maximum(0.0, away - 0.005) * 20 + uneven


def widths(anatomy: Anatomy) -> list[Arch]:
    """Every hidden, the whole first, with the ffn whole; where heads are coupled to hidden, they follow."""
    before = anatomy.sizes
    # Widths stay multiples that kernels and quantization like, and that config validation accepts.
    step = lcm(step_of(before.hidden), before.head_dim if anatomy.coupled else before.heads)
    smaller = range(before.hidden // step * step, 0, -step) if can(anatomy, "hidden") else ()
    archs = []
    for hidden in dict.fromkeys((before.hidden, *smaller)):
        coupled = {"heads": hidden // before.head_dim, "kv_heads": before.kv_heads} if anatomy.coupled else {}
        if anatomy.coupled and _grouped_in_ones(before):
            coupled["kv_heads"] = coupled["heads"]
        arch = before.at(hidden=hidden, **coupled)
        if arch.heads % arch.kv_heads == 0:
            archs.append(arch)
    return archs


def _areas(anatomy: Anatomy) -> list[Arch]:
    """Every hidden with every ffn, but for the whole model."""
    whole = anatomy.sizes.ffn
    step = step_of(whole)
    smaller = range(whole // step * step, 0, -step) if can(anatomy, "ffn") else ()
    archs = (arch.at(ffn=ffn) for arch in widths(anatomy) for ffn in dict.fromkeys((whole, *smaller)))
    return [arch for arch in archs if arch != anatomy.sizes]


def _depths(anatomy: Anatomy) -> list[Arch]:
    """Every number of layers, but for all of them."""
    before = anatomy.sizes
    return [before.at(layers=layers) for layers in range(1, before.layers)] if can(anatomy, "layers") else []


def can(anatomy: Anatomy, axis: str) -> bool:
    """Whether the anatomy lets this axis be cut."""
    return axis not in anatomy.refusals


def step_of(size: int) -> int:
    """A power of two, at most 128 and at most a thirty-second of the size, but 8 at least; 4 for sizes below 512."""
    if size < 512:
        return 4
    step = 8
    while step < 128 and step * 64 <= size:
        step *= 2
    return step


_best: dict[tuple[type, str, int, bool], Candidate] = {}


def _nearest(anatomy: Anatomy, budget: int, *, total: bool) -> Candidate:
    """The first of the candidates. A process looks for it once: a check and each stage ask again."""
    key = (type(anatomy.config), repr(anatomy), budget, total)
    if key not in _best:
        first = next(_candidates(anatomy, budget, total=total), None)
        _best[key] = _none_near(anatomy, budget, total=total) if first is None else first
    return _best[key]


def _none_near(anatomy: Anatomy, budget: int, *, total: bool) -> NoReturn:
    """Raise the `PlanError` that names the nearest sizes."""
    archs = [*_areas(anatomy), *_depths(anatomy)]
    counts = [anatomy.ledger.count(arch) for arch in archs]
    sizes = [c.params if total else c.non_embedding for c in counts]
    by_distance = sorted(range(len(archs)), key=lambda i: abs(sizes[i] - budget))
    near = list(islice((i for i in by_distance if is_legal(anatomy, archs[i])), 3))
    word = "parameters" if total else "non-embedding parameters"
    teacher = anatomy.ledger.count(anatomy.sizes)
    now = format_count(teacher.params if total else teacher.non_embedding)
    if not near:
        raise PlanError(
            f"no valid sizes have about {format_count(budget)} {word}",
            why=f"this {anatomy.family} has {now} of them, and no smaller width or depth is valid",
            fix="name the sizes by hand, such as --heads; halve inspect lists what can be cut",
        )
    raise PlanError(
        f"no valid sizes have about {format_count(budget)} {word}",
        why=f"this {anatomy.family} has {now} of them and can be cut"
        f" to between {format_count(min(sizes))} and {format_count(max(sizes))}",
        fix="nearest: " + "; ".join(f"{format_count(sizes[i])} ({_cut_in(anatomy, archs[i])})" for i in near),
    )


def _cut_in(anatomy: Anatomy, arch: Arch) -> str:
    """The sizes that name a candidate: its layers, or its width as far as that can be cut."""
    if arch.layers < anatomy.sizes.layers:
        return f"layers {arch.layers}"
    return ", ".join(f"{axis} {getattr(arch, axis)}" for axis in ("hidden", "ffn") if can(anatomy, axis))


def parse_count(text: str, *, given_as: str = "", of: str = "parameter") -> int:
    """Read `4.5B`, `350M`, `12k` or a plain number. An error names the flag `given_as` and what is counted.

    Raises `PlanError`.
    """
    units = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
    number, unit = (text[:-1], text[-1].lower()) if text and text[-1].lower() in units else (text, "")
    try:
        value = float(number) * units.get(unit, 1)
    except ValueError:
        value = 0.0
    if not 1 <= value < 1e15:
        flag = f"{given_as} " if given_as else ""
        raise PlanError(
            f"cannot read {flag}{text[:80]!r} as a {of} count",
            why="it is no number from 1 to below 1000T, alone or with k, M, B or T",
            fix="write 4.5B",
        )
    return round(value)


def format_count(count: int) -> str:
    """Three significant digits with a unit.

    >>> format_count(4512700000), format_count(999885952), format_count(1900), format_count(3_800_000_000_000)
    ('4.51B', '1B', '1.9k', '3.8T')
    """
    if count >= 999.5e12:
        return f"{count / 1e12:,.0f}T"
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= 0.9995 * size:
            return f"{count / size:.3g}{unit}"
    return str(count)


def parse_layers(text: str, layers: int) -> frozenset[int]:
    """Read `16-31` or `3,5,7-9` as layer numbers counted from 0."""
    chosen: set[int] = set()
    for part in text.split(","):
        numbers = re.fullmatch(r"\s*([0-9]{1,9})(?:-([0-9]{1,9}))?\s*", part)
        first, last = (int(n) for n in (numbers[1], numbers[2] or numbers[1])) if numbers else (0, -1)
        if last < first:
            raise PlanError(
                f"cannot read {text!r} as layers", why=f"{part!r} is no range", fix="write 16-31 or 3,5,7-9"
            )
        chosen |= {first, *range(first, min(last, layers) + 1)}
    if layers == 1:
        raise PlanError(
            f"cannot drop layers {text}",
            why="the model has one layer and must keep it",
            fix="cut another axis; halve inspect lists what can be cut",
        )
    if max(chosen) >= layers or len(chosen) >= layers:
        raise PlanError(
            f"cannot drop layers {text}",
            why=f"the model has layers 0 to {layers - 1} and must keep one",
            fix=f"name at most {layers - 1} of them, with numbers from 0 to {layers - 1}",
        )
    return frozenset(chosen)
