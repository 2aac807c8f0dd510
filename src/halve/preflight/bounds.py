"""Compare what a recipe needs with what is available: memory, processors, tokenizer, and the model's context."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halve.disk.rundir import LOCK, MARKER, RECIPE
from halve.errors import RecipeError, RunError
from halve.process.waits import bytes_in_words
from halve.recipe.rounds import trainings
from halve.recipe.schema import CHAT_PROMPTS, Recipe, Training

if TYPE_CHECKING:
    from halve.model.checkpoint import Checkpoint

_BYTES_OF_AN_ID = 8
_PROCESSES_A_CORE = 16


def of_the_teacher(recipe: Recipe, teacher: Checkpoint, ranks: int | None) -> Iterator[Callable[[], Any]]:
    """Checks that each raise a `HalveError`. A step is checked only if it is known to run on this machine."""
    yield partial(_check_questions, recipe, teacher)
    if ranks is None:
        return
    for name, training in trainings(recipe).items():
        yield partial(_check_step, recipe, teacher, name, training, ranks)


def check_workers(recipe: Recipe) -> None:
    """Refuse more processes than a machine can start."""
    most = _PROCESSES_A_CORE * (os.cpu_count() or 1)
    if recipe.data.workers > most:
        raise RecipeError(
            f"data.workers {recipe.data.workers} is more than this machine can start",
            why=f"it has {os.cpu_count()} processors, and more than {_PROCESSES_A_CORE} processes on each only wait",
            fix=f"set data.workers to {os.cpu_count()}",
        )


def check_place(out: Path) -> None:
    """Refuse a run folder that cannot be created at this place."""
    nearest = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise RunError(
            f"cannot make run folder {out}",
            why=f"{nearest} is no folder that may be written to",
            fix="choose another --out",
        )
    for name, folder in ((LOCK, False), (MARKER, False), (RECIPE, False), ("data", True)):
        if (out / name).exists() and (out / name).is_dir() != folder:
            raise RunError(
                f"{out / name} is not what halve wrote",
                why=f"it is a {'file' if folder else 'folder'}, and a run folder has a {'folder' if folder else 'file'}"
                " of that name",
                fix="move it away and run the same command, or choose another --out",
            )


def _check_questions(recipe: Recipe, teacher: Checkpoint) -> None:
    """Refuse multiple-choice items and prompts that do not fit the teacher's context and vocabulary."""
    from halve.anatomy.configs import context_length
    from halve.model.choices import encode, load_items
    from halve.text.questions import encoded_chat, encoded_choices, encoded_prompts

    evaluated, named = recipe.evaluate, recipe.evaluate.chat_prompts != CHAT_PROMPTS
    played = None if recipe.search is None else recipe.search.tournament.choices
    others = list(filter(None, (recipe.score.depth_task, played)))
    if not (evaluated.choices or evaluated.prompts or others or named):
        return
    teacher.require_tokenizer()
    limit = context_length(teacher.config)
    for row in encoded_prompts(recipe, teacher.tokenizer, limit):
        teacher.require_embedded(max(row), "a prompt of evaluate.prompts")
    vocab = teacher.config.get_text_config().vocab_size
    for row in encoded_chat(recipe, teacher.tokenizer, limit, num_tokens=vocab).values():
        teacher.require_embedded(max(row), "a prompt of evaluate.chat_prompts")
    files = encoded_choices(recipe, teacher.tokenizer, limit)
    files |= {path: encode(teacher.tokenizer, load_items(path), max_tokens=limit) for path in others}
    for name, items in files.items():
        largest = max(max(row) for item in items for row in item.sequences)
        teacher.require_embedded(largest, f"multiple-choice file {name}")


def _check_step(recipe: Recipe, teacher: Checkpoint, name: str, training: Training, ranks: int) -> None:
    """Refuse a step that cannot fit in memory in any setting: its ids, and the states that enter a layer."""
    sizes = teacher.anatomy.sizes
    context = max([recipe.data.context, *(phase.context or 0 for phase in training.phases)])
    share = max(1, training.batch // ranks)
    samples = min(training.micro_batch or share, share)
    needed = max(share * context * _BYTES_OF_AN_ID, samples * context * 2 * sizes.hidden * sizes.layers)
    there = _memory(recipe)
    if needed > there:
        raise RecipeError(
            f"{name} cannot hold {samples:,} samples of {context:,} tokens at once",
            why=f"its layers' inputs alone take {bytes_in_words(needed)}, the device and main memory have"
            f" {bytes_in_words(there)}",
            fix=f"set {name.split()[0]}.micro_batch to a small divisor of batch, or batch itself lower",
        )


def _memory(recipe: Recipe) -> int:
    """The memory of the device and of the machine together, because some states may be offloaded."""
    import psutil

    from halve.model.checkpoint import resolve_device

    there = psutil.virtual_memory().total + psutil.swap_memory().total
    if resolve_device(recipe.device) == "cuda":
        import torch

        there += sum(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
    return int(there)
