"""The papers' tasks with their shots, and the tasks of a recipe.

2408.11796, Table 1 (base models) and Table 2 (instruct models). The base suite is the one of both versions of the
paper. The instruct suite has the tasks of the anonymous revision's Table 2 that run on this machine. MT-Bench and BFCL
need a judge or their own tools (`evaluation.imports`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from halve.recipe.evaluations import Evaluate

TASKS_KEY: Final = "evaluate.tasks"


@dataclass(frozen=True)
class Ask:
    """A task, and how it is asked and counted."""

    task: str
    """Its name in the recipe and on the page."""
    shots: int
    metric: str = ""
    """The metric that is shown, with `,filter` where the harness has several; empty: see `harness.main_metric`."""
    harness: str = ""
    """Its name in lm-evaluation-harness, if that is another."""
    share: float = 1.0
    """The share of the rows that is asked."""
    answers: int = 1
    """Answers drawn for each item."""
    title: str = ""
    """Its name in the papers' table."""
    asked_in: str = TASKS_KEY
    """The recipe's key that names it, for errors."""

    @property
    def name(self) -> str:
        """Its name in lm-evaluation-harness."""
        return self.harness or self.task

    @property
    def key(self) -> str:
        """What tells it from the same task with other words or shots."""
        return f"{self.name} ({self.shots})"


SUITES: Mapping[str, tuple[Ask, ...]] = {
    "minitron-base": (
        Ask("winogrande", 5, "acc", title="Winogrande"),
        Ask("arc_challenge", 25, "acc_norm", title="Arc_challenge"),
        Ask("mmlu", 5, "acc", title="MMLU"),
        Ask("hellaswag", 10, "acc_norm", title="Hellaswag"),
        Ask("gsm8k", 5, "exact_match,strict-match", title="GSM8k"),
        Ask("truthfulqa_mc2", 0, "acc", title="Truthfulqa"),
        Ask("xlsum_en", 3, "rougeL", share=0.2, title="XLSum en(20%)"),
        Ask("mbpp", 0, "pass_at_1", title="MBPP"),
        Ask("humaneval", 0, "pass@1", answers=20, title="HumanEval(n=20)"),
    ),
    "minitron-instruct": (
        Ask("mmlu", 5, "acc", title="MMLU"),
        Ask("gsm8k", 0, "exact_match,flexible-extract", title="GSM8K"),
        Ask("gpqa", 0, "acc_norm", "gpqa_main_zeroshot", title="GPQA"),
        Ask("humaneval", 0, "pass@1", "humaneval_instruct", title="HumanEval"),
        Ask("mbpp", 0, "pass_at_1", "mbpp_instruct", title="MBPP"),
        Ask("ifeval", 0, "average", title="IFEval"),
    ),
}
SAMPLING = {"do_sample": True, "temperature": 0.2, "top_p": 0.95}
"""How several answers to one item are drawn (2408.11796, Sec. 4.3: HumanEval)."""

_OTHER_NAMES = {"gpqa": "gpqa_main_zeroshot"}


def asked(section: Evaluate, key: str = TASKS_KEY) -> tuple[Ask, ...]:
    """The tasks of a recipe, those of suites first. The same task with the same shots and wording is asked once.

    `key` is the recipe's key that names the tasks of `section`.
    """
    listed = [ask for suite in section.suites for ask in SUITES[suite]]
    known = {(ask.task, ask.shots): ask for suite in SUITES.values() for ask in suite if not ask.harness}
    for task, shots in section.tasks.items():
        listed.append(known.get((task, shots)) or Ask(task, shots, harness=_OTHER_NAMES.get(task, "")))
    by_key: dict[str, Ask] = {}
    for ask in listed:
        by_key.setdefault(ask.key, ask)
    return tuple(replace(ask, asked_in=key) for ask in by_key.values())
