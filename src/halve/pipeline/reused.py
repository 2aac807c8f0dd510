"""Check what a run would reuse from the finished stages of its folder, before it does anything."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from halve.disk.rundir import HASHES, MARKER, RunDir, read_manifest, sound
from halve.pipeline.keys import Keyed, keys_of
from halve.recipe.schema import Recipe
from halve.report import page as report

if TYPE_CHECKING:
    from halve.model.checkpoint import Checkpoint


def require_unchanged(recipe: Recipe, teacher: Checkpoint, out: Path, stages: Sequence[Keyed], *, cache: Path) -> None:
    """Raise `RunError` if a run in `out` would reuse files that were changed. Writes nothing."""
    if not (out / MARKER).exists():
        return
    with RunDir.follow(out) as folder, tempfile.TemporaryDirectory(prefix="halve-check-") as scratch:
        memo = Path(scratch) / HASHES
        if (cache / HASHES).is_file():
            memo.write_bytes((cache / HASHES).read_bytes())
        keys = keys_of(recipe, teacher, stages, memo=memo)
        require_sound(folder, stages, {stage.name for stage in stages if folder.is_done(stage.name, keys[stage.name])})


def require_sound(folder: RunDir, wanted: Sequence[Keyed], done: Collection[str]) -> None:
    """Raise `RunError` if a finished stage was changed and other stages or the report still read it.

    A finished stage no longer needs its inputs.
    """
    for stage in wanted:
        before = [name for name in stage.after if name in done]
        if stage.name in done:
            shown = stage.section == "evaluate"
            _require_sound(folder, [stage.name] if shown else [], report.READS)
        elif stage.section == "report":
            _require_sound(folder, before, report.READS)
        else:
            folder.verify(*before)


def _require_sound(folder: RunDir, stages: Sequence[str], files: Collection[str]) -> None:
    for stage in stages:
        manifest = read_manifest(folder.stage(stage))
        for file in set(files) & set(manifest["files"]):
            sound(folder.stage(stage), manifest, file)
