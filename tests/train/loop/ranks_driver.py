"""Trains tiny models on several ranks: the program that test_ranks starts.

    python ranks_driver.py < jobs > results

Imports everything once, then forks the ranks of each job, a line of JSON such as

    {"folder": "/tmp/a", "size": 2, "training": {"micro_batch": 2}}      train on two ranks
    {"folder": "/tmp/a", "size": 2, "die": [1, 5]}                       rank 1 is killed in step 5
    {"folder": "/tmp/a", "size": 2, "term": [1, 3]}                      rank 1 gets SIGTERM in step 3
    {"folder": "/tmp/a", "size": 2, "full": [1, 2]}                      rank 1 has no room for the second checkpoint
    {"folder": "/tmp/a", "size": 2, "nan": [1, 3]}                       rank 1's part of the loss of step 3 is nan

and answers with a line: the ranks' exit statuses, what each said, the seconds until the last had ended.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # by the first optimizer of a process: seconds for each rank
from looped import VOCAB, Fake, tiny, training
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor

from halve.errors import HalveError
from halve.model.head import Body, Head, split
from halve.recipe.schema import Correct, Distill
from halve.text.batch import Batch
from halve.text.course import Course
from halve.train.beside import Correction, correction
from halve.train.loop import adapters, loop
from halve.train.objectives import intermediate
from halve.train.objectives import logits as objectives
from halve.train.ranks import group as ranks
from halve.train.ranks import shards
from halve.train.teachers.live import Live

END_S = 60.0


def main() -> None:
    for line in sys.stdin:
        job = json.loads(line)
        folder = Path(job["folder"])
        folder.mkdir(exist_ok=True)
        began = time.monotonic()
        port = free_port()
        children = [fork(job, rank, port) for rank in range(job["size"])]
        statuses = [wait(child, began + END_S) for child in children]
        said = [(folder / f"said-{rank}").read_text() for rank in range(job["size"])]
        print(json.dumps({"statuses": statuses, "said": said, "seconds": time.monotonic() - began}), flush=True)


def fork(job: dict[str, Any], rank: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(job["size"]), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    said = Path(job["folder"]) / f"said-{rank}"
    said.write_text("")
    code = 1
    try:
        with ranks.joined("cpu") as here:
            act(job, said, here)
        code = 0
    except HalveError as error:
        said.write_text(f"{type(error).__name__}: {error}")
        code = 2
    except BaseException:
        said.write_text(traceback.format_exc())
    os._exit(code)


def act(job: dict[str, Any], said: Path, here: ranks.Ranks) -> None:
    """One rank's part of a training; rank 0 leaves the weights' hash in `said` and the model in `folder/model`."""
    folder, recipe = Path(job["folder"]), training(**job.get("training", {}))
    half = loop.is_half(recipe, "cpu")
    model = dict(job.get("model", {}))
    dtype = torch.bfloat16 if model.pop("half", False) else torch.float32
    student, teacher = tiny(dtype=dtype, **model), tiny(seed=1, hidden_size=24).eval().requires_grad_(False)
    body, head = split(teacher)
    how = Distill(tokens=1, shard_teacher=bool(job.get("shard_teacher")), replicas=recipe.replicas)
    by: Live | Correction = Live(body, head)
    if "correct" in job:
        section = Correct(**(recipe.model_dump(include={"tokens", "lr", "min_lr", "warmup_steps"}) | job["correct"]))
        adapters.choose_trained(teacher, section, seed=0)
        by = correction(teacher, section, how, Course(recipe, Fake()), device="cpu", ranks=here)
    else:
        shards.frozen(teacher, body, how, half=half, ranks=here)
    objective = objectives.cross_entropy()
    if job.get("objective", "kl") == "kl":
        objective = objectives.distillation(by, vocab=VOCAB)
    held_out = Fake().batch(99, 4)
    heldout = objectives.heldout_divergence(by, held_out, vocab=VOCAB, micro_batch=2)
    if isinstance(by, Correction):
        heldout = by.measuring(heldout, objectives.heldout_loss(held_out, micro_batch=2))
    extra = torch.nn.Linear(3, 2, bias=False) if job.get("extra") else None
    if extra is not None:
        torch.nn.init.constant_(extra.weight, 0.5)
        objective = with_extra(objective, extra)
    if "states" in job:
        matching = intermediate.match(student, teacher, states=job["states"], layers={-1: -1}, seed=0)
        objective, extra = intermediate.with_states(objective, matching, alpha=0.5), matching.map
    if "full" in job and job["full"][0] == here.rank:
        fill(job["full"][1])
    beside = by if isinstance(by, Correction) else None
    lesson = loop.Lesson(troubled(objective, job, here.rank), extra, beside, heldout)
    files = loop.TrainFiles(folder / "work", folder / "metrics.jsonl", seed=0)
    result = loop.train(student, lesson, Course(recipe, Fake()), files, device="cpu", ranks=here)
    if isinstance(by, Correction):
        adapters.merge(teacher)
        shards.save(teacher, folder / "teacher", dtype=torch.float32, extra_from=None, record=None, ranks=here)
    shards.save(student, folder / "model", dtype=torch.float32, extra_from=None, record=None, ranks=here)
    held = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in student.parameters())
    if here.leads:
        weights = hashlib.sha256((folder / "model" / "model.safetensors").read_bytes()).hexdigest()
        tied = student.lm_head.weight is student.model.embed_tokens.weight
        grads = any(p.grad is not None or p.requires_grad for p in teacher.parameters())
        facts = {"weights": weights, "resumed": result.resumed_from, "held": held, "tied": tied, "teacher": grads}
        said.write_text(json.dumps(facts))


def with_extra(objective: objectives.Objective, extra: torch.nn.Linear) -> objectives.Objective:
    """Parameters that every rank holds whole: their loss is a mean over samples too."""

    def summed(body: Body, head: Head, batch: Batch) -> tuple[Tensor, int]:
        loss, count = objective(body, head, batch)
        seen = extra(batch.ids[:, :3].float() / VOCAB)
        return loss + seen.square().sum(), count

    return summed


def troubled(objective: objectives.Objective, job: dict[str, Any], rank: int) -> objectives.Objective:
    """Let one rank come to harm in one step; `calls` are counted in forward passes, one a step here."""
    calls = iter(range(1, 1000))

    def summed(body: Body, head: Head, batch: Batch) -> tuple[Tensor, int]:
        now = [rank, next(calls)]
        if now == job.get("die"):
            os.kill(os.getpid(), signal.SIGKILL)
        if now == job.get("term"):
            os.kill(os.getpid(), signal.SIGTERM)
        loss, count = objective(body, head, batch)
        return (loss * torch.nan if now == job.get("nan") else loss), count

    return summed


def fill(number: int) -> None:
    """Let the writing of this rank's part of a checkpoint find no room."""
    original, calls = HuggingFaceStorageWriter.write_data, iter(range(1, 1000))

    def write_data(self: Any, *args: Any) -> Any:
        if next(calls) == number:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, *args)

    HuggingFaceStorageWriter.write_data = write_data  # type: ignore[method-assign]


def wait(child: int, deadline: float) -> int:
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return 999


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
