"""The cuts that `real_model.py` compares: each method with the calibration samples of its paper, and its shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cut_methods import METHODS, NOTHING, PLAIN, Depth, Setting, Width, depth_arch, scores_of

from halve.anatomy import Anatomy, Arch
from halve.cut import apply
from halve.cut.plan.shapes import list_shapes
from halve.cut.plan.sizes import budget_of, target
from halve.cut.repair.rotate import student_anatomy
from halve.recipe.schema import Prune

INNER = ("ffn", "ffn and heads")
EVERY = (*INNER, "hidden, ffn and heads", "hidden and ffn")


@dataclass(frozen=True)
class Row:
    """One way of cutting, and the samples that it sees."""

    method: Width | Depth
    samples: int
    length: int
    paper: str
    """Number and length of the paper's calibration samples, and where the row departs from them."""
    shapes: tuple[str, ...] = ()
    """Of a width method: the shapes of full depth among which the one that starts closest is taken."""


DEFAULT = "default"
_LONG = "128 x 2,048; here 128 x 512"
ROWS: dict[str, Row] = {
    "plain ffn": Row(METHODS[PLAIN], 1024, 512, "1,024; halve's length", ("ffn",)),
    "plain Minitron width": Row(METHODS[PLAIN], 1024, 512, "1,024; halve's length", ("even",)),
    "plain depth, block": Row(Depth("2407.14679: BI of a block", "bi", "block"), 64, 512, "none given"),
    "plain depth, greedy": Row(
        Depth("2402.09025: SLEB, greedy by loss", "nll", "greedy"), 16, 128, "128 x 2,048; here 16 x 128"
    ),
    "ShortGPT": Row(METHODS["shortgpt"], 64, 512, "none given"),
    "Shortened LLaMA, PPL": Row(METHODS["shortened-ppl"], 10, 128, "10 x 128"),
    "Shortened LLaMA, Taylor": Row(METHODS["shortened-taylor"], 10, 128, "10 x 128"),
    "Shortened LLaMA, Taylor+": Row(
        Depth("2402.02834: Taylor, four first and two last layers kept", "taylor", "single", protects=(4, 2)),
        10,
        128,
        "10 x 128",
    ),
    "LaCo": Row(METHODS["laco"], 10, 128, "10 sentences"),
    "LaCo, its notebook": Row(METHODS["laco-notebook"], 10, 128, "10 sentences"),
    "FLAP": Row(METHODS["flap"], 1024, 128, "1,024 x 128", EVERY),
    "Wanda": Row(METHODS["wanda"], 128, 512, _LONG, EVERY),
    "LLM-Pruner": Row(METHODS["taylor"], 10, 128, "10 x 128", EVERY),
    "OSSCAR": Row(METHODS["osscar"], 128, 512, _LONG, INNER),
    "SliceGPT": Row(METHODS["slicegpt"], 256, 512, "1,024 x 2,048; here 256 x 512", ("hidden", "hidden and ffn")),
}
"""All rows but halve's default, which is the run of a recipe."""
BASELINES = tuple(name for name in ROWS if not name.startswith("plain"))


def _ours(shape: str, **prune: Any) -> Row:
    return Row(Width("halve's refit", prune=prune, ours=True), 1024, 512, "", (shape,))


SCORED: dict[str, Row] = {
    f"{name}, scores of {samples} samples": Row(METHODS[PLAIN], samples, 512, "", (shape,))
    for samples in (64, 256)
    for name, shape in (("plain ffn", "ffn"), ("plain Minitron width", "even"))
}
"""Plain cuts again by scores of fewer tokens."""
_RANKED = {"selection": "rank", "rotation": "none"}
OWN: dict[str, Row] = {
    **SCORED,
    **{
        f"refit {shape}, {tokens:,} tokens": _ours(shape, **_RANKED, refit_tokens=tokens)
        for tokens in (2_048, 16_384, 32_768, 49_152, 98_304)
        for shape in ("ffn", "depth", "even")
    },
    **{
        f"rotated and refit even, {tokens:,} tokens": _ours(
            "even", selection="rank", rotation="pca", refit_tokens=tokens
        )
        for tokens in (2_048, 16_384, 49_152)
    },
    **{
        f"default's {layers} layers, {tokens:,} tokens": _ours(f"{layers} layers", refit_tokens=tokens)
        for layers in (24, 26, 28)
        for tokens in (49_152, 98_304)
    },
    "default's 28 layers, 49,152 tokens, neurons by rank": _ours("28 layers", selection="rank", refit_tokens=49_152),
    **{
        f"refit ffn, {tokens:,} tokens, neurons by refit": _ours("ffn", selection="refit", refit_tokens=tokens)
        for tokens in (32_768, 49_152)
    },
}
"""halve's refit in one shape each: how many tokens it needs, and whether rotation and selection by refit pay."""
FEW = 16
"""Samples on which a method that solves is tried in each of its shapes."""


def shapes_of(row: Row, anatomy: Anatomy, ratio: float) -> dict[str, Arch]:
    """The shapes of full depth that a width method is tried in, by name."""
    assert isinstance(row.method, Width)
    prune = prune_of(row.method, ratio, None)
    own = student_anatomy(anatomy, prune)
    budget = budget_of(own, prune)
    assert budget is not None
    before = own.sizes
    families = list_shapes(own, budget[0], total=False)
    full = [arch for family in families for arch in family[:1]]
    by_layers = {f"{arch.layers} layers": arch for arch in families[0]}
    named = by_layers | {_name(before, arch): arch for arch in full if arch.layers == before.layers}
    named["hidden"] = min(
        (before.at(hidden=hidden) for hidden in range(before.heads, before.hidden, before.heads)),
        key=lambda arch: abs(own.ledger.count(arch).non_embedding - budget[0]),
    )
    named["even"] = target(own, prune)[0]
    named["depth"] = depth_arch(own, ratio)
    return {name: named[name] for name in row.shapes if name in named}


def _name(before: Arch, after: Arch) -> str:
    axes = [axis for axis in ("hidden", "ffn", "heads") if getattr(before, axis) != getattr(after, axis)]
    return " and ".join([*([", ".join(axes[:-1])] if axes[:-1] else []), axes[-1]]) if axes else "nothing"


def prune_of(method: Width, ratio: float, samples: int | None) -> Prune:
    """The settings of a width method that solves on so many samples; halve's own count tokens."""
    counted = {} if method.ours else {"refit_samples": samples}
    return Prune(non_embedding_ratio=ratio, **counted, **method.prune)


def cut_to(
    row: Row, ratio: float, after: Arch, setting: Setting, timed: dict[str, float], *, few: bool = False
) -> apply.Cut:
    """A cut to these sizes; `few` solves on the first `FEW` samples alone."""
    assert isinstance(row.method, Width)
    samples = min(FEW, setting.refit_samples) if few else setting.refit_samples
    prune = prune_of(row.method, ratio, samples)
    scores = scores_of(row.method.method, setting, timed)
    calibration = setting.calibration
    turned = apply.turn(calibration, prune, sizes=[after])
    return apply.cut(calibration, scores, prune, apply.Goal(after), turned=turned)


def solves(row: Row) -> bool:
    """Whether the cut itself reads the samples, so that trying a shape is not for free."""
    return isinstance(row.method, Width) and row.method.prune != NOTHING
