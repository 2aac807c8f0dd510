from __future__ import annotations

import pytest
import torch
from dead import dead_channels, hidden_plan
from families import LAYER_NORM, PROVED, config

from halve.anatomy import discover
from halve.anatomy.configs import build
from halve.cut.plan.plan import select
from halve.cut.proof.twins import RandomScores, fixed_ids, logits, masked, random_twin, twin_plan
from halve.cut.surgery.gain import constant_gains, fit_gains, norm_kind, spread
from halve.cut.surgery.trim import trim

RMS = [family for family in PROVED if family not in LAYER_NORM]


@pytest.mark.parametrize("family", RMS)
def test_cutting_dead_channels_is_exact_with_a_gain(family: str) -> None:
    # eps is added to a mean over another number of channels; it is made too small to matter, the rest must be exact
    twin = discover(config(family, rms_norm_eps=1e-12)).twin()
    plan = hidden_plan(twin)
    teacher = dead_channels(random_twin(twin, seed=1), plan, twin)
    reference = logits(teacher, twin)
    fitted = fit_gains(teacher, twin, plan, [fixed_ids(twin)])
    for gains in (constant_gains(twin, plan), fitted):
        student = trim(teacher, plan, twin, gains=gains)
        assert (logits(student, twin) - reference).abs().max() < 2e-5
    without = trim(teacher, plan, twin)
    assert (logits(without, twin) - reference).abs().max() > 1e-2


def test_a_fitted_gain_is_the_least_squares_factor() -> None:
    twin = discover(config("llama")).twin()
    plan, model = hidden_plan(twin), random_twin(twin, seed=2)
    seen = []
    norm = model.get_submodule(twin.norms[0])
    handle = norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits(model, twin)
    handle.remove()
    x = seen[0].flatten(0, 1)
    full = (x / spread(x, centered=False)[:, None])[:, list(plan.hidden)]
    small = x[:, list(plan.hidden)]
    small = small / spread(small, centered=False)[:, None]
    best = (full * small).sum() / small.square().sum()
    assert fit_gains(model, twin, plan, [fixed_ids(twin)])[twin.norms[0]] == pytest.approx(float(best), rel=1e-5)


def test_gains_do_not_depend_on_the_micro_batch() -> None:
    twin = discover(config("gemma2")).twin()
    plan, model, ids = hidden_plan(twin), random_twin(twin, seed=2), fixed_ids(twin)
    assert fit_gains(model, twin, plan, [ids]) == pytest.approx(fit_gains(model, twin, plan, [ids[:1], ids[1:]]))


@pytest.mark.parametrize(
    ("family", "offset", "centered"), [("llama", 0, False), ("gemma", 1, False), ("gpt2", 0, True)]
)
def test_norms_are_recognized_by_what_they_do(family: str, offset: float, centered: bool) -> None:
    twin = discover(config(family)).twin()
    kind = norm_kind(random_twin(twin, seed=0).get_submodule(twin.norms[0]))
    assert (kind.offset, kind.centered) == (offset, centered)


def test_nemotron_norms_are_centered_with_an_offset() -> None:
    twin = discover(config("nemotron")).twin()
    kind = norm_kind(random_twin(twin, seed=0).get_submodule(twin.norms[0]))
    assert (kind.offset, kind.centered) == (1, True)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "phi3"])
def test_surgery_returns_a_new_model(family: str) -> None:
    twin = discover(config(family)).twin()
    teacher = random_twin(twin, seed=0)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = trim(teacher, twin_plan("ffn", twin, 0), twin)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("family", PROVED)
def test_ties_and_precision_stay(family: str) -> None:
    anatomy = discover(config(family))
    teacher = build(anatomy.config, device="cpu", dtype=torch.bfloat16, initialize=True)
    plan = select(anatomy, anatomy.sizes.at(ffn=64), RandomScores(anatomy.sizes, 0), gain="none")
    student = trim(teacher, plan, anatomy)
    assert student.dtype == torch.bfloat16
    tied = student.get_input_embeddings().weight is student.get_output_embeddings().weight
    assert tied == anatomy.tied == bool(student.config.tie_word_embeddings)


def test_a_plan_that_keeps_everything_changes_nothing() -> None:
    twin = discover(config("gemma")).twin()
    teacher = random_twin(twin, seed=0)
    plan = select(twin, twin.sizes, RandomScores(twin.sizes, 0), gain="none")
    assert torch.equal(logits(trim(teacher, plan, twin), twin), logits(teacher, twin))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi", "cohere2"])
def test_width_and_depth_together_equal_masking_and_skipping(family: str) -> None:
    from halve.cut.proof.twins import skipping

    twin = discover(config(family)).twin()
    teacher = random_twin(twin, seed=4)
    sizes = twin.sizes
    after = sizes.at(hidden=48, ffn=40, heads=2, layers=sizes.layers - 1)
    kept = tuple(layer for layer in range(sizes.layers) if layer != 1)
    scores = RandomScores(sizes, 4)
    plan = select(twin, after, scores, gain="none", kept_layers=kept)
    full_depth = select(twin, after.at(layers=sizes.layers), scores, gain="none")
    reference = masked(teacher, full_depth, twin)
    with skipping(reference, twin, 1):
        expected = logits(reference, twin)
    assert (logits(trim(teacher, plan, twin), twin) - expected).abs().max() < 1e-4
