"""A Plan lists the entries of each axis that survive in each layer. It is saved before any weight is touched.

`halve.cut.plan.sizes` turns a recipe's `prune` section into valid sizes. `select` turns sizes and scores into a Plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from halve.anatomy import Anatomy, Arch
from halve.cut.score.importance import rank
from halve.disk import plain_json
from halve.recipe.schema import Gain


@runtime_checkable
class Importance(Protocol):
    """The scores that `select` needs; higher is kept: [hidden], [layers, ffn], [layers, heads], ..., [layers]."""

    @property
    def hidden(self) -> Tensor | None: ...
    @property
    def ffn(self) -> Tensor | None: ...
    @property
    def heads(self) -> Tensor | None: ...
    @property
    def kv_heads(self) -> Tensor | None: ...
    @property
    def layers(self) -> Tensor | None: ...


@dataclass(frozen=True)
class Plan:
    """The entries that survive; `ffn`, `heads` and `kv_heads` have one list for each kept layer."""

    family: str
    before: Arch
    after: Arch
    layers: tuple[int, ...]
    hidden: tuple[int, ...]
    ffn: tuple[tuple[int, ...], ...]
    heads: tuple[tuple[int, ...], ...]
    kv_heads: tuple[tuple[int, ...], ...]
    gain: Gain

    def kept(self, layer: int | None) -> dict[str, tuple[int, ...]]:
        """Surviving entries by axis in kept layer number `layer` (counted in the student), or outside the layers."""
        kept = {"hidden": self.hidden}
        if layer is not None:
            kept |= {"ffn": self.ffn[layer], "heads": self.heads[layer], "kv_heads": self.kv_heads[layer]}
        return kept

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        """From `to_json`'s data."""
        nested = {name: tuple(tuple(row) for row in data[name]) for name in ("ffn", "heads", "kv_heads")}
        return cls(
            family=data["family"],
            before=Arch.of(data["before"]),
            after=Arch.of(data["after"]),
            layers=tuple(data["layers"]),
            hidden=tuple(data["hidden"]),
            gain=data["gain"],
            **nested,
        )

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a saved plan."""
        return cls.from_json(plain_json.parse_json(Path(path).read_text(encoding="utf-8")))


def select(
    anatomy: Anatomy, after: Arch, scores: Importance, *, gain: Gain, kept_layers: Sequence[int] | None = None
) -> Plan:
    """Keep the entries with the highest scores, in their old order.

    Heads are ranked within each key-value group, and each group keeps the same number. An ordinary config can describe
    no other cut. For equal scores the earlier entry is kept. `kept_layers` overrides the ranking of layers.
    """
    before = anatomy.sizes
    layers = tuple(kept_layers) if kept_layers is not None else _top(scores.layers, before.layers, after.layers)
    ffn, heads, groups = [], [], []
    for layer in layers:
        ffn.append(_top(_row(scores.ffn, layer), before.ffn, after.ffn))
        kept_groups = _top(_row(scores.kv_heads, layer), before.kv_heads, after.kv_heads)
        groups.append(kept_groups)
        heads.append(_heads(_row(scores.heads, layer), before, after, kept_groups))
    return Plan(
        family=anatomy.family,
        before=before,
        after=after,
        layers=layers,
        hidden=_top(scores.hidden, before.hidden, after.hidden),
        ffn=tuple(ffn),
        heads=tuple(heads),
        kv_heads=tuple(groups),
        gain=gain,
    )


def _row(scores: Tensor | None, layer: int) -> Tensor | None:
    return None if scores is None else scores[layer]


def _top(scores: Tensor | None, before: int, after: int) -> tuple[int, ...]:
    if before == after:
        return tuple(range(before))
    assert scores is not None, "an axis that is cut needs scores"
    return tuple(sorted(rank(scores)[:after].tolist()))


def _heads(scores: Tensor | None, before: Arch, after: Arch, groups: tuple[int, ...]) -> tuple[int, ...]:
    per_group, kept = before.heads // before.kv_heads, after.heads // after.kv_heads
    heads: list[int] = []
    for group in groups:
        members = range(group * per_group, (group + 1) * per_group)
        inside = None if scores is None else scores[members.start : members.stop]
        heads += [members[i] for i in _top(inside, per_group, kept)]
    return tuple(heads)
