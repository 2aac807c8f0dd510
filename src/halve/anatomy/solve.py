"""Solving shapes: each dimension as a sum of products of axes, from models built at several sizes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from transformers import PretrainedConfig

from halve.anatomy import configs
from halve.anatomy.arch import Shape
from halve.anatomy.axes import Expr, Term
from halve.errors import AnatomyError, PlanError

# Sizes to build at. Heads divide hidden, groups divide heads, head_dim stays even after partial rotation; together
# the points have full rank in the monomials below, so that each dimension has one solution.
_POINTS = [
    {"hidden": 72, "ffn": 88, "vocab": 104, "heads": 4, "kv_heads": 2, "head_dim": 16},
    {"hidden": 80, "ffn": 88, "vocab": 104, "heads": 4, "kv_heads": 2, "head_dim": 16},
    {"hidden": 72, "ffn": 96, "vocab": 104, "heads": 4, "kv_heads": 2, "head_dim": 16},
    {"hidden": 72, "ffn": 88, "vocab": 120, "heads": 4, "kv_heads": 2, "head_dim": 16},
    {"hidden": 72, "ffn": 88, "vocab": 104, "heads": 8, "kv_heads": 2, "head_dim": 16},
    {"hidden": 72, "ffn": 88, "vocab": 104, "heads": 4, "kv_heads": 4, "head_dim": 16},
    {"hidden": 72, "ffn": 88, "vocab": 104, "heads": 4, "kv_heads": 2, "head_dim": 32},
    {"hidden": 72, "ffn": 88, "vocab": 104, "heads": 8, "kv_heads": 2, "head_dim": 32},
    {"hidden": 72, "ffn": 88, "vocab": 104, "heads": 4, "kv_heads": 4, "head_dim": 32},
    {"hidden": 96, "ffn": 136, "vocab": 160, "heads": 6, "kv_heads": 3, "head_dim": 24},
    {"hidden": 84, "ffn": 52, "vocab": 92, "heads": 12, "kv_heads": 4, "head_dim": 40},
]
_MONOMIALS = [
    "heads head_dim",
    "kv_heads head_dim",
    "hidden",
    "ffn",
    "vocab",
    "heads",
    "kv_heads",
    "head_dim",
    "1",
]
_COUPLED_MONOMIALS = [m for m in _MONOMIALS if m != "heads head_dim"]
TWIN_POINT = _POINTS[0]


def tie(point: Mapping[str, int], *, coupled: bool) -> dict[str, int]:
    """The point as it is, or with hidden = heads x head_dim."""
    return {**point, "hidden": point["heads"] * point["head_dim"]} if coupled else dict(point)


def small(config: PretrainedConfig, point: Mapping[str, int], layers: tuple[int, ...]) -> PretrainedConfig:
    """A twin's config: other sizes and few layers, token ids inside the vocabulary, windows that are felt."""
    sizes = {axis: size for axis, size in point.items() if configs.key(config, axis) or axis == "head_dim"}
    twin = configs.resized(config, sizes, kept_layers=layers)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(twin, name, None)
    if isinstance(getattr(twin, "sliding_window", None), int):
        twin.sliding_window = 5
    return twin


def solve(config: PretrainedConfig, layers: tuple[int, ...], layers_path: str) -> tuple[bool, dict[str, Shape | None]]:
    """Each parameter's dimensions as sums of products of axes; None for a parameter with one that is not."""
    try:
        exprs = _solve_at(config, layers, layers_path, coupled=False)
    except (AnatomyError, PlanError):  # the family's own validation ties hidden to the heads
        return True, _solve_at(config, layers, layers_path, coupled=True)
    made_of = {axis for shape in exprs.values() if shape for expr in shape for axis in expr.axes}
    if {"heads", "head_dim"} <= made_of:
        return False, exprs
    return True, _solve_at(config, layers, layers_path, coupled=True)


def _solve_at(
    config: PretrainedConfig, layers: tuple[int, ...], layers_path: str, *, coupled: bool
) -> dict[str, Shape | None]:
    points = [tie(point, coupled=coupled) for point in _POINTS]
    monomials = [Expr.parse(text) for text in (_COUPLED_MONOMIALS if coupled else _MONOMIALS)]
    if configs.key(config, "kv_heads") is None:
        monomials = [m for m in monomials if "kv_heads" not in m.axes]
    matrix = np.array([[monomial.size(point) for monomial in monomials] for point in points], dtype=np.float64)
    assert np.linalg.matrix_rank(matrix) == len(monomials)
    built = []
    for point in points:
        model = configs.build(small(config, point, layers), device="meta")
        built.append({name: tuple(p.shape) for name, p in model.named_parameters()})
    solved: dict[tuple[int, ...], Expr | None] = {}
    exprs: dict[str, Shape | None] = {}
    prefix = layers_path + "."
    for name, shape in built[0].items():
        real = name
        if name.startswith(prefix):
            number, rest = name[len(prefix) :].split(".", 1)
            real = f"{prefix}{layers[int(number)]}.{rest}"
        dims = []
        for axis in range(len(shape)):
            lengths = tuple(shapes[name][axis] if name in shapes else 0 for shapes in built)
            if lengths not in solved:
                solved[lengths] = _expression(lengths, matrix, monomials)
            dims.append(solved[lengths])
        exprs[real] = None if None in dims else tuple(dim for dim in dims if dim is not None)
    return exprs


def _expression(lengths: tuple[int, ...], matrix: np.ndarray, monomials: list[Expr]) -> Expr | None:
    counts = np.rint(np.linalg.lstsq(matrix, np.array(lengths, dtype=np.float64), rcond=None)[0]).astype(int)
    if (counts < 0).any() or (matrix.astype(int) @ counts != np.array(lengths)).any():
        return None
    terms: list[Term] = []
    for count, monomial in zip(counts.tolist(), monomials, strict=True):
        terms += [(count,)] if not monomial.axes and count else list(monomial.terms) * count
    return Expr(tuple(terms))
