"""Cutting as a recipe asks: the whole way from scores to a student, on twins."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from dead import dead_channels, hidden_plan
from families import config
from torch import Tensor

from halve.anatomy import Anatomy, Arch, discover
from halve.cut import apply
from halve.cut.apply import Goal, Turned, cut, turn
from halve.cut.plan.plan import select
from halve.cut.proof.twins import random_twin
from halve.cut.repair.refit_scores import score_by_refit
from halve.cut.repair.rotate import principal_basis, rotate, stream_moment, tie_head
from halve.cut.score import width
from halve.cut.score.calibration import Calibration
from halve.cut.score.scores import Scores, random_scores
from halve.cut.surgery.trim import trim
from halve.errors import AnatomyError
from halve.model.card import made_in_words
from halve.model.reference import Reference
from halve.recipe.schema import Prune

PLAIN: dict[str, Any] = {"gain": "none", "refit": "none", "rotation": "none", "selection": "rank", "refit_samples": 128}


def _samples(anatomy: Anatomy, num: int = 40, seq: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(anatomy.sizes.vocab, (num, seq), generator=generator)


def _twin(family: str, **changes: Any) -> tuple[Any, Anatomy]:
    anatomy = discover(config(family, **changes)).twin()
    return random_twin(anatomy, seed=0).requires_grad_(False), anatomy


def _scores(model: Any, anatomy: Anatomy) -> Scores:
    return width.score(
        Calibration(model, anatomy, _samples(anatomy, 8), 4),
        method="activation",
        ffn_point="down_input",
        batch_agg="l2",
        seq_agg="mean",
        seed=0,
        model_fingerprint="",
        samples_fingerprint="",
    )


def _cut(model: Any, anatomy: Anatomy, sizes: dict[str, int], *, rescore: Any = _scores, **asked: Any) -> apply.Cut:
    prune, after = Prune(**sizes, **{**PLAIN, **asked}), anatomy.sizes.at(**sizes)
    calibration = Calibration(model, anatomy, _samples(anatomy), 8)
    turned = turn(calibration, prune, sizes=[after])
    return cut(calibration, _scores(model, anatomy), prune, Goal(after), turned=turned, rescore=rescore)


def _gap(ours: Any, theirs: Any, anatomy: Anatomy) -> float:
    ids = _samples(anatomy)
    with torch.no_grad():
        return float((ours(ids).logits - theirs(ids).logits).square().mean())


def test_with_everything_off_it_is_select_and_trim() -> None:
    model, anatomy = _twin("llama")
    sizes = {"hidden": anatomy.sizes.hidden - 8, "ffn": anatomy.sizes.ffn - 16}
    done = _cut(model, anatomy, sizes)
    plan = select(anatomy, anatomy.sizes.at(**sizes), _scores(model, anatomy), gain="none")
    assert done.plan == plan
    assert done.figures == {}
    for ours, theirs in zip(done.student.parameters(), trim(model, plan, anatomy).parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_the_default_comes_closer_than_a_plain_cut_and_is_as_large(family: str) -> None:
    model, anatomy = _twin(family, tie_word_embeddings=True)
    sizes = {"hidden": anatomy.sizes.hidden - 8, "ffn": anatomy.sizes.ffn - 16}
    plain = _cut(model, anatomy, sizes)
    ours = _cut(model, anatomy, sizes, rotation="auto", refit="all", gain="fitted")
    assert ours.student.num_parameters() == plain.student.num_parameters()
    assert ours.student.config.tie_word_embeddings
    assert ours.figures["more_params_untied"] == 0
    assert 0 < ours.figures["energy_kept"] < 1
    made = ours.made(Prune(**sizes))
    assert made == {"cut": "refit", "compared": {}, "rotation": "pca", "unrotated": ""}
    assert ours.plan.hidden == tuple(range(sizes["hidden"]))
    assert _gap(ours.student, model, anatomy) < 0.8 * _gap(plain.student, model, anatomy)
    free = _cut(model, anatomy, sizes, rotation="auto", refit="all", untie=True)
    assert free.figures["more_params_untied"] == anatomy.sizes.vocab * sizes["hidden"]
    more = free.student.num_parameters() - ours.student.num_parameters()
    assert more == free.figures["more_params_untied"]


def test_families_that_cannot_be_rotated_are_cut_in_their_own_basis() -> None:
    model, anatomy = _twin("gemma2")
    sizes = {"hidden": anatomy.sizes.hidden - 8}
    done = _cut(model, anatomy, sizes, rotation="auto")
    assert "energy_kept" not in done.figures
    assert done.made(Prune(**sizes))["rotation"] == "none"
    assert done.made(Prune(**sizes))["unrotated"] == "its norms allow no other"
    assert done.made(Prune(**sizes, steps=2))["unrotated"] == "a cut in steps keeps it"
    assert done.made(Prune(**sizes, rotation="none"))["unrotated"] == ""
    with pytest.raises(AnatomyError, match="cannot rotate"):
        _cut(model, anatomy, sizes, rotation="pca")


def test_a_cut_that_leaves_hidden_alone_is_not_rotated() -> None:
    model, anatomy = _twin("llama")
    done = _cut(model, anatomy, {"ffn": anatomy.sizes.ffn - 16}, rotation="pca")
    plain = _cut(model, anatomy, {"ffn": anatomy.sizes.ffn - 16})
    assert "energy_kept" not in done.figures
    assert all(torch.equal(a, b) for a, b in zip(done.student.parameters(), plain.student.parameters(), strict=True))


def test_selection_by_refit_keeps_one_of_two_that_say_the_same() -> None:
    model, anatomy = _twin("llama")
    with torch.no_grad():
        for layer in model.model.layers:  # neurons 0 and 1 are one and very active
            for weight in (layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight):
                weight[:2] = 3 * weight[:1]
    after = anatomy.sizes.at(ffn=anatomy.sizes.ffn - 16)
    scores = score_by_refit(
        Calibration(model, anatomy, _samples(anatomy), 8), after, layers=range(anatomy.sizes.layers), strength=1e-9
    )
    assert set(scores) == {"ffn"}
    for row in scores["ffn"]:
        assert (row == anatomy.sizes.ffn).sum() == after.ffn
        assert min(row[0], row[1]) == 0  # the first to go
    activity = _scores(model, anatomy).ffn
    assert activity is not None
    assert bool((activity.argsort(dim=1, descending=True)[:, :8] < 2).any())


def test_heads_selected_by_refit_stay_balanced_in_their_groups() -> None:
    model, anatomy = _twin("llama")
    sizes = {"heads": anatomy.sizes.heads // 2}
    done = _cut(model, anatomy, sizes, selection="refit", refit="outputs")
    per_group = anatomy.sizes.heads // anatomy.sizes.kv_heads
    for kept in done.plan.heads:
        counts = [sum(head // per_group == group for head in kept) for group in range(anatomy.sizes.kv_heads)]
        assert len(set(counts)) == 1
    assert _gap(done.student, model, anatomy) < _gap(_cut(model, anatomy, sizes).student, model, anatomy)


def test_heads_with_keys_of_their_own_compete_within_their_layer() -> None:
    anatomy = discover(config("llama", num_key_value_heads=config("llama").num_attention_heads))
    model = random_twin(anatomy, seed=0).requires_grad_(False)
    heads, dim = anatomy.sizes.heads, anatomy.sizes.head_dim
    assert anatomy.sizes.kv_heads == heads
    with torch.no_grad():
        for layer in model.model.layers:  # heads 0 and 1 are one and very active
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                projection.weight[dim : 2 * dim] = projection.weight[:dim]
            layer.self_attn.v_proj.weight[: 2 * dim] *= 3
    sizes = {"heads": heads // 2, "kv_heads": heads // 2}
    by_score, by_refit = (_cut(model, anatomy, sizes, selection=how, refit="outputs") for how in ("rank", "refit"))
    assert all({0, 1} <= set(kept) for kept in by_score.plan.heads)
    assert all(len({0, 1} & set(kept)) == 1 for kept in by_refit.plan.heads)
    assert by_refit.plan.kv_heads == by_refit.plan.heads
    assert _gap(by_refit.student, model, anatomy) < _gap(by_score.student, model, anatomy)


def test_a_merge_meets_by_activation_whoever_selected(monkeypatch: pytest.MonkeyPatch) -> None:
    model, anatomy = _twin("llama")
    seen: list[Tensor] = []
    monkeypatch.setattr(
        apply.heads, "merge_heads", lambda model, plan, own, scores, **_: seen.append(scores.heads) or model
    )
    _cut(model, anatomy, {"heads": anatomy.sizes.heads // 2}, selection="refit", refit="outputs", head_merge=0.5)
    wanted = _scores(model, anatomy).heads
    assert wanted is not None
    assert torch.equal(seen[0], wanted)


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("llama", False), ("gemma2", True), ("olmo2", False)])
def test_the_refit_of_all_keeps_the_gains(family: str, tied: bool) -> None:
    """Channels that are zero everywhere can go without a trace, through tied heads and post-norms, too."""
    anatomy = discover(config(family, tie_word_embeddings=tied, rms_norm_eps=1e-12)).twin()
    plan = hidden_plan(anatomy)
    teacher = dead_channels(random_twin(anatomy, seed=1), plan, anatomy).requires_grad_(False)
    alive_D = torch.zeros(anatomy.sizes.hidden)
    alive_D[list(plan.hidden)] = 1
    prune = Prune(hidden=plan.after.hidden, rotation="none", selection="rank")
    calibration = Calibration(teacher, anatomy, _samples(anatomy, 64), 8)
    scores = replace(_scores(teacher, anatomy), hidden=alive_D)
    turned = turn(calibration, prune, sizes=[plan.after])
    done = cut(calibration, scores, prune, Goal(plan.after), turned=turned)
    assert done.gains.keys() == set(anatomy.norms)
    assert _gap(done.student, teacher, anatomy) < 1e-6


def test_steps_score_what_is_left() -> None:
    model, anatomy = _twin("llama")
    seen: list[int] = []

    def rescore(part: Any, part_anatomy: Anatomy) -> Scores:
        seen.append(part_anatomy.sizes.ffn)
        return _scores(part, part_anatomy)

    sizes = {"ffn": anatomy.sizes.ffn - 32}
    done = _cut(model, anatomy, sizes, steps=2, rescore=rescore)
    assert seen == [anatomy.sizes.ffn, anatomy.sizes.ffn - 16]
    assert done.student.config.intermediate_size == sizes["ffn"]


def test_merges_change_the_student_and_not_the_teacher() -> None:
    model, anatomy = _twin("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    heads = {"heads": anatomy.sizes.heads // 2}
    layers = {"layers": anatomy.sizes.layers - 1}
    for sizes, asked in ((heads, {"head_merge": 0.5}), (layers, {"layer_merge": "laco"})):
        with_merge, without = _cut(model, anatomy, sizes, **asked), _cut(model, anatomy, sizes)
        pairs = zip(with_merge.student.parameters(), without.student.parameters(), strict=True)
        assert not all(torch.equal(a, b) for a, b in pairs)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_tying_back_what_was_never_cut_finds_the_final_norm() -> None:
    """The folded norm is a factor a channel again: E diag(g) with the old g is exact, and the fit finds it."""
    model, anatomy = _twin("llama", tie_word_embeddings=True)
    student = _untied_with_the_norm_folded(model)
    assert anatomy.final_norm is not None
    itself = Calibration(student, anatomy, _samples(anatomy), 8)
    again = tie_head(student, itself, final_norm=anatomy.final_norm, strength=1e-9)
    assert again.config.tie_word_embeddings
    torch.testing.assert_close(again.model.norm.weight, model.model.norm.weight, atol=1e-4, rtol=0)
    assert _gap(again, model, anatomy) < 1e-8


def _untied_with_the_norm_folded(model: Any) -> Any:
    import copy

    from halve.anatomy.configs import build

    settings = copy.deepcopy(model.config)
    settings.tie_word_embeddings = False
    result = build(settings, device="cpu", dtype=model.dtype)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["lm_head.weight"] = model.get_input_embeddings().weight * model.model.norm.weight
    state["model.norm.weight"] = torch.ones_like(model.model.norm.weight)
    result.load_state_dict(state)
    return result


def test_the_stream_is_turned_only_where_a_shape_cuts_it() -> None:
    model, anatomy = _twin("llama")
    same = anatomy.sizes.at(ffn=anatomy.sizes.ffn - 16)
    narrower = same.at(hidden=56)

    def turned(*sizes: Arch) -> apply.Turned:
        return turn(Calibration(model, anatomy, _samples(anatomy), 8), Prune(params="1k"), sizes=sizes)

    assert turned(same, same).model is model
    assert turned(same, same).energy_D is None
    assert turned(same, narrower).model is not model
    assert turned(same, narrower).energy_D is not None


def test_random_scores_do_for_scores() -> None:
    model, anatomy = _twin("llama")
    prune = Prune(ffn=anatomy.sizes.ffn - 16, **PLAIN)
    after = anatomy.sizes.at(ffn=prune.ffn)
    calibration = Calibration(model, anatomy, _samples(anatomy), 8)
    turned = turn(calibration, prune, sizes=[after])
    made = [
        cut(calibration, random_scores(anatomy, seed), prune, Goal(after), turned=turned).plan.ffn for seed in (0, 1)
    ]
    assert made[0] != made[1]


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize("refit", ["outputs", "all"])
def test_hidden_of_a_mixture_is_cut(family: str, refit: str) -> None:
    """Routers and experts read the stream as matrices do; they are trimmed, and what is refit beside them helps."""
    sizes = {"num_hidden_layers": 2, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
    model, anatomy = _twin(family, **sizes)
    student = _cut(model, anatomy, {"hidden": 56}, refit=refit, gain="fitted").student
    assert student.config.hidden_size == 56
    gap = _gap(student, model, anatomy)
    assert gap < _gap(_cut(model, anatomy, {"hidden": 56}, gain="fitted").student, model, anatomy)


def test_what_is_scored_by_inputs_of_matrices_says_that_routers_have_none() -> None:
    model, anatomy = _twin("mixtral", num_hidden_layers=2, num_local_experts=4)
    with pytest.raises(AnatomyError, match="cannot score hidden of mixtral"):
        width.score(
            Calibration(model, anatomy, _samples(anatomy, 8), 4),
            method="wanda",
            ffn_point="down_input",
            batch_agg="l2",
            seq_agg="mean",
            seed=0,
            model_fingerprint="",
            samples_fingerprint="",
        )


def test_of_the_refit_and_the_plain_cut_the_closer_one_on_unseen_samples_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, anatomy = _twin("llama")
    sizes, plans = {"ffn": anatomy.sizes.ffn - 16}, []
    calibration = Calibration(model, anatomy, _samples(anatomy), 8)

    def cut_to(**asked: Any) -> apply.Cut:
        prune = Prune(**sizes, **asked)
        turned = turn(calibration, prune, sizes=[anatomy.sizes.at(**sizes)])
        goal = Goal(anatomy.sizes.at(**sizes))
        return cut(calibration, _scores(model, anatomy), prune, goal, turned=turned, planned=plans.append)

    good = cut_to()
    assert good.figures["kept"] == "refit"
    assert good.figures["refit_kl"] <= good.figures["plain_kl"]
    assert plans == [good.plan]
    made = good.made(Prune(**sizes))
    assert (made["cut"], made["rotation"], made["unrotated"]) == ("refit", "none", "")
    assert made["compared"]["refit_kl"] == good.figures["refit_kl"]
    assert 0 < made["compared"]["compared_tokens"] < calibration.samples_BS.numel()
    plain = cut_to(refit="none", selection="rank", gain="fitted")

    def spoiled(student: Any, *args: Any, **kwargs: Any) -> Any:
        broken = copy.deepcopy(student).requires_grad_(False)
        broken.model.layers[0].mlp.down_proj.weight.mul_(-3)
        return broken

    monkeypatch.setattr(apply, "refit", spoiled)
    kept = cut_to()
    assert kept.figures["kept"] == "plain"
    assert kept.figures["refit_kl"] > kept.figures["plain_kl"]
    assert plans[-1] == kept.plan == plain.plan
    assert kept.made(Prune(**sizes))["cut"] == "plain"
    assert plain.made(Prune(**sizes, refit="none")) == {
        "cut": "plain",
        "compared": {},
        "rotation": "none",
        "unrotated": "",
    }
    for ours, theirs in zip(kept.student.parameters(), plain.student.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_rotation_that_loses_on_unseen_samples_is_left_out() -> None:
    """Here it puts the channels that matter least first."""
    model, anatomy = _twin("llama", tie_word_embeddings=True)
    sizes, plans = {"hidden": anatomy.sizes.hidden - 16}, []
    after = anatomy.sizes.at(**sizes)
    calibration, scores = Calibration(model, anatomy, _samples(anatomy, 200), 32), _scores(model, anatomy)
    basis = principal_basis(stream_moment(calibration))
    backwards = Turned(*rotate(model, anatomy, basis.columns_DD.flip(1)), basis.energy_D)

    def cut_in(turned: Turned, **asked: Any) -> apply.Cut:
        return cut(calibration, scores, Prune(**sizes, **asked), Goal(after), turned=turned, planned=plans.append)

    left = cut_in(backwards)
    without = cut_in(Turned(model, anatomy, None), rotation="none")
    assert left.figures["unrotated_kl"] < left.figures["refit_kl"]
    assert left.plan == without.plan == plans[1]
    assert plans[0] != plans[1]
    for ours, theirs in zip(left.student.parameters(), without.student.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    made = left.made(Prune(**sizes))
    assert (made["cut"], made["rotation"]) == ("refit", "none")
    assert made["unrotated"] == "the principal axes were farther from the teacher"
    assert "in the model's own basis: the principal axes" in made_in_words(made)
    asked_for = cut_in(backwards, rotation="pca")
    assert "unrotated_kl" not in asked_for.figures
    assert asked_for.made(Prune(**sizes, rotation="pca"))["rotation"] in ("pca", "none")


@pytest.mark.parametrize("seed", range(4))
def test_no_number_of_tokens_makes_the_cut_worse_than_the_plain_one(seed: int) -> None:
    """Few tokens, many tokens, any shape: on other text never worse than the plain cut by two standard errors."""
    draw = random.Random(seed)
    model, anatomy = _twin("llama")
    sizes = {
        "ffn": anatomy.sizes.ffn - 8 * draw.randint(1, 4),
        "hidden": anatomy.sizes.hidden - 8 * draw.randint(0, 2),
    }
    tokens, after = 2 ** draw.randint(5, 11), anatomy.sizes.at(**sizes)
    calibration = Calibration(model, anatomy, _samples(anatomy, 200), 32)
    prune = Prune(**sizes, refit_tokens=tokens)
    turned = turn(calibration, prune, sizes=[after])
    scores = _scores(model, anatomy)
    done = cut(calibration, scores, prune, Goal(after), turned=turned)
    plain = cut(calibration, scores, apply.plainly(prune), Goal(after), turned=replace(turned, energy_D=None))
    other = torch.randint(anatomy.sizes.vocab, (100, 16), generator=torch.Generator().manual_seed(2))
    reference = Reference(model, other, micro_batch=50)
    gaps = reference.divergences(done.student) - reference.divergences(plain.student)
    assert float(gaps.mean()) <= 2 * float(gaps.std()) / len(gaps) ** 0.5 + 1e-6
