"""Answers of the current model: from its own distribution, resumed, and made into pairs by a reward."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import pytest
import torch
from talking import SHORT_CHAT, saying, with_turn_end
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from halve.align import writing
from halve.align.examples import LeftOut
from halve.align.setting import StepSetting
from halve.errors import TrainError

ROWS = [{"prompt": [{"role": "user", "content": f"Who sees the {word}?"}]} for word in ("cat", "dog", "tree")]
MakeSetting = Callable[..., StepSetting]


def asking(make_setting: MakeSetting, **given: Any) -> StepSetting:
    return make_setting(kind="rpo", rewards="gsm8k", answers=4, answer_tokens=12, **given)


def test_answers_are_drawn_for_every_prompt(
    model: PreTrainedModel, chat_tokenizer: PreTrainedTokenizerBase, make_setting: MakeSetting
) -> None:
    model.generation_config = before = GenerationConfig(max_new_tokens=1, repetition_penalty=9.0)
    answers = writing.written_answers(ROWS, model, chat_tokenizer, asking(make_setting))
    assert [len(texts) for texts in answers] == [4, 4, 4]
    assert len({text for texts in answers for text in texts}) > 6
    assert model.generation_config is before
    again = writing.written_answers(ROWS, model, chat_tokenizer, asking(make_setting, scratch="b"))
    other = writing.written_answers(ROWS, model, chat_tokenizer, asking(make_setting, scratch="c", seed=1))
    assert again == answers != other


def test_a_low_temperature_is_greedy(
    model: PreTrainedModel, chat_tokenizer: PreTrainedTokenizerBase, make_setting: MakeSetting
) -> None:
    with torch.no_grad():
        model.model.norm.weight *= 50  # else some tokens are nearly as likely as the likeliest
    how = asking(make_setting, temperature=0.01)
    (texts, *_) = writing.written_answers(ROWS, model, chat_tokenizer, how)
    prompt = writing.prompt_ids_of(ROWS[0], chat_tokenizer)
    with torch.no_grad():
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=0, pad_token_id=0)
    assert {*texts} == {chat_tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True)}


def test_an_answer_ends_where_the_template_ends_a_turn(
    model: PreTrainedModel, chat_tokenizer: PreTrainedTokenizerBase, make_setting: MakeSetting
) -> None:
    """The checkpoint names only the end of a text. A verifier would read the next turn as the answer's end."""
    ended = with_turn_end(chat_tokenizer)
    saying(model, ended("It is 5.~\nu:7 8", add_special_tokens=False)["input_ids"])
    (texts, *_) = writing.written_answers(ROWS[:1], model, ended, asking(make_setting))
    assert texts == ["It is 5."] * 4


def test_written_parts_are_not_written_again(
    model: PreTrainedModel,
    chat_tokenizer: PreTrainedTokenizerBase,
    make_setting: MakeSetting,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(writing, "_PROMPTS", 1)
    how = asking(make_setting)
    whole = writing.written_answers(ROWS, model, chat_tokenizer, how)
    (how.scratch / "answers" / "part-000001.json").unlink()
    drawn: list[Any] = []
    true = writing._drawn

    def watched(row: Mapping[str, Any], *args: Any) -> list[str]:
        drawn.append(row)
        return true(row, *args)

    monkeypatch.setattr(writing, "_drawn", watched)
    assert writing.written_answers(ROWS, model, chat_tokenizer, how) == whole
    assert drawn == [ROWS[1]]


def test_the_best_and_the_worst_become_the_pair() -> None:
    left_out = LeftOut()
    answers = [["bb", "a", "dddd", "ccc"], ["x", "y", "z", "w"]]
    (pair,) = writing.judged(ROWS[:2], answers, lambda row, text: float(len(text)), left_out=left_out)
    assert pair["prompt"] == ROWS[0]["prompt"]
    assert (pair["chosen"]["content"], pair["rejected"]["content"]) == ("dddd", "a")
    assert pair["rewards"] == [4.0, 1.0]
    assert left_out.told == "1 have answers of equal reward and are left out"


def test_a_pair_keeps_the_tools_of_its_prompt(chat_tokenizer: PreTrainedTokenizerBase) -> None:
    row = {**ROWS[0], "tools": [{"type": "function", "function": {"name": "look"}}]}
    (pair,) = writing.judged([row], [["a", "bb"]], lambda row, text: float(len(text)), left_out=LeftOut())
    assert pair["tools"] == row["tools"]
    tooled = deepcopy(chat_tokenizer)
    tooled.chat_template = "{{ tools | tojson }}" + SHORT_CHAT
    for one in (row, pair):
        assert '"look"' in tooled.decode(writing.prompt_ids_of(one, tooled))


def test_a_prompt_with_an_answer_that_was_not_read_is_left_out() -> None:
    left_out = LeftOut()
    rewards = {"a": 1.0, "b": None, "c": 2.0}
    (pair,) = writing.judged(ROWS[:2], [["a", "b"], ["a", "c"]], lambda row, text: rewards[text], left_out=left_out)
    assert pair["prompt"] == ROWS[1]["prompt"]
    assert left_out.told == "1 have answers that are too long for the reward model and are left out"
    assert left_out.fix == "give a reward model that reads more tokens, or shorter answers"


@pytest.mark.parametrize("value", [math.nan, math.inf, -1e16])
def test_a_reward_that_is_no_number_ends_the_step(value: float) -> None:
    want = re.escape(f"the reward of an answer is {value:g}\n  why: a reward is a number of at most 1e+15")
    with pytest.raises(TrainError, match=want):
        list(writing.judged(ROWS[:1], [["a", "b"]], lambda row, text: value, left_out=LeftOut()))
