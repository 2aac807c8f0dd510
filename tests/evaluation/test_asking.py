"""Models answer tasks: alike in batches of any size, as halve's own multiple choice, and once after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from chat import CHATML, with_template
from rich.console import Console
from talking import saying, with_turn_end
from task_rows import rows_of, small_model, write_data, write_rows
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from halve.errors import CorpusError
from halve.evaluation import asking
from halve.evaluation.results import item_lines, summary
from halve.model.checkpoint import Checkpoint
from halve.model.choices import Item, answer_encoded, encode
from halve.progress import RichProgress
from halve.recipe.evaluations import Evaluate
from halve.text.day import DAY


def with_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer, with a BOS token at the beginning of every text."""
    from copy import deepcopy

    made = deepcopy(tokenizer)
    end = made.eos_token
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{end} $A", special_tokens=[(end, made.eos_token_id)]
    )
    return made


@pytest.fixture(scope="module", params=["without BOS", "with BOS"])
def model(request: Any, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    own = tokenizer if request.param == "without BOS" else with_bos(tokenizer)
    return Checkpoint.open(small_model(tmp_path_factory.mktemp("models") / "small", own, layers=2))


def test_halve_s_multiple_choice_gives_the_harness_s_accuracies(model: Checkpoint, tmp_path: Path) -> None:
    place = write_data(tmp_path, "arc_easy", 40)
    section = Evaluate(tasks={"arc_easy": 0}, data={"arc_easy": str(place)}, task_batch=16)
    loaded = model.load()
    found = asking.answer(asking.read_exam(section, context=4096), loaded, model.tokenizer, seed=0)
    items = [
        Item(
            f"Question: {row['question']}\nAnswer:",
            tuple(f" {choice}" for choice in row["choices"]["text"]),
            "ABCD".index(row["answerKey"]),
        )
        for row in rows_of("arc_easy", 40)
    ]
    ours = answer_encoded(loaded, encode(model.tokenizer, items, max_tokens=4096))
    theirs = found["arc_easy (0)"].values
    assert theirs["acc"] == ours.acc.double().tolist()
    assert ours.acc_norm is not None
    assert theirs["acc_norm"] == ours.acc_norm.double().tolist()
    assert 0 < sum(theirs["acc"]) < 40


@pytest.fixture
def exam(tmp_path: Path) -> asking.Exam:
    tasks = {"arc_easy": 2, "gsm8k": 1, "ifeval": 0}
    data = {task: str(write_data(tmp_path, task, 5)) for task in tasks}
    return asking.read_exam(Evaluate(tasks=tasks, data=data, max_new_tokens=8), context=4096)


def test_batches_of_one_and_of_eight_give_the_same_answers(model: Checkpoint, exam: asking.Exam) -> None:
    loaded = model.load()
    alone, together = (asking.answer(exam, loaded, model.tokenizer, seed=0, batch=batch) for batch in (1, 8))
    assert {key: asking.changed_items(alone[key], together[key]) for key in alone} == {key: [] for key in alone}
    assert any(len(set(map(str, found.answers))) > 1 for found in alone.values())


def test_a_finished_task_is_not_asked_again(
    model: Checkpoint, exam: asking.Exam, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = model.load()
    first = asking.answer(exam, loaded, model.tokenizer, seed=0, kept=tmp_path / "kept")
    (tmp_path / "kept" / "1.json").unlink()
    asked: list[str] = []
    ask = asking._ask
    monkeypatch.setattr(asking, "_ask", lambda *args: asked.append(args[2].ask.task) or ask(*args))
    again = asking.answer(exam, loaded, model.tokenizer, seed=0, kept=tmp_path / "kept")
    assert asked == ["gsm8k"]
    assert again == first


def test_the_summary_has_every_task_and_every_item(model: Checkpoint, exam: asking.Exam) -> None:
    loaded = model.load()
    before = loaded.generation_config, torch.random.get_rng_state()
    answers = asking.answer(exam, loaded, model.tokenizer, seed=0)
    assert loaded.generation_config is before[0]
    assert torch.equal(torch.random.get_rng_state(), before[1])
    both = {"teacher": answers, "student": answers}
    found = summary(exam, both, subject="student", bos="the tokenizer's own")
    assert found is not None
    assert [(entry["key"], entry["metric"], entry["items"]) for entry in found["listed"]] == [
        ("arc_easy (2)", "acc_norm", 5),
        ("gsm8k (1)", "exact_match,flexible-extract", 5),
        ("ifeval (0)", "average", 5),
    ]
    assert found["differences"]["teacher"]["arc_easy (2)"]["mcnemar"] == {"only_ours": 0, "only_theirs": 0, "p": 1.0}
    four = [found["scores"]["student"]["ifeval (0)"][name]["value"] for name in asking._AVERAGED]
    assert found["scores"]["student"]["ifeval (0)"]["average"]["value"] == pytest.approx(sum(four) / 4)
    lines = list(item_lines(both))
    assert len(lines) == 15
    assert lines[0]["values"]["teacher"] == lines[0]["values"]["student"]


def test_prompts_that_lose_their_beginning_are_counted(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of four questions are longer than the context, and each prompt of gsm8k than what its answer leaves."""
    long = {"question": "What is it? " * 60}
    arc = [row | (long if i > 1 else {}) for i, row in enumerate(rows_of("arc_easy", 4))]
    places = {"arc_easy": arc, "gsm8k": [row | long for row in rows_of("gsm8k", 3)]}
    data = {task: str(write_rows(tmp_path / f"{task}.jsonl", rows)) for task, rows in places.items()}
    section = Evaluate(tasks=dict.fromkeys(data, 0), data=data, max_new_tokens=2)
    teacher = Checkpoint.open(small_model(tmp_path / "model", tokenizer))
    model = teacher.load()

    def cut(context: int) -> dict[str, int]:
        model.config.max_position_embeddings = context
        exam = asking.read_exam(section, context=context)
        answers = asking.answer(exam, model, teacher.tokenizer, seed=0, progress=RichProgress(Console(width=200)))
        found = summary(exam, {"teacher": answers}, subject=None, bos="")
        assert found is not None
        return {entry["task"]: entry["cut"] for entry in found["listed"]}

    assert cut(4096) == {"arc_easy": 0, "gsm8k": 0}
    assert "lost" not in capsys.readouterr().out
    assert cut(128) == {"arc_easy": 2, "gsm8k": 3}
    told = "arc_easy (0): 4 items; the prompts of 2 lost their beginning, for they do not fit into 128 tokens"
    assert told in capsys.readouterr().out


def test_a_choice_that_is_longer_than_the_context_is_an_error(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rows = rows_of("arc_easy", 2)
    rows[1]["choices"]["text"][0] = "a long choice " * 60
    section = Evaluate(tasks={"arc_easy": 0}, data={"arc_easy": str(write_rows(tmp_path / "arc.jsonl", rows))})
    teacher = Checkpoint.open(small_model(tmp_path / "model", tokenizer))
    model = teacher.load()
    model.config.max_position_embeddings = 64
    with pytest.raises(CorpusError, match="a choice of arc_easy is longer than the model's context") as told:
        asking.answer(asking.read_exam(section, context=64), model, teacher.tokenizer, seed=0)
    assert "drop the row with the choice ' a long choice" in told.value.fix


@pytest.mark.parametrize(("chat", "want"), [(True, "It is 5."), (False, "It is 5.\nu:7")])
def test_answers_to_chats_end_where_the_template_ends_a_turn(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, chat: bool, want: str
) -> None:
    ended = with_turn_end(tokenizer)
    folder = small_model(tmp_path / "model", ended)
    model = saying(Checkpoint.open(folder).load(), ended("It is 5.~\nu:7<|endoftext|>")["input_ids"])
    data = {"gsm8k": str(write_data(tmp_path, "gsm8k", 2))}
    section = Evaluate(tasks={"gsm8k": 0}, data=data, max_new_tokens=40, chat_template=chat)
    (answered,) = asking.answer(asking.read_exam(section, context=4096), model, ended, seed=0).values()
    assert answered.answers == [want] * 2


def test_the_harness_s_prompts_have_the_same_day_every_day(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    teacher = Checkpoint.open(small_model(tmp_path / "model", tokenizer))
    data = {"gsm8k": str(write_data(tmp_path, "gsm8k", 2))}
    section = Evaluate(tasks={"gsm8k": 0}, data=data, max_new_tokens=1, chat_template=True)
    exam = asking.read_exam(section, context=4096)

    def requests(before: str) -> list[str]:
        words = with_template(tokenizer, before + CHATML)
        (answered,) = asking.answer(exam, teacher.load(), words, seed=0).values()
        return [item["request"] for item in answered.items]

    assert requests("{{ strftime_now('%d %b %Y') }}: ") == requests(f"{DAY}: ") != requests("")
