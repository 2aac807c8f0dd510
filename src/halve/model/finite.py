"""NaN and infinity: one check and one error for weights, activations, logits and losses."""

from __future__ import annotations

import math

from torch import Tensor

from halve.errors import CheckpointError, HalveError


def is_finite(*values: Tensor | float) -> bool:
    """Whether no value is or holds NaN or infinity.

    >>> is_finite(1.0, 2.0), is_finite(1.0, math.nan)
    (True, False)
    """
    return all(bool(value.isfinite().all()) if isinstance(value, Tensor) else math.isfinite(value) for value in values)


def came_out(*, of: str = "the model", on: str = "the calibration samples") -> str:
    """The usual `why` of `not_finite`: where it was noticed."""
    return f"NaN or infinity came out of {of} on {on}"


def float32_or(otherwise: str = "fetch the checkpoint again") -> str:
    """The usual `fix` of `not_finite`: float32 against an overflow of half precision, and what to do otherwise."""
    return f"try dtype: float32; if that does not help, {otherwise}"


def not_finite(
    what: str,
    *,
    where: str = "",
    verb: str = "are",
    why: str | None = None,
    fix: str | None = None,
    kind: type[HalveError] = CheckpointError,
) -> HalveError:
    """The error about a value that is not finite, with the usual `why` and `fix` if none are given.

    >>> print(not_finite("activations", where=" at model.layers.3"))
    activations are not finite at model.layers.3
      why: NaN or infinity came out of the model on the calibration samples
      fix: try dtype: float32; if that does not help, fetch the checkpoint again
    """
    return kind(f"{what} {verb} not finite{where}", why=why or came_out(), fix=fix or float32_or())


def require_finite(
    what: str,
    *values: Tensor | float,
    where: str = "",
    verb: str = "are",
    why: str | None = None,
    fix: str | None = None,
) -> None:
    """Raise the `CheckpointError` of `not_finite` if a value is not finite."""
    if not is_finite(*values):
        raise not_finite(what, where=where, verb=verb, why=why, fix=fix)
