"""Checks whether a teacher has learned the tokens around documents. One that it never learned is left out.

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
from halve.errors import HalveError
from halve.model import measure
from halve.model.checkpoint import Checkpoint, resolve_device
from halve.model.finite import came_out, require_finite
from halve.model.head import split
from halve.progress import Progress
from halve.recipe.schema import Boundary, Recipe
from halve.text import tokenize
from halve.text.tokenize import Marks

ABSURD = 1.5
"""A loss over this many times that of uniform guessing means that the model has never learned the token."""
BOUNDARY_SAMPLES = 8
"""The number of samples in which the loss around document boundaries is measured."""
_DOCUMENTS = (
    "Once there was a small boat that wanted to see the sea. It sailed all night. Then it was there. The end.",
    "The council met on Tuesday and approved the plans for the new bridge. There was no other business.",
    "def double(x):\n    return 2 * x\n\n\nprint(double(21))\n",
    "Question: How many legs does a spider have?\nAnswer: Eight.",
    "Thank you for your order. It will arrive on Friday.\n\nKind regards,\nThe bookshop",
    "1. Peel the apples.\n2. Cut them into slices.\n3. Bake them for half an hour.\n",
)


class BoundaryWarning(UserWarning):
    """The teacher has not learned the tokens that separate the documents of the recipe."""


def settled(recipe: Recipe, teacher: Checkpoint, *, cache: Path, progress: Progress) -> Boundary:
    """`data.boundary`, with `auto` decided by a check of the teacher.

    If the tokenizer puts BOS in front of documents, EOS is not needed to separate them. EOS is left out if the teacher
    never learned it: after each of a few plain documents, its loss is far above uniform guessing. Such a token costs
    tens of nats wherever it occurs and disturbs what follows. The check runs once; `cache` stores the result.

    Raises `CheckpointError` if the teacher's logits are not finite.
    """
    marks = tokenize.marks(teacher.tokenizer, recipe.data.boundary)
    if not _is_open(recipe, marks):
        return recipe.data.boundary
    assert marks.eos is not None
    what = f"{teacher.fingerprint} {tokenize.tokenizer_fingerprint(teacher.tokenizer)}"
    note = cache / f"{hashlib.sha256(what.encode()).hexdigest()[:32]}.end.json"
    if not note.exists():
        model = teacher.load_to_run(dtype=recipe.dtype, device=resolve_device(recipe.device))
        nats, even = end_nats(model, teacher.tokenizer, marks), math.log(split(model)[1].weight.shape[0])
        require_finite(f"the logits of {recipe.model}", nats, why=came_out(on="plain text"))
        write_json(note, sealed({"nats": nats, "even": even}))
        if nats > ABSURD * even:
            token = teacher.tokenizer.convert_ids_to_tokens(marks.eos)
            progress.say(
                f"data.boundary: the teacher never learned {token} (its loss is at least {nats:.1f} nats at the end"
                f" of a document, and {even:.1f} for uniform guessing); it is left out"
            )
    losses = read_sealed(note)
    return "bos" if losses["nats"] > ABSURD * losses["even"] else "auto"


def asked_documents(recipe: Recipe, teacher: Checkpoint) -> tuple[list[int], ...]:
    """The documents of the check in `settled`. Empty if there is no check, or no tokenizer yet."""
    try:
        tokenizer = Checkpoint.open(teacher.folder).tokenizer  # not `teacher.files`: nothing is downloaded for it
        marks = tokenize.marks(tokenizer, recipe.data.boundary)
    except HalveError:
        return ()
    return _shown(tokenizer, marks) if _is_open(recipe, marks) else ()


def _is_open(recipe: Recipe, marks: Marks) -> bool:
    asked = recipe.data.boundary == "auto" and recipe.data.reads_text
    return asked and marks.eos is not None and marks.follows is not None


def _shown(tokenizer: PreTrainedTokenizerBase, marks: Marks) -> tuple[list[int], ...]:
    """A few plain documents with BOS and EOS around them."""
    front, behind = ([token] if token is not None else [] for token in (marks.bos, marks.eos))
    return tuple([*front, *tokenizer(text, add_special_tokens=False)["input_ids"], *behind] for text in _DOCUMENTS)


def bounded(recipe: Recipe, boundary: Boundary) -> Recipe:
    """The recipe with another `data.boundary`."""
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"boundary": boundary})})


@torch.no_grad()
def end_nats(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, marks: Marks) -> float:
    """The lowest loss of EOS over a few plain documents, in nats. NaN if one of the losses is NaN."""
    assert marks.eos is not None
    body, head = split(model)
    losses = []
    for ids in _shown(tokenizer, marks):
        ids_1S = torch.tensor([ids], device=model.device)
        losses.append(float(measure.token_nll(head, body(ids_1S), ids_1S)[0, -1]))
    return math.nan if any(map(math.isnan, losses)) else min(losses)


@torch.no_grad()
def warn_of_boundaries(
    model: PreTrainedModel, samples_BS: Int[Tensor, "samples seq"], marks: Marks, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Warn with `BoundaryWarning` if a teacher's loss at document boundaries is far above uniform guessing.

    Measured at the token after a document and at the first token of the next document, in the first few samples.
    """
    (body, head), ids_BS = split(model), samples_BS[:BOUNDARY_SAMPLES].to(model.device)
    before_BT, targets_BT = ids_BS[:, :-1], ids_BS[:, 1:]
    special = torch.tensor(marks.between, dtype=torch.long, device=ids_BS.device)
    last_BT = targets_BT == (-1 if marks.eos is None else marks.eos)
    first_BT = torch.isin(before_BT, special) & ~torch.isin(targets_BT, special)
    first_BT[:, 0] &= marks.bos is None  # a sample may begin inside a document
    nats_BT = torch.cat([measure.token_nll(head, body(ids_1S), ids_1S) for ids_1S in torch.split(ids_BS, 1)])
    absurd = ABSURD * math.log(head.weight.shape[0])
    for boundaries_BT, which in ((last_BT, "at the end of documents"), (first_BT, "for the first token of documents")):
        nats = float(nats_BT[boundaries_BT].mean()) if boundaries_BT.any() else 0.0
        if nats > absurd:
            others = float(nats_BT[~(last_BT | first_BT)].mean())
            tokens = " ".join(tokenizer.convert_ids_to_tokens(list(marks.between)))
            warnings.warn(
                f"the teacher's loss is {nats:.1f} nats {which} and {others:.1f} elsewhere: it was not trained on"
                f" documents with {tokens or 'nothing'} between them; set data.boundary to what it was trained on",
                BoundaryWarning,
                stacklevel=2,
            )
