"""Solve each dimension of each weight as a sum of products of axes, from models that are built at several sizes."""

from __future__ import annotations

from collections.abc import Mapping
from math import lcm

import numpy as np
from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig

from halve.anatomy import configs
from halve.anatomy.arch import Shape
from halve.anatomy.axes import Expr, Term
from halve.anatomy.lists import layer_lists
from halve.anatomy.quirks import KEYS, TWIN_SIZES
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
    {"hidden": 96, "ffn": 136, "vocab": 160, "heads": 12, "kv_heads": 6, "head_dim": 24},
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
_STATE_HEADS = 8


def tied_point(point: Mapping[str, int], *, coupled: bool) -> dict[str, int]:
    """The point unchanged, or with hidden = heads x head_dim."""
    return {**point, "hidden": point["heads"] * point["head_dim"]} if coupled else dict(point)


def alike(one: Shape, other: Shape) -> bool:
    """Whether two shapes are equal if hidden = heads x head_dim."""
    points = [tied_point(point, coupled=True) for point in _POINTS]
    return all([expr.size(p) for expr in one] == [expr.size(p) for expr in other] for p in points)


def parse_shape(layout: str) -> Shape:
    """The dimensions that commas separate."""
    return tuple(Expr.parse(dim) for dim in layout.split(","))


def small(
    config: PretrainedConfig, point: Mapping[str, int], layers: tuple[int, ...], *, shrink: bool = False
) -> PretrainedConfig:
    """The config of a twin: other sizes, few layers, token ids inside the vocabulary, windows short enough to matter.

    With `shrink`, experts are few and narrow as well. These sizes are not axes, so the shapes of the model itself need
    them unchanged. If the config's lists are longer than the model is deep, so are those of the twin.
    """
    sizes = {axis: size for axis, size in point.items() if configs.key(config, axis) or axis == "head_dim"}
    if not configs.has_heads(config):
        sizes.pop("head_dim", None)
    twin = configs.resized(config, sizes, kept_layers=layers, others=_few(config) if shrink else {})
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if name == "pad_token_id" and getattr(twin, name, None) in range(twin.vocab_size):
            continue  # in some families positions are counted from this id
        try:
            setattr(twin, name, None)
        except StrictDataclassError:  # the family wants a number
            setattr(twin, name, 0)
    count = configs.num_layers(config)
    for name in layer_lists(config, count):
        if surplus := getattr(config, name)[count : count + 4]:
            setattr(twin, name, getattr(twin, name) + surplus)
    if isinstance(getattr(twin, "sliding_window", None), int):
        twin.sliding_window = 5
    return twin


def _few(config: PretrainedConfig) -> dict[str, int]:
    """The sizes that are smaller in a twin, besides the axes."""
    axes = {config.attribute_map.get(configs.key(config, axis) or "") for axis in KEYS}  # axes under other names
    sizes = {name: getattr(config, name, None) for name in TWIN_SIZES if name not in axes}
    few = {name: TWIN_SIZES[name] for name, size in sizes.items() if isinstance(size, int) and size > TWIN_SIZES[name]}
    # where the width of states follows hidden, their heads are few as well, and divide it in every twin
    return few | {count: min(getattr(config, count), _STATE_HEADS) for _, count, _ in configs.states(config)}


def solve_twin(
    config: PretrainedConfig, layers: tuple[int, ...], layers_path: str, given: Mapping[str, Shape], *, coupled: bool
) -> tuple[bool, dict[str, Shape]]:
    """Whether a twin can have few experts, and its shapes: the given ones, with a small model's numbers."""
    if not _few(config):
        return False, dict(given)
    try:
        solved = _solve_at(config, layers, layers_path, coupled=coupled, shrink=True)
    except (AnatomyError, PlanError):
        return False, dict(given)
    return True, {name: _with_numbers(shape, solved.get(name)) for name, shape in given.items()}


def _with_numbers(given: Shape, solved: Shape | None) -> Shape:
    """The given dimensions with the numbers of the solved ones, where both are made of the same axes."""
    if solved is None or len(solved) != len(given):
        return given
    return tuple(new if _numberless(old) == _numberless(new) else old for old, new in zip(given, solved, strict=True))


def _numberless(expr: Expr) -> list[tuple[str, ...]]:
    return [tuple(factor if isinstance(factor, str) else "" for factor in term) for term in expr.terms]


def solve(
    config: PretrainedConfig, layers: tuple[int, ...], layers_path: str, *, coupled: bool
) -> tuple[bool, dict[str, Shape | None]]:
    """Each parameter's dimensions as sums of products of axes; None for a parameter with a dimension that is not.

    The first value says whether hidden = heads x head_dim, either as given (`coupled`) or as the shapes show.
    """
    if coupled:
        return True, _solve_at(config, layers, layers_path, coupled=True)
    try:
        exprs = _solve_at(config, layers, layers_path, coupled=False)
    except (AnatomyError, PlanError):  # the family's own validation requires hidden = heads x head_dim
        if not configs.has_heads(config):
            raise
        return True, _solve_at(config, layers, layers_path, coupled=True)
    terms = [term for shape in exprs.values() if shape for expr in shape for term in expr.terms]
    if not configs.has_heads(config) or any("heads" in term and len(term) > 1 for term in terms):
        return False, exprs
    try:
        return True, _solve_at(config, layers, layers_path, coupled=True)
    except (AnatomyError, PlanError):  # its states tie hidden to something else, and no layer has heads
        return False, exprs


def system(config: PretrainedConfig, *, coupled: bool) -> tuple[list[dict[str, int]], list[Expr], np.ndarray]:
    """The points to build at, the products of axes to solve for, and how large each is at each point."""
    points = [tied_point(point, coupled=coupled) for point in _POINTS]
    if not coupled:  # a multiple of the heads of states, whose widths are whole numbers then
        unit = lcm(1, *(getattr(config, count) for _, count, _ in configs.states(config)))
        points = [{**point, "hidden": point["hidden"] * unit} for point in points]
    monomials = [Expr.parse(text) for text in (_COUPLED_MONOMIALS if coupled else _MONOMIALS)]
    if configs.key(config, "kv_heads") is None:
        monomials = [m for m in monomials if "kv_heads" not in m.axes]
    if not configs.has_heads(config):
        monomials = [m for m in monomials if not {"heads", "kv_heads", "head_dim"} & m.axes]
    matrix = np.array([[monomial.size(point) for monomial in monomials] for point in points], dtype=np.float64)
    assert np.linalg.matrix_rank(matrix) == len(monomials)
    return points, monomials, matrix


def _solve_at(
    config: PretrainedConfig, layers: tuple[int, ...], layers_path: str, *, coupled: bool, shrink: bool = False
) -> dict[str, Shape | None]:
    points, monomials, matrix = system(config, coupled=coupled)
    built = []
    for point in points:
        model = configs.build(small(config, point, layers, shrink=shrink), device="meta")
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
                solved[lengths] = expression(lengths, matrix, monomials)
            dims.append(solved[lengths])
        exprs[real] = None if None in dims else tuple(dim for dim in dims if dim is not None)
    return exprs


def expression(lengths: tuple[int, ...], matrix: np.ndarray, monomials: list[Expr]) -> Expr | None:
    """The sum of products that has these lengths at the points, outermost factor first; None if there is none."""
    counts = np.rint(np.linalg.lstsq(matrix, np.array(lengths, dtype=np.float64), rcond=None)[0]).astype(int)
    if (counts < 0).any() or (matrix.astype(int) @ counts != np.array(lengths)).any():
        return None
    terms: list[Term] = []
    for count, monomial in zip(counts.tolist(), monomials, strict=True):
        if count and not monomial.axes:
            terms.append((count,))
        elif count > 1 and monomial.axes <= {"heads", "kv_heads"}:
            terms.append((*monomial.terms[0], count))  # channels of a head whose size is the family's own
        else:
            terms += list(monomial.terms) * count
    return Expr(tuple(terms) or ((0,),))
