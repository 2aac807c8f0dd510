"""The memory plan against what training really takes, and against arithmetic."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from allocated import most_bytes
from families import config
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PretrainedConfig, PreTrainedModel

from halve.anatomy import discover
from halve.errors import TrainError
from halve.model.head import split
from halve.preflight.device import card
from halve.preflight.forecast import Forecast, forecast
from halve.preflight.memory import Distillation, Hardware, Sized
from halve.preflight.rehearsal import Cast, Watched, rehearse
from halve.recipe.read import parse
from halve.recipe.schema import Correct, Distill
from halve.text.batch import Batch
from halve.train.loop import adapters
from halve.train.loop.optimizers import make_optimizer
from halve.train.loop.step import Trained, apply, gradients
from halve.train.objectives import logits as objectives
from halve.train.ranks import blocks
from halve.train.teachers.live import Live

CONTEXT, WITHIN = 256, 0.1


def llama(hidden: int, ffn: int, layers: int, *, tied: bool = False) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=4096,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=tied,
    )


def mixture(hidden: int, ffn: int) -> MixtralConfig:
    base = llama(hidden, ffn, 5).to_dict()
    own = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    kept = {key: base[key] for key in (*own, "vocab_size", "max_position_embeddings")}
    return MixtralConfig(**kept, num_local_experts=4, num_experts_per_tok=2)


def sized(one: PretrainedConfig) -> Sized:
    anatomy = discover(one)
    return Sized(one, anatomy.sizes, anatomy.ledger.count(anatomy.sizes))


def section(**keys: Any) -> Distill:
    return Distill(**{"tokens": 10_000, "batch": 4, "micro_batch": 2, **keys})


def measured(student: PreTrainedModel, teacher: PreTrainedModel, training: Distill) -> int:
    """The most bytes in tensors in two steps, by the allocator's own record: kernels' scratch counts, too."""
    half = training.precision == "bfloat16"
    blocks.recompute(student, training.activation_checkpointing)
    body, own = split(student)
    head = replace(own, accumulates=True)
    objective = objectives.distillation(Live(*split(teacher)), vocab=4096, terms=objectives.teacher_terms(training))
    batch = Batch(torch.randint(4096, (training.batch, CONTEXT)), tuple(range(training.batch)))
    weights = sum(p.nbytes for model in (student, teacher) for p in model.parameters())
    between = [p for layer in blocks.layers(student) for p in layer.parameters()]

    def summed(part: Batch) -> tuple[Tensor, int]:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return objective(body, head, part)

    def work() -> None:
        trained = Trained({"student": student}, make_optimizer(student.parameters(), training, between=between))
        for _ in range(2):
            apply(
                trained,
                gradients(trained, summed, batch.split(training.micro_batch or training.batch)),
                lr=1e-5,
                clip=1.0,
            )

    return weights + most_bytes(work)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one pass": {"micro_batch": 4},
    "recomputed": {"activation_checkpointing": "full"},
    "selective": {"activation_checkpointing": "selective"},
    "muon": {"optimizer": "muon"},
    "two terms": {"objective": {"kl": 1.0, "cosine": 0.1}},
}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", CASES)
def test_the_plan_is_what_is_measured(kind: str, precision: str) -> None:
    training, tied = section(precision=precision, **CASES[kind]), kind in ("one pass", "recomputed")
    its, own = llama(192, 512, 6, tied=tied), llama(160, 384, 6, tied=tied)
    assert_measured(its, own, training)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_mixture_of_experts_is_planned(recompute: str) -> None:
    """Its experts' products are grouped, in float32, too; ffn is the experts'."""
    training = section(precision="float32", activation_checkpointing=recompute)
    assert_measured(mixture(192, 256), mixture(160, 192), training)


def assert_measured(its: PretrainedConfig, own: PretrainedConfig, training: Distill) -> None:
    half = training.precision == "bfloat16"
    place = Hardware(cuda=False, half=half)
    planned = Distillation(training, sized(own), sized(its), place, CONTEXT, torch.bfloat16).memory()
    dtype = torch.bfloat16 if half else torch.float32
    teacher: PreTrainedModel = AutoModelForCausalLM.from_config(its, dtype=dtype).eval().requires_grad_(False)
    student: PreTrainedModel = AutoModelForCausalLM.from_config(own, dtype=torch.float32).eval()
    found = measured(student, teacher, training)
    assert planned.total_bytes == pytest.approx(found, rel=WITHIN)


def test_recomputation_and_shards_and_moments_take_less() -> None:
    student, teacher = sized(llama(160, 384, 6)), sized(llama(192, 512, 6))

    def plan(ranks: int = 1, replicas: int = 1, **keys: Any) -> Any:
        place = Hardware(ranks, replicas)
        return Distillation(section(**keys), student, teacher, place, CONTEXT, torch.bfloat16).memory()

    plain = plan()
    params = student.counts.params
    assert (plain.masters_bytes, plain.gradient_bytes, plain.moment_bytes) == (4 * params, 4 * params, 8 * params)
    assert plain.teacher_bytes == 2 * teacher.counts.params
    assert plan(activation_checkpointing="full").passing_bytes < plain.passing_bytes
    assert plan(optimizer="adamw8bit").moment_bytes == pytest.approx(2 * params, rel=0.02)
    assert 4 * params < plan(optimizer="muon").moment_bytes < 8 * params
    assert plan(offload_optimizer=True).moment_bytes == 0
    assert plan(cache="hidden").teacher_bytes == 2 * teacher.table
    assert plan(offload_teacher=True).teacher_bytes < plain.teacher_bytes
    two, replicas = plan(ranks=2), plan(ranks=4, replicas=2)
    assert two.masters_bytes == replicas.masters_bytes == 2 * params
    assert two.gathered_bytes > 0
    assert two.teacher_bytes == teacher.counts.params + 2 * teacher.table  # the head stays whole
    assert plan(ranks=2, shard_teacher=False).teacher_bytes == plain.teacher_bytes


def test_a_teacher_that_learns_beside_takes_its_turn() -> None:
    student, teacher = sized(llama(160, 384, 6)), sized(llama(192, 512, 6))
    one = Distillation(section(), student, teacher, Hardware(), CONTEXT, torch.bfloat16)
    full, norms = (one.with_correction(Correct(tokens=1, method=method, when="beside")) for method in ("full", "norms"))
    params = teacher.counts.params
    assert full.teacher_bytes == 12 * params
    turns = {4 * params, 4 * student.counts.params}  # whose turn is the fuller: gradients are dropped between
    assert full.gradient_bytes in turns
    assert full.total_bytes >= 12 * (params + student.counts.params) + max(turns)
    assert 4 * params < norms.teacher_bytes < 4.1 * params
    assert norms.gradient_bytes == 4 * student.counts.params


def test_the_llama_of_the_papers_fits_one_card_in_some_settings() -> None:
    """Llama 3.1 8B to 4.5B: never with AdamW's moments on the card, but in 8 bits or in main memory.

    In samples of 2048 tokens; docs/concepts/cost.md has the table for 8192.
    """
    shape = {"num_key_value_heads": 8, "vocab_size": 128_256, "max_position_embeddings": 8192, "head_dim": 128}
    eight = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, **shape
    )
    four = LlamaConfig(hidden_size=3072, intermediate_size=9216, num_hidden_layers=32, num_attention_heads=32, **shape)
    training = Distill(tokens=10**9, batch=64, micro_batch=1)
    student, teacher = sized(four), sized(eight)
    assert round(student.counts.params / 1e8) == 45
    found = Distillation(training, student, teacher, Hardware(), 2048, torch.bfloat16).settings()
    fitting = {(one.optimizer, one.recompute, one.teacher) for one in found if one.memory.fits(80e9)}
    assert fitting
    assert not any(optimizer == "adamw" for optimizer, _, _ in fitting)
    assert ("adamw8bit", "full", "cached") in fitting
    assert ("adamw, offloaded", "full", "on the device") in fitting
    plain = next(one for one in found if (one.optimizer, one.recompute, one.teacher) == ("adamw", "none", "cached"))
    assert plain.memory.total_bytes > 16 * student.counts.params


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "phi3", "qwen3"])
def test_every_family_can_be_rehearsed(family: str) -> None:
    one = config(family)
    found = rehearse(Cast(one, one, half=True), section(), samples=2, context=32)
    assert 0 < found.kept <= found.later
    assert found.trained == sum(p.numel() for p in _model(one).parameters())


@pytest.mark.parametrize("method", ["full", "lora", "norms"])
def test_a_correction_is_rehearsed_with_what_it_trains(method: str) -> None:
    if method == "lora":
        pytest.importorskip("peft")
    one, asked = config("llama"), Correct(tokens=1, method=method)
    model = _model(one)
    adapters.choose_trained(model, asked, seed=0)
    found = rehearse(Cast(one, None, half=False), asked, samples=2, context=32)
    assert found.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_states_are_rehearsed() -> None:
    one = config("llama")
    alone, beside = (
        rehearse(Cast(one, one, half=False), section(**more), samples=2, context=64)
        for more in ({}, {"intermediate": {"states": ["output", "attention"]}})
    )
    assert beside.later > alone.later


def test_what_is_watched_is_what_is_alive() -> None:
    known = torch.zeros(1000)
    with Watched([known]) as watched:
        view = known[:10] + 0  # 10 entries, the view itself none
        other = torch.zeros(100)
        del view
        third = torch.zeros(5)
    assert watched.most == 4 * 110
    assert watched.now == 4 * 105
    assert len(other) + len(third) == 105


def test_ranks_mfu_and_card_are_asked_for(tmp_path: Path) -> None:
    config("llama").save_pretrained(tmp_path / "teacher")
    raw: dict[str, Any] = {
        "name": "cost",
        "model": "teacher",
        "data": {"train": ["a.txt"], "valid": ["b.txt"], "context": 100},
        "prune": {"ffn": 64},
        "correct": {"tokens": 1000},
        "distill": {"tokens": 1000, "batch": 32},
    }
    recipe = parse(raw, folder=tmp_path, source="test")
    one = forecast(recipe, device=card(), compare=True)
    four = forecast(recipe, ranks=4, device=card(1e6, mfu=0.2), compare=True)
    assert set(one.memory) == {"correct", "distill"}
    assert four.gpu_hours_by_stage["distill"] == pytest.approx(2 * one.gpu_hours_by_stage["distill"])
    assert four.memory["distill"].masters_bytes == pytest.approx(one.memory["distill"].masters_bytes / 4, abs=1)
    assert one.fits
    assert not four.fits
    assert {setting.optimizer for setting in four.settings} == {"adamw"}
    plain = json.loads(json.dumps(one.to_json(), default=str))
    assert plain["memory"]["distill"]["total_bytes"] == one.memory["distill"].total_bytes
    assert len(plain["settings"]) == 18
    with pytest.raises(TrainError, match="cannot be split into 3 equal shares"):
        forecast(recipe, ranks=3, device=card())
    on_cpu: Forecast = forecast(parse({**raw, "device": "cpu"}, folder=tmp_path, source="test"))
    assert not on_cpu.place.cuda
    assert not on_cpu.place.half
    assert on_cpu.memory["distill"].teacher_bytes == 4 * on_cpu.teacher_counts.params


def _model(one: Any) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_config(one)
    return model


def test_code_that_looks_at_contents_leaves_the_rest_of_the_plan(tmp_path: Path) -> None:
    """JetMoE reads how many tokens each expert has, which nobody knows beforehand."""
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2, "head_dim": 16}
    config("jetmoe", **sizes).save_pretrained(tmp_path / "teacher")
    raw: dict[str, Any] = {
        "name": "unknown",
        "model": "teacher",
        "data": {"train": ["a.txt"], "valid": ["b.txt"], "context": 16},
        "prune": {"layers": 1},
        "distill": {"tokens": 1000, "batch": 4},
    }
    found = forecast(parse(raw, folder=tmp_path, source="test"), compare=True)
    memory = found.memory["distill"]
    assert "DataDependent" in memory.unknown
    assert not memory.fits(1e15)
    assert memory.masters_bytes == 4 * found.student_counts.params
    assert memory.passing_bytes == 0
    assert memory.moment_bytes == 2 * memory.masters_bytes
