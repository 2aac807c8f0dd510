"""The training of a tournament's finalists, from the sections `distill` and `search.tournament`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

from pydantic import ValidationError

from halve.errors import RecipeError
from halve.recipe.trainings import Distill
from halve.recipe.values import MOST

if TYPE_CHECKING:
    from halve.recipe.schema import Recipe

TOURNAMENT_SHARE: Final = 0.4
"""A tournament's winner trains on this share of the tokens of `distill`. With eight finalists, three rungs and room for
ties, its rungs then take at most a quarter of the tokens that training all of them takes."""
_OF_THE_TEACHER = ("teacher_device", "offload_teacher", "shard_teacher")
"""Keys of a teacher that runs; in a tournament none does."""


def adapters_rank(recipe: Recipe) -> int | None:
    """The rank of the adapters that a tournament trains. None if it trains all weights."""
    assert recipe.search is not None
    asked = recipe.search.tournament
    return asked.lora_rank if asked.train == "lora" else None


def tournament_training(recipe: Recipe) -> Distill:
    """The training of each finalist, up to the last rung of the tournament.

    It is that of `distill`, or the default one, with the settings of the section `search.tournament`. All finalists
    read the same cached answers of the teacher, and are measured on as many held-out samples as the evaluation. Only
    the rungs are measured. Phases and intermediate states are left out: a tournament ends before most phases begin.

    Raises `RecipeError` if the number of tokens is not known, or values do not fit each other.
    """
    assert recipe.search is not None
    asked = recipe.search.tournament
    if recipe.distill is not None:
        tokens = asked.tokens or max(1, round(TOURNAMENT_SHARE * recipe.distill.tokens))
    elif asked.tokens is not None:
        tokens = asked.tokens
    else:
        raise RecipeError(
            "the tournament does not know how long to train",
            why="search.tournament.tokens is a share of distill.tokens by default, and there is no distill",
            fix="give search.tournament.tokens, add distill, or choose search.method: trial",
        )
    base = recipe.distill or Distill(tokens=tokens)
    batch = asked.batch or base.batch
    steps = math.ceil(tokens / (batch * recipe.data.context))
    update: dict[str, Any] = {
        "tokens": tokens,
        "batch": batch,
        "micro_batch": asked.micro_batch or (base.micro_batch if asked.batch is None else None),
        "lr": asked.lr or base.lr,
        "min_lr": min(base.min_lr, asked.lr or base.lr),
        "warmup_steps": min(base.warmup_steps, math.ceil(steps / 10)),
        "objective": "kl" if set(base.terms) == {"ce"} else base.objective,
        "on_spike": asked.on_spike or base.on_spike,
        "cache": "logits" if base.cache == "logits" else "hidden",
        "eval_every": MOST,
        "eval_samples": recipe.evaluate.samples,
    }
    plain = base.model_dump(exclude={"phases", "intermediate", "baselines", *_OF_THE_TEACHER})
    try:
        return Distill.model_validate({**plain, **update})
    except ValidationError as error:
        raise RecipeError(
            "search.tournament does not fit distill",
            why=error.errors()[0]["msg"].removeprefix("Value error, "),
            fix="give search.tournament a batch, a micro_batch and a learning rate that fit each other",
        ) from None
