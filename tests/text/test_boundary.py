"""Tokens that a teacher never learned: left out where that is open, warned about where the recipe asks for them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from halve.errors import CheckpointError
from halve.model import measure
from halve.model.checkpoint import Checkpoint
from halve.model.head import Head
from halve.pipeline import run as pipeline
from halve.preflight.forecast import forecast
from halve.progress import SILENT, Silent
from halve.recipe.schema import Recipe
from halve.report import tables as show
from halve.text.boundary import BoundaryWarning, settled, warn_of_boundaries
from halve.text.corpus import Samples, open_split
from halve.text.tokenize import Marks

BEGIN, STOP = 320, 321
MakeRecipe = Callable[..., Recipe]


def teacher(folder: Path, tokenizer: PreTrainedTokenizerFast, *, knows_the_end: bool) -> Path:
    """A model whose tokenizer puts a token in front of text; its states point one way, the end's logit the other."""
    dressed = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str()),
    )
    dressed.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    assert (dressed.bos_token_id, dressed.eos_token_id) == (BEGIN, STOP)
    dressed.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", BEGIN)])
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=322,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            bos_token_id=BEGIN,
            eos_token_id=STOP,
        )
    )
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 4.0
        model.lm_head.weight[STOP, 0] = 0.0 if knows_the_end else -9.0
    model.save_pretrained(folder)
    dressed.save_pretrained(folder)
    return folder


@dataclass
class Said(Silent):
    """Keeps what is told."""

    lines: list[str]

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture
def recipe(make_recipe: MakeRecipe, tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe on two short documents, many times over."""
    (tmp_path / "a.jsonl").write_text((json.dumps({"text": "The old cat sees the river."}) + "\n") * 200)

    def make(model: Path, **data: str) -> Recipe:
        text = [str(tmp_path / "a.jsonl")]
        return make_recipe(model=str(model), data={"train": text, "valid": text, "context": 32, **data})

    return make


def test_an_end_that_the_teacher_never_learned_is_left_out(
    recipe: Callable[..., Recipe], tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = Said([])
    for knows, want in ((True, "auto"), (False, "bos")):
        asked = recipe(teacher(tmp_path / f"{knows}", tokenizer, knows_the_end=knows))
        opened = Checkpoint.open(asked.model)
        assert settled(asked, opened, cache=tmp_path / "cache", progress=said) == want
        with monkeypatch.context() as patch:
            patch.setattr(Checkpoint, "load", None)
            assert settled(asked, opened, cache=tmp_path / "cache", progress=said) == want, "it is asked once"
            for boundary in ("both", "eos", "bos", "none"):
                other = recipe(Path(asked.model), boundary=boundary)
                assert settled(other, opened, cache=tmp_path / "new", progress=said) == boundary
    assert len(said.lines) == 1
    assert "never learned </s>" in said.lines[0]


def test_a_teacher_whose_logits_are_not_finite_is_told(
    recipe: Callable[..., Recipe], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    folder = teacher(tmp_path / "model", tokenizer, knows_the_end=True)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"].fill_(3e38)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    asked = recipe(folder)
    with pytest.raises(CheckpointError, match=r"the logits of .* are not finite"):
        settled(asked, Checkpoint.open(asked.model), cache=tmp_path / "cache", progress=SILENT)
    assert not (tmp_path / "cache").exists()


def test_a_tokenizer_that_puts_nothing_in_front_asks_no_model(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = make_recipe()
    monkeypatch.setattr(Checkpoint, "load", None)
    assert settled(asked, Checkpoint.open(asked.model), cache=tmp_path, progress=SILENT) == "auto"
    assert list(tmp_path.iterdir()) == []


def test_the_dry_run_has_a_row_where_the_teacher_will_be_asked(
    recipe: Callable[..., Recipe],
    make_recipe: MakeRecipe,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = recipe(teacher(tmp_path / "model", tokenizer, knows_the_end=True))
    planned, seen, nll = forecast(asked), [], measure.token_nll

    def counting(head: Head, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        seen.append(ids.numel())
        return nll(head, hidden, ids)

    monkeypatch.setattr(measure, "token_nll", counting)
    settled(asked, Checkpoint.open(asked.model), cache=tmp_path / "cache", progress=SILENT)
    assert planned.tokens["boundary"] == sum(seen) > 0
    assert planned.flops["boundary"] > 0
    show.forecast_tables(planned)
    assert "boundary: data.boundary: auto checks whether the teacher has learned" in capsys.readouterr().out
    without = tmp_path / "config"  # a config alone is enough for a dry run
    without.mkdir()
    shutil.copy(Path(asked.model) / "config.json", without)
    for other in (recipe(Path(asked.model), boundary="both"), make_recipe(), recipe(without)):
        assert "boundary" not in forecast(other).tokens


def test_a_run_reads_documents_without_it(
    recipe: Callable[..., Recipe], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    asked = recipe(teacher(tmp_path / "model", tokenizer, knows_the_end=False))
    folder = pipeline.run(asked, tmp_path / "run", only="score")
    model, cache = Checkpoint.open(asked.model), folder / "data"
    tokens = open_split(recipe(model.folder, boundary="bos"), "train", cache=cache, tokenizer=model.tokenizer)
    assert len(list(cache.glob("*.tokens"))) == 1, "it is the file that the run has made"
    assert BEGIN in tokens.ids
    assert STOP not in tokens.ids
    samples = Samples(tokens, 32, seed=0)
    assert (samples.take(range(len(samples)))[:, 0] == BEGIN).all()


def test_a_teacher_that_finds_the_boundaries_absurd_is_warned_about(
    recipe: Callable[..., Recipe], tokenizer: PreTrainedTokenizerFast, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    for knows in (True, False):
        asked = recipe(teacher(tmp_path / f"{knows}", tokenizer, knows_the_end=knows), boundary="both")
        opened = Checkpoint.open(asked.model)
        tokens = open_split(asked, "valid", cache=tmp_path / "cache", tokenizer=opened.tokenizer)
        samples_BS = Samples(tokens, 32, seed=0).first(4)
        warn_of_boundaries(opened.load(), samples_BS, tokens.marks, opened.tokenizer)
        assert len(recwarn) == (not knows)
    found = recwarn.pop(BoundaryWarning)
    assert "nats at the end of documents" in str(found.message)
    assert "</s> <s>" in str(found.message)
    warn_of_boundaries(opened.load(), samples_BS, Marks(), opened.tokenizer)
    assert not len(recwarn), "what no separator is said to be is text"
