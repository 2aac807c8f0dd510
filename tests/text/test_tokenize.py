"""Tokenizing in several processes, going on after a kill, and two processes that want the same file."""

from __future__ import annotations

import errno
import json
import pickle
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from halve.errors import CorpusError, DiskError
from halve.process import fresh
from halve.text import corpus, tokenize
from halve.text.corpus import Tokens, prepare
from halve.text.sources import Piece
from halve.text.tokenize import EncodedPieces, Separator

NUM_DOCUMENTS = 60
GRACE_SECONDS = 30


def byte_tokenizer(end: str = "eos_token") -> PreTrainedTokenizerFast:
    """One token a byte after `<end>`, which begins documents where it is the bos_token."""
    vocab = {token: i for i, token in enumerate(["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **({end: "<end>"} if end else {}))


TOKENIZER = byte_tokenizer()


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Documents of many lengths, tokenized a few at a time: about 30 batches, a mark after every third."""
    file = tmp_path / "a.jsonl"
    rows = [{"text": f"{i} " + "ab ä\n" * (i * 7 % 31)} for i in range(NUM_DOCUMENTS)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    monkeypatch.setattr(tokenize, "BATCH_CHARS", 128)
    monkeypatch.setattr(corpus, "MARK_BATCHES", 3)
    return file


def made(text: Path, cache: Path, *, tokenizer: PreTrainedTokenizerFast = TOKENIZER, workers: int = 1) -> Tokens:
    return prepare([str(text)], tokenizer=tokenizer, text_field="text", cache=cache, workers=workers)


def processes() -> list[psutil.Process]:
    """The processes that multiprocessing has started from this one for work."""
    return [one for one in psutil.Process().children() if "spawn_main" in " ".join(one.cmdline())]


def counted(
    monkeypatch: pytest.MonkeyPatch, *, stop_at: int | None = None, by: BaseException | None = None
) -> list[int]:
    """Batches that are tokenized in this process from now on; at the one numbered `stop_at` this is raised."""
    seen: list[int] = []
    original = tokenize.encode_pieces

    def encode(batch: list[Piece], **options: Any) -> EncodedPieces:
        if len(seen) == stop_at:
            raise by or KeyboardInterrupt
        seen.append(len(batch))
        return original(batch, **options)

    monkeypatch.setattr(tokenize, "encode_pieces", encode)
    return seen


# ---- boundaries


def test_the_separator_is_the_end_or_else_the_beginning() -> None:
    assert tokenize.separator(TOKENIZER) == Separator(0, ends=True)
    assert tokenize.separator(byte_tokenizer("bos_token")) == Separator(0, ends=False)
    assert tokenize.separator(byte_tokenizer("")) is None


# ---- processes


def test_the_file_does_not_depend_on_the_number_of_processes(text: Path, tmp_path: Path) -> None:
    for tokenizer, several in ((TOKENIZER, (2, 3)), (byte_tokenizer("bos_token"), (2,))):
        alone = made(text, tmp_path / "1", tokenizer=tokenizer)
        for workers in several:
            together = made(text, tmp_path / str(workers), tokenizer=tokenizer, workers=workers)
            assert together.path.read_bytes() == alone.path.read_bytes()
            assert together.path.with_suffix(".json").read_bytes() == alone.path.with_suffix(".json").read_bytes()
    assert not processes(), "the processes end with the call"


def test_a_tokenizing_process_does_without_torch(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.pickle"
    file.write_bytes(pickle.dumps(TOKENIZER))
    code = """
        import pickle, sys
        import halve.text.tokenize
        tokenizer = pickle.loads(open(sys.argv[1], "rb").read())
        assert tokenizer(["ab"], add_special_tokens=False)["input_ids"]
        print("torch" in sys.modules)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(file)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == ["False"]


def test_only_so_many_batches_are_read_ahead() -> None:
    taken = []

    def work() -> Iterator[list[Piece]]:
        for i in range(50):
            taken.append(i)
            yield [Piece(str(i), last=True)]

    rows = tokenize.encoded(work(), tokenizer=TOKENIZER, dtype=np.dtype(np.uint16), workers=2)
    ahead = []
    for done, _ in enumerate(rows):
        ahead.append(len(taken) - done)
    assert len(ahead) == 50
    assert max(ahead) <= 2 * 2


def test_a_short_text_starts_no_process(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fresh, "pool", None)
    found = made(text, tmp_path / "cache", workers=1000)
    assert found.path.read_bytes() == made(text, tmp_path / "alone").path.read_bytes()
    with pytest.raises(TypeError, match="not callable"):
        made(text, tmp_path / "several", workers=2)


def test_an_error_in_the_text_comes_through_and_ends_the_processes(text: Path, tmp_path: Path) -> None:
    with text.open("a") as file:
        file.write("{broken\n")
    with pytest.raises(CorpusError, match=f"line {NUM_DOCUMENTS + 1} is not JSON"):
        made(text, tmp_path / "cache", workers=2)
    assert list((tmp_path / "cache").iterdir()) == []
    assert not processes()


def test_a_process_that_dies_is_said_and_what_is_done_is_kept(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = tokenize.batches

    def dying(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
        for number, batch in enumerate(original(pieces)):
            if number == 15:
                for child in processes():
                    child.kill()
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(tokenize, "batches", dying)
        with pytest.raises(CorpusError, match="a tokenizing process died") as caught:
            made(text, tmp_path / "cache", workers=2)
    assert caught.value.fix.startswith("set data.workers below 2")
    seen = counted(monkeypatch)
    found, again = made(text, tmp_path / "cache"), len(seen)
    assert found.path.read_bytes() == made(text, tmp_path / "whole").path.read_bytes()
    assert again <= len(seen) - again - 12, "twelve batches had come back when the sixteenth was read"


# ---- kills


@pytest.mark.parametrize("killed_at", [0, 1, 3, 4, 11, 24])
@pytest.mark.parametrize("end", ["eos_token", "bos_token"])
def test_a_killed_call_is_gone_on_with(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int, end: str
) -> None:
    tokenizer = byte_tokenizer(end)
    with monkeypatch.context() as patch:
        seen = counted(patch)
        whole = made(text, tmp_path / "whole", tokenizer=tokenizer)
        num_batches = len(seen)
    assert num_batches > 24
    with monkeypatch.context() as patch:
        counted(patch, stop_at=killed_at)
        with pytest.raises(KeyboardInterrupt):
            made(text, tmp_path / "killed", tokenizer=tokenizer)
    seen = counted(monkeypatch)
    found = made(text, tmp_path / "killed", tokenizer=tokenizer)
    assert found.path.read_bytes() == whole.path.read_bytes()
    assert (found.count, found.text_bytes) == (whole.count, whole.text_bytes)
    assert len(seen) == num_batches - killed_at // 3 * 3, "whole groups of three are not done again"
    assert len(list((tmp_path / "killed").iterdir())) == 2


def test_a_full_disk_loses_nothing_that_was_done(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        counted(patch, stop_at=10, by=OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(DiskError, match="no room left while writing"):
            made(text, tmp_path / "full")
    seen = counted(monkeypatch)
    found, again = made(text, tmp_path / "full"), len(seen)
    assert found.path.read_bytes() == made(text, tmp_path / "whole").path.read_bytes()
    assert again == len(seen) - again - 9


def test_a_draft_that_lost_its_end_is_begun_again(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        counted(patch, stop_at=10)
        with pytest.raises(KeyboardInterrupt):
            made(text, tmp_path / "killed")
    (draft,) = (tmp_path / "killed").glob(".*.draft")
    draft.write_bytes(draft.read_bytes()[:100])
    assert made(text, tmp_path / "killed").path.read_bytes() == made(text, tmp_path / "whole").path.read_bytes()


SCRIPT = """
import sys
from pathlib import Path
from halve.text import corpus, tokenize
from halve.text.corpus import prepare
from transformers import PreTrainedTokenizerFast
tokenize.BATCH_CHARS, corpus.MARK_BATCHES = 128, 3
folder = Path(sys.argv[1])
tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
original = tokenize.batches
def slow(pieces):
    import time
    for batch in original(pieces):
        time.sleep(0.1)
        yield batch
tokenize.batches = slow
prepare([str(folder / "a.jsonl")], tokenizer=tokenizer, text_field="text", cache=folder / "cache", workers=2)
"""


def test_a_kill_that_nothing_can_answer_leaves_no_process_and_no_wrong_file(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    TOKENIZER.save_pretrained(tmp_path / "tokenizer")
    with psutil.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path)], stderr=subprocess.PIPE
    ) as process:
        _wait(lambda: any((tmp_path / "cache").glob(".*.mark.json")) or process.poll() is not None)
        children = process.children(recursive=True)
        process.kill()
        process.communicate()
    assert len(children) >= 2
    _, alive = psutil.wait_procs(children, timeout=GRACE_SECONDS)
    assert not alive, "orphans wait for work for ever"
    seen = counted(monkeypatch)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "tokenizer")
    found, again = made(text, tmp_path / "cache", tokenizer=tokenizer), len(seen)
    whole = made(text, tmp_path / "whole", tokenizer=tokenizer)
    assert again < len(seen) - again, "what was marked is not done again"
    assert found.path.read_bytes() == whole.path.read_bytes()


# ---- a script that its own processes run again

PLAIN = """
import sys
from pathlib import Path
from halve.text import corpus, tokenize
from transformers import PreTrainedTokenizerFast
tokenize.BATCH_CHARS = 128
folder = Path(sys.argv[1])
tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
corpus.prepare([str(folder / "a.jsonl")], tokenizer=tokenizer, text_field="text", cache=folder / "cache", workers=2)
"""


def test_a_script_without_a_guard_is_told_of_it(text: Path, tmp_path: Path) -> None:
    """Its tokenizing processes would wait for the lock of the process that waits for them."""
    TOKENIZER.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "plain.py").write_text(PLAIN)
    command = [sys.executable, str(tmp_path / "plain.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=2 * GRACE_SECONDS)
    assert done.returncode == 1
    *_, what, why, fix = done.stderr.strip().splitlines()
    assert what.endswith("the tokenizing processes failed as they began")
    assert why.startswith("  why: each of them runs the calling script again")
    assert fix.startswith('  fix: put the call of halve under if __name__ == "__main__":')
    assert "RunError: this script starts itself again" in done.stderr, "which a process says of itself"


# ---- two at once


def test_of_two_callers_one_works_and_the_other_waits(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = counted(monkeypatch)
    number = len(list(tokenize.batches(Piece(json.loads(row)["text"], True) for row in text.read_text().splitlines())))
    slowed = tokenize.encode_pieces

    def slow(batch: list[Piece], **options: Any) -> EncodedPieces:
        time.sleep(0.005)
        return slowed(batch, **options)

    monkeypatch.setattr(tokenize, "encode_pieces", slow)
    found: list[Tokens] = []
    callers = [threading.Thread(target=lambda: found.append(made(text, tmp_path / "cache"))) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(found) == 3
    assert found[0] == found[1] == found[2]
    assert len(seen) == number
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".json", ".tokens"]


def _wait(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + GRACE_SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
