"""Rewards: the last number of an answer, and reward models."""

from __future__ import annotations

import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from talking import SHORT_CHAT
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerBase

from halve.align.rewards import by_last_number, open_reward, require_classifier
from halve.errors import CheckpointError, CorpusError
from halve.recipe.schema import Alignment
from halve.text.day import DAY

GSM8K = "He has 5 * 7 = <<5*7=35>>35 eggs.\n#### 1,035"


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("So it is 1035.", 1.0),
        ("First 35, then 1,035", 1.0),
        ("$1035.00", 1.0),
        ("#### 1035 and not 7", 1.0),
        ("1035 at first, but 36 at last", 0.0),
        ("It is -1035.", 0.0),
        ("I do not know.", 0.0),
        ("####", 0.0),
        ("", 0.0),
    ],
)
def test_the_last_number_decides(answer: str, right: float) -> None:
    assert by_last_number({"reference": GSM8K}, answer) == right


def test_a_reference_may_be_the_number_alone() -> None:
    assert by_last_number({"reference": "-2.50"}, "x = -2.5") == 1.0
    assert by_last_number({"reference": "none"}, "none") == 0.0


def classifier(
    folder: Path, tokenizer: PreTrainedTokenizerBase, *, num_labels: int = 1, chat: bool = True, **sizes: int
) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=num_labels,
        pad_token_id=0,
        **{"vocab_size": 320, **sizes},
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    if chat:
        (folder / "chat_template.jinja").write_text(SHORT_CHAT, encoding="utf-8")
    return folder


@pytest.mark.parametrize(("num_labels", "chat"), [(1, True), (2, True), (1, False)])
def test_a_reward_model_gives_its_score(
    tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase, num_labels: int, chat: bool
) -> None:
    folder = classifier(tmp_path / "judge", chat_tokenizer, num_labels=num_labels, chat=chat)
    step = Alignment(kind="rpo", data=("a.jsonl",), rewards="model", reward_model=str(folder))
    reward = open_reward(step, device="cpu")
    row: dict[str, Any] = {"prompt": [{"role": "user", "content": "Who?"}]}
    text = "u:Who?\na:The cat.\n" if chat else None
    ids = chat_tokenizer(text)["input_ids"] if text else chat_tokenizer("Who?", "The cat.")["input_ids"]
    model = LlamaForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    want = logits[0] if num_labels == 1 else logits[1] - logits[0]
    score = reward(row, "")
    assert reward(row, "The cat.") == pytest.approx(float(want), abs=1e-6)
    assert reward(row, "The cat.") != reward(row, "A dog.")
    assert score is not None
    assert math.isfinite(score)


def test_a_reward_model_s_template_is_told_the_same_day_and_the_tools(
    tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase
) -> None:
    """Another day would give another reward."""
    folder = classifier(tmp_path / "judge", chat_tokenizer, num_labels=1, chat=True)
    row: dict[str, Any] = {"prompt": [{"role": "user", "content": "Who?"}]}
    step = Alignment(kind="rpo", data=("a.jsonl",), rewards="model", reward_model=str(folder))

    def scored(before: str) -> float | None:
        (folder / "chat_template.jinja").write_text(before + SHORT_CHAT, encoding="utf-8")
        return open_reward(step, device="cpu")(row, "The cat.")

    assert scored("{{ strftime_now('%d %b %Y') }}") == scored(DAY)
    row["tools"] = [{"name": "look"}]
    assert scored("{{ tools[0].name }}") == scored("look")
    with pytest.raises(
        CorpusError, match=r"align.reward_model cannot be rendered for .*Who.*\n  why: TemplateError: no"
    ):
        scored("{{ raise_exception('no system') }}")


def refused(folder: Path | str, *, context: int = 64) -> str:
    with pytest.raises(CheckpointError) as raised:
        require_classifier(str(folder), context=context, where="step 2 of align (rpo)")
    assert "align.reward_model" in raised.value.what
    return str(raised.value)


def test_several_classes_are_no_reward(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase) -> None:
    folder = classifier(tmp_path / "judge", chat_tokenizer, num_labels=3)
    assert "is no reward model\n  why: it has 3 classes" in refused(folder)


def test_a_language_model_is_no_reward_model(chat_folder: Path) -> None:
    assert "is no reward model\n  why: its architecture is LlamaForCausalLM" in refused(chat_folder)


def test_a_missing_reward_model_is_named(tmp_path: Path) -> None:
    assert "there is no model" in refused(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("lost", "what"),
    [
        ("tokenizer.json", "judge has no tokenizer"),
        ("model.safetensors", "judge has no weights"),
        ("config.json", "judge has no config.json"),
    ],
)
def test_a_missing_part_is_found_before_weights_are_read(
    tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase, lost: str, what: str
) -> None:
    folder = classifier(tmp_path / "judge", chat_tokenizer)
    (folder / lost).unlink()
    assert what in refused(folder)


def test_a_classifier_without_its_head_is_refused(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase) -> None:
    """It would be filled with random numbers."""
    folder = classifier(tmp_path / "judge", chat_tokenizer)
    weights = load_file(folder / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "it has no score.weight" in refused(folder)
    step = Alignment(kind="rpo", data=("a.jsonl",), rewards="model", reward_model=str(folder))
    with pytest.raises(CheckpointError, match=r"it has no score\.weight"):
        open_reward(step, device="cpu")


def test_weights_that_are_cut_off_are_found(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase) -> None:
    path = classifier(tmp_path / "judge", chat_tokenizer) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    assert "is truncated" in refused(path.parent)


def test_a_tokenizer_of_another_model_is_found(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase) -> None:
    folder = classifier(tmp_path / "judge", chat_tokenizer, vocab_size=50)
    assert "is not the model's" in refused(folder)


def test_a_reward_model_reads_whole_samples(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase) -> None:
    folder = classifier(tmp_path / "judge", chat_tokenizer, max_position_embeddings=32)
    require_classifier(str(folder), context=32, where="step 2 of align (rpo)")
    assert "reads 32 tokens, and step 2 of align (rpo) has context 33" in refused(folder, context=33)
    step = Alignment(kind="rpo", data=("a.jsonl",), rewards="model", reward_model=str(folder))
    reward, row = open_reward(step, device="cpu"), {"prompt": [{"role": "user", "content": "Who?"}]}
    assert reward(row, "The cat.") is not None
    assert reward(row, "The cat. " * 20) is None


def test_a_token_that_was_added_later_is_refused_where_it_stands(
    tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase
) -> None:
    grown = deepcopy(chat_tokenizer)
    grown.add_tokens(["<new>"])
    folder = classifier(tmp_path / "judge", grown, vocab_size=len(chat_tokenizer))
    require_classifier(str(folder), context=64, where="step 2 of align (rpo)")
    step = Alignment(kind="rpo", data=("a.jsonl",), rewards="model", reward_model=str(folder))
    reward, row = open_reward(step, device="cpu"), {"prompt": [{"role": "user", "content": "Who?"}]}
    assert reward(row, "The cat.") is not None
    with pytest.raises(CorpusError, match=r"an answer holds <new>, which align\.reward_model cannot read"):
        reward(row, "The <new>.")
