"""The papers' claims about what is closer straight after the cut, on the rows of `real_model.py`.

A claim says that one row is closer to the teacher than another. Its effect is the KL of the other less its own, paired
over documents: held or reversed beyond two standard errors, inconclusive within. The verdicts of `halve study` on the
demo's teacher stand beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ERRORS = 2.0
WIDTH, BLOCK, SINGLE = "plain Minitron width", "plain depth, block", "Shortened LLaMA, PPL"


@dataclass(frozen=True)
class Claim:
    """`closer` is closer to the teacher than `farther`, says a paper."""

    words: str
    source: str
    closer: str
    farther: str
    on_toys: str
    """The verdict on the demo's teacher at 50 % (docs/studies)."""


CLAIMS = (
    Claim("Width beats a block of layers", "2408.11796, Figure 6", WIDTH, BLOCK, "reversed"),
    Claim("Width beats single layers by loss", "2408.11796, Figure 6", WIDTH, SINGLE, "not asked"),
    Claim("A block of layers beats width", "2407.14679, Table 1", BLOCK, WIDTH, "held"),
    Claim("Single layers by loss beat a block", "2408.11796, Figure 7", SINGLE, BLOCK, "held"),
)
UNANSWERED = (
    "Where width and depth cross during the distillation (2407.14679, Table 1): no depth cut was trained.",
    "A block keeps more of Winogrande than single layers (2408.11796, Figure 8): the teacher is at chance there.",
    "KL alone beats cross-entropy, and a corrected teacher beats the original one: not trained.",
)
Line = Mapping[str, Any]


def claims_table(
    lines: Sequence[Line], paired: Callable[[Line, Line], tuple[float, float]], spelled: Callable[..., str]
) -> list[str]:
    """Every claim at every ratio whose two rows were measured."""
    rows = {(line["ratio"], line["row"]): line for line in lines if "ratio" in line and "row" in line}
    text = [
        "## The papers' claims, straight after the cut",
        "",
        "One seed; errors are over documents.",
        "",
        "| claim | source | ratio | KL less | here | on the demo's teacher |",
        "|---|---|---:|---:|---|---|",
    ]
    for claim in CLAIMS:
        for ratio in sorted({ratio for ratio, _ in rows}, reverse=True):
            if (ratio, claim.closer) in rows and (ratio, claim.farther) in rows:
                effect = paired(rows[ratio, claim.farther], rows[ratio, claim.closer])
                text.append(
                    f"| {claim.words} | {claim.source} | {ratio:.0%} | {spelled(effect)} | **{verdict(*effect)}** |"
                    f" {claim.on_toys} |"
                )
    return [*text, "", "Not answered by these rows:", "", *(f"- {words}" for words in UNANSWERED), ""]


def verdict(effect: float, error: float) -> str:
    """What an effect says of a claim that it is above zero.

    >>> verdict(1.0, 0.4), verdict(-1.0, 0.4), verdict(0.7, 0.4)
    ('held', 'reversed', 'inconclusive')
    """
    if abs(effect) <= ERRORS * error:
        return "inconclusive"
    return "held" if effect > 0 else "reversed"
