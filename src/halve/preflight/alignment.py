"""Errors in steps of alignment that can be known before a run, and how many tokens a step will read."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halve.disk.textfiles import ending, extra, open_packed
from halve.errors import HalveError, RecipeError
from halve.recipe.schema import Alignment, Correct, Recipe
from halve.text import sources
from halve.text.rows import Piece, Wanted

if TYPE_CHECKING:
    from halve.model.checkpoint import Checkpoint

_ENCODED = 64
"""Rows of each source that are written as tokens."""


def of_the_alignment(recipe: Recipe, teacher: Checkpoint) -> Iterator[Callable[[], Any]]:
    """The checks of every step. Each raises a `HalveError`."""
    for number, step in enumerate(recipe.align, 1):
        where = f"step {number} of align ({step.kind})"
        yield partial(_require_packages, step, where)
        yield partial(_check_place, recipe, step, teacher, where)
        if step.reward_model is not None:
            yield partial(_check_reward, step.reward_model)
        for source in step.data:
            if not source.startswith(sources.HUB):
                yield partial(_check_rows, recipe, step, source, teacher)


def planned_tokens(recipe: Recipe, step: Alignment, teacher: Checkpoint) -> float:
    """Tokens on which a step will train: `tokens`, or an estimate from the first rows and the size of the files.

    0 where this cannot be told, as for a data set of the hub.
    """
    if step.tokens is not None:
        return float(step.tokens)
    from halve.model.checkpoint import Checkpoint

    total, known = 0.0, teacher if teacher.gguf else Checkpoint.open(teacher.folder)  # which downloads nothing
    for source in step.data:
        try:
            files = [] if source.startswith(sources.HUB) else sources.files(source)
            first = list(islice(sources.beginnings(source, _wanted(recipe, step)), _ENCODED)) if files else []
            rows = sum(_rows(path) for path in files)
            tokens = [_length(recipe, step, piece, known) for piece in first]
        except (HalveError, OSError):
            continue  # reported by check
        if tokens:
            total += rows * sum(tokens) / len(tokens)
    return total * (step.passes or 1.0)


def like_a_correction(step: Alignment) -> Correct:
    """A correction that takes as much memory and disk as a step of alignment. A pair is two samples."""
    each = 1 if step.kind == "sft" else 2
    micro_batch = None if step.micro_batch is None else each * step.micro_batch
    shared = ("method", "lora_rank", "lora_alpha", "activation_checkpointing", "precision", "checkpoint_every")
    return Correct(
        tokens=1, batch=each * step.batch, micro_batch=micro_batch, **{key: getattr(step, key) for key in shared}
    )


def _wanted(recipe: Recipe, step: Alignment) -> Wanted:
    from halve.align.examples import messages_field
    from halve.text.preferences import Needs
    from halve.text.rendering import Chat

    if step.kind == "sft":
        return Chat(messages_field(step, recipe.data), "assistant").wanted
    return Needs.of(step).wanted


def _require_packages(step: Alignment, where: str) -> None:
    for package in ("trl", "peft", "datasets"):
        if importlib.util.find_spec(package) is None:
            raise RecipeError(
                f"{where} needs the package {package}",
                why="it is not installed; alignment is an extra of halve",
                fix="pip install 'halve[align]'",
            )


def _check_place(recipe: Recipe, step: Alignment, teacher: Checkpoint, where: str) -> None:
    from halve.model import measure
    from halve.preflight.sizes import planned_rounds
    from halve.text.rendering import template_of

    measure.require_context(teacher.config, step.context or recipe.data.context, f"a sample of {where}")
    template_of(teacher.tokenizer)
    if step.method == "lora" and step.lora_rank > (hidden := planned_rounds(recipe, teacher)[-1].after.hidden):
        raise RecipeError(
            f"lora_rank {step.lora_rank} of {where} is larger than the student's hidden {hidden}",
            why="no matrix that reads or writes hidden states has a higher rank than that",
            fix=f"set lora_rank to {hidden} or less; 16 is usual",
        )


def _check_reward(source: str) -> None:
    from halve.align.rewards import require_classifier

    require_classifier(source)


def _check_rows(recipe: Recipe, step: Alignment, source: str, teacher: Checkpoint) -> None:
    """Read the beginning of every file, and write the first rows as tokens."""
    first = list(sources.beginnings(source, _wanted(recipe, step)))[:_ENCODED]
    if teacher.tokenizer.chat_template:  # else reported already
        for piece in first:
            _length(recipe, step, piece, teacher)


def _rows(path: Path) -> int:
    """The rows of a file."""
    if ending(path) == ".parquet":
        return int(extra("pyarrow.parquet", path).ParquetFile(path).metadata.num_rows)
    with open_packed(path) as file:
        return sum(1 for line in file if line.strip())


def _length(recipe: Recipe, step: Alignment, piece: Piece, teacher: Checkpoint) -> int:
    """The tokens of a row, at most those of its context, twice for a pair; those of new answers at most."""
    from halve.align.examples import LeftOut, dialogues_of, encoded_pair
    from halve.text.rendering import encode_answers

    tokenizer, context, left_out = teacher.tokenizer, step.context or recipe.data.context, LeftOut()
    if step.kind == "sft":
        return sum(len(talk.ids) for talk in dialogues_of([piece], step, recipe.data, tokenizer, context, left_out))
    row = json.loads(piece.text)
    if step.answers is not None:
        prompt, _ = encode_answers(tokenizer, row["prompt"], (), place=piece.place)
        return 2 * min(len(prompt) + step.answer_tokens, context) if len(prompt) < context else 0
    pair = encoded_pair(row, piece.place, tokenizer, context=context, left_out=left_out)
    return 0 if pair is None else 2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected)
