"""What tests of alignment share: a tiny chat model, its tokenizer, and examples as tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from talking import conversations, preferences, with_chat, write_lines
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from halve.align.examples import Dialogue, LeftOut, Preference, dialogues, encoded_pair, preference_rows
from halve.align.setting import StepSetting
from halve.progress import SILENT
from halve.recipe.schema import Alignment, Data


@pytest.fixture(scope="session")
def chat_folder(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_chat(tiny_llama, tmp_path_factory.mktemp("align") / "model")


@pytest.fixture(scope="session")
def chat_tokenizer(chat_folder: Path) -> PreTrainedTokenizerBase:
    made: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(chat_folder)
    return made


@pytest.fixture
def model(chat_folder: Path) -> PreTrainedModel:
    opened: PreTrainedModel = AutoModelForCausalLM.from_pretrained(chat_folder)
    return opened.eval()


@pytest.fixture
def make_setting(tmp_path: Path) -> Callable[..., StepSetting]:
    """`make_setting(kind=..., ...)`: a step of a few tiny batches on a CPU."""

    def make(*, scratch: str = "scratch", seed: int = 0, **given: Any) -> StepSetting:
        usual = {"data": ["none.jsonl"], "batch": 8, "lr": 3e-3, "warmup_steps": 2, "heldout": 0}
        step = Alignment.model_validate({**usual, **given})
        return StepSetting(step, "align", tmp_path / scratch, 64, seed, "cpu", False, SILENT)

    return make


@pytest.fixture
def pairs(chat_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> list[Preference]:
    """24 pairs whose rewards differ by one to four."""
    step = Alignment(kind="rpo", data=(str(write_lines(tmp_path / "pairs.jsonl", preferences(24))),))
    encoded = (encoded_pair(*row, chat_tokenizer, context=64, left_out=LeftOut()) for row in preference_rows(step))
    return [pair for pair in encoded if pair is not None]


@pytest.fixture
def talks(chat_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> list[Dialogue]:
    """24 conversations."""
    step = Alignment(kind="sft", data=(str(conversations(tmp_path / "talks.jsonl", 24)),))
    data = Data(train=("none.txt",), valid=("none.txt",))
    return list(dialogues(step, data, chat_tokenizer, context=64, left_out=LeftOut()))
