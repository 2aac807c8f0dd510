"""The disk plan against what real runs put there."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import teach
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from halve.disk.textfiles import unpacked_bytes
from halve.pipeline import run as pipeline
from halve.preflight import check as preflight
from halve.preflight import space
from halve.preflight.forecast import forecast
from halve.recipe.schema import Recipe
from halve.train.loop import checkpoints
from halve.train.ranks import shards

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
        {
            "correct": STEPS,
            "distill": STEPS | {"keep_checkpoints": 2, "optimizer": "muon", "baselines": ["ce", "random_prune"]},
        },
        {"correct": {"tokens": 12 * 128, "when": "beside"}, "distill": STEPS | {"checkpoint_every": 8}},
        {"correct": STEPS | {"method": "norms"}, "distill": STEPS | {"cache": "hidden", "checkpoint_every": 20}},
    ],
    ids=["many", "beside", "cached"],
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


def test_text_takes_as_much_as_its_files_and_of_a_hub_what_is_trained_on(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(distill=STEPS)
    files = sum(Path(source).stat().st_size for source in (*recipe.data.train_sources, *recipe.data.valid))
    assert forecast(recipe).disk.text_bytes == files
    from_hub = recipe.model_copy(update={"data": recipe.data.model_copy(update={"train": ("hub:some/text",)})})
    valid = sum(Path(source).stat().st_size for source in recipe.data.valid)
    assert forecast(from_hub).disk.text_bytes == valid + 2 * 12 * 128


def test_compressed_text_takes_what_it_unpacks_to(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    text = "".join(f'{{"text": "line {i} of {i * i % 977}"}}\n' for i in range(60_000))
    (tmp_path / "short.jsonl.gz").write_bytes(gzip.compress(text[:9_000].encode()))
    (tmp_path / "long.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "broken.jsonl.gz").write_bytes(b"no gzip")
    assert unpacked_bytes(tmp_path / "short.jsonl.gz") == 9_000
    assert len(text) <= unpacked_bytes(tmp_path / "long.jsonl.gz") <= 3 * len(text)
    data = make_recipe().data
    names = ("short", "broken")
    packed = data.model_copy(update={"train": tuple(str(tmp_path / f"{name}.jsonl.gz") for name in names)})
    recipe = make_recipe(distill=STEPS).model_copy(update={"data": packed})
    valid = sum(Path(source).stat().st_size for source in data.valid)
    assert forecast(recipe).disk.text_bytes == 9_000 + len(b"no gzip") + valid
    talk = recipe.model_copy(update={"data": packed.model_copy(update={"messages_field": "messages"})})
    assert space._text_bytes(talk, 1000) == 2 * space._text_bytes(recipe, 1000)


def test_parquet_says_how_much_it_holds(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = [f"{i} " * 500 for i in range(300)]
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", compression="zstd")
    told = unpacked_bytes(tmp_path / "a.parquet")
    assert told == pytest.approx(sum(map(len, texts)), rel=0.1)
    assert told > 5 * (tmp_path / "a.parquet").stat().st_size


def free_bytes(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))


def test_check_asks_for_what_is_planned(
    make_recipe: MakeRecipe, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(model=str(teacher), device="cpu", distill=STEPS)
    planned = forecast(recipe).disk.total_bytes
    free_bytes(monkeypatch, planned)
    assert preflight.check(recipe, tmp_path / "run") == ()
    free_bytes(monkeypatch, planned - 1)
    (error,) = preflight.check(recipe, tmp_path / "run")
    assert str(error).splitlines()[0] == f"{tmp_path / 'run'} needs about {planned / 1e6:.1f} MB"


def test_what_a_run_has_written_is_not_asked_for_again(
    make_recipe: MakeRecipe, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than half of the disk is filled by the run itself."""
    run = tmp_path / "run"
    recipe = make_recipe(model=str(teacher), device="cpu", prune={"ffn": 256, "refit": "none"}, distill=STEPS)
    pipeline.run(recipe, run, only="score")
    before = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    left = forecast(recipe).disk.total_bytes - before
    (run / "prune").mkdir()
    (run / "prune" / "half of a model").write_bytes(bytes(left // 2))
    free_bytes(monkeypatch, left - left // 2)
    assert preflight.check(recipe, run) == ()
    free_bytes(monkeypatch, left - left // 2 - 1)
    (error,) = preflight.check(recipe, run)
    assert " more\n" in str(error)
    assert len(str(error).splitlines()) == 3
