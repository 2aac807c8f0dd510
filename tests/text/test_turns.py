"""The token that ends a turn by the chat template, beside those that end a text."""

from __future__ import annotations

from pathlib import Path

import pytest
from chat import CHATML, with_template
from talking import SHORT_CHAT, with_turn_end
from transformers import PreTrainedTokenizerFast

from halve.model.checkpoint import Checkpoint
from halve.text.turns import answer_ends, turn_end


def test_a_turn_ends_at_the_first_special_token_behind_the_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    ended = with_turn_end(tokenizer)
    assert turn_end(ended) == tokenizer.convert_tokens_to_ids("~")
    closed = with_template(ended, "{{ '~' + messages[1]['content'] + '!' + eos_token + '~' }}")
    assert turn_end(closed) == tokenizer.eos_token_id


@pytest.mark.parametrize("template", [None, SHORT_CHAT, CHATML, "{{ 1 / 0 }}", "{{ messages[0]['content'] }}"])
def test_a_template_may_end_turns_with_no_token(tokenizer: PreTrainedTokenizerFast, template: str | None) -> None:
    assert turn_end(with_template(tokenizer, template)) is None


def test_an_answer_ends_there_too(tiny_llama: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model, ended = Checkpoint.open(tiny_llama).load(), with_turn_end(tokenizer)
    assert model.generation_config is not None
    turn = turn_end(ended)
    assert answer_ends(model, ended) == [0, turn]
    assert answer_ends(model, with_template(tokenizer, SHORT_CHAT)) == [0]
    model.generation_config.eos_token_id = [turn, 0]
    assert answer_ends(model, ended) == [turn, 0]
    model.generation_config.eos_token_id = ended.eos_token = None
    assert answer_ends(model, ended) == [turn]
