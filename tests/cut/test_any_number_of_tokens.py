"""Random cuts of the demo's teacher, on 64 to 65,536 calibration tokens: other text tells none from a worse cut.

The suite tries one of them, `make cuts` twenty.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from halve.cut.apply import Goal, Turned, cut, plainly, turn
from halve.cut.score import width
from halve.cut.score.calibration import Calibration
from halve.cut.score.scores import Scores
from halve.demo.run import TEACHER, make_recipe
from halve.model.checkpoint import Checkpoint
from halve.model.reference import Reference
from halve.recipe.schema import Prune, Recipe
from halve.text import corpus
from halve.text.conversation_samples import samples_of
from halve.text.mixture import open_mixture

CONTEXTS, MICRO_BATCH = (64, 128, 256), 16
COMPARED = 4_096
"""Tokens on which the refit student and the plain cut are compared."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return make_recipe(tmp_path_factory.mktemp("texts"), long=False, corpus=None)


@pytest.fixture(scope="module")
def teacher() -> Checkpoint:
    return Checkpoint.open(TEACHER)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "number" in metafunc.fixturenames:
        metafunc.parametrize("number", range(metafunc.config.getoption("cuts")))


def test_a_cut_is_never_worse_than_the_plain_one(
    number: int, recipe: Recipe, teacher: Checkpoint, tmp_path: Path
) -> None:
    draw, before = Random(number), teacher.anatomy.sizes
    sizes = {
        "ffn": before.ffn - 4 * draw.randint(1, before.ffn // 8),
        "hidden": before.hidden - 4 * draw.randint(0, before.hidden // 16),
        "layers": before.layers - draw.randint(0, before.layers // 4),
    }
    tokens, context = round(2 ** draw.uniform(6, 16)), draw.choice(CONTEXTS)
    prune, after = Prune(**sizes, refit_tokens=tokens), before.at(**sizes)
    read = recipe.model_copy(update={"data": recipe.data.model_copy(update={"context": context})})
    model = teacher.load(dtype="float32").requires_grad_(False)
    samples_BS = open_mixture(read, cache=tmp_path, tokenizer=teacher.tokenizer).calibration(
        -(-max(tokens, 64 * context) // context) + COMPARED // context + 8
    )
    calibration = Calibration(model, teacher.anatomy, samples_BS, MICRO_BATCH)
    scores = _scores(calibration.first(64))
    turned = turn(calibration, prune, sizes=[after])
    ours = cut(calibration, scores, prune, Goal(after), turned=turned)
    unturned = Turned(model, teacher.anatomy, None)
    plain = cut(calibration, scores, plainly(prune), Goal(after), turned=unturned)
    valid = corpus.open_split(recipe, "valid", cache=tmp_path, tokenizer=teacher.tokenizer)
    reference = Reference(model, samples_of(valid, 256, 0).heldout(64).ids, micro_batch=MICRO_BATCH)
    gaps = reference.divergences(ours.student) - reference.divergences(plain.student)
    error = float(gaps.std()) / len(gaps) ** 0.5
    told = f"{sizes}, {tokens} tokens of {context}: {float(gaps.mean()):.4f} ± {error:.4f} nats, {ours.figures}"
    print(told)
    assert float(gaps.mean()) <= 2 * error, told


def _scores(calibration: Calibration) -> Scores:
    found = width.score(
        calibration,
        method="activation",
        ffn_point="down_input",
        batch_agg="l2",
        seq_agg="mean",
        seed=0,
        model_fingerprint="",
        samples_fingerprint="",
    )
    return replace(found, statistics=None)
