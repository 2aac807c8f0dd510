"""NaN and infinity: one check and one wording, whatever they come out of."""

from __future__ import annotations

import math

from torch import Tensor

from halve.errors import CheckpointError, HalveError


def is_finite(*values: Tensor | float) -> bool:
    """Whether there is neither NaN nor infinity in any value.

    >>> is_finite(1.0, 2.0), is_finite(1.0, math.nan)
    (True, False)
    """
    return all(bool(value.isfinite().all()) if isinstance(value, Tensor) else math.isfinite(value) for value in values)


def came_out(*, of: str = "the model", on: str = "the calibration samples") -> str:
    """Where it was noticed, as the usual `why` of `not_finite`."""
    return f"NaN or infinity came out of {of} on {on}"


def float32_or(otherwise: str = "fetch the checkpoint again") -> str:
    """What helps where a half precision overflows, and what to do otherwise, as the usual `fix` of `not_finite`."""
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
    """The error that says so, with the usual `why` and `fix` if none are given.

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
    """Raise the `CheckpointError` of `not_finite` where a value is not."""
    if not is_finite(*values):
        raise not_finite(what, where=where, verb=verb, why=why, fix=fix)
