"""The disk plan against what real runs put there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import teach
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from halve import pipeline, preflight
from halve.dryrun import forecast
from halve.recipe import Recipe
from halve.train import checkpoints, shards

MakeRecipe = Callable[..., Recipe]
WITHIN = 0.1
STEPS = {"tokens": 12 * 128, "batch": 4, "checkpoint_every": 4, "eval_every": 12, "eval_samples": 4}


@pytest.fixture(scope="module")
def teacher(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast, corpus: Path, make_recipe: MakeRecipe
) -> Path:
    """A llama beside whose weights configs and tokenizers are small."""
    folder = tmp_path_factory.mktemp("disk") / "teacher"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config)
    teach(model, tokenizer((corpus / "train.txt").read_text(encoding="utf-8"))["input_ids"], steps=20)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and "data" not in path.parts)


@pytest.mark.parametrize(
    "parts",
    [
        {"distill": STEPS},
        {
            "correct": STEPS,
            "distill": STEPS | {"keep_checkpoints": 2, "optimizer": "muon", "baselines": ["ce", "random_prune"]},
        },
        {"correct": {"tokens": 12 * 128, "when": "beside"}, "distill": STEPS | {"checkpoint_every": 8}},
        {"correct": STEPS | {"method": "norms"}, "distill": STEPS | {"cache": "hidden", "checkpoint_every": 20}},
    ],
    ids=["plain", "many", "beside", "cached"],
)
def test_the_plan_is_what_a_run_takes(
    teacher: Path, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: dict[str, Any]
) -> None:
    """Measured whenever a training state or a model has just been written, before anything older goes."""
    run, found = tmp_path / "run", [0]

    def seen(module: Any, name: str) -> None:
        real = getattr(module, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            given = real(*args, **kwargs)
            found.append(size(run))
            return given

        monkeypatch.setattr(module, name, watched)

    seen(checkpoints, "sync_tree")
    seen(shards, "save")
    prune = {"ffn": 256, "layers": 3, "refit": "none"}
    recipe = make_recipe(model=str(teacher), prune=prune, dtype="float32", **parts)
    disk = forecast(recipe).disk
    pipeline.run(recipe, run)
    measured = max([*found, size(run)])
    assert disk.model_bytes + disk.cache_bytes == pytest.approx(measured, rel=WITHIN)


def test_text_takes_two_or_four_bytes_a_token(make_recipe: MakeRecipe) -> None:
    assert forecast(make_recipe(distill=STEPS)).disk.text_bytes == 2 * 12 * 128


@pytest.mark.parametrize("keep", [1, 5, 20])
def test_what_check_asks_for_is_never_less_than_the_plan(make_recipe: MakeRecipe, teacher: Path, keep: int) -> None:
    recipe = make_recipe(model=str(teacher), distill=STEPS | {"checkpoint_every": 1, "keep_checkpoints": keep})
    assert preflight._bytes_needed(recipe) >= forecast(recipe).disk.total_bytes
