"""Amounts as people write them: `4.5B` parameters, `2GB`, `20ms`, or `70%` of the teacher's. Does not import torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

Unit = Literal["parameters", "bytes", "FLOPs", "seconds", "tokens/s"]

_POWERS = {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
_BYTES = {"b": 1.0, **{f"{power}b": _POWERS[power] for power in "kmgt"}}
_SUFFIXES: dict[str, dict[str, float]] = {
    "parameters": _POWERS,
    "bytes": {**_BYTES, **{f"{power}ib": 1024.0**exponent for exponent, power in enumerate("kmgt", 1)}},
    "FLOPs": {**_POWERS, "p": 1e15},
    "seconds": {"s": 1.0, "ms": 1e-3, "us": 1e-6},
    "tokens/s": {**_POWERS, "tokens/s": 1.0},
}
_WRITTEN = {
    "parameters": "4.5B",
    "bytes": "2GB",
    "FLOPs": "900M",
    "seconds": "20ms",
    "tokens/s": "50",
}
_SHAPE = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:e([+-]?[0-9]{1,2}))?\s*([a-zµ%/]*)", re.IGNORECASE)


@dataclass(frozen=True)
class Amount:
    """A number in its unit, or a share of what the teacher has."""

    value: float
    is_share: bool = False

    def of(self, teacher: float) -> float:
        """The number, for a teacher that has so much.

        >>> Amount(0.5, is_share=True).of(8e9), Amount(2e9).of(8e9)
        (4000000000.0, 2000000000.0)
        """
        return self.value * teacher if self.is_share else self.value


def parse_amount(text: str, unit: Unit) -> Amount:
    """Read an amount. `kB`, `MB`, `GB` are powers of ten; `KiB`, `MiB`, `GiB` are powers of 1024.

    Raises `ValueError` for anything that is not a positive finite number with a suffix of this unit.

    >>> parse_amount("4.5B", "parameters"), parse_amount("1.5 GiB", "bytes").value
    (Amount(value=4500000000.0, is_share=False), 1610612736.0)
    >>> parse_amount("20ms", "seconds").value, parse_amount("70%", "bytes")
    (0.02, Amount(value=0.7, is_share=True))
    """
    match = _SHAPE.fullmatch(text.strip())
    suffix = match[3].lower().replace("µ", "u") if match else ""
    factor = 1.0 if suffix in ("", "%") else _SUFFIXES[unit].get(suffix)
    if match is None or factor is None:
        raise ValueError(f"{text!r:.60} is no amount of {unit}: write {_WRITTEN[unit]} or 70%")
    value = float(f"{match[1]}e{match[2] or 0}") * factor / (100 if suffix == "%" else 1)
    if not (math.isfinite(value) and 0 < value < 1e30):
        raise ValueError(f"{text!r:.60} is no positive amount of {unit}: write {_WRITTEN[unit]} or 70%")
    return Amount(value, is_share=suffix == "%")
