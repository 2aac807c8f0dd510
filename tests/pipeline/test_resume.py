"""A run that is killed, at any moment and any number of times, ends with the bits of one that was not.

Kills are real: resume_driver forks a process for every run, puts points into functions of the standard
library, torch and halve, and sends itself SIGKILL at one of them. halve has no hook for this.
"""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from halve.recipe.schema import Recipe

MakeRecipe = Callable[..., Recipe]
TRAINING: dict[str, Any] = {
    "tokens": 960,
    "batch": 4,
    "warmup_steps": 2,
    "eval_every": 3,
    "eval_samples": 4,
    "checkpoint_every": 4,
    # five steps of 128 tokens, then five of 64: the checkpoints lie before and after
    "phases": [{"from_tokens": 640, "context": 16, "lr": 5e-5}],
}
KILLED = -9
MOMENTS = 6


class Driver:
    """A running resume_driver; `run` gives its answer."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def run(self, out: Path, **job: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps({"out": str(out), **job}), file=self.process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer


@pytest.fixture(scope="module")
def driver(make_recipe: MakeRecipe, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    few = tmp_path_factory.mktemp("few") / "train.txt"  # less than a training reads: it is killed in later epochs too
    few.write_text((corpus / "train.txt").read_text()[:1300])
    recipe = make_recipe(
        data={"train": [str(few)], "valid": [str(corpus / "valid.txt")], "context": 32},
        correct=TRAINING,
        prune={"hidden": 24, "ffn": 40, "layers": 3},
        distill={**TRAINING, "baselines": ["random_init"]},
    )
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    command = [sys.executable, str(Path(__file__).with_name("resume_driver.py")), str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Driver(process)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait() == 0


@pytest.fixture(scope="module")
def whole(driver: Driver, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], dict[str, Any]]:
    """The artifacts of a run that nobody kills, and what the driver said of it."""
    out = tmp_path_factory.mktemp("whole") / "run"
    answer = driver.run(out)
    assert answer["status"] == 0
    return artifacts(out), answer


def artifacts(run: Path) -> dict[str, str]:
    """The SHA-256 of every file that holds numbers a run computed: weights, scores, plans and tokens."""
    kinds = (".safetensors", ".tokens", "plan.json", "config.json")
    return {
        path.relative_to(run).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(run.rglob("*"))
        if path.name.endswith(kinds)
    }


def losses(run: Path, stage: str) -> list[tuple[int, float | None]]:
    lines = [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line.get("loss")) for line in lines]


def assert_same(run: Path, whole: dict[str, str]) -> None:
    found = artifacts(run)
    assert found == whole
    assert {"correct", "prune", "distill", "distill-random_init"} <= {name.partition("/")[0] for name in found}
    leftovers = [p.name for p in run.rglob(".*") if p.name != ".lock"]
    assert leftovers == []


def test_a_run_passes_every_kind_of_point(whole: tuple[dict[str, str], dict[str, Any]]) -> None:
    points = whole[1]["points"]
    assert points["step"] == points["stepped"] == 3 * 10
    assert points["commit"] == points["committed"] == 7
    assert points["write"] > 30
    assert points["rename"] == points["renamed"] > 30


@pytest.mark.parametrize("point", ["write", "rename", "committed", "step"])
def test_killed_at_points_again_and_again(
    driver: Driver, whole: tuple[dict[str, str], dict[str, Any]], tmp_path: Path, point: str
) -> None:
    """One folder is killed several times over, each time a little further, and then left in peace."""
    stride = max(1, whole[1]["points"][point] // 7)
    kills = 0
    while (answer := driver.run(tmp_path / "run", point=point, at=stride * (kills + 1)))["status"] == KILLED:
        kills += 1
        assert answer["points"][point] == stride * kills
    assert answer["status"] == 0
    assert kills >= 3
    assert_same(tmp_path / "run", whole[0])


def test_a_kill_loses_what_came_after_the_last_complete_checkpoint(
    driver: Driver, whole: tuple[dict[str, str], dict[str, Any]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert driver.run(run, point="stepped", at=9)["status"] == KILLED  # of 10; checkpoints after 4 and 8
    last = max((run / ".correct.work" / ".checkpoints").glob("step-*")).name  # that after 8 may not have been complete
    assert last in ("step-00000004", "step-00000008")
    answer = driver.run(run)
    assert answer["status"] == 0
    lengthless = 1  # it makes the optimizer's state, which the checkpoint fills
    assert answer["points"]["step"] == 30 - int(last.removeprefix("step-")) + lengthless
    assert_same(run, whole[0])
    assert [step for step, _ in losses(run, "correct")] == list(range(11))


@pytest.mark.parametrize("number", range(MOMENTS))
def test_killed_at_a_random_moment(
    driver: Driver, whole: tuple[dict[str, str], dict[str, Any]], tmp_path: Path, number: int
) -> None:
    """Moments spread over the time that a whole run takes, each drawn within its share."""
    moment = (number + random.Random(number).random()) / MOMENTS * whole[1]["seconds"]
    first = driver.run(tmp_path / "run", after_s=moment)
    assert first["status"] in (KILLED, 0)
    if first["status"] == KILLED:
        assert driver.run(tmp_path / "run")["status"] == 0
    assert_same(tmp_path / "run", whole[0])


def test_a_finished_run_does_nothing(
    driver: Driver, whole: tuple[dict[str, str], dict[str, Any]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert driver.run(run)["status"] == 0
    before = {path: path.stat().st_mtime_ns for path in run.glob("*/**/*")}
    answer = driver.run(run)
    assert answer["status"] == 0
    assert set(answer["points"]) <= {"write", "rename", "renamed"}  # the recipe is noted again
    assert {path: path.stat().st_mtime_ns for path in run.glob("*/**/*")} == before
