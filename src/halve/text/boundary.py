"""What a teacher makes of the tokens around documents: one that it never learned is left out, or warned about.

Legend: B samples, S tokens of a sample, T predictions of a sample (S - 1).
"""

from __future__ import annotations

import hashlib
import math
import warnings
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halve.disk.files import read_sealed, sealed, write_json
from halve.errors import CheckpointError, HalveError
from halve.model import measure
from halve.model.checkpoint import Checkpoint, resolve_device
from halve.model.head import split
from halve.progress import Progress
from halve.recipe.schema import Boundary, Recipe
from halve.text import tokenize
from halve.text.tokenize import Marks

ABSURD = 1.5
"""Nats over those of guessing evenly among all tokens, beyond which a model is sure that a token never comes."""
BORDER_SAMPLES = 8
"""That a teacher's loss around borders is looked at in."""
_DOCUMENTS = (
    "Once there was a small boat that wanted to see the sea. It sailed all night. Then it was there. The end.",
    "The council met on Tuesday and approved the plans for the new bridge. There was no other business.",
    "def double(x):\n    return 2 * x\n\n\nprint(double(21))\n",
    "Question: How many legs does a spider have?\nAnswer: Eight.",
    "Thank you for your order. It will arrive on Friday.\n\nKind regards,\nThe bookshop",
    "1. Peel the apples.\n2. Cut them into slices.\n3. Bake them for half an hour.\n",
)


class BoundaryWarning(UserWarning):
    """The teacher does not know what stands between the recipe's documents."""


def settled(recipe: Recipe, teacher: Checkpoint, *, cache: Path, progress: Progress) -> Boundary:
    """`data.boundary` with what `auto` leaves to the recipe's teacher decided.

    Where the tokenizer puts a token in front of documents, the token behind them is not needed to tell them apart. It
    is left out if the teacher never learned it: after each of a few plain documents it finds the end absurd. Such a
    token costs tens of nats wherever it comes and spoils what is read behind it. Asked once; `cache` keeps the answer.

    Raises `CheckpointError` where the teacher's logits are not finite.
    """
    marks = tokenize.marks(teacher.tokenizer, recipe.data.boundary)
    if not _is_open(recipe, marks):
        return recipe.data.boundary
    assert marks.eos is not None
    what = f"{teacher.fingerprint} {tokenize.tokenizer_fingerprint(teacher.tokenizer)}"
    note = cache / f"{hashlib.sha256(what.encode()).hexdigest()[:32]}.end.json"
    if not note.exists():
        model = teacher.load(dtype=recipe.dtype, device=resolve_device(recipe.device))
        nats, even = end_nats(model, teacher.tokenizer, marks), math.log(split(model)[1].weight.shape[0])
        if not math.isfinite(nats):
            raise CheckpointError(
                f"the logits of {recipe.model} are not finite",
                why="NaN or infinity came out of the model on plain text",
                fix="try dtype: float32; if that does not help, fetch the checkpoint again",
            )
        write_json(note, sealed({"nats": nats, "even": even}))
        if nats > ABSURD * even:
            token = teacher.tokenizer.convert_ids_to_tokens(marks.eos)
            progress.say(
                f"data.boundary: the teacher never learned {token} (at least {nats:.1f} nats at a document's end,"
                f" guessing evenly {even:.1f}); it is left out"
            )
    found = read_sealed(note)
    return "bos" if found["nats"] > ABSURD * found["even"] else "auto"


def asked_documents(recipe: Recipe, teacher: Checkpoint) -> tuple[list[int], ...]:
    """The tokens that `settled` shows the teacher; none where it asks nothing, or the tokenizer is not at hand yet."""
    try:
        tokenizer = Checkpoint.open(teacher.folder).tokenizer  # not `teacher.files`: nothing is downloaded for it
        marks = tokenize.marks(tokenizer, recipe.data.boundary)
    except HalveError:
        return ()
    return _shown(tokenizer, marks) if _is_open(recipe, marks) else ()


def _is_open(recipe: Recipe, marks: Marks) -> bool:
    return recipe.data.boundary == "auto" and marks.eos is not None and marks.follows is not None


def _shown(tokenizer: PreTrainedTokenizerBase, marks: Marks) -> tuple[list[int], ...]:
    """A few plain documents with the tokens around them."""
    front, behind = ([token] if token is not None else [] for token in (marks.bos, marks.eos))
    return tuple([*front, *tokenizer(text, add_special_tokens=False)["input_ids"], *behind] for text in _DOCUMENTS)


def bounded(recipe: Recipe, boundary: Boundary) -> Recipe:
    """The recipe with another `data.boundary`."""
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"boundary": boundary})})


@torch.no_grad()
def end_nats(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, marks: Marks) -> float:
    """The fewest nats that the token behind a document costs a model, of a few plain documents; NaN if one is NaN."""
    assert marks.eos is not None
    body, head = split(model)
    found = []
    for ids in _shown(tokenizer, marks):
        ids_1S = torch.tensor([ids], device=model.device)
        found.append(float(measure.token_nll(head, body(ids_1S), ids_1S)[0, -1]))
    return math.nan if any(map(math.isnan, found)) else min(found)


@torch.no_grad()
def warn_of_borders(
    model: PreTrainedModel, samples_BS: Int[Tensor, "samples seq"], marks: Marks, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Warn with `BoundaryWarning` where a teacher's loss around the borders of documents is out of all proportion.

    Looked at are, in the first few samples, the token behind a document and the first of the next one.
    """
    (body, head), ids_BS = split(model), samples_BS[:BORDER_SAMPLES].to(model.device)
    before_BT, targets_BT = ids_BS[:, :-1], ids_BS[:, 1:]
    special = torch.tensor(marks.between, dtype=torch.long, device=ids_BS.device)
    last_BT = targets_BT == (-1 if marks.eos is None else marks.eos)
    first_BT = torch.isin(before_BT, special) & ~torch.isin(targets_BT, special)
    first_BT[:, 0] &= marks.bos is None  # a sample may begin inside a document
    nats_BT = torch.cat([measure.token_nll(head, body(ids_1S), ids_1S) for ids_1S in torch.split(ids_BS, 1)])
    absurd = ABSURD * math.log(head.weight.shape[0])
    for borders_BT, which in ((last_BT, "at the end of documents"), (first_BT, "for the first token of documents")):
        nats = float(nats_BT[borders_BT].mean()) if borders_BT.any() else 0.0
        if nats > absurd:
            others = float(nats_BT[~(last_BT | first_BT)].mean())
            tokens = " ".join(tokenizer.convert_ids_to_tokens(list(marks.between)))
            warnings.warn(
                f"the teacher loses {nats:.1f} nats {which}, {others:.1f} elsewhere: it was not trained on documents"
                f" with {tokens or 'nothing'} between them; set data.boundary to what it was trained on",
                BoundaryWarning,
                stacklevel=2,
            )
