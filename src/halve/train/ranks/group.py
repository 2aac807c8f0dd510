"""The processes of a run: a single one, or several that torchrun (or Slurm) started with the same command.

All of them go through the pipeline. Rank 0 writes what is written once, while the others wait (`lead`). They train
together. `joined` makes the group from the environment. The stages get it from `here` and pass it on. A single process
runs the same code without a group.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from halve.errors import HalveError, RunError, TrainError
from halve.recipe.schema import Training
from halve.text.batch import Batch

_T = TypeVar("_T")
_PATIENCE = timedelta(minutes=10)  # how long a rank waits in a collective for one that does not answer
_POLL_S = 0.1
_GONE = re.compile(r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe|timed out|socket", re.IGNORECASE)


@dataclass(frozen=True)
class Ranks:
    """The rank of this process among `size` processes. `group` is for work during training (checkpoints)."""

    rank: int = 0
    size: int = 1
    kind: str = "cpu"
    store: dist.Store | None = None
    group: dist.ProcessGroup | None = None
    _turns: Iterator[int] = field(default_factory=itertools.count)
    _meshes: dict[int, DeviceMesh] = field(default_factory=dict)

    @property
    def leads(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is only this process."""
        return self.size == 1

    def mesh(self, replicas: int) -> DeviceMesh:
        """The ranks in `replicas` groups, each of which holds a whole model in shards."""
        assert not self.alone
        if replicas not in self._meshes:
            shape = (self.size,) if replicas == 1 else (replicas, self.size // replicas)
            names = ("replicate", "shard")[-len(shape) :]
            self._meshes[replicas] = init_device_mesh(self.kind, shape, mesh_dim_names=names)
        return self._meshes[replicas]

    def home(self, device: str) -> str:
        """The device to which a model is loaded before it trains on `device`.

        A model that will be sharded over several ranks is loaded to main memory. From there it is sharded layer by
        layer, so that no device ever holds the whole model.
        """
        return device if self.alone else "cpu"

    def share(self, batch: Batch) -> Batch:
        """This rank's samples of a step. The shares of all ranks, in order, are the samples of the step."""
        each = len(batch) // self.size
        assert each * self.size == len(batch)
        return batch[self.rank * each : (self.rank + 1) * each]

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks, bit-identical on each."""
        if self.alone:
            return values
        values = values.clone()
        dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return flag if self.alone else bool(self.sum(torch.tensor(float(flag), device=self.kind)) > 0)

    def lead(self, act: Callable[[], _T]) -> _T:
        """Run a function on rank 0, however long it takes, and return its result (plain data) on every rank.

        An error on rank 0 is raised on all ranks.
        """
        if self.alone:
            return act()
        assert self.store is not None
        key = f"lead/{next(self._turns)}"
        if self.leads:
            try:
                result = act()
                answer = {"result": result if _is_plain(result) else None}
            except HalveError as error:
                self.store.set(key, json.dumps({"error": [error.what, error.why, error.fix]}))
                raise
            except BaseException as error:
                self.store.set(key, json.dumps({"error": [f"rank 0 failed: {error!r}", "see its own message", "-"]}))
                raise
            self.store.set(key, json.dumps(answer))
            return result
        with gone_guard(self):
            while not self.store.check([key]):
                time.sleep(_POLL_S)
            answer = json.loads(self.store.get(key))
        if "error" in answer:
            what, why, fix = answer["error"]
            raise Elsewhere(what, why=why, fix=fix)
        return answer["result"]  # type: ignore[no-any-return]


class Elsewhere(HalveError):
    """An error that rank 0 reports itself."""

    told = True


ALONE = Ranks()
_here = [ALONE]


def here() -> Ranks:
    """The group of ranks of this process."""
    return _here[-1]


@contextmanager
def joined(kind: str) -> Iterator[Ranks]:
    """Join the processes that were started together. A single process stays alone.

    `kind` is `cpu` (gloo) or `cuda` (NCCL). In this context, `here` returns the group. Raises `RunError` if a process
    does not find the others.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not here().alone:
        yield here()
        return
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        store, rank, size = next(rendezvous("env://", timeout=_PATIENCE))
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=PrefixStore("group", store), rank=rank, world_size=size, timeout=_PATIENCE
        )
        group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    except (ValueError, RuntimeError) as error:  # torch's network errors are among them
        raise RunError(
            "this process does not find the others of its run",
            why=str(error).splitlines()[0],
            fix="start it with torchrun, or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT as torchrun does",
        ) from error
    _here.append(Ranks(rank, size, kind, PrefixStore("halve", store), group))
    try:
        yield here()
        dist.barrier(group)  # rank 0 holds the store: no rank may leave before the last has read it
        dist.destroy_process_group()  # not after an error, because it would wait for a rank that is gone
    finally:
        _here.pop()


@contextmanager
def gone_guard(ranks: Ranks) -> Iterator[None]:
    """Turn torch's error about a lost one of `ranks` into a `TrainError`."""
    try:
        yield
    except HalveError:
        raise
    except RuntimeError as error:
        if ranks.alone or not _GONE.search(str(error)):
            raise
        raise TrainError(
            f"rank {ranks.rank} has lost another rank",
            why=f"its process ended or does not answer: {str(error).splitlines()[0]}",
            fix="see the other rank's own error; then the same command resumes from the last checkpoint",
        ) from error


@contextmanager
def sigterm() -> Iterator[Callable[[], bool]]:
    """In this context, record a SIGTERM instead of ending. The yielded function tells whether one was received."""
    came = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # where handlers cannot be set
        yield came.is_set
        return
    before = signal.signal(signal.SIGTERM, lambda *_: came.set())
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


def require_shares(training: Training, size: int) -> None:
    """Raise `TrainError` unless samples split equally over the ranks, and each share into equal micro-batches."""
    if size % training.replicas:
        raise TrainError(
            f"{size} rank{'s do' if size > 1 else ' does'} not make {training.replicas} replicas",
            why="every replica is held by the same number of ranks",
            fix=f"set replicas to a divisor of {size}" if size > 1 else "set replicas to 1, or start more ranks",
        )
    if training.batch % size:
        raise TrainError(
            f"a batch of {training.batch} samples cannot be split into {size} equal shares",
            why="every rank takes the same number of a step's samples",
            fix=f"set batch to a multiple of {size}, or start another number of ranks",
        )
    share = training.batch // size
    if share % min(training.micro_batch or share, share):
        raise TrainError(
            f"a share of {share} samples is not a multiple of micro_batch {training.micro_batch}",
            why=f"batch {training.batch} over {size} ranks gives each {share}, in forward passes of equal size",
            fix=f"set micro_batch to a divisor of {share}",
        )


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
