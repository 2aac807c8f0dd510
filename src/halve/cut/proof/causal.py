"""Whether a model is causal, that is, predicts only from earlier tokens.

On a random twin, a later token must not change the logits of earlier ones.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from halve.anatomy import Anatomy
from halve.anatomy.configs import build, quiet
from halve.cut.proof.twins import fixed_ids, random_twin
from halve.errors import AnatomyError

_SAME = 1e-4
_QUICK = 2**25
"""The largest twin that is run for this check. A larger one is left to the proof."""


def check_causal(anatomy: Anatomy) -> None:
    """Raise `AnatomyError` for a model that looks ahead. Tested on a small twin, in a fraction of a second.

    A twin that does not run, or is too large, is left to the proof.
    """
    try:
        twin = anatomy.twin()
        if sum(p.numel() for p in build(twin.config, device="meta").parameters()) > _QUICK:
            return
        model = random_twin(twin, seed=0)
        gap = looks_ahead(model, twin)
    except Exception:  # a family's own code may raise anything at sizes that it was not written for
        return
    _require(anatomy, gap)


def require_causal(model: PreTrainedModel, twin: Anatomy) -> None:
    """Raise `AnatomyError` if this twin looks ahead."""
    _require(twin, looks_ahead(model, twin))


def looks_ahead(model: PreTrainedModel, twin: Anatomy) -> float:
    """How much the last token changes the logits of the tokens before it."""
    ids = fixed_ids(twin)
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % twin.sizes.vocab
    return float((_earlier(model, ids) - _earlier(model, other)).abs().max())


def _earlier(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad(), quiet():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
        return logits[:, :-1]


def _require(anatomy: Anatomy, gap: float) -> None:
    if gap > _SAME:
        raise AnatomyError(
            f"{anatomy.family} is no causal language model as its config has it",
            why=f"on a small random twin, a later token changes the logits of earlier ones, by {gap:.2g}",
            fix="give a decoder; if these weights were trained as one, write is_decoder: true into config.json",
        )
