"""Another basis for hidden: the same logits, and a cut that keeps what matters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import config
from hypothesis import given, settings
from hypothesis import strategies as st

from halve.anatomy import discover
from halve.cut.plan.plan import select
from halve.cut.proof.twins import RandomScores, fixed_ids, logits, random_twin
from halve.cut.repair import rotate as module
from halve.cut.repair.rotate import (
    principal_basis,
    prove_rotation,
    rotate,
    rotates,
    stream_moment,
    student_anatomy,
    untied,
)
from halve.cut.score.calibration import Calibration
from halve.cut.surgery.trim import trim
from halve.errors import AnatomyError, PlanError
from halve.recipe.schema import Prune

ROTATED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "granite", "smollm3", "arcee", "apertus", "ernie4_5")
REFUSED = {
    "gemma2": "stands behind a sub-layer",
    "olmo2": "stands behind a sub-layer",
    "gpt2": "takes the mean off",
    "phi": "takes the mean off",
    "cohere": "takes the mean off",
}


def _orthogonal(size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q


@pytest.mark.parametrize("family", ROTATED)
def test_a_rotation_with_nothing_sliced_leaves_the_logits(family: str) -> None:
    anatomy = discover(config(family))
    assert prove_rotation(anatomy) < 1e-4


@pytest.mark.parametrize("family", REFUSED)
def test_families_whose_norms_do_not_commute_are_refused(family: str) -> None:
    with pytest.raises(AnatomyError, match=f"cannot rotate hidden of {family}") as caught:
        prove_rotation(discover(config(family)))
    assert REFUSED[family] in caught.value.why
    assert "rotation: none" in caught.value.fix


def test_the_proof_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm's weight that is not folded is noticed."""
    whole = module._folded

    def forgetful(*args):  # type: ignore[no-untyped-def]
        found = whole(*args)
        name = next(iter(found))
        return {**found, name: (torch.ones_like(found[name][0]), found[name][1])}

    monkeypatch.setattr(module, "_folded", forgetful)
    with pytest.raises(AnatomyError, match="cannot rotate"):
        prove_rotation(discover(config("llama")))


def test_a_twin_that_does_not_run_refuses_the_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(module, "logits", broken)
    anatomy = discover(config("llama"))
    assert not rotates(anatomy, Prune(hidden=64))
    with pytest.raises(AnatomyError, match="cannot rotate hidden of llama") as refused:
        rotates(anatomy, Prune(hidden=64, rotation="pca"))
    assert "RuntimeError: no such kernel" in refused.value.why


@pytest.mark.parametrize("family", ["gemma", "llama"])
def test_a_tied_head_is_untied_and_counted(family: str) -> None:
    anatomy = discover(config(family, tie_word_embeddings=True)).twin()
    model = random_twin(anatomy, seed=0)
    turned, own = rotate(model, anatomy, _orthogonal(anatomy.sizes.hidden))
    assert anatomy.tied
    assert not own.tied
    assert not turned.config.tie_word_embeddings
    assert turned.get_output_embeddings().weight is not turned.get_input_embeddings().weight
    more = anatomy.sizes.vocab * anatomy.sizes.hidden
    assert sum(p.numel() for p in turned.parameters()) == sum(p.numel() for p in model.parameters()) + more
    assert own.ledger.count(own.sizes).non_embedding == anatomy.ledger.count(anatomy.sizes).non_embedding
    assert student_anatomy(anatomy, Prune(hidden=8, rotation="pca", untie=True)).tied is False
    assert student_anatomy(anatomy, Prune(hidden=8)) is anatomy
    assert untied(own) is own


@pytest.mark.parametrize(
    ("family", "asked"),
    [
        ("gpt2", {"hidden": 16}),
        ("llama", {"hidden": 16, "steps": 2}),
        ("llama", {"ffn": 16}),
        ("llama", {"hidden": 96}),
    ],
)
def test_a_head_that_no_rotation_unties_is_counted_once(family: str, asked: dict[str, Any]) -> None:
    anatomy = discover(config(family, tie_word_embeddings=True))
    assert student_anatomy(anatomy, Prune(untie=True, **asked)) is anatomy


@pytest.mark.parametrize("asked", [{"params": 10_000}, {"non_embedding_ratio": 0.5}])
@pytest.mark.parametrize("shape", ["trial", "width"])
def test_a_budget_counts_the_same_head_in_every_shape(asked: dict[str, Any], shape: Any) -> None:
    """Hidden is not cut in every shape of a trial, and where it stays so does the tied head."""
    anatomy = discover(config("llama", tie_word_embeddings=True))
    prune = Prune(untie=True, shape=shape, **asked)
    if shape == "trial" and "params" in asked:
        with pytest.raises(PlanError, match=r"prune\.untie is not combined with prune\.params"):
            student_anatomy(anatomy, prune)
    else:
        assert not student_anatomy(anatomy, prune).tied


def test_the_teacher_is_not_changed() -> None:
    anatomy = discover(config("llama")).twin()
    model = random_twin(anatomy, seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rotate(model, anatomy, _orthogonal(anatomy.sizes.hidden))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_channels_that_carry_nothing_in_the_new_basis_are_cut_without_loss() -> None:
    """A model whose stream lives in a hidden subspace: axis by axis nothing can go, turned a quarter can."""
    anatomy = discover(config("llama", rms_norm_eps=1e-12)).twin()
    model = random_twin(anatomy, seed=0)
    size, keep = anatomy.sizes.hidden, anatomy.sizes.hidden - 8
    inside = _orthogonal(size)[:, :keep]
    project = inside @ inside.T
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == anatomy.embeddings[0]:
                parameter.copy_(parameter @ project)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.copy_(project @ parameter)
    samples = fixed_ids(anatomy)
    basis = principal_basis(stream_moment(Calibration(model, anatomy, samples, 1)))
    assert float(basis.energy_D[keep:].sum()) < 1e-6
    turned, own = rotate(model, anatomy, basis.columns_DD)
    scores = RandomScores(own.sizes, 0)
    scores.hidden = basis.energy_D
    plan = select(own, own.sizes.at(hidden=keep), scores, gain="constant")
    assert plan.hidden == tuple(range(keep))
    gains = dict.fromkeys(own.norms, (size / keep) ** 0.5)
    student = trim(turned, plan, own, gains=gains)
    assert (logits(student, own) - logits(model, anatomy)).abs().max() < 1e-4


@given(st.integers(0, 50))
@settings(max_examples=10)
def test_principal_axes_are_orthonormal_ordered_and_keep_the_most(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    moment = mix @ mix.T
    basis = principal_basis(moment)
    torch.testing.assert_close(basis.columns_DD.T @ basis.columns_DD, torch.eye(6, dtype=torch.float64))
    assert basis.energy_D.sum() == pytest.approx(1.0)
    assert bool((basis.energy_D.diff() <= 1e-12).all())
    kept = basis.columns_DD[:, :2]
    other = _orthogonal(6, seed)[:, :2]
    assert torch.trace(kept.T @ moment @ kept) >= torch.trace(other.T @ moment @ other) - 1e-9


def test_the_moment_counts_every_token_alike_and_not_the_micro_batch() -> None:
    anatomy = discover(config("llama")).twin()
    model = random_twin(anatomy, seed=0)
    one = stream_moment(Calibration(model, anatomy, fixed_ids(anatomy), 1))
    two = stream_moment(Calibration(model, anatomy, fixed_ids(anatomy), 2))
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
    assert one.trace() == pytest.approx(24 * len(anatomy.norms), rel=1e-5)  # every token of every norm weighs one
