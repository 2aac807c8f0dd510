"""A study's results as Markdown and as a plot. Only results.json is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from halve.report import plots
from halve.report.plots import Interval
from halve.report.sections import Cell, estimate

METRICS = {
    "kl_before": "KL, before",
    "kl_after": "KL, after",
    "perplexity_before": "perplexity, before",
    "perplexity_after": "perplexity, after",
    "accuracy_before": "accuracy, before",
    "accuracy_after": "accuracy, after",
}
PLOTTED = {
    "kl_before": "KL to the teacher straight after the cut",
    "kl_after": "KL to the teacher after retraining",
    "perplexity_before": "Perplexity straight after the cut",
    "perplexity_after": "Perplexity after retraining",
    "accuracy_before": "Accuracy straight after the cut",
    "accuracy_after": "Accuracy after retraining",
}
_ACCENT, _PLAIN = "distilled", "teacher"

Results = Mapping[str, Any]


def markdown(results: Results, *, plot: str) -> str:
    """The whole page of a study; `plot` is the path of the plot, relative to the page."""
    setting, teacher = results["setting"], results["teacher"]
    parts = [f"# {results['title']}", results["question"], f"Source: arXiv {results['source']}."]
    if results["note"]:
        parts.append(results["note"].strip())
    parts += [
        f"![{results['title']}]({plot})",
        "## Results",
        "*Before* means straight after the cut, and *after* means after retraining. KL is the divergence from the"
        " teacher in nats per token, on held-out text. Lower is better, except for accuracy. ± is the standard error"
        " over the seeds. *Kept* is the share of the non-embedding parameters that remain.",
        arms_table(results),
        "## Verdicts",
        "The effect is the difference between two arms, computed seed by seed. It is positive where the claim holds. ±"
        " is the standard error over the seeds. A verdict is inconclusive if the effect does not differ significantly"
        " from zero (Student's t-test at 5 %).",
        claims_table(results),
    ]
    parts += [f"- {claim['text']}: {claim['tie']}." for claim in results["claims"] if _is_tie(claim)]
    parts += [
        "## How it was measured",
        f"On {results['date']}, by\n\n```sh\n{results['command']}\n```",
        f"Teacher: {teacher['name']}, {teacher['params']:,} parameters ({teacher['non_embedding_params']:,} without"
        f" embeddings), perplexity {_text(teacher['perplexity'])}. Seeds: {', '.join(map(str, results['seeds']))}.\n\n"
        f"Each seed has its own {setting['calibration_samples']} calibration samples, its own order of the text and its"
        f" own corrected teacher. Unless an arm says otherwise, retraining takes {setting['tokens']:,} tokens, in steps"
        f" of {setting['batch']} samples with {setting['context']} tokens, at a peak learning rate of"
        f" {setting['lr']:g}. Results are measured on {setting['heldout_tokens']:,} held-out tokens. Machine:"
        f" {results['machine']['device']}, torch {results['versions'].get('torch', '?')}, transformers"
        f" {results['versions'].get('transformers', '?')}.",
    ]
    return "\n\n".join(parts) + "\n"


def arms_table(results: Results) -> str:
    """The results of every arm next to the paper's."""
    arms, metrics = results["arms"], results["metrics"]
    papers = list(dict.fromkeys(key for arm in arms for key in arm["paper"]))
    head = ["arm", "kept", *(METRICS[metric] for metric in metrics), *(f"paper: {key}" for key in papers)]
    rows = []
    for arm in arms:
        figures = [_text(arm["metrics"][metric], percent=metric.startswith("accuracy")) for metric in metrics]
        papers_cells = [arm["paper"].get(key, "") for key in papers]
        rows.append([arm["label"], f"{100 * arm['kept']:.1f} %", *figures, *papers_cells])
    return markdown_table(head, rows)


def claims_table(results: Results) -> str:
    """Every claim, the effect and the verdict."""
    rows = [
        [
            claim["text"],
            METRICS[claim["metric"]],
            claim["paper"],
            _text(claim["effect"], percent=claim["metric"].startswith("accuracy"), signed=True),
            f"**{claim['verdict']}**",
        ]
        for claim in results["claims"]
    ]
    return markdown_table(["claim", "metric", "paper", "effect here", "verdict"], rows, numbers=False)


def plot(results: Results) -> str:
    """Dot plots of the study's main metrics as one self-contained file; the first arm's dot is in color."""
    panels = []
    for metric in results["plot"]:
        scale = 100 if metric.startswith("accuracy") else 1
        rows = []
        for i, arm in enumerate(results["arms"]):
            estimated = arm["metrics"][metric]
            if estimated is not None:
                error = None if estimated["stderr"] is None else scale * estimated["stderr"]
                rows.append(Interval(arm["label"], _PLAIN if i else _ACCENT, scale * estimated["mean"], error))
        if rows:
            title = PLOTTED[metric] + (", percent" if scale == 100 else "")
            panels.append((title, plots.dots(rows, title=title)))
    return plots.sheet(panels, title=results["title"])


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = True) -> str:
    """A Markdown table; with `numbers`, columns after the first are aligned to the right."""
    rule = "|---" + ("|---:" if numbers else "|---") * (len(head) - 1) + "|"
    lines = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in (head, *rows)]
    return "\n".join([lines[0], rule, *lines[1:]])


def _is_tie(claim: Mapping[str, Any]) -> bool:
    return bool(claim["tie"]) and claim["verdict"] == "inconclusive"


def _text(one: Mapping[str, Any] | None, *, percent: bool = False, signed: bool = False) -> str:
    if one is None:
        return "-"
    cell: Cell = estimate({"value": one["mean"], "stderr": one["stderr"]}, percent=percent, signed=signed)
    return f"{cell.value} ± {cell.error}" if cell.error else cell.value
