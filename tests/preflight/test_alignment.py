"""Errors in steps of alignment that `check` finds, and what the dry run says of them."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from talking import ENDED_CHAT, SHORT_CHAT, conversations, preferences, with_chat, with_turn_end, write_lines
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from halve.errors import RecipeError
from halve.model.checkpoint import Checkpoint
from halve.preflight import forecast as forecasts
from halve.preflight.alignment import new_ends, rows_left_out
from halve.preflight.check import check
from halve.recipe.schema import Recipe

CALLS = SHORT_CHAT.replace("message['content']", "(message['content'] or message['tool_calls'][0]['name'])")
"""A template that writes calls of tools."""

MakeRecipe = Callable[..., Recipe]


@pytest.fixture(scope="module")
def chat_model(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_chat(tiny_llama, tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture
def aligned(make_recipe: MakeRecipe, chat_model: Path) -> MakeRecipe:
    """`aligned(step, ...)`: a recipe with these steps on a model with a chat template."""

    def made(*steps: dict[str, Any], model: Path = chat_model) -> Recipe:
        return make_recipe(model=str(model), distill={"tokens": 512, "batch": 4}, align=[*steps])

    return made


def errors(recipe: Recipe) -> str:
    return "\n".join(map(str, check(recipe)))


def test_sound_steps_pass(aligned: MakeRecipe, tmp_path: Path) -> None:
    talks, pairs = conversations(tmp_path / "a.jsonl", 4), write_lines(tmp_path / "b.jsonl", preferences(4))
    recipe = aligned({"kind": "sft", "data": [str(talks)]}, {"kind": "rpo", "data": [str(pairs)]})
    assert check(recipe) == ()


@pytest.mark.parametrize(
    ("row", "step", "what"),
    [
        ({"chosen": None}, {}, "line 2 has no chosen answer"),
        ({"chosen_reward": None}, {}, "line 2 has no reward for its chosen answer"),
        ({"rejected_reward": float("nan")}, {}, "line 2 has no reward for its rejected answer"),
        ({"answer": None}, {"rewards": "gsm8k"}, "line 2 has no answer to compare with"),
        ({"answer": "none"}, {"rewards": "gsm8k", "answers": 2}, "line 2 has no number to compare with"),
        ({"chosen_reward": 10**400}, {}, "line 2 has no reward for its chosen answer"),
        ({"chosen_reward": 1e308, "rejected_reward": -1e308}, {}, "line 2 has no reward for its chosen answer"),
        ({"chosen": {"role": "assistant", "content": None}}, {}, "line 2, chosen, message 1 has no content"),
        ({"prompt": ""}, {"kind": "dpo"}, "line 2 has no field 'prompt'"),
    ],
)
def test_a_bad_row_is_found_before_anything_runs(
    aligned: MakeRecipe, tmp_path: Path, row: dict[str, Any], step: dict[str, Any], what: str
) -> None:
    first, second = preferences(2)
    path = write_lines(tmp_path / "pairs.jsonl", [first, {**second, **row}])
    (error,) = check(aligned({"kind": "rpo", "data": [str(path)], **step}))
    assert what in error.what
    assert len(str(error).splitlines()) == 3


def test_conversations_without_messages_are_found(aligned: MakeRecipe, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": "words"}])
    assert "has no field 'messages'" in errors(aligned({"kind": "sft", "data": [str(path)]}))


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_missing_data_are_found(aligned: MakeRecipe, tmp_path: Path, kind: str) -> None:
    (error,) = check(aligned({"kind": kind, "data": [str(tmp_path / "nowhere.jsonl")]}))
    assert "nowhere.jsonl" in error.what
    assert error.fix.startswith("correct align.data;")


def test_the_plan_says_which_steps_it_does_not_count(aligned: MakeRecipe, tmp_path: Path) -> None:
    """A plan is made before the data are there, and data sets of the hub are read in the run."""
    talks = conversations(tmp_path / "talks.jsonl", 4)
    steps = [{"kind": "sft", "data": [place]} for place in (str(talks), "later.jsonl", "hub:some/set")]
    planned = forecasts.forecast(aligned(*steps))
    assert planned.tokens["align-sft"] > 0
    assert planned.unknown == dict.fromkeys(("align-2-sft", "align-3-sft"), "none of its rows are on this machine")


def test_the_field_of_a_step_is_that_of_the_step(aligned: MakeRecipe, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"talk": []}])
    (error,) = check(aligned({"kind": "sft", "data": [str(path)]}))
    assert error.fix == "set align.messages_field to the field that holds the conversation"
    (error,) = check(aligned({"kind": "sft", "data": [str(path)], "messages_field": "talk"}))
    assert error.fix == "drop that row, or set align.messages_field to the field that holds the messages"
    words = tmp_path / "a.txt"
    words.write_text("Some words.")
    (error,) = check(aligned({"kind": "sft", "data": [str(words)]}))
    assert (error.why, error.fix) == (
        "it is plain text, and align.messages_field names a field of rows",
        "give JSON lines or parquet",
    )


# ---- rows with nothing to learn


QUESTION = {"role": "user", "content": "Who sees it?"}
ANSWER = {"role": "assistant", "content": "A cat."}


def test_conversations_without_any_answer_are_refused(aligned: MakeRecipe, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"messages": [QUESTION]}] * 3)
    (error,) = check(aligned({"kind": "sft", "data": [str(path)]}))
    assert str(error).splitlines() == [
        "step 1 of align (sft) has no conversation to learn from",
        "  why: 3 have no answer of the assistant and are left out",
        "  fix: give conversations in which the assistant answers",
    ]


@pytest.mark.parametrize(
    ("content", "says"),
    [("", "line 2 has no answer in message 4"), (None, "message 4 has no content"), (" \n", "no answer in message 4")],
)
def test_an_answer_that_says_nothing_is_refused(
    aligned: MakeRecipe, tmp_path: Path, content: str | None, says: str
) -> None:
    silent = {"role": "assistant", "content": content}
    rows = [{"messages": [QUESTION, ANSWER]}, {"system": "Be.", "messages": [QUESTION, ANSWER, QUESTION, silent]}]
    (error,) = check(aligned({"kind": "sft", "data": [str(write_lines(tmp_path / "a.jsonl", rows))]}))
    assert "a.jsonl, line 2" in error.what
    assert error.what.endswith(says)
    assert len(str(error).splitlines()) == 3


def test_a_call_of_a_tool_is_an_answer(aligned: MakeRecipe, tiny_llama: Path, tmp_path: Path) -> None:
    model = with_chat(tiny_llama, tmp_path / "calling", template=CALLS)
    call = {**ANSWER, "content": "", "tool_calls": [{"name": "look"}]}
    path = write_lines(tmp_path / "a.jsonl", [{"messages": [QUESTION, call]}])
    assert check(aligned({"kind": "sft", "data": [str(path)]}, model=model)) == ()


def test_pairs_without_any_room_are_refused(aligned: MakeRecipe, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "b.jsonl", preferences(3))
    (error,) = check(aligned({"kind": "dpo", "data": [str(path)], "context": 4}))
    assert error.what == "step 1 of align (dpo) has no pair to learn from"
    assert error.why == "3 have a prompt of over 4 tokens and are left out"
    assert error.fix == "set a larger context in that step, or give more data"


def test_rows_that_are_left_out_are_told(aligned: MakeRecipe, tmp_path: Path) -> None:
    rows = [{"messages": [QUESTION]}] * 2 + [{"messages": [QUESTION, ANSWER]}] * 98
    recipe = aligned(
        {"kind": "sft", "data": [str(write_lines(tmp_path / "a.jsonl", rows))]},
        {"kind": "dpo", "data": [str(write_lines(tmp_path / "b.jsonl", preferences(4)))], "context": 64},
    )
    assert check(recipe) == ()
    assert list(rows_left_out(recipe, Checkpoint.open(recipe.model))) == [
        "step 1 of align (sft): of the first 64 rows, 2 have no answer of the assistant and are left out"
    ]


def test_a_new_end_of_answers_is_told(aligned: MakeRecipe, tiny_llama: Path, tmp_path: Path) -> None:
    folder = with_chat(tiny_llama, tmp_path / "base", template=ENDED_CHAT)
    with_turn_end(AutoTokenizer.from_pretrained(folder)).save_pretrained(folder)
    pairs = write_lines(tmp_path / "b.jsonl", preferences(4))
    recipe = aligned({"kind": "dpo", "data": [str(pairs)]}, model=folder)
    (line,) = new_ends(recipe, Checkpoint.open(folder))
    assert line.startswith("align: answers end at ~, as in the chat template; ")
    turn = Checkpoint.open(folder).tokenizer.convert_tokens_to_ids("~")
    for named, lines in ((turn, 0), (None, 1)):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
        assert len([*new_ends(recipe, Checkpoint.open(folder))]) == lines
    (folder / "generation_config.json").unlink()
    assert len([*new_ends(recipe, Checkpoint.open(folder))]) == 1
    assert not [*new_ends(recipe.model_copy(update={"align": ()}), Checkpoint.open(folder))]


def test_an_answer_behind_many_questions_is_enough(aligned: MakeRecipe, tmp_path: Path) -> None:
    rows = [{"messages": [QUESTION]}] * 99 + [{"messages": [QUESTION, ANSWER]}]
    assert check(aligned({"kind": "sft", "data": [str(write_lines(tmp_path / "a.jsonl", rows))]})) == ()


def test_a_tokenizer_without_a_template_is_found(aligned: MakeRecipe, tiny_llama: Path, tmp_path: Path) -> None:
    plain = with_chat(tiny_llama, tmp_path / "plain", template=None)
    pairs = write_lines(tmp_path / "b.jsonl", preferences(4))
    (error,) = check(aligned({"kind": "rpo", "data": [str(pairs)]}, model=plain))
    assert "the tokenizer has no chat template" in error.what
    assert error.why.startswith("align needs one:")
    assert "chat_template.jinja" in error.fix


@pytest.mark.parametrize(
    ("step", "what"),
    [
        ({"context": 4096}, "set context in step 1 of align (dpo) to"),
        ({"context": 4096}, "a sample of step 1 of align (dpo) has 4096 tokens"),
        ({"method": "lora", "lora_rank": 64}, "lora_rank 64 of step 1 of align (dpo) is larger than"),
        ({"rewards": "model", "reward_model": "./no/judge"}, "there is no model"),
    ],
)
def test_what_does_not_fit_the_model_is_found(
    aligned: MakeRecipe, tmp_path: Path, step: dict[str, Any], what: str
) -> None:
    pairs = write_lines(tmp_path / "b.jsonl", preferences(4))
    assert what in errors(aligned({"kind": "dpo", "data": [str(pairs)], **step}))


def test_a_rank_that_is_too_high_is_one_error(aligned: MakeRecipe, tmp_path: Path) -> None:
    """Also where the disk is planned, which knows the step as a correction."""
    talks = conversations(tmp_path / "a.jsonl", 4)
    recipe = aligned({"kind": "sft", "data": [str(talks)], "method": "lora", "lora_rank": 100})
    (error,) = check(recipe, tmp_path / "run")
    assert error.what.startswith("lora_rank 100 of step 1 of align (sft) is larger")
    with pytest.raises(RecipeError, match=re.escape(error.what)):
        forecasts.forecast(recipe)


def test_a_reward_model_that_cannot_judge_is_found(aligned: MakeRecipe, tmp_path: Path, chat_model: Path) -> None:
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=1,
        max_position_embeddings=16,
    )
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "judge")
    pairs = write_lines(tmp_path / "b.jsonl", preferences(4))
    step = {"data": [str(pairs)], "rewards": "model", "reward_model": str(tmp_path / "judge")}
    recipe = aligned({"kind": "rpo", **step})
    (error,) = check(recipe)
    assert error.what == f"align.reward_model: {tmp_path / 'judge'} has no tokenizer"
    AutoTokenizer.from_pretrained(chat_model).save_pretrained(tmp_path / "judge")
    (error,) = check(recipe)
    assert "reads 16 tokens, and step 1 of align (rpo) has context 32" in error.what


def test_a_missing_package_is_found(aligned: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = write_lines(tmp_path / "b.jsonl", preferences(4))
    true = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "trl" else true(name, *a))
    (error,) = check(aligned({"kind": "dpo", "data": [str(pairs)]}))
    assert error.what == "step 1 of align (dpo) needs the package trl"
    assert error.fix == "pip install 'halve[align]'"


# ---- the dry run


def test_the_dry_run_plans_every_step(aligned: MakeRecipe, tmp_path: Path) -> None:
    talks, pairs = conversations(tmp_path / "a.jsonl", 40), write_lines(tmp_path / "b.jsonl", preferences(40))
    plain = aligned()
    recipe = aligned(
        {"kind": "sft", "data": [str(talks)], "tokens": 10_000},
        {"kind": "rpo", "data": [str(pairs)], "epochs": 3, "batch": 4, "context": 64},
        {"kind": "rpo", "data": [str(pairs)], "batch": 4, "context": 64, "answers": 4, "rewards": "gsm8k"},
        {"kind": "dpo", "data": [str(pairs)], "method": "lora", "lora_rank": 4, "batch": 4},
    )
    before, found = forecasts.forecast(plain), forecasts.forecast(recipe)
    names = ["align-sft", "align-2-rpo", "align-3-rpo", "align-4-dpo"]
    assert [name for name in found.tokens if name.startswith("align")] == names
    assert found.tokens["align-sft"] == 10_000
    assert 40 * 3 * 40 < found.tokens["align-2-rpo"] < 40 * 3 * 80
    assert found.flops["align-2-rpo"] > 3 * found.flops["align-sft"] * found.tokens["align-2-rpo"] / 40_000
    assert [name for name in found.memory if name.startswith("align")] == names
    assert found.memory["align-4-dpo"].moment_bytes < found.memory["align-2-rpo"].moment_bytes / 2
    assert found.disk.model_bytes > before.disk.model_bytes
    assert json.loads(json.dumps(found.to_json(), default=str))["tokens"]["align-sft"] == 10_000
