"""IFEval's verdicts by the harness's scorer, the same each time.

`keywords:letter_frequency` asks for a letter, and in one row of IFEval for "#". The scorer then takes a letter at
random for each verdict, as its authors' does. So each answer is judged from the same seed, with which that row gets the
verdicts that the authors stored for GPT-4's answer.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

_SEED = 0


def ifeval_verdicts(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """The strict and loose verdicts on an answer: for the prompt, and for each of its instructions (2311.07911)."""
    from lm_eval.tasks.ifeval import utils

    before = random.getstate()
    random.seed(_SEED)
    try:
        verdicts: dict[str, Any] = utils.process_results(doc, results)
    finally:
        random.setstate(before)
    return verdicts
