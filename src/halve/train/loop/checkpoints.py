"""Checkpoints of the training loop, from which a killed run resumes bit-identically.

A checkpoint is a folder such as `step-00000200`. It holds one safetensors file per rank, with that rank's part of the
parameters and of the optimizers' state, and `state.json`: the step, which run it belongs to, and the hash of each file,
which is checked before it is loaded. PyTorch's distributed checkpoint writes and reads it with its safetensors storage.
So nothing is pickled, and another number of ranks can load it. The state is copied first, then written while the
training continues, flushed to disk, and renamed. A name without a dot is complete. Older checkpoints are removed only
after that.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from halve.disk.files import disk_guard, file_sha256, plain, read_sealed, sealed, sync_tree
from halve.disk.folders import finish_folder, replace_folder
from halve.errors import RunError
from halve.train.loop.step import Trained
from halve.train.ranks.group import ALONE, Ranks

FACTS = "state.json"


@dataclass(frozen=True)
class Restored:
    """The step from which a run resumes, and the notes that were saved with it."""

    step: int = 0
    notes: Mapping[str, Any] = field(default_factory=dict)


class Keeper:
    """The checkpoints of one run of the loop, in the folder `work`. Use it in a `with` block, which completes all
    writing.

    `groups` are the modules of the optimizers. `identity` says which run the state belongs to. The newest `keep` are
    kept.
    """

    def __init__(
        self,
        work: Path,
        groups: Sequence[Trained],
        identity: Mapping[str, Any],
        *,
        keep: int = 1,
        ranks: Ranks = ALONE,
    ) -> None:
        self.work, self.groups, self.keep, self.ranks = work, groups, keep, ranks
        self.identity = json.loads(json.dumps(identity))
        self.last: Path | None = None
        """The newest complete checkpoint of this run."""
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[Path] | None = None

    def __enter__(self) -> Keeper:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._writer.shutdown(wait=kind is None or self.ranks.alone)

    def save(self, step: int, *, notes: Mapping[str, Any] | None = None) -> None:
        """Copy the state after `step` steps and begin to write it. The checkpoint before it is completed first.

        `restore` returns `notes`, which are plain data. Raises `DiskError` if the checkpoint before it found no room.
        """
        self.wait()
        stager = DefaultStager(StagingOptions(False, False, False, False))
        copied = stager.stage(_tensors(self.groups))
        stager.close()
        assert isinstance(copied, dict)  # not a future, because none was requested
        facts = {"step": step, "identity": self.identity, "notes": dict(notes or {})}
        self._writing = self._writer.submit(_save, self.work, copied, facts, self.keep, self.ranks)

    def wait(self) -> Path | None:
        """Wait until nothing is being written. Returns the newest complete checkpoint. Raises `DiskError` when full."""
        writing, self._writing = self._writing, None
        if writing is not None:
            self.last = writing.result()
        return self.last

    def restore(self) -> Restored:
        """Load this run's newest state into modules and optimizers. The step is 0 if there is none.

        A checkpoint that cannot be read causes a warning, and the one before it is loaded. Raises `RunError` if there
        are checkpoints and none can be read.
        """
        self.wait()
        damaged: list[str] = []
        for checkpoint in self.ranks.lead(self._known):
            why = self.ranks.lead(partial(self._why_not, checkpoint)) or self._load(checkpoint)
            if not self.ranks.any(why is not None):
                self.last = self.work / checkpoint["folder"]
                return Restored(checkpoint["step"], checkpoint["notes"])
            damaged.append(f"{checkpoint['folder']}: {why or 'another rank cannot read its part'}")
            warnings.warn(f"a checkpoint in {self.work} cannot be read, {damaged[-1]}", stacklevel=2)
        if damaged:
            raise RunError(
                f"no checkpoint in {self.work} can be read",
                why="; ".join(damaged),
                fix="remove that folder to start this training again",
            )
        return Restored()

    def _why_not(self, found: Mapping[str, Any]) -> str | None:
        """Why a checkpoint cannot be trusted, if so."""
        return found["why"] or damaged(self.work / found["folder"], found)

    def _load(self, found: Mapping[str, Any]) -> str | None:
        """Load a checkpoint. Returns why it cannot be read, if so. The next one replaces what was loaded."""
        try:
            with _quiet():
                reader = HuggingFaceStorageReader(str(self.work / found["folder"]))
                _make_state(self.groups, known=set(reader.read_metadata().state_dict_metadata))
                group = self.ranks.group
                load(_tensors(self.groups), storage_reader=reader, process_group=group, no_dist=self.ranks.alone)
        except (CheckpointException, SafetensorError, OSError, RuntimeError, ValueError, KeyError) as error:
            return (str(error).strip().splitlines() or [type(error).__name__])[-1]
        return None

    def _known(self) -> list[dict[str, Any]]:
        """This run's checkpoints, the newest first, and those whose run cannot be determined."""
        known: list[dict[str, Any]] = []
        for kept in reversed(complete(self.work)):
            finish_folder(kept, last=FACTS)
            try:
                facts: dict[str, Any] = read_sealed(kept / FACTS)
            except RunError as error:
                known.append({"folder": kept.name, "why": str(error.why)})
                continue
            if facts["identity"] == self.identity:
                known.append({**facts, "folder": kept.name, "why": None})
        return known


def folder(work: Path, step: int) -> Path:
    """The folder of the state after `step` steps."""
    return work / f"step-{step:08d}"


def complete(work: Path) -> list[Path]:
    """The checkpoints in a folder, the newest last."""
    return sorted(work.glob("step-*"))


def damaged(folder: Path, facts: Mapping[str, Any]) -> str | None:
    """What is wrong with a checkpoint's files, by the hashes that were taken when they were written."""
    for name, sha256 in facts.get("files", {}).items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if file_sha256(folder / name) != sha256:
            return f"{name} was changed: it lacks the hash that it was written with"
    return None


def parameters(folder: Path, module: str) -> dict[str, Tensor]:
    """The complete parameters of one module in a checkpoint, on the CPU, by name."""
    prefix = f"param.{module}."
    with _quiet():
        reader = HuggingFaceStorageReader(str(folder))
        entries = reader.read_metadata().state_dict_metadata
        tensors = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in entries.items()
            if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
        }
        load(tensors, storage_reader=reader, no_dist=True)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def write(tensors: dict[str, Any], draft: Path, ranks: Ranks) -> None:
    """Write this rank's part of a state into a folder. On return, the parts of all ranks are written."""
    writer = HuggingFaceStorageWriter(str(draft), save_distributed=True)
    with _quiet():
        save(tensors, storage_writer=writer, process_group=ranks.group, no_dist=ranks.alone)


def _save(work: Path, tensors: dict[str, Any], facts: Mapping[str, Any], keep: int, ranks: Ranks) -> Path:
    final = folder(work, facts["step"])
    draft = work / f".{final.name}.tmp"
    with disk_guard(final):
        if ranks.leads:
            work.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(exist_ok=True)  # another rank may have done this already
        try:
            try:
                write(tensors, draft, ranks)
            except CheckpointException as error:  # the original error, from the first rank with one
                raise next(iter(error.failures.values()))[0] from None
            if ranks.leads:
                files = {path.name: file_sha256(path) for path in sorted(draft.iterdir())}
                (draft / FACTS).write_text(json.dumps(sealed(plain({**facts, "files": files}))))
                sync_tree(draft)
                replace_folder(draft, final, last=FACTS)  # there may be the state of another run
        except Exception:
            shutil.rmtree(draft, ignore_errors=True)
            raise
    for old in [path for path in complete(work) if path != final][: 1 - keep or None] if ranks.leads else ():
        shutil.rmtree(old)
    return final


def _named_parameters(trained: Trained) -> Iterator[tuple[str, nn.Parameter]]:
    """The trained parameters. The rest of a model is unchanged since it was loaded."""
    for prefix, module in trained.modules.items():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                yield f"{prefix}.{name}", parameter


def _tensors(groups: Sequence[Trained]) -> dict[str, Any]:
    """All tensors that a step depends on, by name. They are not copied."""
    tensors: dict[str, Any] = {}
    for trained in groups:
        state = trained.optimizer.state
        for name, parameter in _named_parameters(trained):
            assert f"param.{name}" not in tensors, f"two groups train {name}"
            tensors[f"param.{name}"] = parameter.detach()
            for key, value in state.get(parameter, {}).items():
                tensors |= _plain(f"{key}.{name}", value)
    return tensors


def _plain(name: str, value: Any) -> dict[str, Tensor]:
    """A tensor by its name. A library's tensor subclass is given as its inner tensors."""
    if not isinstance(value, Tensor):
        return {}
    if isinstance(value, DTensor) or not is_traceable_wrapper_subclass(value):
        return {name: value}
    inner, _ = value.__tensor_flatten__()
    return {f"{name}/{part}": getattr(value, part) for part in inner}


def _make_state(groups: Sequence[Trained], *, known: set[str]) -> None:
    """Let optimizers create their state, which a checkpoint then fills, by a step with zero rate and zero gradient."""
    for trained in groups:
        optimizer, rates = trained.optimizer, [group["lr"] for group in trained.optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        for name, parameter in _named_parameters(trained):
            kept = [key for key in optimizer.state.get(parameter, {}) if _is_known(f"{key}.{name}", known)]
            if not kept:
                optimizer.state.pop(parameter, None)  # it had no gradient before


def _is_known(name: str, known: set[str]) -> bool:
    return name in known or any(each.startswith(name + "/") for each in known)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the warning about a missing process group where none is needed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
