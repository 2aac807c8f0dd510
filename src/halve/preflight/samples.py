"""Whether a recipe's text gives enough samples, checked before a run if the text is short.

Short text is tokenized as in a run, into a folder that is thrown away. If a run has tokenized the text before, its
token files are used.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from halve.progress import SILENT
from halve.recipe.rounds import rounds, trainings
from halve.recipe.schema import Boundary, Recipe
from halve.text import sources
from halve.text.rows import Wanted

if TYPE_CHECKING:
    from halve.model.checkpoint import Checkpoint
    from halve.text.rendering import Chat

_SHORT_CHARS = 1 << 20
"""Characters that are tokenized in a second. Longer text gives many samples, unless these are long."""
_CHARS_A_TOKEN = 16


def check_samples(recipe: Recipe, teacher: Checkpoint, cache: Path | None) -> None:
    """Raise `CorpusError` for text with too few samples, or with tokens that the model does not know.

    `cache` is the run's folder of token files. A `RunError` names one that was changed.
    """
    _require_tried(recipe, teacher, lambda wanted: wanted)
    if any(source.startswith(sources.HUB) for source, _ in read_as(recipe)):
        return
    with _opened(recipe, teacher, cache) as opened:
        if opened is not None:
            _look(*opened, teacher)


@contextmanager
def _opened(recipe: Recipe, teacher: Checkpoint, cache: Path | None) -> Iterator[tuple[Recipe, Path] | None]:
    """The recipe with its boundary decided, and a folder in which its text is or can quickly be tokenized."""
    from halve.text.boundary import bounded

    plain = recipe.model_copy(update={"data": recipe.data.model_copy(update={"workers": 1})})
    for boundary in _settled(recipe, teacher):
        if cache is not None and cache.is_dir() and _is_tokenized(bounded(plain, boundary), teacher, cache):
            yield bounded(plain, boundary), cache
            return
    if not _is_short(recipe):
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="halve-check-") as scratch:
        yield plain, Path(scratch)


def _settled(recipe: Recipe, teacher: Checkpoint) -> tuple[Boundary, ...]:
    """The values that a run may have decided for `data.boundary` (see `text.boundary.settled`)."""
    from halve.text import tokenize

    asked = recipe.data.boundary
    text = asked == "auto" and recipe.data.reads_text
    open_ = text and tokenize.marks(teacher.tokenizer, asked).follows is not None
    return ("auto", "bos") if open_ else (asked,)


def _is_tokenized(recipe: Recipe, teacher: Checkpoint, cache: Path) -> bool:
    """Whether the token files of all texts are there. Raises `RunError` for one that was changed."""
    from halve.text import corpus

    how = {"tokenizer": teacher.tokenizer, "boundary": recipe.data.boundary, "text_field": recipe.data.text_field}
    token_files = [corpus.known(listed, **how, chat=chat, cache=cache) for listed, chat in _texts(recipe)]
    return None not in token_files


def _is_short(recipe: Recipe) -> bool:
    """Whether all text together is short, or not long compared with the longest sample."""
    phases = [phase for training in trainings(recipe).values() for phase in training.phases]
    longest = max([recipe.data.context, *(phase.context or 0 for phase in phases)])
    left = max(_SHORT_CHARS, _CHARS_A_TOKEN * longest)
    for source, wanted in read_as(recipe):
        for piece in sources.read_documents(source, wanted):
            left -= len(piece.text)
            if left < 0:
                return False
    return True


def _look(recipe: Recipe, cache: Path, teacher: Checkpoint) -> None:
    """Make the first samples of every stage."""
    from halve.cut.score import calibration
    from halve.text import corpus
    from halve.text.conversation_samples import samples_of
    from halve.text.course import open_course
    from halve.text.mixture import open_mixture
    from halve.text.opened import require_embedded

    text = {"cache": cache, "tokenizer": teacher.tokenizer}
    for split in ("train", "valid"):
        require_embedded(recipe, teacher, split, cache=cache, progress=SILENT)
    samples_of(corpus.open_split(recipe, "valid", **text), recipe.data.context, recipe.seed)
    mixture = open_mixture(recipe, **text)
    vocab = teacher.config.get_text_config().vocab_size
    calibration.require_calibration(mixture.calibration(recipe.score.samples), vocab=vocab)
    _require_tried(recipe, teacher, lambda wanted: len(mixture.calibration(wanted)))
    for training in trainings(recipe).values():
        open_course(recipe, training, **text)


def _require_tried(recipe: Recipe, teacher: Checkpoint, found: Callable[[int], int]) -> None:
    """Raise `CorpusError` if a trial gets too few samples. `found` says how many there are of those that are wanted."""
    from halve.cut import trial
    from halve.cut.plan.shapes import to_try
    from halve.cut.repair.budget import samples_needed
    from halve.preflight.sizes import planned_rounds

    for part, shape in zip(rounds(recipe), planned_rounds(recipe, teacher), strict=True):
        searched = part.search is not None and part.search.method != "additive"
        if searched or to_try(shape.student, part.prune):
            wanted = max(samples_needed(part.prune, shape.before.sizes, part.data.context), part.score.samples)
            trial.require_tried(found(wanted), searched=searched)


def _texts(recipe: Recipe) -> list[tuple[Sequence[str], Chat | None]]:
    """The sources of each token file, and how they are read."""
    from halve.text.rendering import Chat

    data = recipe.data
    parts = data.train.values() if isinstance(data.train, dict) else ()
    listed = [(part.sources, part.plain) for part in parts] or [(data.train_sources, False)]
    return [(sources_, Chat.of(data, plain=plain)) for sources_, plain in (*listed, (data.valid, False))]


def read_as(recipe: Recipe) -> list[tuple[str, Wanted]]:
    """Each source, and what is wanted of its rows."""
    plain = Wanted(recipe.data.text_field)
    wanted = [(source, chat.wanted if chat else plain) for listed, chat in _texts(recipe) for source in listed]
    return list(dict.fromkeys(wanted))
