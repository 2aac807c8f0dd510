"""Whatever is wrong with an input, halve says so in three lines, early, and leaves nothing half-done.

Each case spoils a sound world at random, from the seed in its name, and calls `halve check`; where that finds nothing,
`halve run`. A few cases of every area are part of the suite, `make fuzz` goes through many.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from random import Random

import forked
import pytest
from forked import Outcome
from fuzz import conversations, verdicts, world

from halve.errors import HalveError
from halve.recipe import read as reading
from halve.recipe.schema import Recipe

RUN = ["recipe.yaml", "--out", "run"]
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="cases are forks")


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, corpus: Path) -> Path:
    """A world in which nothing is wrong, with a finished run."""
    folder = tmp_path_factory.mktemp("world") / "world"
    folder.mkdir()
    world.build(folder, model=tiny_llama, corpus=corpus)
    _import_all()
    outcome = forked.halve(["run", *RUN, "--quiet"], folder=folder, limit=600)
    assert list(verdicts.of_a_run(outcome, folder / "run")) == [], outcome.err
    return folder


def _import_all() -> None:
    """What a run imports, once, before the forks."""
    import torch._dynamo  # noqa: F401  by the first optimizer of a process

    from halve.stages import cache, correct, distill, evaluate, prune, score  # noqa: F401


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "number" in metafunc.fixturenames:
        cases = metafunc.config.getoption("cases")
        numbers = [(area, number) for area in world.AREAS for number in range(cases)]
        metafunc.parametrize(("area", "number"), numbers)


@pytest.mark.parametrize("chat", [False, True])
def test_nothing_is_wrong_with_a_sound_world(chat: bool, sound: Path, tmp_path: Path) -> None:
    folder = _copy(sound, tmp_path / "case", finished=False)
    if chat:
        conversations.sound(folder, Random(0))
    outcome = forked.halve(["check", *RUN], folder=folder, limit=60)
    assert list(verdicts.of_a_check(outcome, folder / "run", [])) == []
    assert outcome.code == 0, outcome.err


def test_a_spoiled_world(sound: Path, tmp_path: Path, area: str, number: int, limit: float) -> None:
    draw = Random(f"{area} {number}")
    folder = _copy(sound, tmp_path / "case", finished=world.AREAS[area].finished)
    world.AREAS[area].spoil(folder, draw)
    before = verdicts.listing(folder / "run")
    outcome = forked.halve(["check", *RUN], folder=folder, limit=limit)
    broken = [*verdicts.of_a_check(outcome, folder / "run", before)]
    assert not broken, _told("check", broken, outcome)
    if outcome.code == 0 and _affordable(folder):
        outcome = forked.halve(["run", *RUN, "--quiet"], folder=folder, limit=limit)
        broken = [*verdicts.of_a_run(outcome, folder / "run")]
        if outcome.code == 0 and world.AREAS[area].finished:
            broken += _other_figures(folder, sound)
        assert not broken, _told("run", broken, outcome)
    shutil.rmtree(folder)


def _copy(sound: Path, folder: Path, *, finished: bool) -> Path:
    shutil.copytree(sound, folder, ignore=None if finished else shutil.ignore_patterns("run"))
    return folder


def _affordable(folder: Path) -> bool:
    """Whether a recipe that is in order asks for no more work than a test has time for."""
    with contextlib.suppress(HalveError):
        return _work(reading.load_recipe(folder / "recipe.yaml")) < 50_000
    return False


def _work(recipe: Recipe) -> int:
    trainings = [recipe.correct, recipe.distill, *(step.distill for step in recipe.then)]
    trained = sum(
        max(training.tokens, training.batch * recipe.data.context) * (1 + len(getattr(training, "baselines", ())))
        for training in trainings
        if training is not None
    )
    return trained + 100 * recipe.evaluate.completion_tokens + 2_000 * recipe.prune.steps


def _other_figures(folder: Path, sound: Path) -> list[str]:
    """A run that goes on from files that were changed gives the figures that it gave before, or none."""
    now, then = (
        verdicts.headline(json.loads((one / "run" / "evaluate" / "results.json").read_text(encoding="utf-8")))
        for one in (folder, sound)
    )
    return [] if now == then else [f"measured {now} where nothing changed gives {then}"]


def _told(verb: str, broken: list[str], outcome: Outcome) -> str:
    return f"halve {verb} " + " and ".join(broken) + f"\n{outcome.err[-6000:]}"
