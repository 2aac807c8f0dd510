"""Folders that are written completely or not at all, even if a kill comes at any moment.

A new folder is written as a draft and gets its name by one rename. If the folder exists, it is kept and its content is
replaced: it may be a process's working folder, or nothing may be created next to it. The replacement has three steps,
and a kill may come after each of them:

    out/.halve-draft/     the new content is being written; the old content counts
    out/.halve-whole/     the new content is complete on disk and counts; the old content is being removed
    out/.halve-moving/    the old content is gone; the new content is being moved up

`finish_folder` takes the remaining steps. Code that writes to such a folder calls it first.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from halve.disk.files import disk_guard, rename, sync, sync_tree

_DRAFT, _WHOLE, _MOVING = ".halve-draft", ".halve-whole", ".halve-moving"


@contextmanager
def atomic_folder(path: Path, *, last: str) -> Iterator[Path]:
    """Yield a new folder to write to. When the block ends, `path` has exactly its content.

    A block that fails leaves `path` unchanged. For `last` see `replace_folder`. Raises `DiskError` when the device is
    full.
    """
    folder = Path(path).resolve()
    there = folder.is_dir()
    draft = folder / _DRAFT if there else folder.with_name(f".{folder.name}.tmp")
    try:
        with disk_guard(path):
            finish_folder(folder, last=last)
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            yield draft
            sync_tree(draft)
            replace_folder(draft, folder, last=last)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def replace_folder(draft: Path, folder: Path, *, last: str) -> None:
    """Rename `draft` to `folder`, or replace the content of `folder` with that of `draft` if it exists.

    The draft has to be complete on disk, and on the same device. The file `last` is removed first and written last,
    so that half a folder never counts as complete. After a kill, the folder has its old content or, after a call of
    `finish_folder`, its new content.
    """
    finish_folder(folder, last=last)
    if folder.is_dir():
        os.replace(draft, folder / _WHOLE)
        sync(folder)
        finish_folder(folder, last=last)
    else:
        os.replace(draft, folder)
    sync(folder.parent)


def finish_folder(folder: Path, *, last: str) -> None:
    """Complete a `replace_folder` that a kill has interrupted. Other folders are not changed."""
    whole, moving = folder / _WHOLE, folder / _MOVING
    if whole.is_dir():
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name != last):
            if entry.name not in (_DRAFT, _WHOLE):
                _remove(entry)
        sync(folder)  # no step may reach the disk before the one that it follows
        os.replace(whole, moving)
        sync(folder)
    if moving.is_dir():
        for entry in sorted(moving.iterdir(), key=lambda entry: entry.name == last):
            rename(entry, folder / entry.name)
        moving.rmdir()
        sync(folder)


def is_free(folder: Path) -> bool:
    """Whether nothing stands at this place but an empty folder, or the draft that a kill has left in one."""
    return not folder.exists() or (folder.is_dir() and all(entry.name == _DRAFT for entry in folder.iterdir()))


def is_interrupted(folder: Path) -> bool:
    """Whether a kill has left steps for `finish_folder`: the folder holds neither the old nor the new content."""
    return (folder / _WHOLE).is_dir() or (folder / _MOVING).is_dir()


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink()
