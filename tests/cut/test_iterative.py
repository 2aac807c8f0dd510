"""Cutting in steps: one step is one shot, and several name the entries of the model that they began with."""

from __future__ import annotations

import pytest
import torch
from families import config
from transformers import PreTrainedModel

from halve.anatomy import Anatomy, discover
from halve.cut.iterative import composed, select_iteratively, sizes_on_the_way
from halve.cut.plan.plan import Importance, Plan, select
from halve.cut.plan.sizes import require_sizes
from halve.cut.proof.twins import RandomScores, logits, random_twin, twin_plan
from halve.cut.score.calibration import Calibration
from halve.cut.score.scores import Scores
from halve.cut.score.width import score as width_score
from halve.cut.surgery.gain import constant_gains
from halve.cut.surgery.trim import trim

FAMILIES = ["llama", "gpt2", "phi3", "gpt_neox", "olmo2", "nemotron"]


def twin(family: str) -> tuple[PreTrainedModel, Anatomy]:
    anatomy = discover(config(family)).twin()
    return random_twin(anatomy, seed=0), anatomy


def measured(model: PreTrainedModel, anatomy: Anatomy) -> Scores:
    samples = torch.randint(anatomy.sizes.vocab, (4, 9), generator=torch.Generator().manual_seed(3))
    return width_score(
        Calibration(model, anatomy, samples, 4),
        method="activation",
        ffn_point="down_input",
        batch_agg="l2",
        seq_agg="mean",
        seed=0,
        model_fingerprint="m",
        samples_fingerprint="s",
    )


def smaller(anatomy: Anatomy, **sizes: int) -> dict[str, int]:
    if anatomy.coupled:
        heads = anatomy.sizes.heads // 2
        own = {"kv_heads": heads} if anatomy.sizes.heads == anatomy.sizes.kv_heads else {}
        return {"ffn": anatomy.sizes.ffn // 2, "heads": heads, "hidden": heads * anatomy.sizes.head_dim, **own, **sizes}
    return {
        "ffn": anatomy.sizes.ffn // 2,
        "hidden": anatomy.sizes.hidden - 24,
        "heads": anatomy.sizes.heads // 2,
        **sizes,
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kept_layers", [None, (0, 2)])
def test_one_step_is_one_shot(family: str, kept_layers: tuple[int, ...] | None) -> None:
    model, anatomy = twin(family)
    after = anatomy.sizes.at(**smaller(anatomy, layers=2))
    about = {"gain": "constant", "kept_layers": kept_layers}
    found = select_iteratively(model, anatomy, after, steps=1, score=measured, **about)
    assert found == select(anatomy, after, measured(model, anatomy), **about)


@pytest.mark.parametrize("family", FAMILIES)
def test_several_steps_name_entries_of_the_first_model(family: str) -> None:
    """Cutting by the composed plan equals cutting step by step."""
    model, anatomy = twin(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    after = anatomy.sizes.at(**smaller(anatomy, layers=2))
    stepwise, calls = [(model, anatomy)], []

    def score(part: PreTrainedModel, part_anatomy: Anatomy) -> Importance:
        calls.append(part_anatomy.sizes)
        return RandomScores(part_anatomy.sizes, len(calls))

    plan = select_iteratively(model, anatomy, after, steps=4, score=score, gain="none")
    assert (plan.before, plan.after) == (anatomy.sizes, after)
    assert 2 <= len(calls) <= 4
    assert calls[0] == anatomy.sizes
    for number, sizes in enumerate([*calls[1:], after], 1):
        part, part_anatomy = stepwise[-1]
        step = select(part_anatomy, sizes, RandomScores(part_anatomy.sizes, number), gain="none")
        student = trim(part, step, part_anatomy)
        stepwise.append((student, discover(student.config)))
    expected = stepwise[-1][0]
    student = trim(model, plan, anatomy)
    for (name, mine), theirs in zip(student.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 50])
def test_sizes_on_the_way_are_legal_and_fall(family: str, steps: int) -> None:
    _, anatomy = twin(family)
    after = anatomy.sizes.at(**smaller(anatomy))
    path = list(sizes_on_the_way(anatomy, after, steps))
    assert path[-1] == after
    assert min(steps, anatomy.sizes.ffn - after.ffn) <= len(path) <= steps
    for earlier, later in zip([anatomy.sizes, *path], path, strict=False):
        require_sizes(anatomy, later)
        assert all(later.sizes[axis] <= earlier.sizes[axis] for axis in later.sizes)
        assert later != earlier


def test_scores_see_what_is_left() -> None:
    """A cut of neurons changes what later layers compute, and with it their ranking; the first layer's it does not."""
    model, anatomy = twin("llama")
    after = anatomy.sizes.at(ffn=anatomy.sizes.ffn // 2)
    one, many = (
        select_iteratively(model, anatomy, after, steps=steps, score=measured, gain="none") for steps in (1, 4)
    )
    assert one.ffn[0] == many.ffn[0]
    assert one.ffn != many.ffn


def test_gains_reach_the_models_between() -> None:
    model, anatomy = twin("llama")
    after = anatomy.sizes.at(hidden=anatomy.sizes.hidden // 2)
    seen: list[float] = []

    def score(part: PreTrainedModel, part_anatomy: Anatomy) -> Importance:
        seen.append(float(part.get_submodule("model.norm").weight.detach().abs().max()))
        return RandomScores(part_anatomy.sizes, 0)

    def gains(part: PreTrainedModel, part_anatomy: Anatomy, plan: Plan) -> dict[str, float]:
        return {name: 100 * gain for name, gain in constant_gains(part_anatomy, plan).items()}

    select_iteratively(model, anatomy, after, steps=2, score=score, gain="constant", gains=gains)
    assert seen[1] > 30 * seen[0]


def test_composing_with_a_plan_that_keeps_all() -> None:
    model, anatomy = twin("phi3")
    plan = twin_plan("ffn", anatomy, 0)
    student = trim(model, plan, anatomy)
    small = discover(student.config)
    nothing = select(small, small.sizes, RandomScores(small.sizes, 0), gain="none")
    assert composed(plan, nothing) == plan
    assert torch.equal(logits(trim(model, composed(plan, nothing), anatomy), anatomy), logits(student, anatomy))
