"""Token files and samples: what is read, what is refused and how, memory, and the order of samples."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from halve.disk import files, rundir
from halve.errors import CorpusError, DiskError, RunError
from halve.text import corpus, rows, sources, tokenize
from halve.text.corpus import Samples, Tokens, prepare

EOS = 0


def byte_tokenizer(*, eos: bool = True, bos: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte, so that a token file is its text, moved by one or two."""
    special = ["<end>"] * eos + ["<begin>"] * bos
    vocab = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    names = {"eos_token": "<end>"} if eos else {}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names, **({"bos_token": "<begin>"} if bos else {}))


TOKENIZER = byte_tokenizer()
IDS = TOKENIZER.get_vocab()


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def tokens_of(*names: Path | str, cache: Path, field: str = "text") -> list[int]:
    return prepare(list(map(str, names)), tokenizer=TOKENIZER, text_field=field, cache=cache).ids.tolist()


def fake_tokens(folder: Path, count: int) -> Tokens:
    path = folder / f"{count}.tokens"
    np.arange(count, dtype=np.uint16).tofile(path)
    return Tokens(path=path, count=count, dtype="uint16", fingerprint="", text_bytes=count)


def jsonl(*texts: str) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


# What is read


@pytest.mark.parametrize(
    ("suffix", "pack"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress), (".bz2", bz2.compress)]
)
def test_text_and_json_lines_packed_or_not(tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]) -> None:
    text, rows = tmp_path / f"a.txt{suffix}", tmp_path / f"b.jsonl{suffix}"
    text.write_bytes(pack("\ufeffeins\nzwei äöü\n".encode()))
    rows.write_bytes(pack((jsonl("one", "", "two\n") + '\n{"text": null, "id": 3}\n').encode()))
    found = tokens_of(text, rows, cache=tmp_path / "cache")
    assert found == [*ids("eins\nzwei äöü\n"), EOS, *ids("one"), EOS, *ids("two\n"), EOS]


def test_zstd_of_several_frames(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    pack = zstandard.ZstdCompressor().compress
    file = tmp_path / "a.txt.zst"
    file.write_bytes(pack(b"one, " * 50_000) + pack(b"two"))
    assert tokens_of(file, cache=tmp_path / "cache") == [*ids("one, ") * 50_000, *ids("two"), EOS]


def test_parquet(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"id": [1, 2, 3], "body": ["one", None, "two"]}), file)
    assert tokens_of(file, cache=tmp_path / "cache", field="body") == [*ids("one"), EOS, *ids("two"), EOS]
    with pytest.raises(CorpusError, match="no field 'text'\n  why: its fields are id, body"):
        tokens_of(file, cache=tmp_path / "cache")
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CorpusError, match=r"cannot read .*rows\.parquet"):
        tokens_of(file, cache=tmp_path / "cache", field="body")


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    for name, text in {"b.txt": "2", "a/z.txt": "1", "c.jsonl": jsonl("3"), "d.png": "\0"}.items():
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "in" / name).write_text(text)
    found = tokens_of(tmp_path / "in", cache=tmp_path / "cache")
    assert found == [*ids("1"), EOS, *ids("2"), EOS, *ids("3"), EOS]


def test_a_hub_data_set_stays_at_its_first_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*names: str | None, **options: object) -> list[dict[str, str]]:
        asked.append((names, options))
        return [{"text": "one"}, {"text": "two"}]

    revisions = iter(["abc", "def"])
    monkeypatch.setattr(sources, "hub_revision", lambda source: next(revisions))
    monkeypatch.setattr(sources, "extra", lambda *_: SimpleNamespace(load_dataset=load_dataset))
    for _ in range(2):
        assert tokens_of("hub:owner/name/de:test", cache=tmp_path) == [*ids("one"), EOS, *ids("two"), EOS]
    assert asked == [(("owner/name", "de"), {"split": "test", "revision": "abc", "streaming": True})]
    with pytest.raises(CorpusError, match="names no data set"):
        tokens_of("hub:name", cache=tmp_path)


def test_a_hub_data_set_through_the_datasets_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "train.jsonl").write_text(jsonl("one", "two"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(sources, "hub_revision", lambda source: "main")
    assert tokens_of("hub:owner/name", cache=tmp_path / "cache") == [*ids("one"), EOS, *ids("two"), EOS]
    with pytest.raises(CorpusError, match="cannot read hub:owner/name:nosuch"):
        tokens_of("hub:owner/name:nosuch", cache=tmp_path / "cache")


def test_documents_begin_with_bos_where_there_is_no_eos(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(jsonl("a", "b"))
    tokenizer = byte_tokenizer(eos=False, bos=True)
    found = prepare([str(tmp_path)], tokenizer=tokenizer, text_field="text", cache=tmp_path / "cache").ids.tolist()
    a, b, bos = (tokenizer.convert_tokens_to_ids(token) for token in ("a", "b", "<begin>"))
    assert found == [bos, a, bos, b, bos]


# Pieces, keys, kills


@given(st.text(alphabet="ab \n", max_size=400), st.integers(3, 40))
def test_pieces_lose_nothing_and_are_bounded(text: str, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "PIECE_CHARS", size)
        pieces = list(rows.pieces({"text": text}, place="", text_field="text"))
    assert "".join(piece.text for piece in pieces) == text
    assert all(len(piece.text) <= size for piece in pieces)
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True] * bool(pieces)


def test_characters_may_lie_across_the_chunks_of_a_file(tmp_path: Path) -> None:
    text = "x" + "ä€😀" * 40_000  # 9 bytes a group: every alignment of a chunk's end occurs
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    pieces = list(sources.read_documents(str(tmp_path / "a.txt"), rows.Wanted("text")))
    assert "".join(piece.text for piece in pieces) == text
    assert len(pieces) > 1


def test_same_content_is_tokenized_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, other = tmp_path / "a.txt", tmp_path / "elsewhere.txt"
    first.write_text("hello")
    other.write_text("hello")
    cache = tmp_path / "cache"
    tokens = prepare([str(first)], tokenizer=TOKENIZER, text_field="text", cache=cache)
    TOKENIZER(["a", "bc"], padding=False, truncation=True, max_length=1)  # leaves its settings behind
    monkeypatch.setattr(tokenize, "encode_pieces", None)
    assert prepare([str(other)], tokenizer=TOKENIZER, text_field="text", cache=cache) == tokens
    assert (len(tokens), tokens.dtype, tokens.text_bytes) == (6, "uint16", 5)
    other.write_text("hallo")
    for change in (
        {"sources": [str(other)]},
        {"text_field": "body"},
        {"tokenizer": byte_tokenizer(bos=True)},
    ):
        arguments = {"sources": [str(first)], "text_field": "text", "tokenizer": TOKENIZER} | change
        with pytest.raises(TypeError, match="not callable"):
            prepare(arguments.pop("sources"), **arguments, cache=cache)


def test_what_a_run_has_hashed_is_not_hashed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, cache = tmp_path / "a.txt", tmp_path / "cache"
    text.write_text("hello")
    files.content_hashes([text], memo=cache / rundir.HASHES)
    read = []

    def hashed(path: Path) -> str:
        read.append(path)
        return file_sha256(path)

    file_sha256 = files.file_sha256
    monkeypatch.setattr(files, "file_sha256", hashed)
    first = prepare([str(text)], tokenizer=TOKENIZER, text_field="text", cache=cache)
    assert read == []
    assert first.fingerprint == prepare([str(text)], tokenizer=TOKENIZER, text_field="text", cache=tmp_path).fingerprint
    assert read == [text]
    text.write_text("hallo")
    os.utime(text, ns=(0, 0))  # a time of change of its own, however coarse the file system's clock is
    assert prepare([str(text)], tokenizer=TOKENIZER, text_field="text", cache=cache) != first


def test_a_token_file_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    def digest(file: io.BufferedReader, name: str) -> Any:
        read.append(Path(file.name).suffix)
        return file_digest(file, name)

    file_digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", digest)
    (tmp_path / "a.txt").write_text("hello")
    made = prepare([str(tmp_path / "a.txt")], tokenizer=TOKENIZER, text_field="text", cache=tmp_path / "cache")
    assert prepare([str(tmp_path / "a.txt")], tokenizer=TOKENIZER, text_field="text", cache=tmp_path / "cache") == made
    assert sorted(read) == [".draft", ".txt"]
    made.path.write_bytes(b"\0" * made.path.stat().st_size)
    with pytest.raises(RunError, match="its bytes have changed"):
        prepare([str(tmp_path / "a.txt")], tokenizer=TOKENIZER, text_field="text", cache=tmp_path / "cache")


@pytest.mark.parametrize(("where", "moment"), [(tokenize, "encode_pieces"), (corpus, "write_json"), (corpus, "rename")])
def test_killed_tokenization_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: ModuleType, moment: str
) -> None:
    (tmp_path / "a.jsonl").write_text(jsonl(*["hello"] * 3000))
    hits = []

    def killed(*args: object, **options: object) -> None:
        hits.append(moment)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(where, moment, killed)
        with pytest.raises(KeyboardInterrupt):
            tokens_of(tmp_path / "a.jsonl", cache=tmp_path / "cache")
    assert hits == [moment]
    assert tokens_of(tmp_path / "a.jsonl", cache=tmp_path / "cache") == [*ids("hello"), EOS] * 3000


def test_a_token_file_that_was_cut_short_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    tokens = prepare([str(tmp_path / "a.txt")], tokenizer=TOKENIZER, text_field="text", cache=tmp_path)
    os.truncate(tokens.path, 4)
    assert tokens_of(tmp_path / "a.txt", cache=tmp_path) == [*ids("hello"), EOS]


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("hello")

    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenize, "encode_pieces", full)
    with pytest.raises(DiskError, match="no room left"):
        tokens_of(tmp_path / "a.txt", cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


# What is refused


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt is empty"),
        ("a.txt", b" \n\n", "a.txt is empty"),
        ("a.jsonl", b'{"text": ""}\n', "a.jsonl is empty"),
        ("a.txt", b"one\ntwo\nth\0ree", "a.txt is binary\n.*line 3, at byte 10"),
        ("a.txt", "one".encode("utf-16"), "a.txt is binary"),
        ("a.txt", b"one\ntwo \xe4\n", "a.txt, line 2 is not UTF-8\n.*byte 8 is 0xe4"),
        ("a.txt", b"x" * 70_000 + b"\n" * 70_000 + b"\xff", "line 70001 is not UTF-8\n.*byte 140000 is 0xff"),
        ("a.txt", b"one \xe2\x82", "line 1 is not UTF-8\n.*byte 4 is 0xe2: unexpected end of data"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe4"}\n', "a.jsonl, line 2 is not UTF-8\n.*byte 24 is 0xe4"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n', "a.jsonl, line 2 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', "a.jsonl, line 2 is not an object"),
        ("a.jsonl", b'{"body": "a", "id": 1}\n', "line 1 has no field 'text'\n.*its fields are body, id"),
        ("a.jsonl", b'{"text": 7}\n', "line 1: field 'text' is not text\n.*it holds int"),
        ("a.txt.gz", gzip.compress(b"hello" * 99, mtime=0)[:-9], r"cannot read .*a\.txt\.gz"),
        ("a.txt.gz", b"hello", r"cannot read .*a\.txt\.gz"),
        ("a.txt.xz", lzma.compress(os.urandom(9999))[:999], r"cannot read .*a\.txt\.xz"),
        ("a.txt.xz", b"hello", r"cannot read .*a\.txt\.xz"),
        ("a.bin/x.png", b"\0", "holds no corpus file"),
    ],
)
def test_bad_text_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    source = tmp_path / name.partition("/")[0]
    with pytest.raises(CorpusError, match=message):
        tokens_of(source, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*"))


@pytest.mark.parametrize("content", [b"hello", None])
def test_damaged_zstd_is_refused(tmp_path: Path, content: bytes | None) -> None:
    zstandard = pytest.importorskip("zstandard")
    file = tmp_path / "a.txt.zst"
    file.write_bytes(content or zstandard.ZstdCompressor().compress(b"abc" * 200_000)[:-5])
    with pytest.raises(CorpusError, match=r"cannot read .*a\.txt\.zst"):
        tokens_of(file, cache=tmp_path / "cache")


def test_missing_text_and_missing_packages_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CorpusError, match=r"there is no corpus .*gone"):
        tokens_of(tmp_path / "gone", cache=tmp_path)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.txt.zst").write_bytes(b"")
    with pytest.raises(CorpusError, match=r"zstandard is not installed\n  fix: pip install \"halve\[data\]\""):
        tokens_of(tmp_path / "a.txt.zst", cache=tmp_path)


def test_a_json_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "LONGEST_LINE_BYTES", 1000)
    (tmp_path / "a.jsonl").write_text(jsonl("short", "x" * 1000))
    with pytest.raises(CorpusError, match="line 2 is too long"):
        tokens_of(tmp_path / "a.jsonl", cache=tmp_path)


# Memory


@pytest.mark.parametrize(
    ("line_end", "workers"), [("\n", 1), ("", 1), ("\n", 2)], ids=["lines", "one line", "two processes"]
)
def test_a_large_file_needs_bounded_memory(tmp_path: Path, line_end: str, workers: int) -> None:
    big, small = tmp_path / "big.txt", tmp_path / "small.txt"
    block = ("".join(f"word{i} " for i in range(1000)) + line_end) * 140
    small.write_text(block)
    with big.open("w") as file:
        for _ in range(56):
            file.write(block)
    assert big.stat().st_size > 60_000_000
    words = models.WordLevel({"<unk>": 0, "<end>": 1} | {f"word{i}": i + 2 for i in range(1000)}, unk_token="<unk>")
    backend = Tokenizer(words)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>").save_pretrained(tmp_path / "tokenizer")
    script = """
        import resource, sys
        from pathlib import Path
        from transformers import PreTrainedTokenizerFast
        from halve.text.corpus import prepare
        folder = Path(sys.argv[1])
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
        for name in ("small", "big"):
            source, workers = str(folder / f"{name}.txt"), int(sys.argv[2])
            prepare([source], tokenizer=tokenizer, text_field="text", cache=folder / "cache", workers=workers)
            print(*(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path), str(workers)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
    )
    unit = 1 if sys.platform == "darwin" else 1024
    before, after = ([int(word) * unit for word in line.split()] for line in done.stdout.splitlines())
    for small_file, large_file in zip(before, after, strict=True):  # this process, and the largest that it started
        more = large_file - small_file
        assert more < 30_000_000, f"{more / 1e6:.0f} MB more for a file 56 times the size"
    assert (after[1] > 0) == (workers > 1)


# Samples


@given(count=st.integers(4, 400), context=st.integers(1, 4), batch=st.integers(1, 30), seed=st.integers(0, 3))
def test_every_epoch_draws_every_sample_once(
    tmp_path_factory: pytest.TempPathFactory, count: int, context: int, batch: int, seed: int
) -> None:
    samples = Samples(fake_tokens(tmp_path_factory.getbasetemp(), count), context, seed)
    num = count // context
    assert len(samples) == num
    steps = 2 * -(-num // batch)
    batches = [samples.batch(step, batch) for step in range(steps)]
    drawn = torch.cat([one.ids for one in batches])
    assert drawn.dtype == torch.int64
    assert torch.equal(drawn - drawn[:, :1], torch.arange(context).expand_as(drawn))
    firsts = (drawn[:, 0] // context).tolist()
    assert firsts == [number for one in batches for number in one.numbers]
    for epoch in range(2):
        assert sorted(firsts[epoch * num : (epoch + 1) * num]) == list(range(num))
    again = Samples(samples.tokens, context, seed)
    assert torch.equal(again.batch(steps - 1, batch).ids, drawn[-batch:])  # no state: any step, in any order


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_rows_are_read_as_the_memory_map_has_them(tmp_path: Path, dtype: str) -> None:
    path, top = tmp_path / "a.tokens", np.iinfo(dtype).max
    (top - np.arange(103)).astype(dtype).tofile(path)
    tokens = Tokens(path=path, count=103, dtype=dtype, fingerprint="", text_bytes=0)
    assert tokens.rows([9, 0, 4, 4], 10).tolist() == [tokens.ids[10 * i : 10 * i + 10].tolist() for i in (9, 0, 4, 4)]
    assert Samples(tokens, 10, 0).take([9])[0, -1] == top - 99


def test_order_depends_on_the_seed_and_the_epoch(tmp_path: Path) -> None:
    tokens = fake_tokens(tmp_path, 640)
    orders = [Samples(tokens, 10, seed).batch(step, 64).ids[:, 0].tolist() for seed in (0, 1) for step in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_the_order_is_the_same_on_every_machine(tmp_path: Path) -> None:
    samples = Samples(fake_tokens(tmp_path, 12), 1, seed=7)
    assert samples.batch(0, 12).ids[:, 0].tolist() == [4, 6, 10, 0, 1, 3, 8, 7, 2, 5, 9, 11]


def test_first_samples_are_spread_evenly(tmp_path: Path) -> None:
    samples = Samples(fake_tokens(tmp_path, 105), 10, seed=3)
    assert samples.first(4)[:, 0].tolist() == [0, 20, 50, 70]
    assert samples.first(99)[:, 0].tolist() == list(range(0, 100, 10))


def test_calibration_samples_are_one_of_each_strip_and_move_with_the_seed(tmp_path: Path) -> None:
    tokens = fake_tokens(tmp_path, 1005)
    drawn = [Samples(tokens, 10, seed=seed).calibration(4)[:, 0].tolist() for seed in range(3)]
    assert drawn[0] == Samples(tokens, 10, seed=0).first(4)[:, 0].tolist() == [0, 250, 500, 750]
    assert drawn[1] == [150, 400, 650, 900], "0.618 of a strip of 25 samples is 15"
    assert drawn[2] == [50, 300, 550, 800], "0.236 of it is 5"
    assert Samples(tokens, 10, seed=1).calibration(999)[:, 0].tolist() == list(range(0, 1000, 10))


def test_too_little_text_for_one_sample_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="fewer tokens than one sample: 9 of 10"):
        Samples(fake_tokens(tmp_path, 9), 10, seed=0)
