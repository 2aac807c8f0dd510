"""IFEval's scorer, as halve runs it, against verdicts that were stored for given answers.

    python benchmarks/ifeval_verdicts.py FOLDER

FOLDER has input_data, *_responses, *_expected_strict and *_expected_loose as .jsonl.gz, as in the original repository
of IFEval (2311.07911), where the answers are GPT-4's. The scorer is the harness's; sentences are split by halve's own
tables (`halve.evaluation.sentences`) unless NLTK has its own on this machine.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

from halve.evaluation import harness
from halve.evaluation.rows import read_rows
from halve.evaluation.verdicts import ifeval_verdicts


def main(folder: Path) -> None:
    """Print the four figures of the paper, ours and the stored, and every verdict that differs."""
    rows = read_rows(folder / "input_data.jsonl.gz", "ifeval")
    answers = {row["prompt"]: row["response"] for row in _lines(folder, "*_responses.jsonl.gz")}
    kinds = ("strict", "loose")
    stored = {kind: {row["prompt"]: row for row in _lines(folder, f"*_expected_{kind}.jsonl.gz")} for kind in kinds}
    with harness.quiet_harness():
        verdicts = {row["prompt"]: ifeval_verdicts(row, [answers[row["prompt"]]]) for row in rows}
    for kind in kinds:
        prompts = [bool(verdicts[row["prompt"]][f"prompt_level_{kind}_acc"]) for row in rows]
        single = [verdict for row in rows for verdict in verdicts[row["prompt"]][f"inst_level_{kind}_acc"]]
        theirs = [stored[kind][row["prompt"]] for row in rows]
        theirs_single = [verdict for one in theirs for verdict in one["follow_instruction_list"]]
        theirs_whole = [one["follow_all_instructions"] for one in theirs]
        print(f"{kind}: prompts {_percent(prompts)} (stored {_percent(theirs_whole)}),", end=" ")
        print(f"instructions {_percent(single)} (stored {_percent(theirs_single)})")
        for row, one in zip(rows, theirs, strict=True):
            ours = verdicts[row["prompt"]][f"inst_level_{kind}_acc"]
            for name, a, b in zip(row["instruction_id_list"], ours, one["follow_instruction_list"], strict=True):
                if a != b:
                    print(f"  key {row['key']}, {name}: ours {a}, stored {b}")


def _lines(folder: Path, pattern: str) -> list[dict[str, Any]]:
    (path,) = folder.glob(pattern)
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _percent(verdicts: list[bool]) -> str:
    return f"{100 * sum(verdicts) / len(verdicts):.2f} % of {len(verdicts)}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
