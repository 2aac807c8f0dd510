"""The tokens around documents: which they are, where they stand, and what of them is predicted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from halve.errors import CorpusError, TokenizerError
from halve.model.choices import Item, encode
from halve.model.measure import target_bytes
from halve.recipe.schema import Boundary
from halve.text.corpus import Samples, Tokens, prepare
from halve.text.mixture import Mixture
from halve.text.tokenize import Marks, Separator, marks, separator

BOS, EOS = 1, 2


def dressing(*, adds: bool, bos: str | None = "<s>", eos: str | None = "</s>") -> PreTrainedTokenizerFast:
    """One token a byte; `adds` puts the first special token in front of text that it is given."""
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if adds:
        assert bos is not None
        backend.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, vocab[bos])])
    names = {"bos_token": bos, "eos_token": eos}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{k: v for k, v in names.items() if v is not None})


ADDS, PLAIN = dressing(adds=True), dressing(adds=False)


def made(*texts: str, cache: Path, boundary: Boundary = "auto", tokenizer: PreTrainedTokenizerFast = ADDS) -> Tokens:
    file = cache / "a.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return prepare([str(file)], tokenizer=tokenizer, boundary=boundary, text_field="text", cache=cache)


# ---- which tokens


@pytest.mark.parametrize(
    ("tokenizer", "want"),
    [
        (ADDS, Marks(bos=BOS, eos=EOS)),
        (PLAIN, Marks(eos=EOS)),
        (dressing(adds=True, eos=None), Marks(bos=BOS)),
        (dressing(adds=False, eos=None), Marks(bos=BOS)),
        (dressing(adds=False, bos=None), Marks(eos=EOS)),
        (dressing(adds=True, bos="</s>"), Marks(bos=EOS, eos=EOS)),
        (dressing(adds=False, bos="</s>"), Marks(eos=EOS)),
        (dressing(adds=False, bos=None, eos=None), Marks()),
    ],
)
def test_auto_does_as_the_tokenizer_does(tokenizer: PreTrainedTokenizerFast, want: Marks) -> None:
    assert marks(tokenizer, "auto") == want


def test_a_recipe_may_say_otherwise() -> None:
    asked: tuple[Boundary, ...] = ("bos", "eos", "both", "none")
    want = [Marks(bos=BOS), Marks(eos=EOS), Marks(bos=BOS, eos=EOS), Marks()]
    assert [marks(PLAIN, one) for one in asked] == [marks(ADDS, one) for one in asked] == want
    for one, lacking in (("bos", dressing(adds=False, bos=None)), ("both", dressing(adds=True, eos=None))):
        with pytest.raises(TokenizerError, match=f"data.boundary {one} needs a token .*\n  why: it has no"):
            marks(lacking, one)


def test_documents_are_told_apart_by_what_they_begin_with() -> None:
    assert separator(ADDS) == Separator(BOS, ends=False)
    assert separator(ADDS, "eos") == separator(PLAIN) == Separator(EOS, ends=True)
    assert separator(ADDS, "none") is None


# ---- where they stand


@pytest.mark.parametrize(
    ("boundary", "want"),
    [
        ("auto", [BOS, "a", EOS, BOS, "b", EOS]),
        ("both", [BOS, "a", EOS, BOS, "b", EOS]),
        ("bos", [BOS, "a", BOS, "b", BOS]),
        ("eos", ["a", EOS, "b", EOS]),
        ("none", ["a", "b"]),
    ],
)
def test_a_token_file_of_each_kind(tmp_path: Path, boundary: Boundary, want: list[int | str]) -> None:
    found = made("a", "b", cache=tmp_path, boundary=boundary)
    vocab = ADDS.get_vocab()
    assert found.ids.tolist() == [vocab[one] if isinstance(one, str) else one for one in want]
    assert found.text_bytes == 2
    assert len({made("a", "b", cache=tmp_path, boundary=one).path for one in ("eos", "bos", "none")}) == 3


def test_one_token_stands_between_where_both_are_the_same(tmp_path: Path) -> None:
    tokenizer = dressing(adds=True, bos="</s>")
    a, b = (tokenizer.get_vocab()[one] for one in "ab")
    assert made("a", "b", cache=tmp_path, tokenizer=tokenizer).ids.tolist() == [EOS, a, EOS, b, EOS]


def test_the_second_sample_of_a_long_document_begins_with_bos(tmp_path: Path) -> None:
    text = "".join(chr(97 + i % 26) for i in range(40))
    samples = Samples(made(text, cache=tmp_path), 8, seed=0)
    plain = ADDS(text, add_special_tokens=False)["input_ids"]
    assert samples.take([0, 1, 2]).tolist() == [[BOS, *plain[:7]], [BOS, *plain[6:13]], [BOS, *plain[13:20]]]
    first, second = samples.numbered([0]), samples.numbered([1])
    assert first.labels().tolist() + second.labels().tolist() == plain[:13], "each token of the text once"
    assert Samples(made(text, cache=tmp_path, boundary="eos"), 8, seed=0).take([1]).tolist() == [plain[8:16]]


# ---- what is predicted


def tokens_of(folder: Path, ids: list[int], which: Marks) -> Tokens:
    path = folder / "drawn.tokens"
    np.array(ids, dtype=np.uint16).tofile(path)
    return Tokens(path=path, count=len(ids), dtype="uint16", fingerprint="", text_bytes=0, marks=which)


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=30),
    context=st.integers(2, 12),
    which=st.sampled_from([Marks(bos=BOS, eos=EOS), Marks(bos=BOS), Marks(bos=EOS, eos=EOS)]),
)
def test_every_token_of_the_text_is_predicted_once(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], context: int, which: Marks
) -> None:
    bos, next_id, ids = which.bos, 3, []
    assert bos is not None
    for length in lengths:
        ids += [bos, *range(next_id, next_id + length), *[EOS] * (which.eos not in (None, bos))]
        next_id += length
    if len(ids) < context:
        return
    samples = Samples(tokens_of(tmp_path_factory.getbasetemp(), ids, which), context, seed=0)
    batch = samples.numbered(range(len(samples)))
    assert (batch.ids[:, 0] == bos).all()
    assert (batch.ids[:, 1] != bos).all(), "one is enough"
    text = [token for token in batch.labels().tolist() if token > EOS]
    assert text == list(range(3, 3 + len(text))), "in order, none twice and none left out"
    assert text == [token for token in ids[: len(samples) * (context - 1)] if token > EOS]
    assert (bos in batch.labels().tolist()) <= (which.follows is None)


def test_masks_travel_with_their_samples(tmp_path: Path) -> None:
    samples = Samples(made("ab", "c", "defgh", "ij", cache=tmp_path), 4, seed=1)
    whole = samples.numbered(range(len(samples)))
    assert whole.predicted is not None
    assert not whole.predicted.all()
    assert EOS in whole.labels().tolist()
    assert BOS not in whole.labels().tolist()
    for numbers in ([2, 0], [1]):
        part = samples.numbered(numbers)
        assert part.predicted is not None
        assert torch.equal(part.predicted, whole.predicted[numbers])
        assert torch.equal(part.labels(), whole.rows(numbers).to("cpu").labels())
    assert torch.equal(torch.cat([part.labels() for part in whole.split(2)]), whole.labels())
    mixed = Mixture((samples, samples), (1.0, 1.0)).numbered([len(samples) + 1, 0, len(samples)])
    assert torch.equal(mixed.labels(), whole.rows([1, 0, 0]).labels())
    assert mixed.numbers == (len(samples) + 1, 0, len(samples))
    apart = Samples(samples.tokens, 4, seed=1, separator=separator(ADDS)).numbered(range(len(samples)))
    assert BOS not in apart.labels().tolist()
    assert apart.positions is not None
    assert (apart.positions[apart.ids == BOS] == 0).all()


def test_bytes_are_those_of_what_is_predicted(tmp_path: Path) -> None:
    samples = Samples(made("abc", "def", "ghi", cache=tmp_path), 6, seed=0)
    batch = samples.numbered(range(len(samples)))
    assert batch.ids[:, :2].tolist() == [[BOS, ADDS.get_vocab()["a"]], [BOS, ADDS.get_vocab()["d"]]]
    found = target_bytes(ADDS, batch.ids, batch.predicted)
    assert found.tolist() == [3, 3]


def test_a_sample_holds_more_than_the_token_in_front(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="a sample of one token"):
        Samples(made("abc", cache=tmp_path), 1, seed=0)


def test_multiple_choice_gets_no_second_bos() -> None:
    (item,) = encode(ADDS, [Item("a", ("b", "c"), 0)], max_tokens=None)
    assert [row.count(BOS) for row in item.sequences] == [1, 1]
    assert item.starts == (2, 2)
    (item,) = encode(ADDS, [Item("", ("b", "c"), 0)], max_tokens=None)
    assert [row[:1] + row[1:].count(BOS) * (0,) for row in item.sequences] == [(BOS,), (BOS,)]
