"""The choice of a search, as the prune stage reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from halve.anatomy import Arch
from halve.disk.files import read_object, write_json

CHOICE: Final = "choice.json"


@dataclass(frozen=True)
class ChosenShape:
    """The sizes to cut to, the layers to keep, and how they were chosen."""

    arch: Arch
    kept_layers: tuple[int, ...]
    metrics: Mapping[str, Any]

    def save(self, folder: Path) -> None:
        """Write it into the search stage's folder."""
        data = {"arch": self.arch.sizes, "kept_layers": list(self.kept_layers), "metrics": dict(self.metrics)}
        write_json(folder / CHOICE, data)

    @classmethod
    def load(cls, folder: Path) -> ChosenShape:
        """Read it from the search stage's folder. Raises `RunError`."""
        data = read_object(folder / CHOICE)
        return cls(Arch.of(data["arch"]), tuple(data["kept_layers"]), data["metrics"])
