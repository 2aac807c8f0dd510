"""Weights are stored in one precision, and computed with in float32 where a processor has no units for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DeepseekV3Config

from halve.model import measure, precision
from halve.model.checkpoint import Checkpoint
from halve.preflight.forecast import forecast
from halve.recipe.schema import Recipe
from halve.stages import evaluate, prune, score
from halve.text import corpus
from halve.text.conversation_samples import samples_of
from halve.train.ranks import shards

MakeRecipe = Callable[..., Recipe]
SIZES = {"hidden": 24, "ffn": 40, "layers": 3}
DEEPSEEK = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}


@pytest.fixture(scope="module")
def half_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("half")
    teacher = Checkpoint.open(tiny_llama)
    model = teacher.load().bfloat16()
    model.save_pretrained(folder)
    teacher.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def without_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "is_slow_here", lambda dtype: dtype.itemsize < 4)


@pytest.fixture
def with_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "is_slow_here", lambda dtype: False)


def test_only_what_takes_twice_as_long_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {torch.float32: 1.0, torch.bfloat16: 6.0, torch.float16: 1.9}
    monkeypatch.setattr(precision, "_seconds", lambda dtype: seconds[dtype])
    precision.is_slow_here.cache_clear()
    try:
        assert [precision.is_slow_here(d) for d in (torch.bfloat16, torch.float16, torch.float32, torch.float64)] == [
            *(True, False, False, False)
        ]
    finally:
        precision.is_slow_here.cache_clear()


def test_this_processor_is_measured_once() -> None:
    precision.is_slow_here.cache_clear()
    first = precision.is_slow_here(torch.bfloat16)
    assert first is precision.is_slow_here(torch.bfloat16)
    assert precision.is_slow_here.cache_info().misses == 1


@pytest.mark.parametrize(
    ("asked", "on_cpu", "computing"),
    [
        ("auto", True, torch.float32),
        ("auto", False, torch.bfloat16),
        ("bfloat16", True, torch.bfloat16),
        ("float32", True, torch.float32),
    ],
)
def test_auto_alone_is_raised_and_on_a_cpu_alone(
    half_llama: Path, without_units: None, asked: Any, on_cpu: bool, computing: torch.dtype
) -> None:
    config = Checkpoint.open(half_llama).config
    assert precision.computing_dtype(asked, config, on_cpu=on_cpu) == computing


def test_float64_is_not_lowered(half_llama: Path, without_units: None) -> None:
    config = Checkpoint.open(half_llama).config
    config.dtype = torch.float64
    assert precision.computing_dtype("auto", config, on_cpu=True) == torch.float64


def test_a_model_that_only_runs_is_raised_with_the_same_values(half_llama: Path, without_units: None) -> None:
    teacher = Checkpoint.open(half_llama)
    raised, own = teacher.load_to_run(), teacher.load()
    assert (raised.dtype, own.dtype) == (torch.float32, torch.bfloat16)
    for (name, a), (_, b) in zip(raised.named_parameters(), own.named_parameters(), strict=True):
        assert torch.equal(a, b.float()), name
    assert teacher.load_to_run(dtype="bfloat16").dtype == torch.bfloat16


def test_a_processor_with_units_keeps_the_precision(half_llama: Path, with_units: None) -> None:
    assert Checkpoint.open(half_llama).load_to_run().dtype == torch.bfloat16


def test_a_student_is_stored_as_its_teacher_and_measured_as_it_is_stored(
    half_llama: Path, make_recipe: MakeRecipe, without_units: None, tmp_path: Path
) -> None:
    recipe, teacher = make_recipe(model=str(half_llama), prune=SIZES), Checkpoint.open(half_llama)
    score.run(recipe, teacher=teacher, cache=tmp_path / "data", out=tmp_path)
    scores = tmp_path / "scores.safetensors"
    made = prune.run(recipe, teacher=teacher, scores=scores, cache=tmp_path / "data", out=tmp_path)
    folder = tmp_path / "model"
    assert {value.dtype for value in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    models = {"teacher": teacher, "student": Checkpoint.open(folder)}
    evaluate.run(
        recipe,
        models=models,
        reference="teacher",
        subject="student",
        cache=tmp_path / "data",
        out=tmp_path / "evaluate",
    )
    told = json.loads((tmp_path / "evaluate/results.json").read_text())["models"]["student"]
    assert told["dtype"] == "float32"
    assert told["weight_bytes"] == 2 * told["params"]
    again = measure.perplexity(*_nll(recipe, folder, tmp_path))
    assert made["perplexity"]["value"] == pytest.approx(again.value, rel=1e-6)


def _nll(recipe: Recipe, folder: Path, scratch: Path) -> tuple[torch.Tensor, torch.Tensor]:

    student = Checkpoint.open(folder)
    valid = corpus.open_split(recipe, "valid", cache=scratch / "data", tokenizer=student.tokenizer)
    held = samples_of(valid, recipe.data.context, recipe.seed).heldout(prune.CHECK_SAMPLES)
    nll = measure.language_modeling(student.load_to_run(), held.ids, predicted=held.predicted, micro_batch=4)
    return nll, held.weights


def test_the_plan_counts_the_raised_weights_in_memory_and_the_stored_ones_on_disk(
    half_llama: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(model=str(half_llama))
    plans = {}
    for slow in (False, True):
        monkeypatch.setattr(precision, "is_slow_here", lambda dtype, slow=slow: slow)
        plans[slow] = forecast(recipe)
    assert plans[True].disk == plans[False].disk
    assert plans[True].held["prune"].models_bytes == 2 * plans[False].held["prune"].models_bytes


def test_what_an_architecture_keeps_in_float32_is_not_rounded_when_saved(tmp_path: Path) -> None:
    """A router of DeepSeek chooses experts by a bias that loads in float32 whatever the rest is in."""
    config = DeepseekV3Config(**DEEPSEEK)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).float()
    bias = model.model.layers[1].mlp.gate.e_score_correction_bias
    bias.data = torch.linspace(1, 2, len(bias))
    angles = model.model.rotary_emb.inv_freq.clone()
    shards.save(model, tmp_path / "model", dtype=torch.bfloat16, extra_from=None, record=None)
    stored = load_file(tmp_path / "model/model.safetensors")
    assert torch.equal(stored["model.layers.1.mlp.gate.e_score_correction_bias"], torch.linspace(1, 2, len(bias)))
    assert {name for name, value in stored.items() if value.dtype == torch.float32} == {
        "model.layers.1.mlp.gate.e_score_correction_bias"
    }
    assert torch.equal(model.model.rotary_emb.inv_freq, angles), "a cast to bfloat16 and back would round it"
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    compared = {name: value.dtype for name, value in reopened.state_dict().items() if name in stored}
    assert compared == {name: stored[name].dtype for name in compared}
    assert len(compared) > 20
