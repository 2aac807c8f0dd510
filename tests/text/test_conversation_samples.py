"""Samples of conversations: each is read as it is read alone, in every family, padded or packed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from chat import small_talk, turns, with_template, write_rows
from families import ALSO, PROVED, config
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from halve.errors import CorpusError
from halve.model.head import split
from halve.recipe.schema import Recipe
from halve.text.batch import Batch, predictions
from halve.text.conversation_samples import Conversations, samples_of
from halve.text.corpus import Samples, Tokens, prepare
from halve.text.course import open_course, open_heldout
from halve.text.mixture import open_mixture
from halve.text.rendering import CODES, COUNTED, FIRST, IDS, Chat

LENGTHS = (5, 9, 3, 30, 2, 7, 4)


def tokens_of(folder: Path, lengths: tuple[int, ...], *, uncounted: tuple[int, ...] = ()) -> Tokens:
    """Conversations of these lengths, of which every third token counts; in those that are named, none."""
    rows = []
    for number, length in enumerate(lengths):
        row = np.arange(length, dtype=CODES) + 10 * number + 1
        if number not in uncounted:
            row[1::3] |= COUNTED
        row[0] |= FIRST
        rows.append(row)
    codes = np.concatenate(rows)
    path = folder / "some.tokens"
    codes.tofile(path)
    return Tokens(path, len(codes), CODES.name, "", 0, largest=int(max(codes & IDS)), chat=True)


def test_each_conversation_is_a_sample_with_padding_behind_it(tmp_path: Path) -> None:
    batch = Conversations(tokens_of(tmp_path, LENGTHS), 8, 0).numbered(range(7))
    assert batch.ids[0].tolist() == [1, 2, 3, 4, 5, 0, 0, 0]
    assert batch.ids[3].tolist() == list(range(31, 39)), "cut"
    assert batch.attended is not None
    assert batch.attended.sum(1).tolist() == [5, 8, 3, 8, 2, 7, 4]
    assert batch.positions is None
    counted = batch.counted()
    assert counted is not None
    assert counted[0].tolist() == [True, False, False, True, False, False, False]
    assert batch.labels().tolist() == [i for row in batch.ids.tolist() for i in row[1::3] if i]
    assert batch.weights is not None
    assert batch.weights.tolist() == counted.sum(1).tolist()


def test_packed_samples_hold_whole_conversations(tmp_path: Path) -> None:
    samples = Conversations(tokens_of(tmp_path, LENGTHS), 12, 0, packed=True)
    batch = samples.numbered(range(len(samples)))
    assert batch.ids.tolist() == [
        [1, 2, 3, 4, 5, 0, 0, 0, 0, 0, 0, 0],
        [*range(11, 20), 21, 22, 23],
        list(range(31, 43)),
        [41, 42, *range(51, 58), 0, 0, 0],
        [61, 62, 63, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
    assert batch.positions is not None
    assert batch.positions[1].tolist() == [*range(9), 0, 1, 2]
    assert batch.positions[3].tolist() == [0, 1, *range(7), 0, 1, 2]
    alone = Conversations(samples.tokens, 12, 0).numbered(range(7))
    assert batch.labels().tolist() == alone.labels().tolist()


def test_what_is_cut_or_left_out_is_said(tmp_path: Path) -> None:
    samples = Conversations(tokens_of(tmp_path, LENGTHS, uncounted=(0, 4)), 8, 0)
    assert (len(samples), samples.cut, samples.left_out) == (5, 2, 2)
    assert samples.told == (
        "of 7 conversations 2 are longer than 8 tokens and are cut,"
        " 2 have no token that counts within 8 and are left out"
    )
    assert samples.numbered([0]).ids[0, 0] == 11
    assert Conversations(samples.tokens, 40, 0).cut == 0
    with pytest.raises(CorpusError, match="no conversation has a token to learn from"):
        Conversations(tokens_of(tmp_path, (3, 4), uncounted=(0, 1)), 8, 0)


def test_calibration_takes_the_length_with_the_most_tokens_and_pads_nothing(tmp_path: Path) -> None:
    samples = Conversations(tokens_of(tmp_path, (2, 6, 6, 6, 8, 20)), 100, 0)
    assert samples.calibration_length == 6  # 5 x 6 above 1 x 20, 2 x 8 and 6 x 2
    found = samples.calibration(99)
    assert found.tolist() == [list(range(10 * n + 1, 10 * n + 7)) for n in (1, 2, 3, 4, 5)]
    assert samples.calibration(2).tolist() == [found[0].tolist(), found[2].tolist()]
    assert samples.calibration(99, 7).tolist() == [list(range(10 * n + 1, 10 * n + 8)) for n in (4, 5)]


@pytest.mark.parametrize(
    ("lengths", "taken"), [((5, 6, 7, 90), 5), ((5, 90, 90), 5), ((5, 90, 90, 90), 90), ((5, 90), 5), ((90,), 90)]
)
def test_a_long_conversation_does_not_calibrate_alone(lengths: tuple[int, ...], taken: int, tmp_path: Path) -> None:
    assert Conversations(tokens_of(tmp_path, lengths), 100, 0).calibration_length == taken


@given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.integers(2, 9), st.booleans(), st.integers(0, 3))
def test_every_epoch_draws_every_counted_token_once(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], context: int, packed: bool, seed: int
) -> None:
    tokens = tokens_of(tmp_path_factory.getbasetemp(), tuple(lengths))
    if not any(length > 1 for length in lengths):
        return
    samples = Conversations(tokens, context, seed, packed=packed)
    batch = samples.batch(0, len(samples))
    want = [10 * n + 1 + i for n, length in enumerate(lengths) for i in range(1, min(length, context), 3)]
    assert sorted(batch.labels().tolist()) == sorted(want)


def test_parts_lose_the_columns_that_are_padding_in_all_of_them(tmp_path: Path) -> None:
    samples = Conversations(tokens_of(tmp_path, (70, 9, 130, 9)), 200, 0)
    batch = samples.numbered(range(4))
    first, second, third = (batch.rows([0, 1]), batch.rows([2]), batch.rows([3]))
    assert [one.ids.shape[1] for one in batch.split(2)] == [128, 192]
    assert [next(one.split(9)).ids.shape[1] for one in (first, second, third)] == [128, 192, 64]
    assert torch.cat([one.labels() for one in batch.split(1)]).equal(batch.labels())
    wide = Batch(batch.ids, batch.numbers)
    assert next(wide.split(4)).ids.shape[1] == 200, "what has no padding keeps its columns"


# ---- alone and beside others


def family(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config(name)).double().eval()
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", PROVED + ALSO)
@pytest.mark.parametrize("packed", [False, True])
def test_a_conversation_is_read_as_it_is_alone(name: str, packed: bool, tmp_path: Path) -> None:
    """Packed families are those that `documents.require_apart` passes; padded, all."""
    model, context = family(name), 16
    samples = Conversations(tokens_of(tmp_path, LENGTHS), context, 0, packed=packed)
    body, head = split(model)
    batch = samples.numbered(range(len(samples)))
    have = head.logits(predictions(body, batch))
    alone = Conversations(samples.tokens, context, 0)
    want = []
    for number in range(len(alone)):
        row = alone.numbered([number])
        assert row.attended is not None
        length = int(row.attended.sum())
        logits_TV = model(input_ids=row.ids[:, :length]).logits[0, :-1]
        counted = row.counted()
        assert counted is not None
        want.append(logits_TV[counted[0, : length - 1]])
    torch.testing.assert_close(have, torch.cat(want).to(have.dtype), rtol=1e-4, atol=1e-5)


# ---- recipes


@pytest.fixture(scope="module")
def chatty(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return with_template(tokenizer)


@pytest.fixture
def recipe(make_recipe: Callable[..., Recipe], tmp_path: Path) -> Callable[..., Recipe]:
    def made(**changes: object) -> Recipe:
        train = write_rows(tmp_path / "train.jsonl", *small_talk(40))
        valid = write_rows(tmp_path / "valid.jsonl", *small_talk(9, seed=1))
        data = {"train": [str(train)], "valid": [str(valid)], "messages_field": "messages", "context": 128, **changes}
        return make_recipe(data=data, distill={"tokens": 5120, "batch": 4, "eval_samples": 9})

    return made


def test_a_part_of_plain_text_beside_conversations(
    recipe: Callable[..., Recipe], chatty: PreTrainedTokenizerFast, corpus: Path, tmp_path: Path
) -> None:
    parts = {
        "chat": {"sources": [str(tmp_path / "train.jsonl")], "weight": 1},
        "web": {"sources": [str(corpus / "train.txt")], "weight": 1, "plain": True},
    }
    where = {"cache": tmp_path / "cache", "tokenizer": chatty}
    for documents in ("joined", "apart"):
        asked = recipe(train=parts, documents=documents)
        write_rows(tmp_path / "train.jsonl", *(one[:2] for one in small_talk(40)))
        assert asked.distill is not None
        batch = open_course(asked, asked.distill, **where).batch(1)
        talks, prose = (batch.rows(rows) for rows in ([0, 2], [1, 3]))
        assert talks.attended is not None
        assert prose.attended is not None
        assert bool(prose.attended.all())
        assert not bool(talks.attended.all())
        assert talks.labels().numel() < prose.labels().numel()
        assert (batch.positions is None) == (documents == "joined")
    mixture = open_mixture(asked, **where)
    length = min(part.calibration_length for part in mixture.parts)
    assert mixture.calibration(10).shape == (10, length)
    assert length < 128


def test_conversations_need_no_border(
    recipe: Callable[..., Recipe], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    bare = with_template(PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer))
    asked = recipe(documents="apart")
    assert asked.distill is not None
    heldout = open_heldout(asked, asked.distill, cache=tmp_path / "c", tokenizer=bare)
    assert heldout.positions is not None
    assert isinstance(open_course(asked, asked.distill, cache=tmp_path / "c", tokenizer=bare).batch(1), Batch)


def test_the_kind_of_samples_is_that_of_the_tokens(chatty: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", turns("Who?", "I."), text="plain text " * 9)
    how = {"tokenizer": chatty, "text_field": "text", "cache": tmp_path / "c"}
    plain, talk = (prepare([str(file)], chat=chat, **how) for chat in (None, Chat("messages", "all")))
    assert type(samples_of(plain, 8, 0)) is Samples
    assert type(samples_of(talk, 8, 0)) is Conversations
