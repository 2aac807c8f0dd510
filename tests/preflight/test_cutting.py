"""The memory plan of a cut against what a cut really takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from allocated import most_bytes
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from halve.anatomy import discover
from halve.cut.apply import Goal, cut, turn
from halve.cut.repair import rotate
from halve.cut.repair.budget import samples_needed
from halve.cut.score import width
from halve.cut.score.calibration import Calibration
from halve.cut.score.scores import Scores
from halve.cut.trial import try_shapes
from halve.model import measure
from halve.preflight.cutting import pruning
from halve.preflight.evaluation import evaluation_memory
from halve.preflight.sizes import PlannedRound
from halve.recipe.schema import Recipe

CONTEXT, WITHIN = 64, 0.1


def llama(**changes: Any) -> LlamaConfig:
    sizes: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**{**sizes, **changes})


def scored(calibration: Calibration) -> Scores:
    how = {"method": "activation", "ffn_point": "down_input", "batch_agg": "l2", "seq_agg": "mean", "seed": 0}
    return width.score(calibration, **how, model_fingerprint="", samples_fingerprint="")


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "states": ({}, {"hidden": 96, "ffn": 256, "refit_tokens": 16_384}),
    "comparison": ({"vocab_size": 4096}, {"ffn": 256, "refit_tokens": 1024}),
    "solves": ({"intermediate_size": 1280}, {"ffn": 1152, "refit_tokens": 1024}),
    "turned": ({"vocab_size": 8192, "tie_word_embeddings": True}, {"hidden": 96, "refit_samples": 16}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_plan_of_a_cut_is_what_is_measured(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever holds most: the states of all samples, the rival and the teacher's distributions, a solve, a basis."""
    own, asked = CASES[case]
    config = llama(**own)
    anatomy = discover(config)
    raw = {
        "name": "cut",
        "model": "teacher",
        "data": {"train": ["a.txt"], "valid": ["b.txt"], "context": CONTEXT},
        "score": {"samples": 8, "micro_batch": 8},
        "prune": asked,
    }
    recipe = Recipe.model_validate(raw)
    after = anatomy.sizes.at(**{axis: size for axis, size in asked.items() if axis in ("hidden", "ffn")})
    turned = after.hidden < anatomy.sizes.hidden
    shape = PlannedRound(anatomy, anatomy, after, tuple(range(anatomy.sizes.layers)))
    planned = pruning(recipe, shape, (), turned=turned, dtype=torch.float32, on_cpu=True)
    assert not planned.unknown
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    monkeypatch.setattr(rotate, "prove_rotation", lambda *_, **__: 0.0)
    samples_BS = torch.randint(config.vocab_size, (samples_needed(recipe.prune, anatomy.sizes, CONTEXT), CONTEXT))
    calibration = Calibration(model, anatomy, samples_BS, recipe.score.micro_batch)
    scores = scored(calibration.first(8))

    def work() -> None:
        basis = turn(calibration, recipe.prune, sizes=[after])
        cut(calibration, scores, recipe.prune, Goal(after), turned=basis)

    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert planned.total_bytes == pytest.approx(weights + most_bytes(work), rel=WITHIN)


def test_a_trial_in_two_bases_keeps_what_the_teacher_did_in_both() -> None:
    """Measured as a run does it: the trial refits shapes that cut hidden in another basis than the others."""
    config = llama(tie_word_embeddings=True)
    anatomy = discover(config)
    raw = {
        "name": "cut",
        "model": "teacher",
        "data": {"train": ["a.txt"], "valid": ["b.txt"], "context": CONTEXT},
        "score": {"samples": 256, "micro_batch": 4},
        "prune": {"non_embedding_ratio": 0.5, "refit_tokens": 2048},
    }
    recipe = Recipe.model_validate(raw)
    shapes = [anatomy.sizes.at(hidden=112), anatomy.sizes.at(ffn=256)]
    shape = PlannedRound(anatomy, anatomy, shapes[1], tuple(range(anatomy.sizes.layers)))
    where: dict[str, Any] = {"turned": True, "dtype": torch.float32, "on_cpu": True}
    planned = pruning(recipe, shape, shapes, **where)
    alone = pruning(recipe, shape, shapes[:1], **where)
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    calibration = Calibration(model, anatomy, torch.randint(config.vocab_size, (256, CONTEXT)), 4)
    scores = scored(calibration.first(8))
    basis = turn(calibration, recipe.prune, sizes=shapes)
    weights = sum(parameter.nbytes for parameter in (*model.parameters(), *basis.model.parameters()))

    def work() -> None:
        try_shapes(calibration, scores, recipe.prune, [[each] for each in shapes], turned=basis)

    assert planned.total_bytes == pytest.approx(weights + most_bytes(work), rel=WITHIN)
    assert planned.states_bytes > 1.9 * alone.states_bytes


def test_the_plan_of_an_evaluation_is_what_is_measured() -> None:
    """Two models, and a chunk of the distributions of both."""
    config = llama(vocab_size=4096)
    anatomy = discover(config)
    raw = {
        "name": "cut",
        "model": "teacher",
        "data": {"train": ["a.txt"], "valid": ["b.txt"], "context": CONTEXT},
        "prune": {"ffn": 256},
        "evaluate": {"samples": 64, "speed": False},
    }
    after = anatomy.sizes.at(ffn=256)
    shape = PlannedRound(anatomy, anatomy, after, tuple(range(anatomy.sizes.layers)))
    recipe = Recipe.model_validate(raw)
    planned = evaluation_memory(recipe, [shape], dtype=torch.float32, on_cpu=True)
    teacher, student = (AutoModelForCausalLM.from_config(one).eval() for one in (config, shape.config()))
    samples_BS = torch.randint(config.vocab_size, (64, CONTEXT))

    def work() -> None:
        measure.divergence(student, teacher, samples_BS, micro_batch=4096 // CONTEXT)

    weights = sum(parameter.nbytes for model in (teacher, student) for parameter in model.parameters())
    assert planned.total_bytes == pytest.approx(weights + most_bytes(work), rel=WITHIN)
    timed = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"speed": True})})
    assert evaluation_memory(timed, [shape], dtype=torch.float32, on_cpu=True) == planned, "two models are timed, too"
