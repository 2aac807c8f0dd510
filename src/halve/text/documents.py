"""Where documents end inside packed samples, and whether a model keeps them apart there.

Shapes: B batch, S seq, D hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from halve.errors import AnatomyError, TrainError
from halve.text.tokenize import Separator

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LENGTHS = [5, 1, 7, 3]  # of the documents that the check packs
_BOUNDARIES = (_LENGTHS, _LENGTHS[::-1])


def positions(ids: Int[Tensor, "batch seq"], separator: Separator) -> Int[Tensor, "batch seq"]:
    """The position of each token in its own document, from 0. The first document of a sample begins with the sample.

    >>> positions(torch.tensor([[7, 0, 8, 9, 0, 0, 6]]), Separator(0, ends=True)).tolist()
    [[0, 1, 0, 1, 2, 0, 0]]
    """
    starts_BS = ids == separator.token
    if separator.ends:
        starts_BS = starts_BS.roll(1, dims=1)
    starts_BS[:, 0] = True
    places_S = torch.arange(ids.shape[1], device=ids.device)
    return places_S - torch.where(starts_BS, places_S, 0).cummax(dim=1).values


@torch.no_grad()
def require_apart(model: PreTrainedModel) -> None:
    """Prove that `model` reads packed documents as it reads each document alone.

    Documents are marked by positions that restart at 0. transformers builds attention masks from such positions, but
    only in families whose code passes them on. So this is tested: two samples of four documents each, with different
    boundaries, are compared with every document alone. They must be closer to that than to the same samples read as one
    text. Raises `AnatomyError` where they are not.
    """
    vocab = model.get_input_embeddings().weight.shape[0]
    ids_BS = torch.randint(vocab, (2, sum(_LENGTHS)), generator=torch.Generator().manual_seed(0)).to(model.device)
    packed, alone, joined = (read(model, ids_BS) for read in (_packed, _alone, _joined))
    size = alone.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    gap, whole = (float((states - alone).abs().max() / size) for states in (packed, joined))
    tolerance = 1e-3 if packed.dtype in (torch.float32, torch.float64) else 5e-2
    if not gap < min(tolerance, whole / 2):
        raise AnatomyError(
            f"{type(model).__name__} does not keep packed documents apart",
            why=f"its hidden states differ by {gap:.2g} of their size from those of each document alone",
            fix="set data.documents to joined",
        )


def require_separator(separator: Separator | None) -> Separator:
    """Raise `TrainError` where neither a document's end nor its beginning is marked."""
    if separator is None:
        raise TrainError(
            "documents cannot be kept apart",
            why="neither an end-of-sequence nor a beginning-of-sequence token stands between them to tell them by",
            fix="set data.documents to joined, data.boundary to auto, or give the tokenizer an eos_token",
        )
    return separator


def _packed(model: PreTrainedModel, ids_BS: Tensor) -> Tensor:
    places_BS = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in _BOUNDARIES])
    return _hidden(model, ids_BS, position_ids=places_BS.to(model.device))


def _alone(model: PreTrainedModel, ids_BS: Tensor) -> Tensor:
    rows = (ids_S.split(lengths) for ids_S, lengths in zip(ids_BS, _BOUNDARIES, strict=True))
    return torch.stack([torch.cat([_hidden(model, part[None])[0] for part in row]) for row in rows])


def _joined(model: PreTrainedModel, ids_BS: Tensor) -> Tensor:
    return _hidden(model, ids_BS)


def _hidden(model: PreTrainedModel, ids_BS: Tensor, **where: Tensor) -> Tensor:
    hidden_BSD: Tensor = model.base_model(input_ids=ids_BS, use_cache=False, **where)[0]
    return hidden_BSD
