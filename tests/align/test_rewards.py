"""Rewards: the last number of an answer, and reward models."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from talking import SHORT_CHAT
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerBase

from halve.align.rewards import by_last_number, open_reward, require_classifier
from halve.errors import CheckpointError
from halve.recipe.schema import Alignment

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


def classifier(folder: Path, tokenizer: PreTrainedTokenizerBase, *, num_labels: int, chat: bool = True) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=num_labels,
        pad_token_id=0,
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
    assert reward(row, "The cat.") == pytest.approx(float(want), abs=1e-6)
    assert reward(row, "The cat.") != reward(row, "A dog.")
    assert math.isfinite(reward(row, ""))


@pytest.mark.parametrize(("num_labels", "why"), [(3, "it has 3 classes")])
def test_several_classes_are_no_reward(
    tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase, num_labels: int, why: str
) -> None:
    folder = classifier(tmp_path / "judge", chat_tokenizer, num_labels=num_labels)
    with pytest.raises(CheckpointError, match=f"is no reward model\n  why: {why}"):
        require_classifier(str(folder))


def test_a_language_model_is_no_reward_model(chat_folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is no reward model\n  why: its architecture is LlamaForCausalLM"):
        require_classifier(str(chat_folder))


def test_a_missing_reward_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no model"):
        require_classifier(str(tmp_path / "nowhere"))
