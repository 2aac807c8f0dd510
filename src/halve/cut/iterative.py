"""Iterative importance: width is cut in steps, and the remaining entries are scored again before each step.

2407.14679, Sec. 2.2 and Table 14: with T steps from size d to d', step i ranks at `d - i (d - d') / T` and keeps the
best of `d - (i + 1) (d - d') / T`. The paper finds no gain over one step. Nothing is trained in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from transformers import PreTrainedModel

from halve.anatomy import Anatomy, Arch, discover
from halve.cut.plan.plan import Importance, Plan, select
from halve.cut.plan.sizes import require_sizes
from halve.cut.surgery.trim import trim
from halve.errors import PlanError
from halve.recipe.schema import Gain

Gains = Callable[[PreTrainedModel, Anatomy, Plan], Mapping[str, float]]


def no_gains(model: PreTrainedModel, anatomy: Anatomy, plan: Plan) -> Mapping[str, float]:
    """No gains: norms are left unchanged."""
    return {}


def select_iteratively(
    model: PreTrainedModel,
    anatomy: Anatomy,
    after: Arch,
    *,
    steps: int,
    score: Callable[[PreTrainedModel, Anatomy], Importance],
    gain: Gain,
    kept_layers: Sequence[int] | None = None,
    gains: Gains = no_gains,
) -> Plan:
    """A plan for the given model, found in `steps` cuts. With one step it is the result of `select` on the scores.

    Layers are dropped in the first step: those not in `kept_layers`, or the least important. Widths shrink by equal
    parts, at the nearest sizes that the family's config accepts. `score` is called before each step on the remaining
    model. `gains` says how norms compensate for fewer channels between the steps (`halve.cut.surgery.gain`). `gain` is
    recorded in the plan for the final cut, which starts from the given model again. The given model is not changed.
    """
    assert steps > 0, "a cut has at least one step"
    chosen: Plan | None = None
    part, part_anatomy = model, anatomy
    path = list(sizes_on_the_way(anatomy, after, steps))
    for number, sizes in enumerate(path):
        layers = kept_layers if number == 0 else None
        plan = select(part_anatomy, sizes, score(part, part_anatomy), gain=gain, kept_layers=layers)
        chosen = plan if chosen is None else composed(chosen, plan)
        if number + 1 < len(path):
            part = trim(part, plan, part_anatomy, gains=gains(part, part_anatomy, plan))
            part_anatomy = discover(part.config)
    assert chosen is not None
    return chosen


def sizes_on_the_way(anatomy: Anatomy, after: Arch, steps: int) -> Iterator[Arch]:
    """The sizes after each step. The last are `after`. A step without a change is left out."""
    before, last = anatomy.sizes, anatomy.sizes
    for step in range(1, steps):
        groups = _part(before.kv_heads, after.kv_heads, step, steps)
        per_group = _part(before.heads // before.kv_heads, after.heads // after.kv_heads, step, steps)
        sizes = after.at(ffn=_part(before.ffn, after.ffn, step, steps), heads=groups * per_group, kv_heads=groups)
        near = _part(before.hidden, after.hidden, step, steps)
        legal = _with_legal_hidden(anatomy, sizes, near, most=last.hidden)
        if legal is not None and legal not in (last, after):
            yield legal
            last = legal
    yield after


def _part(before: int, after: int, step: int, steps: int) -> int:
    return before - round(step * (before - after) / steps)


def _with_legal_hidden(anatomy: Anatomy, sizes: Arch, near: int, *, most: int) -> Arch | None:
    """The sizes with the nearest valid `hidden` between the final one and that of the last step.

    None if the heads allow no such size.
    """
    if anatomy.coupled:
        near = sizes.heads * sizes.head_dim
    for hidden in sorted(range(sizes.hidden, most + 1), key=lambda size: abs(size - near)):
        candidate = sizes.at(hidden=hidden)
        try:
            require_sizes(anatomy, candidate)
        except PlanError:
            continue
        return candidate
    return None


def composed(first: Plan, second: Plan) -> Plan:
    """One plan with the same result as `first`, followed by `second` on its result."""
    rows = {
        axis: tuple(
            tuple(getattr(first, axis)[layer][entry] for entry in kept)
            for layer, kept in zip(second.layers, getattr(second, axis), strict=True)
        )
        for axis in ("ffn", "heads", "kv_heads")
    }
    return Plan(
        family=first.family,
        before=first.before,
        after=second.after,
        layers=tuple(first.layers[layer] for layer in second.layers),
        hidden=tuple(first.hidden[channel] for channel in second.hidden),
        gain=second.gain,
        **rows,
    )
