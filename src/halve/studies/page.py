"""A study's results as Markdown and as a plot; reads results.json and nothing else."""

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
    """The whole page of a study; `plot` is the drawing's path from there."""
    setting, teacher = results["setting"], results["teacher"]
    parts = [f"# {results['title']}", results["question"], f"After {results['source']}."]
    if results["note"]:
        parts.append(results["note"].strip())
    parts += [
        f"![{results['title']}]({plot})",
        "## Figures",
        "*Before* is straight after the cut, and *after* is after retraining. KL is to the teacher, in nats per token"
        " on held-out text. Lower is better, except for accuracy. ± is the standard error over the seeds. *Kept* is the"
        " share of the non-embedding parameters.",
        arms_table(results),
        "## Verdicts",
        "The effect is above zero where the claim holds. ± is the standard error of the differences, computed seed by"
        " seed. Inconclusive: the effect does not differ from zero, by Student's t over the seeds at 5 %.",
        claims_table(results),
    ]
    parts += [f"- {one['text']}: {one['tie']}." for one in results["claims"] if _is_tie(one)]
    parts += [
        "## How it was measured",
        f"On {results['date']}, by\n\n```sh\n{results['command']}\n```",
        f"Teacher: {teacher['name']}, {teacher['params']:,} parameters ({teacher['non_embedding_params']:,} without"
        f" embeddings), perplexity {_text(teacher['perplexity'])}. Seeds: {', '.join(map(str, results['seeds']))}.\n\n"
        f"Each seed draws its own {setting['calibration_samples']} calibration samples and its own order of the text,"
        f" and corrects a teacher of its own. Retraining: {setting['tokens']:,} tokens,"
        f" {setting['batch']} x {setting['context']} per step, peak learning rate {setting['lr']:g}, unless an arm says"
        f" otherwise. Measured on {setting['heldout_tokens']:,} held-out tokens. {results['machine']['device']},"
        f" torch {results['versions'].get('torch', '?')}, transformers {results['versions'].get('transformers', '?')}.",
    ]
    return "\n\n".join(parts) + "\n"


def arms_table(results: Results) -> str:
    """Every arm's figures beside the paper's."""
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
            one["text"],
            METRICS[one["metric"]],
            one["paper"],
            _text(one["effect"], percent=one["metric"].startswith("accuracy"), signed=True),
            f"**{one['verdict']}**",
        ]
        for one in results["claims"]
    ]
    return markdown_table(["claim", "figure", "paper", "effect here", "verdict"], rows, numbers=False)


def index(studies: Sequence[tuple[str, str, str, Results | None]]) -> str:
    """The list of studies: (name, title, source, results or None), with their verdicts counted."""
    rows = []
    for name, title, source, results in studies:
        if results is None:
            rows.append([title, source, "not run yet", "", "", ""])
            continue
        said = [claim["verdict"] for claim in results["claims"]]
        counts = [str(said.count(verdict)) for verdict in ("held", "reversed", "inconclusive")]
        rows.append([f"[{title}]({name}.md)", source, results["date"], *counts])
    return markdown_table(["study", "after", "run on", "held", "reversed", "inconclusive"], rows, numbers=False)


def plot(results: Results) -> str:
    """Dot plots of the study's main figures, the first arm's dot in color, as a file that stands alone."""
    panels = []
    for metric in results["plot"]:
        scale = 100 if metric.startswith("accuracy") else 1
        rows = []
        for i, arm in enumerate(results["arms"]):
            one = arm["metrics"][metric]
            if one is not None:
                error = None if one["stderr"] is None else scale * one["stderr"]
                rows.append(Interval(arm["label"], _PLAIN if i else _ACCENT, scale * one["mean"], error))
        if rows:
            title = PLOTTED[metric] + (", percent" if scale == 100 else "")
            panels.append((title, plots.dots(rows, title=title)))
    return plots.sheet(panels, title=results["title"])


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = True) -> str:
    """A Markdown table; columns after the first stand to the right if they are numbers."""
    rule = "|---" + ("|---:" if numbers else "|---") * (len(head) - 1) + "|"
    lines = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in (head, *rows)]
    return "\n".join([lines[0], rule, *lines[1:]])


def _is_tie(claim: Mapping[str, Any]) -> bool:
    return bool(claim["tie"]) and claim["verdict"] == "inconclusive"


def _text(one: Mapping[str, Any] | None, *, percent: bool = False, signed: bool = False) -> str:
    if one is None:
        return "-"
    found: Cell = estimate({"value": one["mean"], "stderr": one["stderr"]}, percent=percent, signed=signed)
    return f"{found.value} ± {found.error}" if found.error else found.value
