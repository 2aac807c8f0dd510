"""Files that several processes write."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

from halve.disk.files import alone, atomic_file, content_hashes, read_json, write_json


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
