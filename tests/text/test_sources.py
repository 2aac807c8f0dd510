"""What of the files that people bring is text: by content, whatever a file is called; and what is left out."""

from __future__ import annotations

import functools
import gzip
import json
import os
import sys
from pathlib import Path

import pytest

from halve.disk.files import content_hashes
from halve.errors import CorpusError
from halve.text import folders, sources
from halve.text.rows import Wanted

ROW = '{"text": "A star"}\n'
DEEP = "[" * 100_000


def documents(source: Path, field: str = "text") -> list[str]:
    return [piece.text for piece in sources.read_documents(str(source), Wanted(field))]


def make(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


# Content


@pytest.mark.parametrize(
    "name", ["a.jsonlines", "a.jl", "wiki_00", "part-00000", "a.jsonl.bak", "a.txt", "a.md", "a.JSONL", "wiki_00.gz"]
)
def test_json_lines_are_told_by_their_content(tmp_path: Path, name: str) -> None:
    content = f"\ufeff{ROW}\n{ROW}".encode()
    make(tmp_path, {name: gzip.compress(content) if name.endswith(".gz") else content})
    assert documents(tmp_path / name) == ["A star", "A star"]
    assert documents(tmp_path) == ["A star", "A star"]


def test_one_long_json_line_is_one(tmp_path: Path) -> None:
    long = "word " * folders.HEAD_BYTES
    make(tmp_path, {"wiki_00": json.dumps({"text": long})})
    assert "".join(documents(tmp_path / "wiki_00")) == long


@pytest.mark.parametrize("content", ['{"a": 1} is how it begins.\nThen comes prose.\n', "{}\n", '{\n  "a": 1\n}\n'])
def test_text_that_looks_a_little_like_json_is_text(tmp_path: Path, content: str) -> None:
    make(tmp_path, {"a.txt": content, "notes": content})
    assert documents(tmp_path / "a.txt") == documents(tmp_path / "notes") == [content]


def test_a_json_array_is_refused_whatever_its_name(tmp_path: Path) -> None:
    for name in ("a.json", "a.txt", "part-0"):
        make(tmp_path, {name: json.dumps([{"text": "x"}], indent=1)})
        with pytest.raises(CorpusError, match=rf"{name}, line 1 is not JSON\n.*\n  fix: .* jq -c '\.\[\]' {name}"):
            documents(tmp_path / name)


@pytest.mark.parametrize(("name", "between"), [("a.csv", ","), ("a.csv", ";"), ("a.tsv", "\t"), ("part-0", ",")])
def test_csv_is_read_by_its_header(tmp_path: Path, name: str, between: str) -> None:
    lines = [("id", "text"), ("1", '"one, ""two""\nlines"'), ("2", ""), ("3", "three")]
    make(tmp_path, {name: "\ufeff" + "\r\n".join(map(between.join, lines)) + "\r\n"})
    assert documents(tmp_path / name) == ['one, "two"\nlines', "three"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n", "line 1 has no field 'text'\n  why: its fields are a, b"),
        ("id,text\n1,2,3\n", "line 2 is no row of a CSV file\n  why: it has 3 columns and the first line 2"),
        ('id,text\n1,"open\n', "is no row of a CSV file"),
        ("", "is empty"),
        ("id,text\n", "is empty"),
    ],
)
def test_bad_csv_is_refused(tmp_path: Path, content: str, message: str) -> None:
    make(tmp_path, {"a.csv": content})
    with pytest.raises(CorpusError, match=message):
        documents(tmp_path / "a.csv")


def test_parquet_of_any_name(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["one"]}), tmp_path / "part-0")
    assert documents(tmp_path / "part-0") == documents(tmp_path) == ["one"]


# Folders


def test_hidden_files_notes_and_licenses_are_left_out(tmp_path: Path) -> None:
    hidden = (".ipynb_checkpoints/a-checkpoint.jsonl", ".cache/x.jsonl", "_temporary/part-0", "__MACOSX/a.jsonl")
    about = ("README.md", "LICENSE", "LICENSE.txt", "LICENSE-APACHE", "dataset_info.json", "readme.txt", "data_card.md")
    make(tmp_path, {"a.jsonl": ROW, "sub/wiki_00": ROW, "license-plates.jsonl": ROW, "._a.jsonl": b"\0\5Mac OS X"})
    make(tmp_path, dict.fromkeys(hidden, ROW) | dict.fromkeys(about, "# About the data\n"))
    make(tmp_path, {"a.png": b"\x89PNG\0", "_SUCCESS": "", "runs/r/run.json": "{}", "runs/r/metrics.jsonl": ROW})
    found = folders.find(str(tmp_path))
    assert [path.name for path in found.read] == ["a.jsonl", "license-plates.jsonl", "wiki_00"]
    assert documents(tmp_path) == ["A star"] * 3
    said = sources.told([str(tmp_path)], documents=3, tokens=1200)
    assert said.startswith(f"text of {tmp_path.name}: 3 files, 3 documents, 1,200 tokens, left out .")
    assert f"and {len(found.left_out) - 3} more" in said


def test_markdown_is_text_and_a_readme_where_there_is_nothing_else(tmp_path: Path) -> None:
    make(tmp_path, {"README.md": "one", "b/README.md": "two", "c.rst": "three", "LICENSE": "four"})
    assert documents(tmp_path) == ["one", "two", "three"]
    make(tmp_path, {"d.txt": "five"})
    assert documents(tmp_path) == ["three", "five"]
    make(tmp_path, {"e.jsonl": ROW})
    assert documents(tmp_path) == ["three", "five", "A star"]


def test_a_table_does_not_hide_the_prose_beside_it(tmp_path: Path) -> None:
    make(tmp_path, {"a.md": "one", "b.md": "two", "t.csv": "id,text\n1,three\n", "Dataset-Card.md": "About t"})
    assert documents(tmp_path) == ["one", "two", "three"]
    assert [path.name for path in folders.find(str(tmp_path)).left_out] == ["Dataset-Card.md"]


@pytest.mark.parametrize("content", ['{\n  "name": "a",\n  "scripts": {}\n}\n', '["a", "b"]\n', "", "7\n"])
def test_a_json_file_without_rows_is_left_out_of_a_folder(tmp_path: Path, content: str) -> None:
    make(tmp_path, {"a.md": "one", "b.txt": "two", "package.json": content})
    assert documents(tmp_path) == ["one", "two"]
    assert [path.name for path in folders.find(str(tmp_path)).left_out] == ["package.json"]
    with pytest.raises(CorpusError):
        documents(tmp_path / "package.json")  # named itself it is read


def test_a_card_alone_is_no_text(tmp_path: Path) -> None:
    make(tmp_path, {"README.md": "# The card", "data.arrow": b"ARROW1\0\0"})
    with pytest.raises(CorpusError, match=r"holds no corpus file\n.*left out README\.md, data\.arrow"):
        documents(tmp_path)


def test_the_whole_disk_is_no_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to("/")
    for source in ("/", str(tmp_path / "link"), "/" + "../" * 9):
        with pytest.raises(CorpusError, match="is the whole disk"):
            sources.files(source)
    monkeypatch.setattr(folders, "MOST_LEFT_OUT", 5)
    make(tmp_path, {f"{i}.bin": "x" for i in range(9)} | {"a.txt": "text"})
    with pytest.raises(CorpusError, match="holds too much that is not text"):
        sources.files(str(tmp_path))


def test_links_to_folders_are_followed_and_each_folder_is_read_once(tmp_path: Path) -> None:
    far = make(tmp_path / "far", {"b.txt": "two", "sub/c.txt": "three"})
    here = make(tmp_path / "here", {"a.txt": "one", "own/d.txt": "four", ".old/e.txt": "hidden"})
    (here / "again").symlink_to("own")
    (here / "wiki").symlink_to(far)
    (here / "wiki-2").symlink_to(far / "sub")
    (far / "back").symlink_to(here)
    (far / "loop").symlink_to(".")
    (here / "gone").symlink_to("nowhere")
    (here / "link.txt").symlink_to("a.txt")
    (here / "_hidden").symlink_to(far)
    assert documents(here) == ["one", "one", "four", "two", "three"]
    left_out = {str(path.relative_to(here)) for path in folders.find(str(here)).left_out}
    assert left_out == {".old", "_hidden", "again", "gone", "wiki/back", "wiki/loop", "wiki-2"}


def test_a_link_to_what_holds_the_folder_is_left_out(tmp_path: Path) -> None:
    """It would lead out into the disk."""
    here = make(tmp_path / "here", {"a.txt": "one"})
    make(tmp_path, {"beside.txt": "not asked for", "there/b.txt": "two"})
    (here / "root").symlink_to("/")
    (here / "up").symlink_to("..")
    (here / "there").symlink_to(tmp_path / "there")
    (tmp_path / "there/up").symlink_to("..")
    assert documents(here) == ["one", "two"]
    assert folders.find(str(here)).told == "left out root, up, up"


def test_linked_folders_count_for_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "MOST_LEFT_OUT", 5)
    far = make(tmp_path / "far", {f"{i}.bin": "x" for i in range(9)})
    here = make(tmp_path / "here", {"a.txt": "text"})
    (here / "far").symlink_to(far)
    with pytest.raises(CorpusError, match="holds too much that is not text"):
        sources.files(str(here))


# What cannot be read


@pytest.mark.parametrize("source", ["a" * 5000, "/" + "a" * 300, "a\0b", "\ud800", "/dev/zero", "~nobody/x"])
def test_what_is_no_path_is_refused(source: str) -> None:
    with pytest.raises(CorpusError) as caught:
        sources.files(source)
    assert len(str(caught.value)) < 1000
    assert str(caught.value).replace("\n", "").isprintable()


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(CorpusError, match="neither a file nor a folder"):
        sources.files(str(tmp_path / "a.txt"))
    (tmp_path / "b.txt").write_text("one")
    assert documents(tmp_path) == ["one"]


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the one who tests is allowed everything."""
    make(tmp_path, {"a.jsonl": ROW, "wiki_00": ROW})

    def forbidden(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    for where in (sources, folders):
        monkeypatch.setattr(where, "open_packed", forbidden)
    for name in ("a.jsonl", "wiki_00"):
        with pytest.raises(CorpusError, match=rf"cannot read .*{name}\n  why: Permission denied\n"):
            documents(tmp_path / name)
    with pytest.raises(CorpusError, match=r"cannot read .*a\.jsonl\n  why: Permission denied\n"):
        documents(tmp_path)
    with pytest.raises(CorpusError, match=r"cannot read .*a\.jsonl\n  why: Permission denied\n"):
        sources.fingerprint(str(tmp_path), sha256=forbidden)


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(path: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(CorpusError, match=r"cannot read folder .*\n  why: Permission denied\n"):
        sources.files(str(tmp_path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (DEEP, "line 2 is not JSON\n  why: it is nested deeper"),
        ('{"a": ' + DEEP + "]" * len(DEEP) + ', "text": "x"}', "line 2 is not JSON\n  why: it is nested deeper"),
        (
            '{"text": "A star \\ud83d and"}',
            r"line 2: field 'text' holds half a character\n  why: character 7 is \\ud83d",
        ),
    ],
)
def test_lines_that_json_can_spell_and_no_text_holds(tmp_path: Path, line: str, message: str) -> None:
    make(tmp_path, {"a.jsonl": ROW + line + "\n"})
    with pytest.raises(CorpusError, match=message):
        documents(tmp_path / "a.jsonl")
    with pytest.raises(CorpusError, match=message):
        sources.probe(str(tmp_path / "a.jsonl"), Wanted("text"))


# What `check` reads


def test_the_beginning_of_every_file_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, {"a.jsonl": ROW * 9, "b.jsonl": ROW * 5 + "{"})

    with pytest.raises(CorpusError, match=r"b\.jsonl, line 6 is not JSON"):
        sources.probe(str(tmp_path), Wanted("text"))
    for limit, chars in (("PROBED_CHARS", 20), ("PROBED_IN_ALL", 60)):  # a row has six characters
        with monkeypatch.context() as patch:
            patch.setattr(sources, limit, chars)
            sources.probe(str(tmp_path), Wanted("text"))


def test_nothing_but_blanks_is_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PROBED_IN_ALL", 5)
    make(tmp_path, {"a.txt": " \n" * 50, "b.txt": "\n" * 50})
    with pytest.raises(CorpusError, match="is empty"):
        sources.probe(str(tmp_path), Wanted("text"))
    make(tmp_path, {"b.txt": "\n" * 50 + "word"})
    sources.probe(str(tmp_path), Wanted("text"))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
@pytest.mark.parametrize("name", [b"caf\xe9.jsonl", b"b.\xe9"])
def test_a_file_name_that_is_not_utf_8_is_a_name(tmp_path: Path, name: bytes) -> None:
    (tmp_path / os.fsdecode(name)).write_text(ROW * 3, encoding="utf-8")
    assert documents(tmp_path) == ["A star"] * 3
    (memo := tmp_path.with_suffix(".memo")).touch()
    hashes = functools.partial(content_hashes, memo=memo)
    before = hashes(sources.files(str(tmp_path))), sources.fingerprint(str(tmp_path))
    assert (hashes(sources.files(str(tmp_path))), sources.fingerprint(str(tmp_path))) == before
