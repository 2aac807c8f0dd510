"""Several ranks compute what one computes, and survive what befalls one of them.

Ranks are real processes that talk with gloo over the loopback; ranks_driver forks them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from halve.errors import RunError, TrainError
from halve.recipe.schema import Training
from halve.text.batch import Batch
from halve.train.ranks import group as ranks
from halve.train.ranks.group import ALONE, Ranks

SAME = 1e-5
KILLED = -9


@dataclass(frozen=True)
class Answer:
    """What became of a job: its folder, and the driver's words."""

    folder: Path
    statuses: list[int]
    said: list[str]
    seconds: float

    @property
    def facts(self) -> dict[str, Any]:
        assert set(self.statuses) == {0}, self.said
        facts: dict[str, Any] = json.loads(self.said[0])
        return facts

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    @property
    def course(self) -> list[dict[str, float]]:
        """Loss, norm and held-out figures of every step."""
        return [
            {key: line[key] for key in ("step", "loss", "grad_norm", "teacher_loss") if key in line}
            | line.get("heldout", {})
            for line in self.lines
        ]

    @property
    def spikes(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if "spike" in line]

    @property
    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "work").iterdir())


class Driver:
    """A running ranks_driver; `run` gives its answer."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self.process = process
        self.folder = folder
        self._whole: dict[str, Answer] = {}

    def whole(self, size: int, **job: Any) -> Answer:
        """A training that nothing befalls; several tests look at the same one."""
        asked = json.dumps([size, job], sort_keys=True)
        if asked not in self._whole:
            self._whole[asked] = self.run(self.folder / str(len(self._whole)), size, **job)
        return self._whole[asked]

    def run(self, folder: Path, size: int, **job: Any) -> Answer:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps({"folder": str(folder), "size": size, **job}), file=self.process.stdin, flush=True)
        return Answer(folder, **json.loads(self.process.stdout.readline()))


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    tests = Path(__file__).parents[2]
    command = [sys.executable, str(tests / "train" / "loop" / "ranks_driver.py")]
    shared = {**os.environ, "PYTHONPATH": str(tests)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=shared) as process:
        yield Driver(process, tmp_path_factory.mktemp("whole"))
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait() == 0


def assert_same_course(have: Answer, want: Answer, *, rel: float = SAME) -> None:
    assert [line.keys() for line in have.course] == [line.keys() for line in want.course]
    for mine, its in zip(have.course, want.course, strict=True):
        assert mine == pytest.approx(its, rel=rel)


CASES: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"model": {"tie_word_embeddings": False}},
    "ce": {"objective": "ce"},
    "accumulation": {"training": {"micro_batch": 1}},
    "sharded teacher": {"shard_teacher": True, "training": {"activation_checkpointing": "full"}},
    "intermediate states": {
        "states": ["embedding", "input", "output", "attention"],
        "shard_teacher": True,
        "training": {"activation_checkpointing": "full"},
    },
    "extra parameters": {"extra": True, "training": {"activation_checkpointing": "selective"}},
}


@pytest.mark.parametrize("case", CASES)
def test_ranks_compute_what_one_rank_computes(driver: Driver, case: str) -> None:
    job = CASES[case]
    one = driver.whole(1, **job)
    assert one.facts["held"] > 0
    for size in (2, 4):
        several = driver.whole(size, **job)
        assert several.facts["tied"] == one.facts["tied"]
        assert not several.facts["teacher"]
        # uneven rows are rounded up
        assert several.facts["held"] < 1.1 * one.facts["held"] / size
        assert_same_course(several, one)


@pytest.mark.parametrize("method", ["full", "lora", "norms"])
def test_a_teacher_that_is_corrected_beside_is_corrected_alike(driver: Driver, tmp_path: Path, method: str) -> None:
    # an adapter's first gradients are next to nothing, and Adam takes whole steps along them: small ones
    job = {"correct": {"method": method, "lora_rank": 3, "lr": 2e-3}, "training": {"micro_batch": 1}}
    one, two = (driver.run(tmp_path / str(size), size, **job) for size in (1, 2))
    assert one.facts["held"] > two.facts["held"]
    assert "teacher_loss" in one.course[1]
    assert_same_course(two, one)
    for model in ("teacher", "model"):
        mine, its = (load_file(answer.folder / model / "model.safetensors") for answer in (two, one))
        torch.testing.assert_close(mine, its, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("case", ["tied", "untied"])
def test_replicas_of_shards_compute_what_one_rank_computes(driver: Driver, tmp_path: Path, case: str) -> None:
    job = CASES[case]
    one = driver.whole(1, **job)
    four = driver.run(tmp_path / "4", 4, **job, shard_teacher=True, training={"replicas": 2})
    assert_same_course(four, one)
    assert one.facts["held"] / 2 <= four.facts["held"] < 1.1 * one.facts["held"] / 2


def test_muon_on_shards_stays_near_one_rank(driver: Driver) -> None:
    """Its iteration is made in bfloat16, so that the last digits of a gradient grow to its third."""
    job = {"training": {"optimizer": "muon"}}
    one, two, four = (driver.whole(size, **job) for size in (1, 2, 4))
    assert_same_course(two, one, rel=1e-3)
    assert_same_course(four, one, rel=1e-3)


@pytest.mark.parametrize("policy", ["skip", "rewind"])
def test_a_spike_on_one_rank_is_left_out_by_all(driver: Driver, tmp_path: Path, policy: str) -> None:
    job = {"training": {"on_spike": policy}, "nan": [0, 4]}
    one, two = driver.run(tmp_path / "1", 1, **job), driver.run(tmp_path / "2", 2, **job | {"nan": [1, 4]})
    assert [(spike["step"], spike["spike"]) for spike in one.spikes] == [(4, policy)]
    assert [spike["samples"] for spike in two.spikes] == [spike["samples"] for spike in one.spikes]
    assert_same_course(two, one)


def test_a_spike_on_one_rank_stops_all(driver: Driver, tmp_path: Path) -> None:
    found = driver.run(tmp_path / "2", 2, nan=[1, 4])
    assert found.statuses == [2, 2]
    assert all("step 4" in said for said in found.said)


@pytest.mark.parametrize("keys", [{"optimizer": "adamw8bit"}, {"offload_optimizer": True}])
def test_what_saves_memory_on_one_device_is_refused_on_several(
    driver: Driver, tmp_path: Path, keys: dict[str, Any]
) -> None:
    if "optimizer" in keys:
        pytest.importorskip("torchao")
    found = driver.run(tmp_path / "2", 2, training=keys)
    assert found.statuses == [2, 2]
    assert "does not go with several ranks" in found.said[0]


def test_half_precision_stays_near_one_rank(driver: Driver, tmp_path: Path) -> None:
    """Gradients are rounded to bfloat16 by rank, so that courses differ in their third digit."""
    job = {"training": {"precision": "bfloat16"}, "model": {"half": True}}
    one, two = (driver.run(tmp_path / str(size), size, **job) for size in (1, 2))
    assert_same_course(two, one, rel=1e-2)
    assert one.course != two.course


def test_a_rank_that_dies_ends_the_others_and_the_run_goes_on(driver: Driver, tmp_path: Path) -> None:
    whole = driver.whole(2)
    died = driver.run(tmp_path / "died", 2, die=[1, 6])
    assert died.statuses == [2, KILLED]
    assert died.seconds < 30
    assert died.said[0].startswith("TrainError: rank 0 has lost another rank")
    assert "the same command resumes from the last checkpoint" in died.said[0]
    assert died.checkpoints
    others: dict[str, tuple[int, dict[str, Any]]] = {
        "one": (1, {}),
        "four": (4, {}),
        "replicas": (4, {"replicas": 2, "activation_checkpointing": "full"}),
    }
    for name in others:
        shutil.copytree(died.folder, tmp_path / name)
    again = driver.run(died.folder, 2)
    assert again.facts["resumed"] in (2, 4)
    assert again.facts["weights"] == whole.facts["weights"]
    assert again.course == whole.course
    for name, (size, changes) in others.items():
        other = driver.run(tmp_path / name, size, training=changes)
        assert other.facts["resumed"] == again.facts["resumed"]
        assert_same_course(other, whole)


def test_a_teacher_that_is_corrected_beside_goes_on_with_the_same_bits(driver: Driver, tmp_path: Path) -> None:
    job = {"correct": {"method": "lora", "lora_rank": 3, "lr": 2e-3}}
    whole = driver.run(tmp_path / "whole", 2, **job)
    stopped = driver.run(tmp_path / "stopped", 2, **job, term=[1, 3])
    assert stopped.checkpoints == ["step-00000003"]
    again = driver.run(stopped.folder, 2, **job)
    assert again.facts["resumed"] == 3
    assert again.facts["weights"] == whole.facts["weights"]
    assert again.course == whole.course
    mine, its = (load_file(answer.folder / "teacher" / "model.safetensors") for answer in (again, whole))
    assert all(torch.equal(mine[name], its[name]) for name in its)


def test_replicas_leave_a_checkpoint_that_one_rank_goes_on_from(driver: Driver, tmp_path: Path) -> None:
    whole = driver.whole(1)
    stopped = driver.run(tmp_path / "stopped", 4, training={"replicas": 2}, term=[2, 3])
    assert stopped.checkpoints == ["step-00000003"]
    again = driver.run(stopped.folder, 1)
    assert again.facts["resumed"] == 3
    assert_same_course(again, whole)


def test_sigterm_to_one_rank_saves_and_stops_all(driver: Driver, tmp_path: Path) -> None:
    whole = driver.whole(2)
    stopped = driver.run(tmp_path / "stopped", 2, term=[1, 3])
    assert stopped.statuses == [2, 2]
    assert all(said.startswith("Stopped: stopped by SIGTERM after step 3") for said in stopped.said)
    assert stopped.checkpoints == ["step-00000003"]
    again = driver.run(stopped.folder, 2)
    assert again.facts["resumed"] == 3
    assert again.facts["weights"] == whole.facts["weights"]


def test_a_full_disk_on_one_rank_is_said_by_all_and_loses_no_checkpoint(driver: Driver, tmp_path: Path) -> None:
    full = driver.run(tmp_path / "full", 2, full=[1, 2])
    assert full.statuses == [2, 2]
    assert all(said.startswith("DiskError: no room left while writing") for said in full.said)
    assert full.checkpoints == ["step-00000002"]
    assert driver.run(full.folder, 2).facts["resumed"] == 2


def test_shares_are_contiguous_and_in_order() -> None:
    batch = Batch(torch.arange(24).reshape(8, 3), tuple(range(10, 18)))
    shares = [Ranks(rank, 4).share(batch) for rank in range(4)]
    assert torch.equal(torch.cat([share.ids for share in shares]), batch.ids)
    assert [number for share in shares for number in share.numbers] == list(batch.numbers)
    assert ALONE.share(batch).numbers == batch.numbers


@pytest.mark.parametrize(
    ("size", "changes", "what"),
    [
        (3, {}, "a batch of 8 samples cannot be split into 3 equal shares"),
        (4, {"replicas": 3, "batch": 12}, "4 ranks do not make 3 replicas"),
        (1, {"replicas": 2}, "1 rank does not make 2 replicas"),
        (2, {"batch": 12, "micro_batch": 4}, "a share of 6 samples is not a multiple of micro_batch 4"),
    ],
)
def test_unequal_shares_are_refused(size: int, changes: dict[str, int], what: str) -> None:
    with pytest.raises(TrainError) as caught:
        ranks.require_shares(Training(**({"tokens": 1, "batch": 8} | changes)), size)
    assert caught.value.what == what
    ranks.require_shares(Training(tokens=1, batch=8, micro_batch=8, replicas=2), 4)


def test_a_process_that_does_not_find_the_others_says_so(monkeypatch: Any) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    with pytest.raises(RunError, match="does not find the others"), ranks.joined("cpu"):
        pass
