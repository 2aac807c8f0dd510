"""Layer collapse: the differences of removed layers are added to the layer before them, instead of being lost.

LaCo, arXiv 2402.11187, Sec. 2. With theta_l all parameters of layer l, attention and MLP and norms, merging m layers
into the one before them gives

    theta*_l = theta_l + sum_{k=1..m} (theta_{l+k} - theta_l)

and layers l+1 .. l+m are dropped. For m = 1 this is theta_{l+1}. This follows the text of the paper. The notebook that
was published with it subtracts the layer that it has already changed, and leaves norms alone: its merged layer has the
matrices of the last of the layers and the norms of the first. Merging changes the teacher's weights. Then
`halve.cut.surgery.trim.trim` drops the layers as in any other cut.

Sums are float64 and rounded once to the parameter's own type.

Legend: B batch, S seq, D hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from halve.anatomy import Anatomy
from halve.cut.layers import removal
from halve.cut.layers.removal import Trace
from halve.cut.score.calibration import Calibration
from halve.cut.score.importance import token_cosine
from halve.errors import AnatomyError, CorpusError, PlanError
from halve.model.finite import came_out, float32_or, require_finite

THRESHOLD_STEP = 0.05
_DEEP = 30


def laco(first: Float[Tensor, "*shape"], following: Sequence[Tensor]) -> Float[Tensor, "*shape"]:
    """One parameter of a layer, merged with those of the m layers after it.

    `theta + sum_k (theta_k - theta)`; with nothing behind, the parameter itself.

    >>> laco(torch.tensor([1.0, 2.0]), [torch.tensor([1.5, 0.0]), torch.tensor([2.0, 3.0])]).tolist()
    [2.5, 1.0]
    """
    base = first.double()
    merged = base + sum((other.double() - base for other in following), torch.zeros_like(base))
    return merged.to(first.dtype)


Rule = Callable[[Tensor, Sequence[Tensor]], Tensor]
"""One parameter of a layer after a merge, of its value and those in the layers that are taken in."""


@dataclass(frozen=True)
class Merge:
    """Layers that collapse into the layer before them, by their numbers in the whole model."""

    into: int
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Collapse:
    """The result of the search: merges in the order in which they are made, and the remaining layers."""

    merges: tuple[Merge, ...]
    kept: tuple[int, ...]
    threshold: float
    """The similarity that every merge had to exceed."""
    similarity: float
    """The similarity of the final merged model with the whole one."""
    passes: float
    """The cost of the search in full forward passes."""


def merges_of(kept: Sequence[int], total: int) -> tuple[Merge, ...]:
    """Every kept layer takes in the removed layers after it. Layers before the first kept one are lost.

    >>> merges_of([0, 3], 6)
    (Merge(into=0, layers=(1, 2)), Merge(into=3, layers=(4, 5)))
    """
    ends = [*kept[1:], total]
    groups = [Merge(layer, tuple(range(layer + 1, end))) for layer, end in zip(kept, ends, strict=True)]
    return tuple(group for group in groups if group.layers)


def merge_layers(model: PreTrainedModel, anatomy: Anatomy, kept: Sequence[int]) -> PreTrainedModel:
    """A copy of the model in which each kept layer has the differences of the removed layers after it.

    All layers are still there, so that `trim` can drop the removed ones. `kept` is in ascending order. Raises
    `AnatomyError` if layers that merge do not have the same parameters.
    """
    return apply_merges(model, anatomy, merges_of(kept, anatomy.sizes.layers))


def apply_merges(
    model: PreTrainedModel, anatomy: Anatomy, merges: Sequence[Merge], *, rule: Rule = laco
) -> PreTrainedModel:
    """A copy of the model with these merges, each made on the result of the earlier ones.

    Raises `AnatomyError` if layers that merge do not have the same parameters.
    """
    result = copy.deepcopy(model)
    _apply(result, anatomy, merges, rule)
    return result


@contextmanager
def _applied(model: PreTrainedModel, anatomy: Anatomy, merges: Sequence[Merge], rule: Rule) -> Iterator[None]:
    """In this context, the model itself is merged. Its own weights are restored on every exit."""
    into = {merge.into for merge in merges}
    weights = {
        name: value.detach().clone() for name, value in model.named_parameters() if anatomy.layer_of(name) in into
    }
    try:
        _apply(model, anatomy, merges, rule)
        yield
    finally:
        _write(model, weights)


def _apply(model: PreTrainedModel, anatomy: Anatomy, merges: Sequence[Merge], rule: Rule) -> None:
    for merge in merges:
        _write(model, _merged(model, anatomy, merge, rule))


def _merged(model: PreTrainedModel, anatomy: Anatomy, merge: Merge, rule: Rule) -> dict[str, Tensor]:
    """The new parameters of the layer that the others collapse into, by name."""
    parameters = dict(model.named_parameters())
    merged = {}
    for name in (n for n in parameters if anatomy.layer_of(n) == merge.into):
        others = [parameters.get(anatomy.in_layer(name, layer)) for layer in merge.layers]
        same = [other for other in others if other is not None and other.shape == parameters[name].shape]
        if len(same) != len(others):
            raise AnatomyError(
                f"cannot merge layers {', '.join(map(str, merge.layers))} into layer {merge.into}",
                why=f"they are not all made of the same parameters: {name} differs",
                fix="set layer_merge: none, or remove other layers",
            )
        merged[name] = rule(parameters[name].detach(), [other.detach() for other in same])
    return merged


@torch.no_grad()
def _write(model: PreTrainedModel, values: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for name, value in values.items():
        parameters[name].copy_(value)


# ---- the search


def search_setting(total: int) -> tuple[int, int]:
    """How many layers a merge turns into one, and the distance of merges, for a model of `total` layers.

    The paper merges four at a time, at a distance of two, in models of 30 layers and more. For few layers this is too
    coarse, and merging pairs would be plain removal. Then it is three at a time, at a distance of one.

    >>> search_setting(32), search_setting(10)
    ((4, 2), (3, 1))
    """
    return (4, 2) if total >= _DEEP else (3, 1)


def laco_search(
    calibration: Calibration,
    *,
    layers: int,
    combine: int = 4,
    interval: int = 2,
    threshold: float = 0.95,
    rule: Rule = laco,
) -> Collapse:
    """Collapse a model to `layers` layers by the paper's procedure. The model is unchanged on return.

    LaCo, Algorithm 1 (`collapse`). The similarity is the cosine between the last hidden states (those that the head
    reads) and those of the whole model, averaged over tokens. The paper tunes the threshold by hand. Here it is lowered
    in steps of 0.05 until the number of layers is reached, if necessary until any similarity is accepted. Results under
    a higher threshold are not measured again.

    The last hidden states of all samples and a copy of the merged layers' weights are kept in main memory. Raises
    `PlanError` for a number of layers that cannot be reached, `CorpusError` for no samples, `CheckpointError` for
    hidden states that are not finite, and `AnatomyError` if layers that merge differ in their parameters.
    """
    total = calibration.anatomy.sizes.layers
    _require_fewer(layers, total)
    _require_samples(calibration.samples_BS)
    similarity = _Similarity(calibration, rule)
    bound = threshold
    while True:
        merges = collapse(total, layers, combine=combine, interval=interval, threshold=bound, similarity=similarity)
        kept = kept_after(merges, total)
        if len(kept) == layers:
            return Collapse(merges, kept, bound, similarity(merges), similarity.passes)
        if bound == -inf:
            raise PlanError(
                f"cannot collapse {total} layers to {layers}",
                why=f"merging {combine} layers into one every {interval} layers leaves {len(kept)} at best",
                fix="merge more layers at a time (combine), or keep more layers",
            )
        bound = bound - THRESHOLD_STEP if bound - THRESHOLD_STEP > -1 else -inf


class _Similarity:
    """The similarity of the last hidden states after merges to those of the whole model. Each is measured once."""

    def __init__(self, calibration: Calibration, rule: Rule) -> None:
        self.calibration, self.rule = calibration, rule
        self.layers = removal.layers_of(calibration.model, calibration.anatomy)
        self.reference: list[Tensor] = []
        self.known: dict[tuple[Merge, ...], float] = {}
        self.passes = self._sweep((), lambda _, before: self.reference.append(before.hidden.cpu()))

    def __call__(self, merges: tuple[Merge, ...]) -> float:
        if merges not in self.known:
            self.known[merges] = self._measured(merges)
        return self.known[merges]

    def _measured(self, merges: tuple[Merge, ...]) -> float:
        sums = torch.zeros((), dtype=torch.float64)

        def whole(b: int, before: Trace) -> None:
            cosine_BS = token_cosine(before.hidden, self.reference[b].to(before.hidden.device))
            sums.add_(cosine_BS.sum(dtype=torch.float64).cpu())

        gone = [layer for merge in merges for layer in merge.layers]
        with _applied(self.calibration.model, self.calibration.anatomy, merges, self.rule):
            self.passes += self._sweep(gone, whole)
        return _finite(sums.item() / self.calibration.samples_BS.numel(), merges[-1])

    def _sweep(self, removed: Sequence[int], whole: Callable[[int, Trace], None]) -> float:
        """A pass over all samples without these layers."""
        batches, progress = self.calibration.batches, self.calibration.progress
        return removal.sweep(
            self.layers, batches, (), removed=removed, whole=whole, each=removal.ignore, progress=progress
        )


def collapse(
    total: int,
    layers: int,
    *,
    combine: int,
    interval: int,
    threshold: float,
    similarity: Callable[[tuple[Merge, ...]], float],
) -> tuple[Merge, ...]:
    """The merges that LaCo's Algorithm 1 makes under one threshold, stopping at `layers` layers.

    It starts from the back. The current layer takes in the `combine` - 1 layers after it. If the `similarity` with all
    merges so far exceeds the threshold, the merge is kept, and the position moves `interval` layers toward the front
    (or more, if fewer than `combine` layers would be left after it). Otherwise the merge is undone, and the position
    moves by one. Positions count the remaining layers, so a layer may be merged again. Only the last merge may take in
    fewer layers, if `combine` - 1 would overshoot `layers`.
    """
    assert combine > 1, "a merge takes in at least one layer"
    assert interval > 0, "places move to the front"
    merges: tuple[Merge, ...] = ()
    left = tuple(range(total))
    place = max(0, total - combine)
    while place >= 0 and len(left) > layers:
        count = min(combine - 1, len(left) - place - 1, len(left) - layers)
        tried = (*merges, Merge(left[place], left[place + 1 : place + 1 + count]))
        if similarity(tried) > threshold:
            merges, left = tried, kept_after(tried, total)
            place = min(place - interval, max(0, len(left) - combine))
        else:
            place -= 1
    return merges


def kept_after(merges: Sequence[Merge], total: int) -> tuple[int, ...]:
    """The layers that no merge has taken in."""
    gone = {layer for merge in merges for layer in merge.layers}
    return tuple(layer for layer in range(total) if layer not in gone)


def _require_fewer(layers: int, total: int) -> None:
    if not 0 < layers < total:
        raise PlanError(
            f"cannot collapse {total} layers to {layers}",
            why="at least one layer must be removed and one kept",
            fix=f"keep between 1 and {total - 1} layers (--layers)",
        )


def _require_samples(samples_BS: Tensor) -> None:
    if len(samples_BS) == 0:
        raise CorpusError(
            "no samples to compare merged layers with",
            why="the calibration text is shorter than one sample",
            fix="give more text in data.train, or a smaller data.context",
        )


def _finite(value: float, merge: Merge) -> float:
    require_finite(
        "hidden states",
        value,
        where=f" with layers {', '.join(map(str, merge.layers))} merged into {merge.into}",
        why=came_out(of="the merged model"),
        fix=float32_or("set layer_merge: none"),
    )
    return value
