"""Rows of preferences in every form, and rows that lack something."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from chat import CHATML, with_template
from talking import SHORT_CHAT
from transformers import PreTrainedTokenizerFast

from halve.errors import CorpusError, TokenizerError
from halve.recipe.schema import Alignment
from halve.text import sources
from halve.text.preferences import Needs
from halve.text.rendering import encode_answers

USER = {"role": "user", "content": "Who sees it?"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("The cat.", "No."))
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look", "arguments": {}}}]}
PLAIN = {"prompt": "Who sees it?", "chosen": "The cat.", "rejected": "No."}
PAIR = Needs(answers=True, rewards=False, reference=False)
REWARDED = Needs(answers=True, rewards=True, reference=False)
JUDGED = Needs(answers=True, rewards=False, reference=False, words=True)
CHECKED = Needs(answers=True, rewards=False, reference=True)


def read(tmp_path: Path, *rows: Any, needs: Needs = PAIR) -> list[dict[str, Any]]:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return [json.loads(piece.text) for piece in sources.read_documents(str(path), needs.wanted)]


# ---- forms


@pytest.mark.parametrize(
    "row",
    [
        PLAIN,
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": GOOD, "rejected": BAD},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "Who sees it?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"messages": [USER], "chosen": "The cat.", "rejected": "No."},
        {"question": "Who sees it?", "chosen": "The cat.", "rejected": "No."},
        {
            "conversations": [{"from": "human", "value": "Who sees it?"}],
            "chosen": {"from": "gpt", "value": "The cat."},
            "rejected": {"from": "gpt", "value": "No."},
        },
    ],
)
def test_all_forms_are_the_same_pair(tmp_path: Path, row: dict[str, Any]) -> None:
    assert read(tmp_path, row) == [{"prompt": [USER], "chosen": GOOD, "rejected": BAD}]


def test_answers_that_are_alike_keep_the_last_message(tmp_path: Path) -> None:
    (row,) = read(tmp_path, {"chosen": [USER, GOOD], "rejected": [USER, GOOD]})
    assert row == {"prompt": [USER], "chosen": GOOD, "rejected": GOOD}


@pytest.mark.parametrize("fields", [("chosen_reward", "rejected_reward"), ("score_chosen", "score_rejected")])
def test_rewards_are_read(tmp_path: Path, fields: tuple[str, str]) -> None:
    (row,) = read(tmp_path, {**PLAIN, fields[0]: 3, fields[1]: -0.5}, needs=REWARDED)
    assert row["rewards"] == [3.0, -0.5]


def test_a_prompt_alone_will_do_for_new_answers(tmp_path: Path) -> None:
    needs = Needs(answers=False, rewards=False, reference=True)
    assert read(tmp_path, {"prompt": "2 + 2?", "answer": 4}, needs=needs) == [
        {"prompt": [{"role": "user", "content": "2 + 2?"}], "reference": "4"}
    ]


SYSTEM = {"role": "system", "content": "Be short."}


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Who sees it?", "chosen": "The cat.", "rejected": "No."},
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [SYSTEM, USER, BAD]},
        {"prompt": [SYSTEM, USER], "chosen": GOOD, "rejected": [SYSTEM, USER, BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {
            "conversations": [{"from": "human", "value": "Who sees it?"}],
            "chosen": {"from": "gpt", "value": "The cat."},
            "rejected": {"from": "gpt", "value": "No."},
        },
    ],
)
def test_a_system_text_beside_the_prompt_is_its_first_message(tmp_path: Path, row: dict[str, Any]) -> None:
    whole, without = read(tmp_path, {**row, "system": "Be short."}, {**PLAIN, "system": " "})
    assert whole == {"prompt": [SYSTEM, USER], "chosen": GOOD, "rejected": BAD}
    assert without == {"prompt": [USER], "chosen": GOOD, "rejected": BAD}


def test_system_texts_and_tools_are_read_from_parquet(tmp_path: Path) -> None:
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    tools = [{"type": "function", "function": {"name": "look"}}]
    rows = [{**PLAIN, "system": "Be short.", "tools": json.dumps(tools)}, {**PLAIN, "system": None, "tools": None}]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    first, second = (json.loads(p.text) for p in sources.read_documents(str(tmp_path / "pairs.parquet"), PAIR.wanted))
    assert first == {"prompt": [SYSTEM, USER], "tools": tools, "chosen": GOOD, "rejected": BAD}
    assert second == {"prompt": [USER], "chosen": GOOD, "rejected": BAD}


def test_parquet_is_read(tmp_path: Path) -> None:
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    rows = [{"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "chosen_reward": 1.0, "rejected_reward": 0.0}]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    (piece,) = sources.read_documents(str(tmp_path / "pairs.parquet"), REWARDED.wanted)
    assert json.loads(piece.text) == {"prompt": [USER], "chosen": GOOD, "rejected": BAD, "rewards": [1.0, 0.0]}


# ---- bad rows


@pytest.mark.parametrize(
    ("change", "needs", "what", "why"),
    [
        ({"chosen": None}, PAIR, "has no chosen answer", "its field 'chosen' is null"),
        ({"chosen": " \n"}, PAIR, "has no chosen answer", "is empty"),
        ({"rejected": []}, PAIR, "has no rejected answer", "is empty"),
        ({"chosen": {"role": "assistant", "content": None}}, PAIR, "chosen, message 1 has no content", "it is null"),
        ({"chosen": {"role": "assistant", "content": ""}}, PAIR, "has no chosen answer", "says nothing"),
        ({"rejected": [USER, {"role": "assistant", "content": " "}]}, PAIR, "has no rejected answer", "says nothing"),
        ({"chosen": [USER]}, PAIR, "has no chosen answer", "messages of nobody after the prompt"),
        ({"chosen": [GOOD, USER]}, PAIR, "has no chosen answer", "messages of assistant, user"),
        (
            {"prompt": [SYSTEM, USER], "system": "Be long."},
            PAIR,
            "has two system texts",
            "holds 'Be long.', and message 1",
        ),
        ({"system": 7}, PAIR, "field 'system' is not text", "it holds int"),
        ({"tools": "look"}, PAIR, "field 'tools' holds no list of tools", "it holds str"),
        ({"chosen": 7}, PAIR, "field 'chosen' holds neither text nor messages", "it holds int"),
        ({"prompt": None}, PAIR, "has no field 'prompt'", "its fields are prompt, chosen, rejected"),
        ({"prompt": [GOOD]}, PAIR, "does not alternate", "message 1 is of assistant"),
        ({"prompt": [USER, GOOD]}, PAIR, "the prompt ends with an answer", "its message 2 is of assistant"),
        ({"chosen": "cut \ud83d"}, PAIR, "holds half a character", "half of a surrogate pair"),
        ({"chosen": CALL}, JUDGED, "has no words to judge in its chosen answer", "rewards: model read content"),
        ({"rejected": CALL}, JUDGED, "has no words to judge in its rejected answer", "a call of a tool alone"),
        ({}, REWARDED, "has no reward for its chosen answer", "its field 'chosen_reward' is missing"),
        ({"chosen_reward": 1}, REWARDED, "has no reward for its rejected answer", "'rejected_reward' is missing"),
        ({"chosen_reward": math.nan}, REWARDED, "has no reward for its chosen answer", "holds nan"),
        ({"chosen_reward": math.inf}, REWARDED, "has no reward for its chosen answer", "holds inf"),
        ({"chosen_reward": 10**400}, REWARDED, "has no reward for its chosen answer", "holds 1000"),
        ({"chosen_reward": 1e39}, REWARDED, "has no reward for its chosen answer", "holds 1e+39"),
        ({"chosen_reward": 1, "rejected_reward": -3e38}, REWARDED, "has no reward for its rejected", "holds -3e+38"),
        ({"chosen_reward": True}, REWARDED, "has no reward for its chosen answer", "holds True"),
        ({"score_chosen": "5"}, REWARDED, "has no reward for its chosen answer", "'score_chosen' holds '5'"),
        ({"answer": "four"}, CHECKED, "has no number to compare with", "field 'answer' holds 'four'"),
        ({"answer": "4 #### none"}, CHECKED, "has no number to compare with", "rewards: gsm8k compares numbers"),
        ({}, CHECKED, "has no answer to compare with", "rewards: gsm8k reads it from field 'answer'"),
    ],
)
def test_a_row_that_lacks_something_is_named(
    tmp_path: Path, change: dict[str, Any], needs: Needs, what: str, why: str
) -> None:
    whole = {**PLAIN, "chosen_reward": 1, "rejected_reward": 0, "answer": "4"}
    with pytest.raises(CorpusError) as raised:
        read(tmp_path, whole, {**PLAIN, **change}, needs=needs)
    assert "line 2" in raised.value.what
    assert what in raised.value.what
    assert why in raised.value.why
    assert raised.value.fix


def test_an_answer_may_be_a_call_alone(tmp_path: Path) -> None:
    (row,) = read(tmp_path, {**PLAIN, "chosen": CALL})
    assert row["chosen"] == {**CALL, "content": ""}


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ({"kind": "rpo"}, False),
        ({"kind": "dpo", "rewards": "gsm8k"}, True),
        ({"kind": "rpo", "rewards": "model", "reward_model": "judge"}, True),
        ({"kind": "rpo", "rewards": "gsm8k", "answers": 2}, False),
    ],
)
def test_answers_that_a_reward_function_reads_need_words(step: dict[str, Any], words: bool) -> None:
    assert Needs.of(Alignment(data=("a.jsonl",), **step)).words == words


def test_a_conversation_has_no_chosen_answer(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"line 1 has no chosen answer\n  why: its field 'chosen' is missing"):
        read(tmp_path, {"messages": [USER, GOOD, USER, GOOD]})


def test_a_missing_answer_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"line 1 has no chosen answer\n  why: its field 'chosen' is missing"):
        read(tmp_path, {"prompt": "Who?", "rejected": "No."})


@pytest.mark.parametrize("row", [7, "text"])
def test_a_row_that_is_no_object_is_named(tmp_path: Path, row: Any) -> None:
    with pytest.raises(CorpusError, match="line 1 is not an object"):
        read(tmp_path, row)


def test_plain_text_holds_no_pairs(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words", encoding="utf-8")
    with pytest.raises(CorpusError, match=r"holds no pairs of answers\n.*plain text"):
        list(sources.read_documents(str(tmp_path / "a.txt"), PAIR.wanted))


# ---- as tokens


def test_prompt_and_answer_are_the_whole_conversation(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = with_template(tokenizer, SHORT_CHAT)
    prompt, answers = encode_answers(chat, [USER], [GOOD, BAD], tools=None, place="here")
    assert chat.decode(prompt).startswith("u:Who sees it?\n")
    for ids, answer in zip(answers, (GOOD, BAD), strict=True):
        whole = chat.apply_chat_template([USER, answer], tokenize=False)
        assert [*prompt, *ids] == chat(whole, add_special_tokens=False)["input_ids"]
        assert answer["content"].strip() in chat.decode(ids)


def test_a_token_that_joins_prompt_and_answer_belongs_to_the_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    """The invitation ends in a space, and a word begins with one in the vocabulary."""
    chat = with_template(tokenizer, SHORT_CHAT.replace("'a:'", "'a: '").replace("':'", "': '"))
    invited = chat(chat.apply_chat_template([USER], tokenize=False, add_generation_prompt=True))["input_ids"]
    prompt, (answer,) = encode_answers(
        chat, [USER], [{"role": "assistant", "content": "the cat"}], tools=None, place="here"
    )
    assert prompt == invited[: len(prompt)]
    assert len(prompt) < len(invited)
    assert chat.decode(answer).startswith(" the cat")


def test_without_a_template_there_are_no_answers(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(TokenizerError, match="has no chat template"):
        encode_answers(with_template(tokenizer, None), [USER], [GOOD], tools=None, place="here")


def test_a_template_that_fails_names_the_row(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(CorpusError, match="file, line 3: the chat template cannot be rendered"):
        encode_answers(with_template(tokenizer, "{{ 1 / 0 }}"), [USER], [GOOD], tools=None, place="file, line 3")


def test_a_template_that_would_leave_out_an_answer_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    """Its tokens would be the end of a turn alone, which the training would make more likely."""
    said = {**CALL, "content": ""}
    with pytest.raises(CorpusError, match="file, line 3: the chat template does not write calls of tools"):
        encode_answers(with_template(tokenizer, SHORT_CHAT), [USER], [said, BAD], tools=None, place="file, line 3")
    _, (call, _) = encode_answers(with_template(tokenizer), [USER], [said, BAD], tools=None, place="file, line 3")
    assert "look" in tokenizer.decode(call)


def test_tools_are_in_the_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = with_template(tokenizer, "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML)
    tools = [{"type": "function", "function": {"name": "look"}}]
    prompt, _ = encode_answers(chat, [USER], [GOOD, BAD], tools=tools, place="here")
    bare, _ = encode_answers(chat, [USER], [GOOD, BAD], tools=None, place="here")
    assert chat.decode(prompt) == json.dumps(tools) + chat.decode(bare)
