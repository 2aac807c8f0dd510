"""The papers' claims about what is closer to the teacher, on the rows of `real_model.py` and of `real_distill.py`.

A claim says that one row is closer to the teacher than another. Its effect is the KL of the other less its own, paired
over documents: held or reversed beyond two standard errors, inconclusive within. The verdicts of `halve study` on the
demo's teacher stand beside it. Of two trained rows, the number of tokens at which their curves cross is named too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ERRORS = 2.0
WIDTH, BLOCK, SINGLE = "plain Minitron width", "plain depth, block", "Shortened LLaMA, PPL"
GREEDY = "plain depth, greedy"


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
TRAINED = (Claim("Width beats depth, once trained", "2407.14679, Table 1", WIDTH, GREEDY, "not asked"),)
UNANSWERED = (
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
    return [*text, "", *trained_table(lines, paired, spelled)]


def trained_table(
    lines: Sequence[Line], paired: Callable[[Line, Line], tuple[float, float]], spelled: Callable[..., str]
) -> list[str]:
    """Every claim about two rows that were trained alike: at the end, and where the first one gets ahead."""
    how = ("ratio", "tokens", "batch", "seed")
    rows = {(*(line[key] for key in how), line["distilled"]): line for line in lines if "distilled" in line}
    text = []
    for claim in TRAINED:
        for *alike, name in rows:
            other = rows.get((*alike, claim.farther))
            if name == claim.closer and other is not None:
                own, (ratio, tokens, batch, seed) = rows[(*alike, name)], alike
                effect = paired(other, own)
                text.append(
                    f"| {claim.words} | {claim.source} | {ratio:.0%} | {tokens:,}, batch {batch}, seed {seed} |"
                    f" {spelled(effect)} | **{verdict(*effect)}** | {crossing(own['curve'], other['curve'])} |"
                )
    unanswered = [*UNANSWERED]
    if text:
        text = [
            "## The papers' claims, after the distillation",
            "",
            "| claim | source | ratio | tokens | KL less | here | it gets ahead |",
            "|---|---|---:|---|---:|---|---|",
            *text,
            "",
        ]
    else:
        unanswered = ["Where width and depth cross (2407.14679, Table 1): the two were not trained alike.", *unanswered]
    return [*text, "Not answered by these rows:", "", *(f"- {words}" for words in unanswered), ""]


def crossing(own: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> str:
    """Between which measurements a curve of (tokens, KL, perplexity) gets below another for good.

    >>> crossing([(0, 3.0), (10, 1.0), (20, 0.5)], [(0, 1.0), (10, 0.9), (20, 0.8)])
    'between 10 and 20 tokens'
    >>> crossing([(0, 3.0), (10, 1.0)], [(0, 1.0), (10, 0.9)]), crossing([(0, 1.0), (10, 0.5)], [(0, 2.0), (10, 0.9)])
    ('never', 'from the start')
    """
    behind = [i for i, (mine, theirs) in enumerate(zip(own, other, strict=True)) if mine[1] >= theirs[1]]
    if not behind:
        return "from the start"
    last = behind[-1]
    if last == len(own) - 1:
        return "never"
    return f"between {own[last][0]:,} and {own[last + 1][0]:,} tokens"


def verdict(effect: float, error: float) -> str:
    """What an effect says of a claim that it is above zero.

    >>> verdict(1.0, 0.4), verdict(-1.0, 0.4), verdict(0.7, 0.4)
    ('held', 'reversed', 'inconclusive')
    """
    if abs(effect) <= ERRORS * error:
        return "inconclusive"
    return "held" if effect > 0 else "reversed"
