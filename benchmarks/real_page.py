"""The page of `real_model.py`: a table for each ratio, and whether the goals are met.

    python benchmarks/real_page.py RESULTS --out PAGE

Differences are paired over documents: a row's KL less the default's, prediction by prediction.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from real_claims import claims_table
from real_cuts import BASELINES, DEFAULT, OWN, ROWS

from halve.model import measure

GOAL = 0.5
"""The default's KL as a share of the best plain cut's."""

Line = Mapping[str, Any]


def main() -> None:
    """Read the results and write the page."""
    parser = argparse.ArgumentParser(description="The page of real_model.py.")
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    lines = [json.loads(line) for line in args.results.read_text().splitlines()]
    args.out.write_text("\n".join(page(lines)) + "\n", encoding="utf-8")


def page(lines: Sequence[Line]) -> list[str]:
    """The whole page."""
    teacher = next(line for line in lines if line.get("row") == "teacher")
    weights_D = torch.tensor(teacher["predictions_by_document"])
    text = [
        "# A real model, straight after the cut",
        "",
        f"KL to the teacher in nats and perplexity on {teacher['predictions']:,} predictions of {teacher['documents']}"
        " held-out stretches of six kinds of text. Errors are standard errors over stretches, and differences are"
        f" paired over them. The teacher's perplexity is {spelled(teacher['perplexity'], 1)}."
        f" Torch {teacher['torch']}, {teacher['machine']}.",
        "",
    ]
    for ratio in sorted({line["ratio"] for line in lines if "ratio" in line}, reverse=True):
        measured = [line for line in lines if line.get("ratio") == ratio and "row" in line]
        text += table([line for line in measured if line["row"] not in OWN], ratio, weights_D)
        text += own_table([line for line in measured if line["row"] in OWN])
        text += distilled_table([line for line in lines if line.get("ratio") == ratio and "distilled" in line])
    text += claims_table(lines, partial(paired, weights_D=weights_D), spelled)
    text += tasks_table([line for line in lines if "tasks" in line])
    return text + decode_table([line for line in lines if "decoded" in line])


def tasks_table(lines: Sequence[Line]) -> list[str]:
    """Accuracy by task, that of a student with its paired difference from the teacher, which has the first line."""
    if not lines:
        return []
    tasks = list(lines[0]["accuracy"])
    text = [
        "## Tasks",
        "",
        f"The first {lines[0]['limit']} items of each, without examples. In brackets the model minus the teacher on the"
        " same items. The last column is accuracy above chance, averaged over tasks, as a share of the teacher's, with"
        " its 95 % interval by a bootstrap of the items.",
        "",
        f"| model | {' | '.join(tasks)} | above chance |",
        f"|---|{'---:|' * (len(tasks) + 1)}",
    ]
    for line in lines:
        cells = [_task_cell(line, task) for task in tasks]
        low, high = line["share_interval"]
        share = "100 %" if line is lines[0] else f"{line['share']:.0%} ({low:.0%} to {high:.0%})"
        text.append(f"| {line['tasks']} | {' | '.join(cells)} | {share} |")
    return [*text, ""]


def _task_cell(line: Line, task: str) -> str:
    value = {name: 100 * number for name, number in line["accuracy"][task].items()}
    cell = f"{value['value']:.1f} ± {value['stderr']:.1f}"
    gap = line["minus_teacher"][task]
    return (
        cell if line["tasks"] == line["against"] else f"{cell} ({100 * gap['value']:+.1f} ± {100 * gap['stderr']:.1f})"
    )


def decode_table(lines: Sequence[Line]) -> list[str]:
    """Tokens a second of one sequence, and how much faster than the teacher, which is the first of its runtime."""
    if not lines:
        return []
    first = {line["runtime"]: line["tokens_per_second"] for line in reversed(lines)}
    return [
        "## Decode speed",
        "",
        f"One sequence, one token at a time after a prompt of {lines[0]['prompt']} tokens, in bfloat16;"
        f" {lines[0]['machine']}.",
        "",
        "| model | runtime | tokens a second | beside the teacher |",
        "|---|---|---:|---:|",
        *(
            f"| {line['decoded']} | {line['runtime']} | {line['tokens_per_second']:.1f} |"
            f" {line['tokens_per_second'] / first[line['runtime']]:.2f} |"
            for line in lines
        ),
        "",
    ]


def own_table(lines: Sequence[Line]) -> list[str]:
    """halve's refit by tokens, rotation and selection, shape by shape."""
    if not lines:
        return []
    head = ["| refit | sizes | kept | KL | perplexity | CPU seconds of the cut |", "|---|---|---|---:|---:|---:|"]
    return [
        *head,
        *(
            f"| {line['row']} | {sized(line['sizes'])} | {line.get('kept', '')} | {spelled(line['kl'])} |"
            f" {spelled(line['perplexity'], 1)} | {line['seconds']['last_cut_cpu']:.0f} |"
            for line in lines
        ),
        "",
    ]


def distilled_table(lines: Sequence[Line]) -> list[str]:
    """Students after distillation, and KL on the way."""
    if not lines:
        return []
    return [
        "| distilled | tokens | seed | batch | products in | learning rate | KL | perplexity | KL by tokens |",
        "|---|---:|---:|---:|---|---:|---:|---:|---|",
        *(
            f"| {line['distilled']} | {line['tokens']:,} | {line['seed']} | {line['batch']} |"
            f" {line['precision']} | {line['lr']:g} |"
            f" {spelled(line['kl'])} | {spelled(line['perplexity'], 1)} |"
            f" {', '.join(f'{n:,}: {kl:.3f}' for n, kl, _ in line['curve'])} |"
            for line in lines
        ),
        "",
    ]


def table(lines: Sequence[Line], ratio: float, weights_D: torch.Tensor) -> list[str]:
    """One ratio: its rows, the closest first, and the goals."""
    lines = sorted(lines, key=lambda line: float(line["kl"][0]))
    ours = next((line for line in lines if line["row"] == DEFAULT), None)
    text = [
        f"## {ratio:.0%} of the non-embedding parameters",
        "",
        "| cut | sizes | share | calibration | in its paper | KL | less the default's | perplexity | CPU seconds |",
        "|---|---|---:|---|---|---:|---:|---:|---:|",
    ]
    for line in lines:
        gap = "" if ours is None or line is ours else spelled(paired(line, ours, weights_D))
        text.append(
            f"| {line['row']} | {sized(line['sizes'])} | {line['share']:.1%} | {line['calibration']} |"
            f" {line.get('paper', '')} | {spelled(line['kl'])} | {gap} | {spelled(line['perplexity'], 1)} |"
            f" {seconds(line):.0f} |"
        )
    return [*text, "", *(goals(lines, ours, weights_D) if ours is not None else []), ""]


def goals(lines: Sequence[Line], ours: Line, weights_D: torch.Tensor) -> list[str]:
    """Whether the default is at half of the best plain cut, and below every baseline."""
    text = []
    plain = [line for line in lines if line["row"].startswith("plain")]
    if plain:
        share = ours["kl"][0] / plain[0]["kl"][0]
        text.append(
            f"- The default starts at {share:.2f} of the best plain cut ({plain[0]['row']}; asked: at most {GOAL})."
        )
    for line in lines:
        if line["row"] in BASELINES:
            gap, error = paired(line, ours, weights_D)
            verdict = "above it" if gap > 2 * error else "below it" if gap < -2 * error else "too near to tell"
            text.append(f"- {line['row']}: {verdict}.")
    missing = [name for name in ROWS if name not in {line["row"] for line in lines}]
    return [*text, *([f"- Not measured: {', '.join(missing)}."] if missing else [])]


def paired(line: Line, ours: Line, weights_D: torch.Tensor) -> tuple[float, float]:
    """How far a row's KL is above another's, and the standard error of that."""
    theirs_D, ours_D = (torch.tensor(one["kl_by_document"]) for one in (line, ours))
    gap = measure.difference(theirs_D, ours_D, weights_D)
    return gap.value, gap.stderr


def seconds(line: Line) -> float:
    """Processor seconds of scores and cut, without the shapes that were tried and not taken."""
    spent = line["seconds"]
    if "run" in spent:
        return float(spent["run"]["cpu"])
    if "score" in spent:
        return float(spent["score"]["cpu"] + spent["prune"]["cpu"])
    return float(spent.get("scores_cpu", 0.0) + spent.get("last_cut_cpu", spent["cut_cpu"]))


def sized(sizes: Mapping[str, int]) -> str:
    """Layers x hidden x ffn, heads/groups.

    >>> sized(dict(layers=30, hidden=576, ffn=928, heads=9, kv_heads=3))
    '30 x 576 x 928, 9/3'
    """
    return f"{sizes['layers']} x {sizes['hidden']} x {sizes['ffn']}, {sizes['heads']}/{sizes['kv_heads']}"


def spelled(pair: Sequence[float], digits: int = 3) -> str:
    """A value and its error."""
    return f"{pair[0]:,.{digits}f} ± {pair[1]:.{digits}f}"


if __name__ == "__main__":
    main()
