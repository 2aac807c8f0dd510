"""The tasks of an evaluation, asked of one model after another, with what is written in the end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halve.disk.files import atomic_file
from halve.evaluation.asking import Answered, Exam, answer, changed_items
from halve.evaluation.results import item_lines, summary
from halve.progress import SILENT, Progress

ITEMS = "task-items.jsonl"


@dataclass
class TaskSession:
    """An exam under way. `out` is the stage's folder; what was answered before a kill is kept in it."""

    exam: Exam
    tokenizer: PreTrainedTokenizerBase
    out: Path
    seed: int = 0
    progress: Progress = SILENT
    answers: dict[str, dict[str, Answered]] = field(default_factory=dict)
    _changed: dict[str, list[dict[str, Any]]] | None = None

    def ask(self, name: str, model: PreTrainedModel, *, is_reference: bool = False) -> None:
        """Ask a loaded model all tasks. With `check_batch` the reference is asked twice."""
        kept = self.out / ".tasks" / name
        self.progress.say(f"tasks of {name}") if self.exam.built else None
        answers = answer(self.exam, model, self.tokenizer, seed=self.seed, kept=kept, progress=self.progress)
        self.answers[name] = answers
        if is_reference and self.exam.section.check_batch:
            alone = answer(self.exam, model, self.tokenizer, seed=self.seed, batch=1, kept=kept / "one-by-one")
            self._changed = {key: changed_items(answers[key], alone[key]) for key in alone}

    def write(self, *, subject: str | None, chain: Sequence[str] = ()) -> dict[str, Any] | None:
        """Write every item to `task-items.jsonl`, and return the results; None where no task was asked for.

        `subject` is compared with every other model, and each model of `chain` with the one before it.
        """
        bos = list(self.tokenizer("a").input_ids)[:1] == [self.tokenizer.bos_token_id]
        words = f"the tokenizer's own: sequences begin {'with' if bos else 'without'} a BOS token"
        facts = summary(self.exam, self.answers, subject=subject, chain=chain, bos=words)
        if facts is None:
            return None
        with atomic_file(self.out / ITEMS) as draft:
            draft.write_text("".join(f"{json.dumps(line)}\n" for line in item_lines(self.answers)), encoding="utf-8")
        return facts | {"changed_by_batch": self._changed}
