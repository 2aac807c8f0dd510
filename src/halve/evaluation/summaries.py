"""The score of a summary, for XL-Sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def rouge_of_summary(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """ROUGE-L (F1, with stemming) of the first result against the article's own summary."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return {"rougeL": float(scorer.score(doc["summary"], results[0])["rougeL"].fmeasure)}
