"""Which metrics of the harness belong to items. Only those are compared: models are paired item by item.

The harness gives a value for every item and metric, and then a function that makes one figure of them. Where that
function is a mean, the values are scores. Elsewhere they are only its parts: for F1, MCC and BLEU a pair of the right
answer and the given one, for a perplexity a log-likelihood. An item has no F1 of its own, so such metrics are left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np

_MEAN, _MEAN_OF_VERDICTS = "mean", "agg_inst_level_acc"
"""The harness's functions of scores, and of ifeval's lists of verdicts, by their names."""


def is_of_items(part: Any, metric: str, value: Any) -> bool:
    """Whether a metric of a part, which gave an item this value, is a mean over items, or over all their verdicts."""
    figure = getattr(part.aggregation().get(metric), "__name__", _MEAN)  # the harness's own default
    if isinstance(value, list):
        return figure == _MEAN_OF_VERDICTS
    return figure == _MEAN and isinstance(value, bool | int | float | np.bool_ | np.number)


@contextmanager
def figures_unread(parts: Mapping[str, Any]) -> Iterator[None]:
    """In this context the harness makes no figures of items. Nobody reads them, and some would fetch a model."""
    counts: dict[str, Any] = defaultdict(lambda: len)
    with ExitStack() as stack:
        for part in parts.values():
            stack.enter_context(mock.patch.object(part, "aggregation", return_value=counts))
        yield
