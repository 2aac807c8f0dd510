"""Which runtimes open a cut model, known before it is cut.

A verdict rests on measurements. `runtimes.csv` has a row for a random twin of each family and each way of cutting it.
The row holds the largest difference between the logits of the runtime and those of transformers, or why there are no
logits. `scripts/runtimes.py` writes it. What was not measured is unknown. transformers itself is not looked up, because
the proof reopens a twin in it.
"""

from __future__ import annotations

import csv
import functools
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import PretrainedConfig

from halve.anatomy.arch import Arch
from halve.anatomy.configs import context_length, num_layers, quiet, resized
from halve.anatomy.discover import Anatomy
from halve.anatomy.lists import layer_lists

Opens = Literal["yes", "no", "unknown"]
TABLE = Path(__file__).with_suffix(".csv")
# Of the logits' standard deviation. Rounding stays below (the most is llama.cpp's table of GELU in 16 bits, in deep
# twins), a layer that is computed as another kind, or with another scale, lies above.
ROUNDING = 0.1
# The ways of cutting that have rows, beside the axes ffn, hidden, heads and kv_heads cut alone.
WHOLE, DEPTH_CUT, IN_PLACE, PROPORTION = "whole", "layers", "layers in place", "hidden with heads"


@dataclass(frozen=True)
class Measurement:
    """How a runtime handled a twin that was cut in one way."""

    runtime: str
    version: str
    kind: str
    """The family and its traits, as `family_and_traits` gives them."""
    cut: str
    difference: float | None
    """The largest difference of logits, in standard deviations of the logits; None if the runtime gave no logits."""
    reason: str
    """Why it gave no logits."""

    @property
    def opens(self) -> Opens:
        """Whether the runtime computes the same logits."""
        return "yes" if self.difference is not None and self.difference < ROUNDING else "no"


@dataclass(frozen=True)
class Runtime:
    """Whether a runtime opens the result, and what would make it."""

    name: str
    opens: Opens
    remedy: str = ""


def runtimes(anatomy: Anatomy, after: Arch, kept_layers: Sequence[int] | None = None) -> tuple[Runtime, ...]:
    """The verdict of transformers, vLLM and llama.cpp on a model of this family cut to these sizes.

    It is yes if every single cut was measured to be right, and no if one was measured to be wrong. If the kept layers
    are not given, a cut of layers counts as one that moves kinds of layers to other places.
    """
    made = cuts(anatomy, after, kept_layers)
    verdicts = [Runtime("transformers", "yes")]
    for name in ("vLLM", "llama.cpp"):
        said = {cut: _verdict(name, anatomy, cut) for cut in made}
        refused = [cut for cut, verdict in said.items() if verdict == "no"]
        verdicts.append(Runtime(name, worst(said.values()), _remedy(name, anatomy, after, refused)))
    return tuple(verdicts)


def cuts(anatomy: Anatomy, after: Arch, kept_layers: Sequence[int] | None = None) -> tuple[str, ...]:
    """The rows on which the verdict for these sizes rests."""
    before = anatomy.sizes
    rows = []
    if not _regular(anatomy.config):
        rows.append(DEPTH_CUT)  # layers were cut before
    elif after.layers != before.layers:
        stays = period(anatomy) == 1 if kept_layers is None else _stays(anatomy, kept_layers)
        rows.append(IN_PLACE if stays else DEPTH_CUT)
    if after.ffn != before.ffn:
        rows.append("ffn")
    changed = [axis for axis in ("hidden", "heads", "kv_heads") if getattr(before, axis) != getattr(after, axis)]
    if before.heads == before.kv_heads and after.heads == after.kv_heads and "kv_heads" in changed:
        changed.remove("kv_heads")  # every head has its own
    if changed and all(sizes.hidden == sizes.heads * sizes.head_dim for sizes in (before, after)):
        changed = [PROPORTION]
    return (*rows, *changed) or (WHOLE,)


def family_and_traits(config: PretrainedConfig) -> str:
    """The family, and the traits on which the code path of some runtimes depends.

    A *window* is a layer that sees only the latest tokens; a *scale* is one of attention that head_dim does not give.
    """
    kinds = getattr(config, "layer_types", None) or ()
    window = getattr(config, "sliding_window", None) or sys.maxsize
    positions = context_length(config) or sys.maxsize
    slides = window < positions and (not kinds or any("sliding" in name for name in kinds))
    scalar = getattr(config, "query_pre_attn_scalar", None)
    traits = [" with a window"] * slides
    traits += [" with a scale"] * (scalar is not None and scalar != getattr(config, "head_dim", scalar))
    return str(config.model_type) + " and".join(traits)


def period(anatomy: Anatomy) -> int | None:
    """After how many layers the kinds of layers repeat: 1 if all are alike, None if they never do."""
    total = anatomy.sizes.layers
    return next((n for n in range(1, total) if _stays(anatomy, range(n, total))), None)


@functools.cache
def measured() -> tuple[Measurement, ...]:
    """The table."""
    if not TABLE.exists():
        return ()
    with TABLE.open(encoding="utf-8", newline="") as file:
        return tuple(
            Measurement(**{**line, "difference": float(line["difference"]) if line["difference"] else None})  # type: ignore[arg-type]
            for line in csv.DictReader(file)
        )


def worst(verdicts: Iterable[Opens]) -> Opens:
    """The verdict on a whole, given the verdicts on its parts."""
    return max(verdicts, key=("yes", "unknown", "no").index, default="yes")


def _verdict(runtime: str, anatomy: Anatomy, cut: str) -> Opens:
    family = family_and_traits(anatomy.config)
    rows = {row.cut: row for row in measured() if (row.runtime, row.kind) == (runtime, family)}
    if cut == IN_PLACE and cut not in rows:
        cut = DEPTH_CUT  # all layers of the twin are alike
    return rows[cut].opens if cut in rows else "unknown"


# ---- depth


def _regular(config: PretrainedConfig) -> bool:
    """Whether the kinds of layers are the family's default for this number of layers."""
    count = num_layers(config)
    lists = layer_lists(config, count)
    if all(value.count(value[0]) == len(value) for value in lists.values()):
        return True
    bare = {name: value for name, value in config.to_dict().items() if name not in lists}
    try:
        with quiet():
            return layer_lists(type(config).from_dict(bare), count) == lists
    except Exception:  # a family's own code may raise anything: it makes no lists by itself
        return False


def _stays(anatomy: Anatomy, kept: Sequence[int]) -> bool:
    """Whether every place has a layer of the same kind as before the cut."""
    first, kept_config = (resized(anatomy.config, {}, kept_layers=layers) for layers in (range(len(kept)), kept))
    return bool(first.to_dict() == kept_config.to_dict())


# ---- remedies


def _remedy(runtime: str, anatomy: Anatomy, after: Arch, refused: Sequence[str]) -> str:
    """What to cut instead, as flags of the command line. Only cuts that were measured to be right."""
    if not refused or _verdict(runtime, anatomy, WHOLE) != "yes":
        return ""
    parts = []
    if DEPTH_CUT in refused and (other := _whole_periods(runtime, anatomy, after)):
        parts.append(other)
    if {"hidden", "heads", "kv_heads"} & {*refused} and _verdict(runtime, anatomy, PROPORTION) == "yes":
        parts.append(_proportion(anatomy, after))
    free = [cut for cut in ("ffn", DEPTH_CUT) if cut not in refused and _verdict(runtime, anatomy, cut) == "yes"]
    if free:
        parts.append(f"cut only {' and '.join(free)}")
    return "; or ".join(parts)


def _whole_periods(runtime: str, anatomy: Anatomy, after: Arch) -> str:
    span, total = period(anatomy), anatomy.sizes.layers
    if span is None or _verdict(runtime, anatomy, IN_PLACE) != "yes":
        return ""
    dropped = -(-(total - after.layers) // span) * span
    if dropped >= total:
        return ""
    first = (total - dropped) // 2 // span * span
    return f"--drop-layers {first}-{first + dropped - 1} (whole periods of {span} layers)"


def _proportion(anatomy: Anatomy, after: Arch) -> str:
    hidden = after.heads * after.head_dim
    other = f"--hidden {hidden} (= heads x head_dim)" if hidden <= anatomy.sizes.hidden else "fewer heads"
    groups = anatomy.sizes.kv_heads
    heads = after.hidden // after.head_dim // groups * groups
    if after.hidden % after.head_dim == 0 and heads * after.head_dim == after.hidden and heads:
        other = f"--heads {heads} (hidden = heads x head_dim), or {other}"
    return other
