"""What the training loop leaves behind so that a killed run goes on with the same bits.

A checkpoint is a folder `step-00000200` of two files: `state.safetensors` (parameters and optimizer
moments) and `state.json` (the step, and whose state it is). It is written beside, put on the disk,
and then renamed: a name without a dot is complete. Older ones are removed only after that.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from halve.rundir import disk_guard, read_json, sync, sync_tree
from halve.train.step import Trained

_WEIGHTS, _FACTS = "state.safetensors", "state.json"
_MOMENTS = ("exp_avg", "exp_avg_sq")


def folder(work: Path, step: int) -> Path:
    """Give the place of the state after `step` steps."""
    return work / f"step-{step:08d}"


@dataclass(frozen=True)
class Restored:
    """The step that a run goes on from, and the notes that were saved with it."""

    step: int = 0
    notes: Mapping[str, Any] = field(default_factory=dict)


def save(
    work: Path,
    step: int,
    groups: Sequence[Trained],
    identity: Mapping[str, Any],
    *,
    keep: int = 1,
    notes: Mapping[str, Any] | None = None,
) -> Path:
    """Write the state after `step` steps, leave the newest `keep`, give its folder. `DiskError` when full.

    `groups` are what several optimizers move; `notes`, plain data, come back from `restore`.
    """
    final = folder(work, step)
    draft = work / f".{final.name}.tmp"
    with disk_guard(final):
        work.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        try:
            save_file(_tensors(groups), draft / _WEIGHTS)
            (draft / _FACTS).write_text(json.dumps({"step": step, "identity": identity, "notes": dict(notes or {})}))
            sync_tree(draft)
            shutil.rmtree(final, ignore_errors=True)  # a state that was not this run's
            os.replace(draft, final)
            sync(work)
        except Exception:
            shutil.rmtree(draft, ignore_errors=True)
            raise
    for old in [path for path in _complete(work) if path != final][: 1 - keep or None]:
        shutil.rmtree(old)
    return final


def restore(work: Path, groups: Sequence[Trained], identity: Mapping[str, Any]) -> Restored:
    """Load this run's newest state into modules and optimizers; its step is 0 where there is none."""
    wanted = json.loads(json.dumps(identity))
    for kept in reversed(_complete(work)):
        facts = read_json(kept / _FACTS)
        if facts["identity"] == wanted:
            for trained in groups:
                _load(kept / _WEIGHTS, facts["step"], trained)
            return Restored(int(facts["step"]), facts["notes"])
    return Restored()


def _complete(work: Path) -> list[Path]:
    return sorted(work.glob("step-*"))


def _named_parameters(trained: Trained) -> Iterator[tuple[str, nn.Parameter]]:
    for prefix, module in trained.modules.items():
        for name, parameter in module.named_parameters():
            yield f"{prefix}.{name}", parameter


def _tensors(groups: Sequence[Trained]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for trained in groups:
        state = trained.optimizer.state
        for name, parameter in _named_parameters(trained):
            assert f"param.{name}" not in tensors, f"two groups train {name}"
            tensors[f"param.{name}"] = parameter.detach().contiguous()
            for moment in _MOMENTS:
                if parameter in state:
                    tensors[f"{moment}.{name}"] = state[parameter][moment].contiguous()
    return tensors


@torch.no_grad()
def _load(path: Path, step: int, trained: Trained) -> None:
    optimizer = trained.optimizer
    fused = {id(p): bool(group.get("fused")) for group in optimizer.param_groups for p in group["params"]}
    with safe_open(path, framework="pt") as file:
        known = set(file.keys())
        for name, parameter in _named_parameters(trained):
            parameter.copy_(file.get_tensor(f"param.{name}"))
            if f"{_MOMENTS[0]}.{name}" in known:
                device = parameter.device if fused[id(parameter)] else "cpu"
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(step), device=device),
                    **{m: file.get_tensor(f"{m}.{name}").to(parameter.device) for m in _MOMENTS},
                }
