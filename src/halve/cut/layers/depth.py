"""Which layers are dropped: what is compared, and which set is chosen.

A pattern says which sets of layers are compared, a criterion (`halve.cut.layers.depth_values`) what each is worth. The
methods of the papers are special cases of `choose`:

    ShortGPT (arXiv 2403.03853)             bi, single         the layers that change the direction of their input least
    Gromov et al. (arXiv 2403.17887)        angular, block     the block whose input and output are most alike
    Shortened LLaMA (arXiv 2402.02834)      nll, single        by perplexity; taylor, single by first-order Taylor
    SLEB (arXiv 2402.09025)                 nll, greedy        one by one, each measured in the model that is left
    Nemotron Elastic (arXiv 2511.16664)     logit_mse, greedy
    Minitron (2407.14679, Sec. 2.2)         bi or nll, single
    Llama-Minitron (2408.11796)             task, block        contiguous layers by accuracy downstream

No layer is protected from removal, not even the first and the last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Final

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from halve.cut.layers import depth_values
from halve.cut.layers.depth_values import Compare, Compared
from halve.cut.score.calibration import Calibration
from halve.cut.score.importance import block_importance
from halve.cut.score.scores import Scores
from halve.errors import CorpusError, PlanError, RecipeError
from halve.model.choices import Item
from halve.recipe.schema import DepthCriterion, DepthPattern


@dataclass(frozen=True)
class Removal:
    """A set of layers and the effect of its removal by the criterion. Higher hurts more."""

    layers: tuple[int, ...]
    value: float


@dataclass(frozen=True)
class DepthChoice:
    """The kept layers, and every set that was compared."""

    criterion: DepthCriterion
    pattern: DepthPattern
    kept: tuple[int, ...]
    removals: tuple[Removal, ...]
    """In greedy order: sets of one layer first, each later set holding the layers chosen before it."""
    passes: float
    """The cost of the choice in full forward passes."""
    whole: float | None
    """The value of the criterion for the whole model, or None."""

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    def of(self, remove: int) -> DepthChoice:
        """The choice for another number of layers.

        A comparison of single layers is valid for any number, a greedy one for any up to the compared number, because
        each of its sets holds the one before. That of blocks is valid only for its own.

        >>> removals = (Removal((0,), 3.0), Removal((1,), 1.0), Removal((2,), 2.0))
        >>> DepthChoice("bi", "single", (0, 2), removals, 1.0, None).of(2).kept
        (0,)
        """
        if self.pattern == "single":
            removed = _union(sorted(self.removals, key=_least)[:remove])
            return replace(self, kept=tuple(layer for layer in range(len(self.removals)) if layer not in removed))
        if self.pattern != "greedy":
            return self
        removed, total = (), sum(len(removal.layers) == 1 for removal in self.removals)
        for size in range(1, remove + 1):
            compared = [removal for removal in self.removals if len(removal.layers) == size]
            removed = min(compared, key=_least_beside(removed)).layers
        return replace(self, kept=tuple(layer for layer in range(total) if layer not in removed))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DepthChoice:
        """From `to_json`'s data."""
        return cls(
            criterion=data["criterion"],
            pattern=data["pattern"],
            kept=tuple(data["kept"]),
            removals=tuple(Removal(tuple(r["layers"]), r["value"]) for r in data["removals"]),
            passes=data["passes"],
            whole=data["whole"],
        )


@dataclass(frozen=True)
class PatternResult:
    """The result of a pattern: the layers to remove, the compared sets, and the cost."""

    removed: tuple[int, ...]
    removals: tuple[Removal, ...]
    passes: float
    whole: float | None


# ---- patterns


def single(compare: Compare, num_layers: int, *, remove: int) -> PatternResult:
    """Compare every layer alone and remove those that hurt least. For equal values, the later layer is removed.

    >>> values = {(0,): 3.0, (1,): 1.0, (2,): 2.0}
    >>> compare = lambda sets, removed: Compared(tuple(values[s] for s in sets), 1.0, None)
    >>> single(compare, 3, remove=2).removed
    (1, 2)
    """
    compared, removals = _compare(compare, [(layer,) for layer in range(num_layers)], ())
    order = sorted(removals, key=_least)
    return PatternResult(_union(order[:remove]), removals, compared.passes, compared.whole)


def blocks(compare: Compare, num_layers: int, *, remove: int) -> PatternResult:
    """Compare contiguous blocks of `remove` layers at every position and remove the one that hurts least.

    `removals` are the values by position, as in the papers' figures. For equal values, the later block is removed.
    """
    sets = [tuple(range(start, start + remove)) for start in range(num_layers - remove + 1)]
    compared, removals = _compare(compare, sets, ())
    return PatternResult(min(removals, key=_least).layers, removals, compared.passes, compared.whole)


def greedy(compare: Compare, num_layers: int, *, remove: int) -> PatternResult:
    """Remove one layer at a time: the one that hurts least in the remaining model. For equal values, the later one.

    SLEB, arXiv 2402.09025, Sec. 3. The layers need not be neighbors. Two layers that can replace each other are not
    both removed, which may happen if each is judged alone.
    """
    gone: tuple[int, ...] = ()
    all_removals: list[Removal] = []
    passes, whole = 0.0, None
    for step in range(remove):
        compared, removals = _compare(compare, [(i,) for i in range(num_layers) if i not in gone], gone)
        all_removals += removals
        passes += compared.passes
        whole = compared.whole if step == 0 else whole
        gone = min(removals, key=_least_beside(gone)).layers
    return PatternResult(gone, tuple(all_removals), passes, whole)


def _compare(
    compare: Compare, sets: Sequence[tuple[int, ...]], gone: tuple[int, ...]
) -> tuple[Compared, tuple[Removal, ...]]:
    compared = compare(sets, gone)
    pairs = zip(sets, compared.values, strict=True)
    return compared, tuple(Removal(tuple(sorted({*gone, *chosen})), value) for chosen, value in pairs)


def _least(removal: Removal) -> tuple[float, int]:
    return removal.value, -removal.layers[-1]


def _least_beside(gone: tuple[int, ...]) -> Callable[[Removal], tuple[float, int]]:
    return lambda removal: (removal.value, -next(layer for layer in removal.layers if layer not in gone))


def _union(removals: Sequence[Removal]) -> tuple[int, ...]:
    return tuple(sorted(layer for removal in removals for layer in removal.layers))


PATTERNS: Final[Mapping[DepthPattern, Callable[..., PatternResult]]] = {
    "single": single,
    "block": blocks,
    "greedy": greedy,
}


# ---- the choice


def choose(
    calibration: Calibration,
    *,
    criterion: DepthCriterion,
    pattern: DepthPattern,
    remove: int,
    keep: Collection[int] = (),
    **given: Any,
) -> DepthChoice:
    """Choose `remove` layers to drop, none of `keep`, by one criterion and pattern. The model is not changed.

    `given` are a `seed`, and `items`, `tokenizer` and `scores` where there are some. `task` uses `items` and
    `tokenizer`, `taylor` uses `scores.layer_scores`, and the others use the samples. `bi` of single layers is taken
    from `scores` if they come from a forward pass, and then needs no other pass.

    Raises `PlanError` unless at least one layer goes and one stays, and if every set of layers holds one of `keep`.
    Raises `RecipeError` for `task` without items and `taylor` without layer scores, `CorpusError` for no samples, and
    `CheckpointError` where logits are not finite.
    """
    total = calibration.anatomy.sizes.layers
    _check_count(remove, total)
    compare = _sparing(_comparison(calibration, criterion, pattern, **given), keep)
    result = PATTERNS[pattern](compare, total, remove=remove)
    if set(result.removed) & set(keep):
        raise PlanError(
            f"cannot remove {remove} of {total} layers and keep {', '.join(map(str, sorted(keep)))}",
            why="every set of layers that is compared holds one that has to stay",
            fix="keep fewer layers by name, or more layers in all",
        )
    kept = tuple(layer for layer in range(total) if layer not in result.removed)
    return DepthChoice(criterion, pattern, kept, result.removals, result.passes, result.whole)


def _comparison(
    calibration: Calibration,
    criterion: DepthCriterion,
    pattern: DepthPattern,
    *,
    seed: int,
    items: Sequence[Item] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    scores: Scores | None = None,
) -> Compare:
    if (known := _known(criterion, pattern, scores)) is not None:
        return known
    if criterion == "random":
        return depth_values.random_values(seed)
    if criterion == "task":
        return _task(calibration, items, tokenizer)
    _check_samples(calibration.samples_BS)
    compare: Compare = _MEASURED[criterion](calibration)
    return compare


def _sparing(compare: Compare, keep: Collection[int]) -> Compare:
    """The same comparison, by which a set that holds one of `keep` hurts without bound."""

    def spared(sets: Sequence[tuple[int, ...]], gone: Collection[int]) -> Compared:
        found = compare(sets, gone)
        pairs = zip(sets, found.values, strict=True)
        return replace(found, values=tuple(math.inf if set(keep) & set(held) else value for held, value in pairs))

    return spared if keep else compare


_MEASURED: Final[Mapping[DepthCriterion, Callable[..., Compare]]] = {
    "bi": partial(depth_values.from_states, distance=block_importance),
    "angular": partial(depth_values.from_states, distance=depth_values.angular_distance),
    "nll": depth_values.nll,
    "logit_mse": depth_values.logit_mse,
}


def _known(criterion: DepthCriterion, pattern: DepthPattern, scores: Scores | None) -> Compare | None:
    """Values that were measured before: BI of single layers, and layer scores from gradients."""
    if criterion == "bi" and pattern == "single" and scores is not None and scores.statistics is not None:
        return depth_values.additive(scores.layers)
    if criterion != "taylor":
        return None
    layer_scores: Tensor | None = getattr(scores, "layer_scores", None)
    if layer_scores is None:
        raise RecipeError(
            "depth: taylor needs scores from gradients",
            why="a layer's value is the sum of weight times gradient, and these scores were made without gradients",
            fix="set score.method: taylor, or another score.depth",
        )
    return depth_values.additive(layer_scores)


def _task(calibration: Calibration, items: Sequence[Item], tokenizer: PreTrainedTokenizerBase | None) -> Compare:
    if not items:
        raise RecipeError(
            "depth: task needs multiple-choice items",
            why="layers are compared by the model's answers without them, and no file was given",
            fix="set score.depth_task to a multiple-choice file (JSON lines), or another score.depth",
        )
    assert tokenizer is not None, "items are tokenized"
    model, anatomy = calibration.model, calibration.anatomy
    return depth_values.task(model, anatomy, items, tokenizer, progress=calibration.progress)


def _check_count(remove: int, total: int) -> None:
    if not 0 < remove < total:
        raise PlanError(
            f"cannot remove {remove} of {total} layers",
            why="at least one layer must be removed and one kept",
            fix=f"keep between 1 and {total - 1} layers (--layers)",
        )


def _check_samples(samples_BS: Tensor) -> None:
    if len(samples_BS) == 0:
        raise CorpusError(
            "no samples to compare layers with",
            why="the calibration text is shorter than one sample",
            fix="give more text in data.train, a smaller data.context, or score.depth_samples above 0",
        )
