"""Folders: whole or not there, and the old one is not lost before the new one is whole."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from disk.test_rundir import Killed, count_or_kill, names

from halve.disk.folders import atomic_folder, finish_folder, is_interrupted, replace_folder
from halve.disk.soundness import read_config
from halve.errors import CheckpointError, DiskError

OLD = {"config.json": "old", "weights": "old", "templates/a": "old", "of-the-old": "old"}
NEW = {"config.json": "new", "weights": "new", "templates/a": "new", "templates/b": "new", "of-the-new": "new"}


def fill(folder: Path, content: dict[str, str]) -> Path:
    for name, text in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def content(folder: Path) -> dict[str, str]:
    return {name: (folder / name).read_text() for name in names(folder) if (folder / name).is_file()}


def write_new(folder: Path) -> None:
    with atomic_folder(folder, last="config.json") as draft:
        fill(draft, NEW)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What matters here is the order of the steps, not that the disk has them."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_gets_its_content_and_no_other(tmp_path: Path, there: bool) -> None:
    out = tmp_path / "deep" / "out"
    if there:
        fill(out, OLD)
        (out / "link").symlink_to(tmp_path / "elsewhere")
        stands_in = out.stat().st_ino
    write_new(out)
    assert content(out) == NEW
    assert names(tmp_path / "deep") == ["out", *(f"out/{name}" for name in names(out))]
    assert names(out) == sorted([*NEW, "templates"])
    assert not there or out.stat().st_ino == stands_in


@pytest.mark.parametrize("there", [False, True])
def test_a_block_that_fails_leaves_the_folder_as_it_was(tmp_path: Path, there: bool) -> None:
    out = fill(tmp_path / "out", OLD) if there else tmp_path / "out"
    before = names(tmp_path)

    def fail(number: int) -> None:
        with atomic_folder(out, last="config.json") as draft:
            fill(draft, NEW)
            raise OSError(number, os.strerror(number))

    with pytest.raises(OSError, match="denied"):
        fail(errno.EACCES)
    with pytest.raises(DiskError, match=r"no room left while writing .*out"):
        fail(errno.ENOSPC)
    assert names(tmp_path) == before
    assert not there or content(out) == OLD


def test_a_kill_at_any_change_of_the_disk_leaves_the_old_folder_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fill(tmp_path / "whole", OLD)
    with monkeypatch.context() as patch:
        calls = count_or_kill(patch, None)
        write_new(whole)
    found = []
    for at in range(len(calls)):
        out = fill(tmp_path / f"killed-{at}", OLD)
        with monkeypatch.context() as patch:
            made = count_or_kill(patch, at)
            with pytest.raises(Killed):
                write_new(out)
            assert len(made) > at
        interrupted = is_interrupted(out)
        readable = {name: text for name, text in content(out).items() if not name.startswith(".halve")}
        assert readable in (OLD, NEW) or (interrupted and "config.json" not in readable), calls[at]
        finish_folder(out, last="config.json")
        found.append({name: text for name, text in content(out).items() if not name.startswith(".halve-draft")})
        assert not is_interrupted(out)
        write_new(out)
        assert content(out) == NEW
    turn = found.index(NEW)
    assert found == [OLD] * turn + [NEW] * (len(found) - turn)
    assert 0 < turn < len(found) - 10, "the kill comes while the old goes and while the new moves up, too"


def test_a_kill_while_a_new_folder_is_written_leaves_none_or_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        calls = count_or_kill(patch, None)
        write_new(tmp_path / "whole")
    for at in range(len(calls)):
        out = tmp_path / f"killed-{at}"
        with monkeypatch.context() as patch:
            count_or_kill(patch, at)
            with pytest.raises(Killed):
                write_new(out)
        assert not out.exists() or content(out) == NEW, calls[at]
        write_new(out)
        assert content(out) == NEW
    assert [name for name in names(tmp_path) if name.startswith(".")] == []


def test_a_second_kill_while_the_folder_is_finished_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = ({name: text[name] for name in ("config.json", "weights")} for text in (OLD, NEW))

    def runs_to_its_end(at: int, act: Callable[[], None]) -> bool:
        with monkeypatch.context() as patch:
            count_or_kill(patch, at)
            with suppress(Killed):
                act()
                return True
        return False

    first = tried = 0
    while True:
        out, draft = fill(tmp_path / f"{first}", old), fill(tmp_path / f"draft-{first}", new)
        if runs_to_its_end(first, partial(replace_folder, draft, out, last="config.json")):
            break
        for second in range(100) if is_interrupted(out) else ():
            again = shutil.copytree(out, tmp_path / f"{first}-{second}")
            if runs_to_its_end(second, partial(finish_folder, again, last="config.json")):
                break
            finish_folder(again, last="config.json")
            assert content(again) == new, (first, second)
            tried += 1
        first += 1
    assert tried > 100


def test_a_folder_that_nobody_interrupted_is_left_alone(tmp_path: Path) -> None:
    out = fill(tmp_path / "out", OLD)
    finish_folder(out, last="config.json")
    finish_folder(out / "weights", last="config.json")
    finish_folder(tmp_path / "nowhere", last="config.json")
    assert content(out) == OLD
    assert names(tmp_path) == ["out", *(f"out/{name}" for name in names(out))]


def test_a_reader_is_told_of_a_model_that_is_half_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = fill(tmp_path / "out", OLD)

    def killed(path: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        draft = fill(tmp_path / "draft", NEW)
        with pytest.raises(Killed):
            replace_folder(draft, out, last="config.json")
    with pytest.raises(CheckpointError, match=r"is not complete\n  why: halve was killed while it replaced"):
        read_config(out)
