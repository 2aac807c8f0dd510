"""Write a cache and die by SIGKILL while so many shards are whole and the next is in the making.

python cache_driver.py RECIPE TEACHER OUT SHARD_BYTES SHARDS
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from halve.model.checkpoint import Checkpoint
from halve.recipe.schema import Recipe
from halve.stages import cache as stage
from halve.train.teachers import cache


def main(recipe: Path, teacher: Path, out: Path, shard_bytes: int, shards: int) -> None:
    def save(tensors: Any, path: Path, **kwargs: Any) -> None:
        if len(list(out.glob("train-*"))) == shards:
            path.write_bytes(b"the beginning of a shard")
            os.kill(os.getpid(), signal.SIGKILL)
        save_file(tensors, path, **kwargs)

    cache.save_file = save
    parsed = Recipe.model_validate_json(recipe.read_text())
    stage.run(parsed, teacher=Checkpoint.open(teacher), cache=out.parent / "data", out=out, shard_bytes=shard_bytes)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), *map(int, sys.argv[4:]))
