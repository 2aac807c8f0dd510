"""FLOPs a token: the same figures for the dry run, for a step's utilization and for the cost of a cut."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from families import config

from halve.anatomy import Anatomy, configs, discover
from halve.anatomy.work import Costed, by_context, correcting, distilling, learning
from halve.recipe.schema import Correct, Distill

CONTEXT = 24


def test_work_of_training_counts_both_models_and_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = discover(config("llama", intermediate_size=64)), discover(config("llama"))
    assert student.sizes != teacher.sizes

    def unasked(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a step may build no model to count its work")

    monkeypatch.setattr(configs, "build", unasked)

    def forward(anatomy: Anatomy, context: int = CONTEXT) -> int:
        return anatomy.ledger.count(anatomy.sizes, context=context).flops_per_token

    def work(**keys: Any) -> float:
        return by_context(partial(distilling, training=Distill(tokens=1, **keys)), student, teacher)(CONTEXT)

    def corrected(**keys: Any) -> float:
        return by_context(partial(correcting, section=Correct(tokens=1, **keys)), teacher)(CONTEXT)

    assert by_context(learning, student)(CONTEXT) == 3 * forward(student)
    assert work() == 3 * forward(student) + forward(teacher)
    assert corrected() == 3 * forward(teacher)
    assert corrected(method="norms") == 3 * forward(teacher) - forward(teacher, 0)
    assert work(cache="hidden") == 3 * forward(student) + 2 * teacher.sizes.vocab * teacher.sizes.hidden
    assert work(cache="logits") == 3 * forward(student)


def test_parts_add_up_and_attention_alone_grows_with_the_context() -> None:
    anatomy = discover(config("llama"))
    short, long = (Costed.of(anatomy, context) for context in (CONTEXT, 2 * CONTEXT))
    for model in (short, long):
        assert model.body + model.head == model.matrices + model.attention == model.whole
    assert long.matrices == short.matrices
    assert long.attention == 2 * short.attention > 0
    fewer = Costed(anatomy, anatomy.sizes.at(layers=2), CONTEXT, (0, 1))
    assert fewer.whole == short.at(anatomy.sizes.at(layers=2)).whole < short.whole
