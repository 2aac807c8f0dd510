"""Intermediate states: what is heard, how it is compared, and that it is trained like every other loss.

Shapes: B batch, S seq, D hidden, H heads, E head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import families
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from halve.errors import RecipeError, TrainError
from halve.model.head import split
from halve.preflight import check as preflight
from halve.recipe.schema import Recipe
from halve.text.batch import Batch
from halve.train.losses.relations import relation_divergence
from halve.train.objectives import intermediate
from halve.train.objectives import logits as objectives
from halve.train.ranks import blocks
from halve.train.teachers import live as teachers
from halve.train.teachers.live import Live

VOCAB, B, S = 37, 3, 10
F64 = torch.float64
NORMS = {"rtol": 1e-3, "atol": 1e-5}  # a llama takes its norms in float32, whatever its weights


def llama(seed: int = 0, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "initializer_range": 0.3,
    }
    model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**(sizes | changes))).to(F64).eval()
    with torch.no_grad():  # gains of one would hide where a state was taken
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def teacher() -> PreTrainedModel:
    return llama(1, hidden_size=24, num_attention_heads=6, num_hidden_layers=5).requires_grad_(False)


def batch(*, apart: bool = False, seed: int = 0) -> Batch:
    ids_BS = torch.randint(VOCAB, (B, S), generator=torch.Generator().manual_seed(seed))
    positions_BS = torch.cat([torch.arange(4), torch.arange(S - 4)]).expand(B, S) if apart else None
    return Batch(ids_BS, tuple(range(B)), positions_BS)


def read(model: PreTrainedModel, layer: int, ids_BS: Tensor) -> Tensor:
    """What a layer of a llama reads, the plain way: the stream of `output_hidden_states`, normed."""
    streams = model(ids_BS, output_hidden_states=True).hidden_states
    layers = model.model.layers
    return streams[-1] if layer == len(layers) else layers[layer].input_layernorm(streams[layer])


def heard(matching: intermediate.Matching, model: PreTrainedModel, who: str, ids_BS: Tensor) -> list[Tensor]:
    with intermediate.recorded([getattr(pair, who) for pair in matching.pairs]) as states:
        model(ids_BS)
    return states


@pytest.mark.parametrize(
    ("state", "layers", "mine", "its"),
    [
        ("embedding", None, 0, 0),
        ("input", None, 1, 3),
        ("output", None, 2, 4),
        ("input", {0: 0}, 0, 0),
        ("output", {-1: -1}, 3, 5),
        ("output", {1: 2}, 3, 2),
    ],
)
def test_states_are_heard_after_the_norms(state: Any, layers: Any, mine: int, its: int) -> None:
    student, master, ids_BS = llama(), teacher(), batch().ids
    matching = intermediate.match(student, master, states=[state], layers=layers, seed=0)
    (have,) = heard(matching, student, "student", ids_BS)
    torch.testing.assert_close(have, read(student, mine, ids_BS))
    (have,) = heard(matching, master, "teacher", ids_BS)
    torch.testing.assert_close(have, read(master, its, ids_BS))


@pytest.mark.parametrize("apart", [False, True])
def test_the_loss_of_states_is_the_plain_formula(apart: bool) -> None:
    student, master, one = llama(), teacher(), batch(apart=apart)
    matching = intermediate.match(
        student, master, states=["embedding", "input", "output"], layers={3: 1, -1: -1}, seed=0
    )
    assert matching.map is not None
    learned, taught = (
        heard(matching, model, who, one.ids) for model, who in ((student, "student"), (master, "teacher"))
    )
    want, counted = torch.zeros((), dtype=F64), 0
    for mine, its in ((0, 0), (1, 3), (2, 4), (2, 4), (3, 5)):
        state_BSD, known_BSD = read(student, mine, one.ids), read(master, its, one.ids)
        for row in range(B):
            for place in range(S - 1):
                if not (apart and place == 3):  # there the next token begins another document
                    difference = state_BSD[row, place] @ matching.map.weight.T - known_BSD[row, place]
                    want, counted = want + difference.square().mean(), counted + 1
    assert counted == 5 * B * (S - 1 - apart)
    have = matching.loss(learned, taught, one)
    torch.testing.assert_close(have, want)
    parameters = [student.model.embed_tokens.weight, student.model.layers[1].mlp.up_proj.weight, matching.map.weight]
    for ours, theirs in zip(torch.autograd.grad(have, parameters), torch.autograd.grad(want, parameters), strict=True):
        torch.testing.assert_close(ours, theirs, **NORMS)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox", "gpt2"])
def test_queries_keys_and_values_are_found_in_every_layout(family: str) -> None:
    """The relations of the three, whatever module makes them, against those taken from the attention's own call."""
    torch.manual_seed(0)
    student, master = (
        AutoModelForCausalLM.from_config(families.config(family), dtype=F64, attn_implementation="eager").eval()
        for _ in range(2)
    )
    matching = intermediate.match(student, master, states=["attention"], layers={3: 2}, seed=0)
    assert matching.map is None
    one = Batch(torch.randint(128, (2, S), generator=torch.Generator().manual_seed(1)), (0, 1))
    learned, taught = heard(matching, student, "student", one.ids), heard(matching, master, "teacher", one.ids)
    have = matching.loss(learned, taught, one)
    seen = {"documents": torch.zeros(2, S, dtype=torch.int64), "counted": torch.arange(S).expand(2, S) < S - 1}
    want = torch.zeros((), dtype=F64)
    for mine, its in zip(vectors(family, student, 2, one.ids), vectors(family, master, 3, one.ids), strict=True):
        want = want + relation_divergence(mine, its, **seen)
    torch.testing.assert_close(have, want)
    assert have > 0


def vectors(family: str, model: PreTrainedModel, layer: int, ids_BS: Tensor) -> list[Tensor]:
    """Queries, keys and values [batch, seq, heads, head_dim], as the family's own code takes them apart."""
    names = {"llama": ("q_proj", "k_proj", "v_proj"), "phi3": ("qkv_proj",), "gpt_neox": ("query_key_value",)}
    block = model.base_model.get_submodule(f"{'h' if family == 'gpt2' else 'layers'}.{layer}")
    attention = (
        block.self_attn if hasattr(block, "self_attn") else getattr(block, "attention", getattr(block, "attn", None))
    )
    outputs: list[Tensor] = []
    modules = [getattr(attention, name) for name in names.get(family, ("c_attn",))]
    hooks = [module.register_forward_hook(lambda _m, _a, output: outputs.append(output)) for module in modules]
    model(ids_BS)
    for hook in hooks:
        hook.remove()
    heads, groups = 6, 6 if family in families.NO_GROUPS else 3
    if family == "gpt_neox":
        return list(outputs[0].view(*ids_BS.shape, heads, -1).chunk(3, dim=-1))
    if family == "gpt2":
        return [part.view(*ids_BS.shape, heads, -1) for part in outputs[0].split(96, dim=2)]
    parts = outputs if family == "llama" else list(outputs[0].split([120, 60, 60], dim=-1))
    return [part.view(*ids_BS.shape, num, -1) for part, num in zip(parts, (heads, groups, groups), strict=True)]


@pytest.mark.parametrize("family", [*families.PROVED, *families.ALSO])
def test_every_family_has_its_states(family: str) -> None:
    torch.manual_seed(0)
    config = families.config(family)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    states = ["embedding", "input", "output", "attention"]
    matching = intermediate.match(model, model, states=states, layers={-1: -1, 1: 1}, seed=0)
    one = Batch(torch.randint(128, (2, S), generator=torch.Generator().manual_seed(1)), (0, 1))
    learned = heard(matching, model, "student", one.ids)
    assert {tuple(state.shape[:2]) for state in learned} == {(2, S)}
    assert matching.loss(learned, learned, one) == 0  # the map between equal widths starts as the identity


def objective(master: PreTrainedModel, matching: intermediate.Matching, alpha: float | None) -> objectives.Objective:
    plain = objectives.distillation(Live(*split(master)), vocab=VOCAB)
    return intermediate.with_states(plain, matching, alpha=alpha)


STATES = ("embedding", "input", "output", "attention")


def test_a_fixed_weight_adds_and_a_dynamic_one_balances() -> None:
    student, master, one = llama(), teacher(), batch()
    matching = intermediate.match(student, master, states=STATES, layers=None, seed=0)
    body, head = split(student)
    logits, count = objectives.distillation(Live(*split(master)), vocab=VOCAB)(body, head, one)
    states = matching.loss(
        heard(matching, student, "student", one.ids), heard(matching, master, "teacher", one.ids), one
    )
    weights = list(student.parameters()) + list(matching.map.parameters())
    with_grad = [torch.autograd.grad(part, weights, allow_unused=True) for part in (logits, states)]
    for alpha in (0.3, None):
        loss, tokens = objective(master, matching, alpha)(body, head, one)
        factor = 0.3 if alpha else float(logits.detach() / states.detach())
        assert tokens == count
        torch.testing.assert_close(loss, logits + factor * states)
        for have, first, second in zip(torch.autograd.grad(loss, weights), *with_grad, strict=True):
            want = factor * second if first is None else first if second is None else first + factor * second
            torch.testing.assert_close(have, want, **NORMS)


def test_a_student_that_matches_exactly_weighs_nothing() -> None:
    master = teacher()
    twin = teacher()
    matching = intermediate.match(twin, master, states=STATES, layers=None, seed=0)
    loss, _ = objective(master, matching, None)(*split(twin), batch())
    assert loss == 0


def test_accumulation_changes_nothing() -> None:
    student, master, one = llama(), teacher(), batch()
    matching = intermediate.match(student, master, states=STATES, layers=None, seed=0)
    found = []
    for size in (B, 1):
        student.zero_grad()
        matching.map.zero_grad()
        parts = [objective(master, matching, 0.7)(*split(student), part) for part in one.split(size)]
        for loss, _ in parts:
            loss.backward()
        grads = [p.grad.clone() for p in [*student.parameters(), *matching.map.parameters()]]
        found.append([sum(loss.detach() for loss, _ in parts), *grads])
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_layers_computed_again_are_heard_once(kind: str) -> None:
    found = []
    for again in ("none", kind):
        student, master, one = llama(), teacher(), batch()
        matching = intermediate.match(student, master, states=STATES, layers=None, seed=0)
        blocks.recompute(student, again)
        loss, _ = objective(master, matching, 0.7)(*split(student), one)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in student.parameters())])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again)


def test_the_teacher_gets_no_gradient_and_inference_mode_is_enough() -> None:
    student, master = llama(), teacher().requires_grad_(True)
    matching = intermediate.match(student, master, states=STATES, layers=None, seed=0)
    objective(master, matching, None)(*split(student), batch())[0].backward()
    assert all(parameter.grad is None for parameter in master.parameters())
    assert student.model.embed_tokens.weight.grad is not None


def test_the_map_starts_as_an_isometry() -> None:
    student, master = llama(), teacher()
    for seed in (0, 1):
        one, other = (
            intermediate.match(student, master, states=["output"], layers=None, seed=seed).map for _ in range(2)
        )
        assert isinstance(one, nn.Linear)
        assert torch.equal(one.weight, other.weight)
        torch.testing.assert_close(one.weight.T @ one.weight, torch.eye(16, dtype=F64))


@pytest.mark.parametrize("layers", [{5: 0}, {0: 3}, {-6: 0}, {0: -4}])
def test_a_layer_that_is_not_there_is_refused(layers: dict[int, int]) -> None:
    with pytest.raises(RecipeError, match="names the"):
        intermediate.layer_pairs(layers, teacher=5, student=3)


def test_layers_of_two_kinds_are_refused() -> None:
    torch.manual_seed(0)
    fused = AutoModelForCausalLM.from_config(families.config("phi3")).eval()
    with pytest.raises(TrainError, match="cannot be compared"):
        intermediate.match(llama(), fused, states=["attention"], layers=None, seed=0)


@pytest.mark.parametrize(
    ("layers", "who"),
    [(None, None), ({3: 2}, None), ({4: 0}, "the teacher's layer 4"), ({0: 3}, "the student's layer 3")],
)
def test_layers_are_checked_before_weights_load(
    layers: Any, who: str | None, make_recipe: Callable[..., Recipe]
) -> None:
    recipe = make_recipe(distill={"tokens": 1000, "intermediate": {"layers": layers}})
    found = preflight.check(recipe)
    assert (who is None and not found) or (who is not None and len(found) == 1 and who in str(found[0]))


def test_a_further_round_may_learn_from_the_last_student(make_recipe: Callable[..., Recipe]) -> None:
    section = {"tokens": 1000, "intermediate": {"layers": {3: 1}}}
    then = {"prune": {"layers": 2}, "distill": section}
    assert preflight.check(make_recipe(distill=section, then=[then])) == ()
    (error,) = preflight.check(make_recipe(distill=section, then=[then | {"teacher": "previous"}]))
    assert "the teacher has 3 layers" in str(error)


@pytest.mark.parametrize("where", ["offloaded", "away"])
def test_a_teacher_that_runs_elsewhere_is_heard(where: str) -> None:
    losses = []
    for place in ("here", where):
        student, master = llama(), teacher()
        matching = intermediate.match(student, master, states=STATES, layers=None, seed=0)
        if place == "offloaded":
            teachers.visiting(master, "cpu", fetch=torch.clone)
        body, head = split(master)
        answers = Live(teachers.away(body, place="cpu", half=False) if place == "away" else body, head)
        plain = objectives.distillation(answers, vocab=VOCAB)
        loss, _ = intermediate.with_states(plain, matching, alpha=0.7)(*split(student), batch())
        losses.append(loss)
    assert losses[0] == losses[1]
