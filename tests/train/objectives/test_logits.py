"""Objectives on whole models: each term against autograd through the model's own logits, in float64.

Shapes: B batch, S seq, N tokens, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import families
import pytest
import torch
from plain_losses import TERMS, K, soft
from pydantic import ValidationError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from halve.model.head import split
from halve.recipe.schema import Distill, Intermediate
from halve.text.batch import Batch
from halve.train.loop.step import Trained, gradients
from halve.train.losses import divergences
from halve.train.losses.divergences import Sampled
from halve.train.objectives import intermediate
from halve.train.objectives import logits as objectives
from halve.train.teachers.live import Live

B, S, V = 4, 7, 128
F64 = torch.float64
NORMS = {"rtol": 1e-4, "atol": 1e-6}  # these models take their norms in float32, whatever their weights
KEYS: dict[str, dict[str, Any]] = {
    "kl": {},
    "reverse_kl": {"objective": "reverse_kl"},
    "jsd 0.1": {"objective": "jsd", "beta": 0.1},
    "jsd 0.5": {"objective": "jsd"},
    "jsd 0.9": {"objective": "jsd", "beta": 0.9},
    "top_k": {"top_k": K},
    "top_k_tail": {"top_k": K, "top_k_tail": True},
    "mse": {"objective": "mse"},
    "cosine": {"objective": "cosine"},
}


def model(family: str, *, seed: int, layers: int = 2) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = families.config(family, num_hidden_layers=layers, initializer_range=0.2)
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=F64, attn_implementation="eager")
    return made.eval()


def samples(seed: int = 0, num: int = B) -> Batch:
    ids_BS = torch.randint(V, (num, S), generator=torch.Generator().manual_seed(seed))
    return Batch(ids_BS, tuple(range(num)))


def section(**keys: Any) -> Distill:
    return Distill(tokens=1000, **keys)


def built(training: Distill, teacher: PreTrainedModel) -> objectives.Objective:
    terms = objectives.teacher_terms(training)
    return objectives.distillation(Live(*split(teacher)), vocab=V, terms=terms, ce=training.terms.get("ce", 0.0))


def flat(logits_BSV: Tensor) -> Tensor:
    return logits_BSV[:, :-1].flatten(0, 1)


def assert_plain(student: PreTrainedModel, have: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(have, want, **NORMS)
    parameters = list(student.parameters())
    ours, theirs = (torch.autograd.grad(loss, parameters) for loss in (have, want))
    for mine, plain in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, plain, **NORMS)


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "phi"])
def test_a_term_of_the_recipe_is_the_plain_formula_on_whole_models(family: str, name: str) -> None:
    """Untied; tied with a soft-cap; with a scale; with a bias."""
    student, teacher, batch = model(family, seed=0), model(family, seed=1), samples()
    loss, count = built(section(**KEYS[name]), teacher)(*split(student), batch)
    assert count == B * (S - 1)
    with torch.no_grad():
        known_NV = flat(teacher(batch.ids).logits)
    assert_plain(student, loss, TERMS[name][1](flat(student(batch.ids).logits), known_NV).sum())


def test_the_recipe_weighs_and_warms_its_terms() -> None:
    student, teacher, batch = model("llama", seed=0), model("llama", seed=1), samples()
    weights = {"kl": 0.5, "cosine": 2.0, "jsd": 0.7, "ce": 0.25}
    training = section(objective=weights, temperature=2.0, beta=0.3)
    loss, _ = built(training, teacher)(*split(student), batch)
    logits_NV = flat(student(batch.ids).logits)
    with torch.no_grad():
        known_NV = flat(teacher(batch.ids).logits)
    jsd = partial(TERMS["jsd 0.5"][1].func, beta=0.3, temperature=2.0)  # type: ignore[attr-defined]
    parts = {
        "kl": TERMS["kl"][1](logits_NV, known_NV, temperature=2.0),  # type: ignore[call-arg]
        "cosine": TERMS["cosine"][1](logits_NV, known_NV),
        "jsd": jsd(logits_NV, known_NV),
        "ce": torch.nn.functional.cross_entropy(logits_NV, batch.labels(), reduction="none"),
    }
    assert_plain(student, loss, sum(weights[name] * part.sum() for name, part in parts.items()))


def test_draws_of_everything_are_the_teacher_itself() -> None:
    """A teacher of whom draws are known: here every token, as often as it is likely."""
    student, teacher, batch = model("llama", seed=0), model("llama", seed=1), samples()

    class Drawn:
        def answer(self, batch: Batch) -> Sampled:
            with torch.no_grad():
                p_NV = soft(flat(teacher(batch.ids).logits), 2.0)
            return Sampled(torch.arange(V).expand(p_NV.shape), p_NV, -(p_NV * p_NV.log()).sum(-1))

    have, count = objectives.distillation_from_draws(Drawn(), vocab=V, kl=0.8, temperature=2.0, ce=0.3)(
        *split(student), batch
    )
    want, same = built(section(objective={"kl": 0.8, "ce": 0.3}, temperature=2.0), teacher)(*split(student), batch)
    assert count == same
    assert_plain(student, have, want)


def accumulated(
    make: Callable[[PreTrainedModel, PreTrainedModel], tuple[objectives.Objective, torch.nn.Module | None]],
) -> list[tuple[Any, list[Tensor]]]:
    found = []
    for size in (8, 1):
        student, teacher = model("llama", seed=0), model("llama", seed=1, layers=3).requires_grad_(False)
        objective, extra = make(student, teacher)
        modules = {"student": student} | ({} if extra is None else {"extra": extra})
        trained = Trained(modules, torch.optim.SGD(student.parameters()))
        halves = split(student)
        step = gradients(trained, lambda part: objective(*halves, part), samples(num=8).split(size))  # noqa: B023
        found.append(((step.loss, step.norm, step.count), [grad.clone() for grad in trained.gradients()]))
    return found


@pytest.mark.parametrize("name", [*TERMS, "sum"])
def test_accumulation_1_is_8(name: str) -> None:
    keys = KEYS[name] if name != "sum" else {"objective": {"kl": 0.5, "mse": 0.1, "ce": 0.2}}
    (whole, want), (parts, have) = accumulated(lambda _, teacher: (built(section(**keys), teacher), None))
    assert parts == pytest.approx(whole, rel=1e-9)
    torch.testing.assert_close(have, want, **NORMS)


def test_accumulation_1_is_8_with_intermediate_states() -> None:
    states = Intermediate(states=("embedding", "input", "output", "attention"), alpha=0.7)

    def make(student: PreTrainedModel, teacher: PreTrainedModel) -> tuple[objectives.Objective, torch.nn.Module | None]:
        matching = intermediate.match(student, teacher, states=states.states, layers=states.layers, seed=0)
        plain = built(section(), teacher)
        return intermediate.with_states(plain, matching, alpha=states.alpha), matching.map

    (whole, want), (parts, have) = accumulated(make)
    assert parts == pytest.approx(whole, rel=1e-9)
    torch.testing.assert_close(have, want, **NORMS)
    assert len(have) == len(list(model("llama", seed=0).parameters())) + 1  # the map's too


@pytest.mark.parametrize("name", [name for name in TERMS if name != "top_k"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(name: str) -> None:
    twin = model("gemma2", seed=0)
    loss, _ = built(section(**KEYS[name]), model("gemma2", seed=0))(*split(twin), samples())
    assert loss == 0
    loss.backward()
    assert not any(parameter.grad.any() for parameter in twin.parameters() if parameter.grad is not None)


def test_cross_entropy_alone_asks_no_teacher() -> None:
    assert objectives.teacher_terms(section(objective="ce")) == []
    assert section().terms == {"kl": 1.0}
    assert objectives.teacher_terms(section())[0][1].func is divergences.kl_rows  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"objective": {"ce": 0.5}}, "a sum with only ce"),
        ({"objective": "mse", "top_k": 5}, "top_k applies to the term kl"),
        ({"top_k_tail": True}, "give top_k"),
        ({"objective": {"kl": 1.0, "jsd": 1.0}, "cache": "logits"}, "only kl over all tokens"),
        ({"top_k": 5, "cache": "logits"}, "only kl over all tokens"),
        ({"intermediate": {}, "cache": "hidden"}, "needs a running teacher"),
        ({"intermediate": {}, "objective": "ce"}, "needs a running teacher"),
        ({"intermediate": {}, "compile": True}, "needs a running teacher"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        section(**keys)
