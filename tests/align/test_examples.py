"""Conversations and pairs as tokens: what is cut, what is left out, what is held out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from chat import CHATML, turns, with_template, write_rows
from talking import conversations, preferences, write_lines
from transformers import PreTrainedTokenizerBase

from halve.align.examples import (
    LeftOut,
    Preference,
    dialogues,
    encoded_pair,
    largest_id,
    messages_field,
    parted,
    preference_rows,
    require_examples,
)
from halve.errors import CorpusError
from halve.recipe.schema import Alignment, Data

DATA = Data(train=("none.txt",), valid=("none.txt",))


def test_only_what_the_assistant_says_counts(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase) -> None:
    path = write_rows(tmp_path / "a.jsonl", turns("Who?", "The cat.", "Why?", "It has to."))
    (talk,) = dialogues(Alignment(kind="sft", data=(str(path),)), DATA, chat_tokenizer, context=64, left_out=LeftOut())
    assert chat_tokenizer.decode(talk.ids) == "u:Who?\na:The cat.\nu:Why?\na:It has to.\n"
    assert chat_tokenizer.decode(talk.ids[talk.counts]) == "The cat.\nIt has to.\n"


def test_long_conversations_are_cut_and_empty_ones_left_out(
    tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase
) -> None:
    path = write_rows(tmp_path / "a.jsonl", turns("a " * 40, "b"), turns("a", "b " * 40), turns("a", "b"))
    left_out = LeftOut()
    step = Alignment(kind="sft", data=(str(path),))
    talks = list(dialogues(step, DATA, chat_tokenizer, context=30, left_out=left_out))
    assert [len(talk.ids) for talk in talks] == [30, len(talks[1].ids)]
    assert left_out.told == (
        "2 are longer than 30 tokens and are cut, 1 say nothing to learn from within 30 tokens and are left out"
    )


def test_conversations_come_from_the_field_of_the_step_or_of_the_data(tmp_path: Path) -> None:
    step = Alignment(kind="sft", data=("a.jsonl",))
    assert messages_field(step, DATA) == "messages"
    assert messages_field(step, DATA.model_copy(update={"messages_field": "talk"})) == "talk"
    named = step.model_copy(update={"messages_field": "mine"})
    assert messages_field(named, DATA.model_copy(update={"messages_field": "talk"})) == "mine"


def encoded(row: dict[str, object], tokenizer: PreTrainedTokenizerBase, path: Path, *, context: int = 64) -> Preference:
    write_lines(path, [row])
    ((read, place),) = preference_rows(Alignment(kind="rpo", data=(str(path),)))
    pair = encoded_pair(read, place, tokenizer, context=context, left_out=LeftOut())
    assert pair is not None
    return pair


def test_the_better_answer_is_the_chosen_one(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase) -> None:
    (row,) = preferences(1)
    pair = encoded({**row, "chosen_reward": 3, "rejected_reward": 1}, chat_tokenizer, tmp_path / "a.jsonl")
    other = encoded({**row, "chosen_reward": -2, "rejected_reward": 2.5}, chat_tokenizer, tmp_path / "b.jsonl")
    assert (pair.gap, other.gap) == (2.0, 4.5)
    assert (other.chosen, other.rejected) == (pair.rejected, pair.chosen)


def test_pairs_that_teach_nothing_are_left_out(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase) -> None:
    talk = {"prompt": "a", "chosen": "b b b c", "rejected": "b b b d"}
    write_lines(tmp_path / "a.jsonl", [{**talk, "prompt": "a " * 40}, {**talk, "chosen": talk["rejected"]}, talk])
    left_out = LeftOut()
    step = Alignment(kind="dpo", data=(str(tmp_path / "a.jsonl"),))
    pairs = [encoded_pair(*row, chat_tokenizer, context=40, left_out=left_out) for row in preference_rows(step)]
    assert [pair is None for pair in pairs] == [True, True, False]
    assert list(left_out.counts.values()) == [1, 1]
    prompt = len(pairs[2].prompt) if pairs[2] else 0
    (row, place) = list(preference_rows(step))[2]
    assert encoded_pair(row, place, chat_tokenizer, context=prompt + 3, left_out=left_out) is None  # alike up to there
    cut = encoded_pair(
        {**row, "rejected": {"role": "assistant", "content": "d d d d"}},
        place,
        chat_tokenizer,
        context=prompt + 3,
        left_out=left_out,
    )
    assert cut is not None
    assert len(cut.chosen) == len(cut.rejected) == 3


def test_largest_id_of_both_kinds(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase) -> None:
    path = conversations(tmp_path / "a.jsonl", 5)
    step = Alignment(kind="sft", data=(str(path),))
    chat = with_template(chat_tokenizer, CHATML)  # type: ignore[arg-type]
    talks = list(dialogues(step, DATA, chat, context=200, left_out=LeftOut()))
    assert largest_id(talks) == max(int(np.max(talk.ids)) for talk in talks)
    assert largest_id([Preference([1, 5], [7], [2]), Preference([1], [2], [300])]) == 300
    assert largest_id([]) == -1


def of_prompts(*prompts: int) -> list[Preference]:
    """A pair of each of these prompts."""
    return [Preference([prompt], [i], [i + 1], asked=str(prompt)) for i, prompt in enumerate(prompts)]


def test_what_is_held_out_is_fixed_by_the_seed_and_never_trained_on() -> None:
    pairs = of_prompts(*range(100))
    train, heldout, beside = parted(pairs, 8, seed=1)
    assert sorted([*train, *heldout]) == pairs
    assert (len(heldout), beside) == (8, [])
    assert parted(pairs, 8, seed=1)[1] == heldout != parted(pairs, 8, seed=2)[1]
    assert parted(pairs, 0, seed=1) == (pairs, [], [])
    assert len(parted(pairs, 64, seed=1)[1]) == 10


@pytest.mark.parametrize(("num_prompts", "asked", "held"), [(100, 64, 10), (100, 3, 3), (20, 64, 2), (9, 64, 0)])
def test_one_pair_of_a_held_out_prompt_is_held_out_and_none_trained_on(num_prompts: int, asked: int, held: int) -> None:
    pairs = of_prompts(*(i % num_prompts for i in range(3 * num_prompts)))
    train, heldout, beside = parted(pairs, asked, seed=0)
    assert (len(heldout), len(beside)) == (held, 2 * held)
    assert sorted([*train, *heldout, *beside]) == sorted(pairs)
    prompts = {pair.asked for pair in heldout}
    assert len(prompts) == held
    assert {pair.asked for pair in beside} == prompts
    assert not prompts & {pair.asked for pair in train}


def test_a_prompt_of_most_pairs_is_not_held_out() -> None:
    pairs = of_prompts(*([0] * 900), *range(1, 101))
    for seed in range(20):
        train, heldout, _ = parted(pairs, 64, seed=seed)
        assert (len(train), len(heldout)) == (990, 10)


def test_pairs_of_one_prompt_have_one_group(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase) -> None:
    """However the prompt is written, and whatever its last token is beside an answer."""
    one, other = preferences(2)
    messages = [{"content": one["prompt"], "role": "user"}]
    rows = [one, {**one, "chosen": "Nobody."}, {**one, "prompt": messages}, other]
    groups = [encoded(row, chat_tokenizer, tmp_path / "a.jsonl").group for row in rows]
    assert groups[0] == groups[1] == groups[2] != groups[3]


def test_a_file_that_is_given_twice_leaks_nothing(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase) -> None:
    path = str(conversations(tmp_path / "a.jsonl", 60))
    step = Alignment(kind="sft", data=(path, path))
    talks = list(dialogues(step, DATA, chat_tokenizer, context=64, left_out=LeftOut()))
    train, heldout, beside = parted(talks, 64, seed=0)
    held = {talk.ids.tobytes() for talk in heldout}
    assert len(talks) == 120 == len(train) + len(heldout) + len(beside)
    assert 4 <= len(held) == len(heldout) <= 6
    assert not held & {talk.ids.tobytes() for talk in train}


def test_nothing_left_is_an_error() -> None:
    left_out = LeftOut()
    left_out.add("are empty", 3)
    with pytest.raises(CorpusError, match=r"no pair is left to learn from\n  why: 3 are empty"):
        require_examples(0, left_out, "pair")
