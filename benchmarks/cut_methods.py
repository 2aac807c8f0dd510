"""The methods that `cut_quality.py` compares: how each scores and cuts, under one interface."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from halve.anatomy import Anatomy, Arch
from halve.cut import apply, trial
from halve.cut.layers import depth, layer_merge
from halve.cut.plan.plan import select
from halve.cut.plan.shapes import to_try
from halve.cut.plan.sizes import target
from halve.cut.repair import refit_scores, ridge
from halve.cut.repair.rotate import student_anatomy
from halve.cut.score import width
from halve.cut.score.calibration import Calibration
from halve.cut.score.scores import Scores
from halve.cut.surgery.trim import trim
from halve.recipe.schema import DepthCriterion, DepthPattern, Method, Prune

MICRO_BATCH = 16
PLAIN, RANDOM, RANDOM_DEPTH, OURS = "minitron", "random", "random-depth", "halve"
INNER = "-inner"
"""What a method is called that cuts heads and ffn and keeps hidden: halve's own shape at 50 %, and the fairer one."""

# ---- the methods

NOTHING = {"shape": "width", "gain": "none", "rotation": "none", "selection": "rank", "refit": "none"}
OSSCAR = {**NOTHING, "selection": "refit", "refit": "outputs"}
DEFAULT: dict[str, Any] = {}
"""What a recipe does that says nothing."""


@dataclass(frozen=True)
class Width:
    """A cut of hidden and ffn."""

    source: str
    method: Method = "activation"
    prune: Mapping[str, Any] = field(default_factory=lambda: NOTHING)
    ours: bool = False
    keep_hidden: bool = False
    """Cut groups of heads in half and ffn to what is left of the budget, hidden not at all."""

    def cut(self, ratio: float, setting: Setting, timed: dict[str, float]) -> PreTrainedModel:
        """A student of this share of the non-embedding parameters."""
        return _by_width(self, ratio, setting, timed)


@dataclass(frozen=True)
class Depth:
    """A cut of layers: a criterion and a pattern, or LaCo's search."""

    source: str
    criterion: DepthCriterion
    pattern: DepthPattern
    laco: layer_merge.Rule | None = None
    """Merge layers by this rule, at the places that LaCo's search finds."""
    ours: bool = False
    protects: tuple[int, int] = (0, 0)
    """So many first and last layers always stay (criterion taylor)."""

    def cut(self, ratio: float, setting: Setting, timed: dict[str, float]) -> PreTrainedModel:
        """A student of nearly this share of the non-embedding parameters."""
        return _by_depth(self, ratio, setting, timed)


def last_matrices(first: Tensor, following: Sequence[Tensor]) -> Tensor:
    """What the notebook that was published with LaCo makes of one parameter of merged layers.

    It subtracts the layer that it has already changed: a matrix is that of the last layer, a norm that of the first.
    """
    return following[-1] if first.ndim > 1 and following else first


_INNER: tuple[tuple[str, str, Method], ...] = (
    (PLAIN, "2407.14679", "activation"),
    (RANDOM, "uniform random entries", "random"),
    ("magnitude", "weight magnitude", "magnitude"),
    ("wanda", "2306.11695", "wanda"),
    ("taylor", "2305.11627", "taylor"),
    ("flap", "2312.11983", "fluctuation"),
)
METHODS: dict[str, Width | Depth] = {
    OURS: Width("halve's default: shape by trial, rotation, refit of everything", prune=DEFAULT, ours=True),
    "halve-width": Width(
        "the same in hidden and ffn alone, neurons by score", prune={"shape": "width", "selection": "rank"}, ours=True
    ),
    PLAIN: Width("2407.14679: l2/mean, one shot, no refit, no gain"),
    RANDOM: Width("uniform random entries", method="random"),
    "magnitude": Width("weight magnitude", method="magnitude"),
    "wanda": Width("2306.11695, structured: activation x weight norm", method="wanda"),
    "taylor": Width("LLM-Pruner, 2305.11627: first-order Taylor", method="taylor"),
    "flap": Width("2312.11983: fluctuation", method="fluctuation"),
    "osscar": Width("2403.12983: selection with refit", prune=OSSCAR),
    "osscar-inner": Width("the same in heads and ffn, which its paper cuts", prune=OSSCAR, keep_hidden=True),
    **{
        f"{name}{INNER}": Width(f"{source} in heads and ffn, hidden kept", method=method, keep_hidden=True)
        for name, source, method in _INNER
    },
    "slicegpt": Width("2401.15024: PCA rotation, one basis", prune={**NOTHING, "rotation": "pca", "untie": True}),
    "shortgpt": Depth("2403.03853: BI", "bi", "single"),
    "gromov": Depth("2403.17887: angular distance of blocks", "angular", "block"),
    "shortened-ppl": Depth("2402.02834: perplexity", "nll", "single"),
    "shortened-taylor": Depth("2402.02834: Taylor", "taylor", "single"),
    "sleb": Depth("2402.09025: greedy", "nll", "greedy"),
    "laco": Depth("2402.11187: layer merge", "angular", "single", laco=layer_merge.laco),
    "laco-notebook": Depth("2402.11187, as its notebook merges", "angular", "single", laco=last_matrices),
    RANDOM_DEPTH: Depth("uniform random layers", "random", "single"),
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all methods share under one seed. Scores that several methods use are taken once, and timed."""

    model: PreTrainedModel
    anatomy: Anatomy
    calibration_BS: Tensor
    seed: int
    refit_samples: int
    micro_batch: int = MICRO_BATCH
    scored: dict[Method, tuple[Scores, float]] = field(default_factory=dict)

    @property
    def calibration(self) -> Calibration:
        """The teacher with its calibration samples."""
        return Calibration(self.model, self.anatomy, self.calibration_BS, self.micro_batch)


def make_student(method: Width | Depth, ratio: float, setting: Setting) -> tuple[PreTrainedModel, dict[str, float]]:
    """Score and cut; the processor seconds that both took, and of them those spent in solves."""
    timed: dict[str, float] = {"solves": 0.0, "seconds": 0.0}
    with stopwatch(timed):
        began = time.process_time()
        student = method.cut(ratio, setting, timed)
        timed["seconds"] += time.process_time() - began
    return student, timed


def _by_width(method: Width, ratio: float, setting: Setting, timed: dict[str, float]) -> PreTrainedModel:
    prune = Prune(non_embedding_ratio=ratio, refit_samples=setting.refit_samples, **method.prune)
    own = student_anatomy(setting.anatomy, prune)
    after, kept = (_inner(own, ratio), None) if method.keep_hidden else target(own, prune)
    scores = scores_of(method.method, setting, timed)
    listed = to_try(own, prune)
    sizes = [arch for family in listed for arch in family] or [after]
    calibration = setting.calibration
    turned = apply.turn(calibration, prune, sizes=sizes)
    if listed:
        tried = trial.try_shapes(calibration, scores, prune, listed, turned=turned)
        after, kept = trial.best(tried).arch, trial.best(tried).kept_layers
    return apply.cut(calibration, scores, prune, apply.Goal(after, kept), turned=turned).student


def _inner(anatomy: Anatomy, ratio: float) -> Arch:
    before = anatomy.sizes
    groups = max(1, before.kv_heads // 2)
    half = before.at(heads=groups * before.heads // before.kv_heads, kv_heads=groups)
    goal = ratio * anatomy.ledger.count(before).non_embedding
    sizes = [half.at(ffn=ffn) for ffn in range(8, before.ffn + 1)]
    return min(sizes, key=lambda arch: abs(anatomy.ledger.count(arch).non_embedding - goal))


def _by_depth(method: Depth, ratio: float, setting: Setting, timed: dict[str, float]) -> PreTrainedModel:
    anatomy, total = setting.anatomy, setting.anatomy.sizes.layers
    after = depth_arch(anatomy, ratio)
    source = setting.model
    if method.laco is not None:
        combine, interval = layer_merge.search_setting(total)
        few = setting.calibration.first(16)
        found = layer_merge.laco_search(few, layers=after.layers, combine=combine, interval=interval, rule=method.laco)
        source, kept = layer_merge.apply_merges(source, anatomy, found.merges, rule=method.laco), found.kept
    else:
        scores = None
        if method.criterion == "taylor":
            scores = _protected(scores_of("taylor", setting, timed), method.protects)
        kept = depth.choose(
            setting.calibration.first(setting.refit_samples),
            criterion=method.criterion,
            pattern=method.pattern,
            remove=total - after.layers,
            seed=setting.seed,
            scores=scores,
        ).kept
    plan = select(anatomy, after, _nothing(anatomy), gain="none", kept_layers=kept)
    return trim(source, plan, anatomy)


def _protected(scores: Scores, ends: tuple[int, int]) -> Scores:
    """Scores under which so many first and last layers go last."""
    assert scores.layer_scores is not None
    first, last = ends
    layer_scores_L = scores.layer_scores.clone()
    for layer in (*range(first), *range(len(layer_scores_L) - last, len(layer_scores_L))):
        layer_scores_L[layer] += 1 + 2 * scores.layer_scores.abs().max()
    return replace(scores, layer_scores=layer_scores_L)


def depth_arch(anatomy: Anatomy, ratio: float) -> Arch:
    """The number of layers whose non-embedding parameters are nearest to the share."""
    goal = ratio * anatomy.ledger.count(anatomy.sizes).non_embedding
    sizes = [anatomy.sizes.at(layers=n) for n in range(1, anatomy.sizes.layers)]
    return min(sizes, key=lambda arch: abs(anatomy.ledger.count(arch).non_embedding - goal))


def scores_of(method: Method, setting: Setting, timed: dict[str, float]) -> Scores:
    """Scores of a method; their seconds count for everyone who asks."""
    if (known := setting.scored.get(method)) is not None:
        timed["seconds"] += known[1]
        return known[0]
    began = time.process_time()
    scores = width.score(
        setting.calibration,
        method=method,
        ffn_point="down_input",
        batch_agg="l2",
        seq_agg="mean",
        seed=setting.seed,
        model_fingerprint="",
        samples_fingerprint="",
    )
    setting.scored[method] = scores, time.process_time() - began
    return scores


def _nothing(anatomy: Anatomy) -> Scores:
    """Scores that are never read: all widths stay."""
    return Scores(None, None, None, None, torch.zeros(anatomy.sizes.layers), model="", samples="")


@contextmanager
def stopwatch(timed: dict[str, float]) -> Iterator[None]:
    """Count the seconds spent in ridge solves, removal orders and eigenvectors."""
    places = [(ridge, "ridge"), (refit_scores, "removal_order"), (apply, "principal_basis")]
    before = [(module, name, getattr(module, name)) for module, name in places]

    def counting(act: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            try:
                return act(*args, **kwargs)
            finally:
                timed["solves"] += time.process_time() - began

        return counted

    for module, name, act in before:
        setattr(module, name, counting(act))
    try:
        yield
    finally:
        for module, name, act in before:
            setattr(module, name, act)
