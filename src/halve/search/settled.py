"""What a search has settled, in files that a resumed search reads instead of settling it again.

    OUT/.candidates.json   the candidates, those of them that are tried, and the layers that they keep
    OUT/.finalists.json    the finalists, in the order in which their folders and rungs are numbered

Another machine has other times, and so other candidates and other finalists. A search that went on under these would
take what was measured on one shape for that of another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from halve.anatomy import Arch
from halve.cut.trial import Tried
from halve.disk.files import read_object, read_sealed, sealed, write_json
from halve.disk.soundness import CONFIG
from halve.errors import RunError
from halve.model.saving import RECORD

CANDIDATES: Final = ".candidates.json"
SETTLED: Final = ".finalists.json"


@dataclass(frozen=True)
class Candidates:
    """The shapes of a trial."""

    archs: tuple[Arch, ...]
    """All of them."""
    tried: tuple[Arch, ...]
    """Those that meet the budget with the layers that they keep."""
    kept_layers: Mapping[int, tuple[int, ...]]
    """Which layers stay, by their number."""

    def save(self, out: Path) -> None:
        """Write them into the search stage's folder."""
        data = {
            "archs": [arch.sizes for arch in self.archs],
            "tried": [arch.sizes for arch in self.tried],
            "kept_layers": sorted(self.kept_layers.values()),
        }
        write_json(out / CANDIDATES, sealed(data))

    @classmethod
    def settled(cls, out: Path) -> Candidates | None:
        """Those of an earlier start; None if there are none yet. Raises `RunError` for a file that was changed."""
        if not (out / CANDIDATES).exists():
            return None
        data = read_sealed(out / CANDIDATES)
        kept = [tuple(layers) for layers in data["kept_layers"]]
        archs, tried = (tuple(map(Arch.of, data[key])) for key in ("archs", "tried"))
        return cls(archs, tried, {len(layers): layers for layers in kept})


def save_finalists(finalists: Sequence[Tried], out: Path) -> None:
    """Write the finalists into the search stage's folder, by number."""
    write_json(out / SETTLED, sealed({"finalists": [finalist.to_json() for finalist in finalists]}))


def settled_finalists(out: Path) -> list[Tried] | None:
    """Those of an earlier start; None if there are none yet. Raises `RunError` for a file that was changed."""
    if not (out / SETTLED).exists():
        return None
    return [Tried.from_json(finalist) for finalist in read_sealed(out / SETTLED)["finalists"]]


def is_cut(finalist: Tried, folder: Path) -> bool:
    """Whether the folder holds the finalist's model. Raises `RunError` if it holds that of another shape."""
    if not (folder / CONFIG).is_file():
        return False
    plan = read_object(folder / RECORD).get("plan", {})
    if plan.get("after") == finalist.arch.sizes and plan.get("layers") == list(finalist.kept_layers):
        return True
    raise RunError(
        f"{folder} does not hold the finalist of its number",
        why=f"the finalist has {finalist.arch} and keeps layers {', '.join(map(str, finalist.kept_layers))}; the folder"
        " was cut to another shape or from other layers",
        fix=f"remove {folder.parent.parent.parent} and run the same command: the search begins again",
    )
