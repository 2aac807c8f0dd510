"""The text that a training stage reads: tokenized, and checked against the models that will read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase

from halve.errors import TokenizerError
from halve.model import measure
from halve.model.checkpoint import Checkpoint
from halve.progress import Progress
from halve.recipe.schema import Recipe, Training
from halve.text.batch import Batch
from halve.text.corpus import Tokens, open_split
from halve.text.course import Course, open_course, open_heldout
from halve.text.mixture import open_texts


@dataclass(frozen=True)
class Text:
    """The samples of every training step, and the held-out samples for measurements."""

    tokenizer: PreTrainedTokenizerBase
    course: Course
    heldout: Batch


def require_embedded(
    recipe: Recipe, teacher: Checkpoint, split: Literal["train", "valid"], *, cache: Path, progress: Progress
) -> None:
    """Tokenize text if necessary. Refuse it if it holds a token without an embedding in the model.

    Raises `CorpusError`, also for text that cannot be read.
    """
    tokenizer = teacher.tokenizer
    if split == "valid":
        files: Sequence[Tokens] = [open_split(recipe, split, cache=cache, tokenizer=tokenizer, progress=progress)]
    else:
        files = open_texts(recipe, cache=cache, tokenizer=tokenizer, progress=progress).tokens
    teacher.require_embedded(max(tokens.largest for tokens in files), f"the text of data.{split}")


def open_text(recipe: Recipe, training: Training, *models: Checkpoint, cache: Path, progress: Progress) -> Text:
    """Tokenize text with the first model's tokenizer. `cache` is the run's folder of token files.

    Raises `TokenizerError` and `TrainError` for a model that does not fit the tokens or the context, and `CorpusError`.
    """
    tokenizer = models[0].tokenizer
    for model in models:
        model.require_tokenizer()
        if model.tokenizer.get_vocab() != tokenizer.get_vocab():
            raise TokenizerError(
                f"{model.source} has another tokenizer than {models[0].source}",
                why="they split text into different tokens, so the distributions of the models cannot be compared",
                fix="use a student with the teacher's tokenizer",
            )
        measure.require_context(model.config, recipe.data.context, "a sample")
    require_embedded(recipe, models[0], "train", cache=cache, progress=progress)
    course = open_course(recipe, training, cache=cache, tokenizer=tokenizer, progress=progress)
    heldout = open_heldout(recipe, training, cache=cache, tokenizer=tokenizer, progress=progress)
    return Text(tokenizer, course, heldout)
