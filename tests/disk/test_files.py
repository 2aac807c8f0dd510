"""Files that are whole or not there, that several processes write, and whose hashes are remembered."""

from __future__ import annotations

import errno
import json
import math
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from halve.disk import files
from halve.disk.files import alone, atomic_file, content_hashes, read_json, write_json
from halve.errors import DiskError, RunError


def test_who_writes_the_same_file_takes_turns(tmp_path: Path) -> None:
    """As runs do that share a folder of token files. A lock parts threads as it parts processes."""
    path, begun = tmp_path / "note.json", threading.Event()

    def slowly() -> None:
        with atomic_file(path) as draft:
            draft.write_text("first")
            begun.set()
            time.sleep(0.2)

    other = threading.Thread(target=slowly)
    other.start()
    begun.wait()
    with atomic_file(path) as draft:
        assert path.read_text() == "first"
        draft.write_text("second")
    other.join()
    assert path.read_text() == "second"
    assert os.listdir(tmp_path) == ["note.json"]


def test_hashes_are_remembered_by_several_at_once(tmp_path: Path) -> None:
    files = [tmp_path / f"{n}.txt" for n in range(4)]
    for n, file in enumerate(files):
        file.write_text(f"text {n}")
    failed: list[Exception] = []

    def hashed(file: Path) -> None:
        try:
            for n in range(20):
                file.write_text(f"{file.name} {n}")
                content_hashes([file], memo=tmp_path / "memo.json")
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=hashed, args=(file,)) for file in files]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert sorted(os.listdir(tmp_path)) == ["0.txt", "1.txt", "2.txt", "3.txt", "memo.json"]


def test_one_works_alone_and_its_lock_goes(tmp_path: Path) -> None:
    lock, order, begun = tmp_path / ".lock", [], threading.Event()

    def first() -> None:
        with alone(lock):
            begun.set()
            time.sleep(0.1)
            order.append("first")

    other = threading.Thread(target=first)
    other.start()
    begun.wait()
    with alone(lock):
        order.append("second")
    other.join()
    assert order == ["first", "second"]
    assert not lock.exists()


def test_json_holds_names_that_are_not_utf_8(tmp_path: Path) -> None:
    value = {os.fsdecode(b"caf\xe9"): ["\ud83d", "\N{GRINNING FACE}", "\\ud83d"]}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value


def test_json_survives_the_trip_and_stays_standard(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, "é"], "b": {"c": None}, "path": tmp_path, "bad": math.nan, "worse": [math.inf]}
    write_json(tmp_path / "x.json", value)
    expected = {"a": [1, 2.5, "é"], "b": {"c": None}, "path": str(tmp_path), "bad": None, "worse": [None]}
    assert read_json(tmp_path / "x.json") == expected
    json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize("content", [None, "{", "\xff"])
def test_json_that_cannot_be_read_is_a_run_error(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "x.json").write_text(content, encoding="latin1")
    with pytest.raises(RunError, match=r"cannot read .*x\.json"):
        read_json(tmp_path / "x.json")


def test_an_atomic_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    with atomic_file(path) as draft:
        draft.write_text("one")
        assert not path.exists()
    assert path.read_text() == "one"

    def fail() -> None:
        with atomic_file(path) as draft:
            draft.write_text("two")
            raise KeyError("stop")

    with pytest.raises(KeyError):
        fail()
    assert path.read_text() == "one"
    assert [one.name for one in (tmp_path / "deep").iterdir()] == ["file"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_full_disk_is_a_disk_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, number: int
) -> None:
    def full(*args: Any) -> None:
        raise OSError(number, os.strerror(number))

    write_json(tmp_path / "x.json", 1)
    monkeypatch.setattr(os, function, full)
    with pytest.raises(DiskError, match=r"no room left while writing .*x\.json\n  why: .*\n  fix: free some space"):
        write_json(tmp_path / "x.json", 2)
    monkeypatch.undo()
    assert [one.name for one in tmp_path.iterdir()] == ["x.json"]
    assert read_json(tmp_path / "x.json") == 1


def test_other_errors_of_the_system_pass_the_guard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="broken"):
        write_json(tmp_path / "x.json", 2)


def test_hashes_are_remembered_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    sha256 = files.file_sha256

    def counted(path: Path) -> str:
        read.append(path.name)
        return sha256(path)

    monkeypatch.setattr(files, "file_sha256", counted)
    texts, memo = [tmp_path / "a", tmp_path / "b"], tmp_path / "memo.json"
    for path in texts:
        path.write_text(path.name)
    first = content_hashes(texts, memo=memo)
    assert first == [sha256(path) for path in texts]
    assert content_hashes(texts, memo=memo) == first
    assert content_hashes([*texts, texts[0]], memo=memo) == [*first, first[0]], "a file that is listed twice"
    texts[1].write_text("changed")
    assert content_hashes(texts, memo=memo) == [first[0], sha256(texts[1])]
    assert read == ["a", "b", "b"]
    texts[0].unlink()
    with pytest.raises(RunError, match=r"cannot read .*a\n  why: No such file"):
        content_hashes(texts, memo=memo)
