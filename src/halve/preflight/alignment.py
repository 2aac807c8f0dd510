"""Errors in steps of alignment that can be known before a run, and how many tokens a step will read."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halve.disk.textfiles import ending, extra, open_packed
from halve.errors import CorpusError, HalveError, RecipeError
from halve.recipe.schema import Alignment, Correct, Recipe
from halve.text import sources
from halve.text.conversations import TOOLS
from halve.text.rows import Piece, Wanted

if TYPE_CHECKING:
    from halve.align.examples import LeftOut
    from halve.model.checkpoint import Checkpoint
    from halve.preflight.sizes import PlannedRound

_ENCODED = 64
"""Rows of each source that are written as tokens."""


def of_the_alignment(recipe: Recipe, teacher: Checkpoint) -> Iterator[Callable[[], Any]]:
    """The checks of every step. Each raises a `HalveError`."""
    for number, step in enumerate(recipe.align, 1):
        where = _where(number, step)
        yield partial(_require_packages, step, where)
        yield partial(_check_place, recipe, step, teacher, where)
        if step.reward_model is not None:
            yield partial(_check_reward, recipe, step, step.reward_model, where)
        for source in step.data:
            if not source.startswith(sources.HUB):
                yield partial(_check_rows, recipe, step, source, teacher)
        yield partial(_check_learned, recipe, step, teacher, where)


def rows_left_out(recipe: Recipe, teacher: Checkpoint) -> Iterator[str]:
    """What the steps will cut or leave out of the first rows of their sources, in words: a line for each step."""
    from halve.align.examples import LeftOut

    for number, step in enumerate(recipe.align, 1):
        counted, rows = LeftOut(), 0
        for source in step.data:
            if not source.startswith(sources.HUB):
                for piece in islice(sources.beginnings(source, _wanted(recipe, step)), _ENCODED):
                    _length(recipe, step, piece, teacher, counted)
                    rows += 1
        if counted.told:
            yield f"{_where(number, step)}: of the first {rows} rows, {counted.told}"


def new_ends(recipe: Recipe, teacher: Checkpoint) -> Iterator[str]:
    """That answers will end at a token that the teacher's generation_config.json does not name, in words."""
    from transformers import GenerationConfig

    from halve.anatomy.configs import quiet
    from halve.model import measure
    from halve.text.turns import turn_end

    turn = turn_end(teacher.tokenizer) if recipe.align else None
    if turn is None:
        return
    with quiet():
        try:
            generation = GenerationConfig.from_pretrained(teacher.files, local_files_only=True)
        except OSError:  # transformers then takes what the config says
            generation = GenerationConfig.from_model_config(teacher.config)
    if turn not in (measure.named_ends(generation, teacher.tokenizer) or []):
        token = teacher.tokenizer.convert_ids_to_tokens(turn)
        yield (
            f"align: answers end at {token}, as in the chat template; the aligned student's generation_config.json will"
            " name it, the teacher's does not"
        )


def planned_tokens(recipe: Recipe, step: Alignment, teacher: Checkpoint) -> float:
    """Tokens on which a step will train: `tokens`, or an estimate from the first rows and the size of the files.

    0 where this cannot be told, as for a data set of the hub.
    """
    if step.tokens is not None:
        return float(step.tokens)
    from halve.align.examples import LeftOut
    from halve.model.checkpoint import Checkpoint

    total, known = 0.0, teacher if teacher.gguf else Checkpoint.open(teacher.folder)  # which downloads nothing
    for source in step.data:
        try:
            files = [] if source.startswith(sources.HUB) else sources.files(source)
            first = list(islice(sources.beginnings(source, _wanted(recipe, step)), _ENCODED)) if files else []
            rows = sum(_rows(path) for path in files)
            tokens = [_length(recipe, step, piece, known, LeftOut()) for piece in first]
        except (HalveError, OSError):
            continue  # reported by check
        if tokens:
            total += rows * sum(tokens) / len(tokens)
    return total * (step.passes or 1.0)


def like_corrections(recipe: Recipe, hidden: int) -> Iterator[Correct]:
    """Corrections that take as much memory and disk as the steps. `hidden` is the student's.

    Raises `RecipeError` for adapters of a higher rank.
    """
    for number, step in enumerate(recipe.align, 1):
        _require_rank(step, _where(number, step), hidden)
        yield _like_a_correction(step)


def _like_a_correction(step: Alignment) -> Correct:
    """A pair is two samples."""
    each = 1 if step.kind == "sft" else 2
    micro_batch = None if step.micro_batch is None else each * step.micro_batch
    shared = ("method", "lora_rank", "lora_alpha", "activation_checkpointing", "precision", "checkpoint_every")
    return Correct(
        tokens=1, batch=each * step.batch, micro_batch=micro_batch, **{key: getattr(step, key) for key in shared}
    )


def _where(number: int, step: Alignment) -> str:
    return f"step {number} of align ({step.kind})"


def _wanted(recipe: Recipe, step: Alignment) -> Wanted:
    from halve.align.examples import wanted_of

    return wanted_of(step, recipe.data)


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
    from halve.preflight.outcomes import require_every_outcome
    from halve.text.rendering import template_of

    key = "data.context" if step.context is None else f"context in {where}"
    measure.require_context(teacher.config, step.context or recipe.data.context, f"a sample of {where}", key=key)
    template_of(teacher.tokenizer, "align")

    def ranked(found: Sequence[PlannedRound]) -> None:
        _require_rank(step, where, found[-1].after.hidden)

    require_every_outcome(recipe, teacher, ranked, axes=("hidden",))


def _require_rank(step: Alignment, where: str, hidden: int) -> None:
    if step.method == "lora" and step.lora_rank > hidden:
        raise RecipeError(
            f"lora_rank {step.lora_rank} of {where} is larger than the student's hidden {hidden}",
            why="no matrix that reads or writes hidden states has a higher rank than that",
            fix=f"set lora_rank to {hidden} or less; 16 is usual",
        )


def _check_reward(recipe: Recipe, step: Alignment, source: str, where: str) -> None:
    from halve.align.rewards import require_classifier

    require_classifier(source, context=step.context or recipe.data.context, where=where)


def _check_rows(recipe: Recipe, step: Alignment, source: str, teacher: Checkpoint) -> None:
    """Read the beginning of every file, and write the first rows as tokens."""
    from halve.align.examples import LeftOut

    first = list(sources.beginnings(source, _wanted(recipe, step)))[:_ENCODED]
    if teacher.tokenizer.chat_template:  # else reported already
        for piece in first:
            _length(recipe, step, piece, teacher, LeftOut())


def _check_learned(recipe: Recipe, step: Alignment, teacher: Checkpoint, where: str) -> None:
    """Raise `CorpusError` if all rows of a step would be left out. Reads on until one teaches something."""
    from halve.align.examples import LeftOut

    if not teacher.tokenizer.chat_template or any(source.startswith(sources.HUB) for source in step.data):
        return
    counted, rows = LeftOut(), 0
    for source in step.data:
        for piece in sources.beginnings(source, _wanted(recipe, step)):
            if _length(recipe, step, piece, teacher, counted):
                return
            rows += 1
    if rows == sum(_rows(path) for source in step.data for path in sources.files(source)):
        raise CorpusError(
            f"{where} has no {'conversation' if step.kind == 'sft' else 'pair'} to learn from",
            why=counted.told,
            fix=counted.fix,
        )


def _rows(path: Path) -> int:
    """The rows of a file."""
    if ending(path) == ".parquet":
        return int(extra("pyarrow.parquet", path).ParquetFile(path).metadata.num_rows)
    with open_packed(path) as file:
        return sum(1 for line in file if line.strip())


def _length(recipe: Recipe, step: Alignment, piece: Piece, teacher: Checkpoint, counted: LeftOut) -> int:
    """The tokens of a row, at most those of its context, twice for a pair; those of new answers at most.

    0 for a row that is left out, which is then in `counted`.
    """
    from halve.align.examples import dialogues_of, encoded_pair
    from halve.text.rendering import encode_answers

    tokenizer, context = teacher.tokenizer, step.context or recipe.data.context
    if step.kind == "sft":
        return sum(len(talk.ids) for talk in dialogues_of([piece], step, recipe.data, tokenizer, context, counted))
    row = json.loads(piece.text)
    if step.answers is not None:
        prompt, _ = encode_answers(tokenizer, row["prompt"], (), tools=row.get(TOOLS), place=piece.place)
        if len(prompt) >= context:
            counted.add(f"have a prompt of over {context} tokens and are left out")
            return 0
        return 2 * min(len(prompt) + step.answer_tokens, context)
    pair = encoded_pair(row, piece.place, tokenizer, context=context, left_out=counted)
    return 0 if pair is None else 2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected)
