"""Head residual merge: kept query heads take over residuals of removed ones.

2407.14679, Sec. 2.3. Of L heads ranked by importance the first K stay, and kept head i takes

    head_i + c (head_i - head_{2K-i+1}),    i = 2K - L + 1 .. K

so that the least important kept head is paired with the most important removed one. Differences from the paper:

- the paper prints `i = K - (L - K) .. K`, which has one pair too many: 2K - i + 1 would then be L + 1;
- the paper's c is 1; LaCo, which it follows, has the other sign (c = -1). Here c is a parameter, and 0 is off;
- pairs are inside one key-value group, because a query head is of no use with the keys of another group. Then only the
  weights of query heads change: rows of the query projection and its bias, columns of the output projection. If every
  head has its own key and value, these change too, and the layer is one group;
- with L > 2K only the first K removed heads are paired with a kept one. The others are removed without a merge.

Legend: N weights of one head in one parameter.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from halve.anatomy import Anatomy
from halve.cut.plan.plan import Importance, Plan
from halve.cut.score.importance import rank
from halve.cut.score.structures import AxisPlace, places


def merged(kept: Float[Tensor, "*n"], removed: Float[Tensor, "*n"], *, coefficient: float) -> Float[Tensor, "*n"]:
    """A kept head's weights with its residual to a removed head's, `kept + c (kept - removed)`, in float32 or better.

    >>> merged(torch.tensor([2.0]), torch.tensor([3.0]), coefficient=1.0).tolist()
    [1.0]
    """
    wide = torch.promote_types(kept.dtype, torch.float32)
    value: Tensor = kept.to(wide) + coefficient * (kept.to(wide) - removed.to(wide))
    return value.to(kept.dtype)


def pairs(kept: Sequence[int], removed: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs of a kept and a removed head. Both lists are ordered from the most to the least important.

    >>> pairs([7, 5, 6], [1, 2])  # ranks 1 2 3 | 4 5: the third meets the fourth, the second the fifth
    [(6, 1), (5, 2)]
    """
    return list(zip(reversed(kept), removed, strict=False))


def merge_heads(
    model: PreTrainedModel, plan: Plan, anatomy: Anatomy, scores: Importance, *, coefficient: float
) -> PreTrainedModel:
    """A copy of the model whose kept heads carry residuals of the heads that the plan removes. `trim` then removes
    them.

    Heads are ranked by `scores.heads`. Groups that the plan removes completely are not merged. With coefficient 0, or
    if no head is removed, the copy is bit-identical.
    """
    result = copy.deepcopy(model)
    if coefficient == 0:
        return result
    assert scores.heads is not None, "a merge ranks heads"
    parameters, old = dict(result.named_parameters()), dict(model.named_parameters())
    matrices = list(_matrices(anatomy))
    with torch.no_grad():
        for number, layer in enumerate(plan.layers):
            met = list(_met(plan, number, scores.heads[layer]))
            for place in (place for place in matrices if place.layer == layer):
                target, source = (values[place.name].movedim(place.dim, 0) for values in (parameters, old))
                for kept, removed in met:
                    here, there = place.positions[kept], place.positions[removed]
                    target[here] = merged(source[here], source[there], coefficient=coefficient)
    return result


def _matrices(anatomy: Anatomy) -> Iterator[AxisPlace]:
    """Weights and biases of the projections of query heads, and of keys and values if each head has its own."""
    multi_head = anatomy.sizes.heads == anatomy.sizes.kv_heads
    for axis in ("heads", "kv_heads") if multi_head else ("heads",):
        for place in places(anatomy, axis):
            if place.name.rpartition(".")[0] in anatomy.modules:
                yield place


def _met(plan: Plan, number: int, scores: Tensor) -> Iterator[tuple[int, int]]:
    before, kept = plan.before, set(plan.heads[number])
    per_group = before.heads // before.kv_heads
    if per_group == 1:
        cells = [range(before.heads)]
    else:
        cells = [range(group * per_group, (group + 1) * per_group) for group in plan.kv_heads[number]]
    order = rank(scores).tolist()
    for cell in cells:
        ranked = [head for head in order if head in cell]
        yield from pairs([h for h in ranked if h in kept], [h for h in ranked if h not in kept])
