"""Criteria and patterns of layer removal: against really trimmed models in float64, and on hand-made states."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import config
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from halve.anatomy import Anatomy, discover
from halve.cut.layers import depth, depth_values
from halve.cut.layers.depth import DepthChoice, Removal
from halve.cut.layers.depth_values import Compared, angular_distance, state_values
from halve.cut.plan.plan import select
from halve.cut.proof.twins import RandomScores, random_twin
from halve.cut.score import taps
from halve.cut.score.calibration import Calibration
from halve.cut.score.importance import block_importance
from halve.cut.score.scores import Scores, random_scores
from halve.cut.surgery.trim import trim
from halve.errors import CheckpointError, CorpusError, PlanError, RecipeError
from halve.model import choices
from halve.model.choices import Item

LAYERS = 6
FAMILIES = ["llama", "gpt2", "gemma2", "olmo2"]
Made = tuple[PreTrainedModel, Anatomy]


def choose(
    model: PreTrainedModel, anatomy: Anatomy, samples_BS: Tensor, *, micro_batch: int, **asked: Any
) -> DepthChoice:
    return depth.choose(Calibration(model, anatomy, samples_BS, micro_batch), **asked)


@pytest.fixture(scope="module", params=FAMILIES)
def made(request: pytest.FixtureRequest) -> Made:
    changes = {"sliding_window": 5} if request.param == "gemma2" else {}
    anatomy = discover(config(request.param, vocab_size=320, **changes))
    model = random_twin(anatomy, seed=7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.mul_(0.1)  # biases of order one answer every item, whatever layers do
    return model, anatomy


@pytest.fixture(scope="module")
def llama() -> Made:
    anatomy = discover(config("llama", vocab_size=320))
    return random_twin(anatomy, seed=7), anatomy


@pytest.fixture(scope="module")
def samples() -> Tensor:
    return torch.randint(320, (5, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def items() -> list[Item]:
    words = ["dog", "cat", "red", "old", "sees", "king", "lamp", "road"]
    return [
        Item(
            f"The {words[i % 7]} {words[i % 5]}",
            tuple(f" {words[(i + k) % 4]} {words[k + 4]}" for k in range(4)),
            i % 4,
        )
        for i in range(24)
    ]


_TRIMMED: dict[tuple[str, tuple[int, ...]], PreTrainedModel] = {}


def trimmed(made: Made, removed: Collection[int]) -> PreTrainedModel:
    """A really trimmed model; made once for each family, whose weights are fixed by the seed."""
    key = made[1].family, tuple(sorted(removed))
    if key not in _TRIMMED:
        _TRIMMED[key] = _trimmed(made, removed)
    return _TRIMMED[key]


def _trimmed(made: Made, removed: Collection[int]) -> PreTrainedModel:
    model, anatomy = made
    kept = [layer for layer in range(LAYERS) if layer not in removed]
    plan = select(
        anatomy, anatomy.sizes.at(layers=len(kept)), RandomScores(anatomy.sizes, 0), gain="none", kept_layers=kept
    )
    student = trim(model, plan, anatomy)
    student.config._attn_implementation = "eager"
    return student


def logits_of(model: PreTrainedModel, samples: Tensor) -> Tensor:
    with torch.no_grad():
        return model(samples, use_cache=False).logits


def expected_nll(made: Made, removed: Collection[int], samples: Tensor, **_: Any) -> float:
    logits = logits_of(trimmed(made, removed), samples)[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), samples[:, 1:].flatten()).item()


def expected_mse(made: Made, removed: Collection[int], samples: Tensor, **_: Any) -> float:
    full = logits_of(made[0], samples)
    return ((logits_of(trimmed(made, removed), samples) - full).square().sum() / full.square().sum()).item()


def expected_task(made: Made, removed: Collection[int], *, tokenizer: Any, items: Any, **_: Any) -> float:
    encoded = choices.encode(tokenizer, items, max_tokens=None)
    return 1 - choices.answer_encoded(trimmed(made, removed), encoded).right.double().mean().item()


EXPECTED = {"nll": expected_nll, "logit_mse": expected_mse, "task": expected_task}
_VALUES: dict[tuple[str, str, tuple[int, ...]], float] = {}


def expected(criterion: str, made: Made, removed: Collection[int], **about: Any) -> float:
    """The value of a trimmed model; patterns compare the same sets, and each is worked out once."""
    key = criterion, made[1].family, tuple(sorted(removed))
    if key not in _VALUES:
        _VALUES[key] = EXPECTED[criterion](made, removed, **about)
    return _VALUES[key]


@pytest.mark.parametrize("criterion", EXPECTED)
@pytest.mark.parametrize(("pattern", "remove"), [("single", 2), ("block", 3), ("greedy", 3)])
def test_every_value_is_that_of_a_trimmed_model(
    made: Made,
    samples: Tensor,
    items: list[Item],
    tokenizer: PreTrainedTokenizerFast,
    criterion: Any,
    pattern: Any,
    remove: int,
) -> None:
    about = {"items": items, "tokenizer": tokenizer}
    found = choose(*made, samples, criterion=criterion, pattern=pattern, remove=remove, micro_batch=2, seed=0, **about)
    compared = {"single": LAYERS, "block": LAYERS - remove + 1, "greedy": 6 + 5 + 4}[pattern]
    assert len(found.removals) == compared
    for removal in found.removals:
        want = expected(criterion, made, removal.layers, samples=samples, **about)
        assert removal.value == pytest.approx(want, rel=1e-10, abs=1e-12), removal.layers
    assert found.whole == pytest.approx(expected(criterion, made, (), samples=samples, **about), rel=1e-10, abs=1e-12)
    assert len(found.kept) == LAYERS - remove
    assert len({removal.value for removal in found.removals}) > 1


def passed(model: PreTrainedModel, anatomy: Anatomy, samples: Tensor) -> list[tuple[Tensor, Tensor]]:
    seen: list[tuple[Tensor, Tensor]] = []
    hooks = [
        model.get_submodule(f"{anatomy.layers_path}.{i}").register_forward_hook(
            lambda _, args, output: seen.append((args[0], output))
        )
        for i in range(anatomy.sizes.layers)
    ]
    with torch.no_grad():
        model.base_model(samples, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def turn(x: Tensor, y: Tensor) -> float:
    return 1 - torch.nn.functional.cosine_similarity(x, y, dim=-1).mean().item()


def angle(x: Tensor, y: Tensor) -> float:
    return (torch.nn.functional.cosine_similarity(x[:, -1], y[:, -1], dim=-1).arccos() / math.pi).mean().item()


@pytest.mark.parametrize(("criterion", "distance"), [("bi", turn), ("angular", angle)])
def test_states_of_one_pass(made: Made, samples: Tensor, criterion: Any, distance: Any) -> None:
    seen = passed(*made, samples)
    for size in (1, 2, 5):
        found = choose(*made, samples, criterion=criterion, pattern="block", remove=size, micro_batch=2, seed=0)
        assert [r.layers[0] for r in found.removals] == list(range(LAYERS - size + 1))
        for r in found.removals:
            want = distance(seen[r.layers[0]][0], seen[r.layers[-1]][1])
            assert r.value == pytest.approx(want, rel=1e-6, abs=1e-6)
        assert found.passes == pytest.approx(1.0)
        assert found.whole is None


def test_a_greedy_choice_holds_those_of_fewer_layers(llama: Made, samples: Tensor) -> None:
    asked = {"criterion": "logit_mse", "pattern": "greedy", "micro_batch": 2, "seed": 0}
    most = choose(*llama, samples, remove=4, **asked)
    assert most.of(4).kept == most.kept
    assert most.of(0).kept == tuple(range(LAYERS))
    for remove in (1, 2, 3):
        assert most.of(remove).kept == choose(*llama, samples, remove=remove, **asked).kept


@pytest.mark.parametrize(("criterion", "distance"), [("bi", turn), ("angular", angle)])
def test_greedy_states_are_those_of_the_model_that_is_left(
    llama: Made, samples: Tensor, criterion: Any, distance: Any
) -> None:
    found = choose(*llama, samples, criterion=criterion, pattern="greedy", remove=3, micro_batch=2, seed=0)
    gone: list[int] = []
    at = 0
    for step in range(3):
        left = [layer for layer in range(LAYERS) if layer not in gone]
        seen = passed(trimmed(llama, gone), replace(llama[1], sizes=llama[1].sizes.at(layers=len(left))), samples)
        want = [distance(x, y) for x, y in seen]
        now = found.removals[at : at + len(left)]
        assert [r.layers for r in now] == [tuple(sorted((*gone, layer))) for layer in left]
        assert [r.value for r in now] == pytest.approx(want, rel=1e-6, abs=1e-6)
        gone.append(left[want.index(min(want))])
        at += len(left)
        assert step == len(gone) - 1
    assert found.kept == tuple(layer for layer in range(LAYERS) if layer not in gone)
    assert found.passes == pytest.approx((6 + 5 + 4) / 6)


def test_passes_count_layers_that_ran(llama: Made, samples: Tensor) -> None:
    def passes(pattern: Any, remove: int, criterion: Any = "nll") -> float:
        return choose(
            *llama, samples, criterion=criterion, pattern=pattern, remove=remove, micro_batch=2, seed=0
        ).passes

    assert passes("single", 2) == pytest.approx((6 + 15) / 6)
    assert passes("block", 2) == pytest.approx((6 + 10) / 6)
    first_gone = choose(*llama, samples, criterion="nll", pattern="greedy", remove=1, micro_batch=2, seed=0).kept
    assert len(first_gone) == 5
    assert passes("greedy", 2) == pytest.approx((6 + 15 + 5 + 10) / 6)
    assert passes("greedy", 2, "logit_mse") == passes("greedy", 2)
    assert passes("single", 2, "random") == 0


# ---- the methods of the papers, on hand-made states and values


def states(*angles: float) -> list[Tensor]:
    """A stream of one sample, two tokens and two channels that stands at these angles (in units of pi)."""
    turned = torch.tensor([[math.cos(a * math.pi), math.sin(a * math.pi)] for a in angles], dtype=torch.float64)
    return [torch.stack([torch.tensor([1.0, 0.0]).double(), row])[None] for row in turned]


def by_states(stream: Sequence[Tensor], distance: Any) -> depth_values.Compare:
    return lambda sets, removed: Compared(tuple(state_values(stream, sets, distance)[:, 0].tolist()), 1.0, None)


def test_shortgpt_removes_what_turns_least() -> None:
    stream = states(0.0, 0.5, 0.6, 0.6, 0.9)
    found = depth.single(by_states(stream, block_importance), 4, remove=2)
    # the first token never turns: half of 1 - cos of the second's turn
    turns = [(1 - math.cos(t * math.pi)) / 2 for t in (0.5, 0.1, 0.0, 0.3)]
    assert [r.value for r in found.removals] == pytest.approx(turns, abs=1e-7)
    assert found.removed == (1, 2)


def test_gromov_removes_the_block_that_turns_least() -> None:
    stream = states(0.0, 0.3, 0.1, 0.4, 0.45, 0.5)
    found = depth.blocks(by_states(stream, angular_distance), 5, remove=2)
    assert [r.layers for r in found.removals] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert [r.value for r in found.removals] == pytest.approx([0.1, 0.1, 0.35, 0.1])
    # layers 1 and 2 turn back and forth: together they do little, though each alone turns most
    stream = states(0.0, 0.2, 0.5, 0.22, 0.4, 0.6)
    found = depth.blocks(by_states(stream, angular_distance), 5, remove=2)
    assert found.removed == (1, 2)
    assert min(found.removals, key=lambda r: r.value).value == pytest.approx(0.02)


def table(values: dict[tuple[int, ...], float]) -> depth_values.Compare:
    def compare(sets: Sequence[tuple[int, ...]], removed: Collection[int]) -> Compared:
        return Compared(tuple(values[tuple(sorted({*removed, *chosen}))] for chosen in sets), 1.0, 0.0)

    return compare


# Layers 0 and 1 stand in for each other: each alone is free to go, both are not.
REDUNDANT = {(0,): 1.0, (1,): 1.1, (2,): 2.0, (0, 1): 9.0, (0, 2): 3.0, (1, 2): 3.5}


def test_sleb_judges_each_layer_in_the_model_that_is_left() -> None:
    found = depth.greedy(table(REDUNDANT), 3, remove=2)
    assert found.removed == (0, 2)
    assert found.removals == tuple(Removal(layers, REDUNDANT[layers]) for layers in [(0,), (1,), (2,), (0, 1), (0, 2)])
    assert found.passes == 2.0


def test_shortened_llama_judges_each_layer_alone() -> None:
    found = depth.single(table(REDUNDANT), 3, remove=2)
    assert found.removed == (0, 1)
    assert found.passes == 1.0


def test_of_equals_the_later_layer_goes() -> None:
    same = table({(i,): 1.0 for i in range(4)} | {(i, 3): 1.0 for i in range(3)})
    assert depth.single(same, 4, remove=2).removed == (2, 3)
    assert depth.blocks(same, 4, remove=1).removed == (3,)
    assert depth.greedy(same, 4, remove=2).removed == (2, 3)


def test_taylor_adds_up(llama: Made, samples: Tensor) -> None:
    scores = random_scores(llama[1], 0)
    object.__setattr__(scores, "layer_scores", torch.tensor([3.0, 1.0, 4.0, 1.5, 0.5, 2.0]))
    about = {"criterion": "taylor", "micro_batch": 2, "seed": 0, "scores": scores}
    single = choose(*llama, samples, pattern="single", remove=2, **about)
    assert single.kept == (0, 2, 3, 5)
    block = choose(*llama, samples, pattern="block", remove=2, **about)
    assert [r.value for r in block.removals] == pytest.approx([4.0, 5.0, 5.5, 2.0, 2.5])
    assert block.kept == (0, 1, 2, 5)
    greedy = choose(*llama, samples, pattern="greedy", remove=2, **about)
    assert greedy.kept == single.kept
    assert greedy.removals[-1] == Removal((4, 5), 2.5)
    assert single.passes == greedy.passes == 0


def test_random_is_a_matter_of_the_seed(llama: Made, samples: Tensor) -> None:
    def kept(seed: int, pattern: Any = "single") -> tuple[int, ...]:
        about = {"criterion": "random", "remove": 3, "micro_batch": 2}
        return choose(*llama, samples, pattern=pattern, seed=seed, **about).kept

    assert kept(0) == kept(0)
    assert len({kept(seed) for seed in range(20)}) > 5
    assert len({kept(seed, "block") for seed in range(40)}) == 4
    assert len({kept(seed, "greedy") for seed in range(20)}) > 5


# ---- the default, files and errors


def test_the_default_is_what_a_plan_chooses(llama: Made, samples: Tensor) -> None:
    model, anatomy = llama
    statistics = taps.measure_activations(Calibration(model, anatomy, samples, 2))
    scores = statistics.scores(batch_agg="l2", seq_agg="mean", model="m", samples="s")
    for keep in range(1, LAYERS):
        planned = select(anatomy, anatomy.sizes.at(layers=keep), scores, gain="none").layers
        about = {"criterion": "bi", "pattern": "single", "remove": LAYERS - keep, "micro_batch": 2, "seed": 0}
        reused = choose(model, anatomy, samples, scores=scores, **about)
        assert reused.kept == planned
        assert reused.passes == 0
        own = choose(model, anatomy, samples, **about)
        assert own.kept == planned
        assert [r.value for r in own.removals] == pytest.approx(scores.layers.tolist(), rel=1e-5)
    tied = replace(scores, layers=torch.tensor([1.0, 0.5, 0.5, 2.0, 0.5, 0.7]))
    for keep in range(1, LAYERS):
        planned = select(anatomy, anatomy.sizes.at(layers=keep), tied, gain="none").layers
        about["remove"] = LAYERS - keep
        assert choose(model, anatomy, samples, scores=tied, **about).kept == planned


def test_scores_that_saw_no_tokens_are_not_taken_for_bi(llama: Made, samples: Tensor) -> None:
    about = {"criterion": "bi", "pattern": "single", "remove": 2, "micro_batch": 2, "seed": 0}
    drawn: Scores = random_scores(llama[1], 3)
    assert choose(*llama, samples, scores=drawn, **about) == choose(*llama, samples, **about)


def test_a_choice_survives_json(llama: Made, samples: Tensor) -> None:
    about = {"micro_batch": 4, "seed": 0, "remove": 2}
    for criterion, pattern in (("nll", "greedy"), ("bi", "block")):
        found = choose(*llama, samples, criterion=criterion, pattern=pattern, **about)
        assert DepthChoice.from_json(json.loads(json.dumps(found.to_json()))) == found


@pytest.mark.parametrize("micro_batch", [1, 3, 8])
@pytest.mark.parametrize("criterion", ["bi", "angular", "nll", "logit_mse"])
def test_micro_batches_do_not_matter(llama: Made, samples: Tensor, criterion: Any, micro_batch: int) -> None:
    about = {"criterion": criterion, "pattern": "greedy", "remove": 2, "seed": 0}
    one, other = (choose(*llama, samples, micro_batch=size, **about) for size in (2, micro_batch))
    assert [r.layers for r in one.removals] == [r.layers for r in other.removals]
    assert [r.value for r in one.removals] == pytest.approx([r.value for r in other.removals], rel=1e-6)
    assert one.passes == pytest.approx(other.passes)


@pytest.mark.parametrize("remove", [0, -1, 6, 7])
def test_removing_all_layers_or_none_is_an_error(llama: Made, samples: Tensor, remove: int) -> None:
    with pytest.raises(PlanError, match=f"cannot remove {remove} of 6 layers") as caught:
        choose(*llama, samples, criterion="bi", pattern="single", remove=remove, micro_batch=2, seed=0)
    assert "between 1 and 5" in caught.value.fix


@pytest.mark.parametrize(
    ("criterion", "error", "fix"),
    [("task", RecipeError, "score.depth_task"), ("taylor", RecipeError, "score.method: taylor")],
)
def test_what_a_criterion_needs(llama: Made, samples: Tensor, criterion: Any, error: Any, fix: str) -> None:
    with pytest.raises(error, match=f"depth: {criterion} needs") as caught:
        choose(*llama, samples, criterion=criterion, pattern="single", remove=1, micro_batch=2, seed=0)
    assert fix in caught.value.fix


@pytest.mark.parametrize("criterion", ["bi", "angular", "nll", "logit_mse"])
def test_no_samples_is_an_error(llama: Made, samples: Tensor, criterion: Any) -> None:
    with pytest.raises(CorpusError, match="no samples"):
        choose(*llama, samples[:0], criterion=criterion, pattern="single", remove=1, micro_batch=2, seed=0)


@pytest.mark.parametrize("criterion", ["bi", "angular", "nll", "logit_mse", "task"])
def test_values_that_are_not_finite_are_an_error(
    items: list[Item], tokenizer: PreTrainedTokenizerFast, criterion: Any
) -> None:
    anatomy = discover(config("llama", vocab_size=320))
    about = {"pattern": "single", "remove": 1, "micro_batch": 2, "seed": 0, "items": items, "tokenizer": tokenizer}
    bad = tokenizer(items[0].context)["input_ids"][0]
    model = random_twin(anatomy, seed=7)
    with torch.no_grad():
        model.model.embed_tokens.weight[bad] = math.nan  # a token that the first trial does not read
    with pytest.raises(CheckpointError, match="not finite") as caught:
        choose(model, anatomy, torch.full((2, 6), bad), criterion=criterion, **about)
    assert "calibration" in caught.value.why
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(CheckpointError, match="not finite") as caught:
        choose(model, anatomy, torch.full((2, 6), bad), criterion=criterion, **about)
    assert "float32" in caught.value.fix
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_removal_that_is_not_finite_is_named(llama: Made, samples: Tensor) -> None:
    values = torch.tensor([1.0, math.inf])
    with pytest.raises(CheckpointError, match="without layers 3, 4 the logits are not finite"):
        depth_values.finite_values(values, [(0,), (3, 4)])
