"""Gates: a few generative items during a distillation, and a warning when they collapse while KL falls.

A student can come closer to its teacher on the training text and lose what that text does not ask for, such as
following instructions. A task is armed only where the teacher solves it: its answers must score better on their own
items than on the next ones by three standard errors of the pairs. What they score on the next items is chance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halve.disk.files import plain, read_json, write_json
from halve.errors import RecipeError
from halve.evaluation.asking import Exam, answer, by_neighbors, read_exam
from halve.evaluation.harness import has_task, is_code, is_installed, main_metric, output_type, quiet_harness
from halve.evaluation.results import mean_score, paired
from halve.evaluation.suites import asked
from halve.progress import SILENT, Progress
from halve.recipe.evaluations import Evaluate, Gates

GATES_KEY: Final = "distill.gates"
SURE = 3.0
"""Standard errors above chance for a gate to be armed, and below the best score for a warning."""
_NEAR_CHANCE = "the teacher is not above chance by three standard errors"


def gate_section(gates: Gates, evaluate: Evaluate) -> Evaluate:
    """The section that asks the gates' tasks, on the data of the evaluation."""
    own = {"tasks": gates.tasks, "limit": gates.items, "max_new_tokens": gates.max_new_tokens, "suites": ()}
    return evaluate.model_copy(update={**own, "run_untrusted_code": False, "check_batch": False})


def require_texts(section: Evaluate) -> None:
    """Raise `RecipeError` for a gate whose answers are no texts to be compared: choices, likelihoods or programs.

    `section` is the one of `gate_section`. Tasks that the harness does not have are left to `asking.errors_of`.
    """
    asks = [ask for ask in asked(section, GATES_KEY) if is_installed() and has_task(ask)]
    if not asks:
        return
    with quiet_harness():
        unfit = [ask for ask in asks if is_code(ask) or output_type(ask) != "generate_until"]
    for ask in unfit[:1]:
        raise RecipeError(
            f"{GATES_KEY}.tasks names {ask.task}, which is no gate",
            why="programs are not run during a training"
            if is_code(ask)
            else "chance is what answers score on other items, and this task has no written answers",
            fix="name tasks with written answers, such as gsm8k or ifeval; ask this one in evaluate.tasks",
        )


@dataclass
class TaskGate:
    """The gates of one training. `file` keeps the teacher's scores and the student's best ones through a kill."""

    exam: Exam
    tokenizer: PreTrainedTokenizerBase
    every: int
    file: Path
    seed: int = 0
    progress: Progress = SILENT
    _notes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        gates: Gates,
        evaluate: Evaluate,
        tokenizer: PreTrainedTokenizerBase,
        *,
        context: int | None,
        file: Path,
        seed: int,
        progress: Progress = SILENT,
    ) -> TaskGate:
        """Read the items. Raises the errors of `asking.read_exam`."""
        exam = read_exam(gate_section(gates, evaluate), context=context, key=GATES_KEY)
        for left in exam.left:
            progress.say(f"gate {left.ask.key}: {left.status}, {left.why}")
        made = cls(exam, tokenizer, gates.every, file, seed, progress)
        if file.exists():
            made._notes = read_json(file)
        return made

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher has not answered yet."""
        return bool(self.exam.built) and "teacher" not in self._notes

    def arm(self, teacher: PreTrainedModel) -> None:
        """Ask the teacher, and arm the tasks that it solves better than chance."""
        answers = answer(self.exam, teacher, self.tokenizer, seed=self.seed)
        notes = {}
        for built in self.exam.built:
            key = built.ask.key
            metric = main_metric(built.ask, list(answers[key].values))
            scores = answers[key].values[metric]
            above = paired(scores, by_neighbors(built, answers[key]).values[metric])
            armed = above["stderr"] is not None and above["value"] > SURE * above["stderr"]
            notes[key] = {"metric": metric, "score": mean_score(scores).value, "above_chance": above, "armed": armed}
            words = "armed" if armed else f"not armed: {_NEAR_CHANCE}"
            self.progress.say(f"gate {key}: the teacher scores {notes[key]['score']:.3f}, {words}")
        self._keep({"teacher": notes, "best": {}})

    def told(self) -> dict[str, dict[str, Any]]:
        """The tasks that count, with the teacher's scores, and those that do not, with the reason."""
        notes = self._notes.get("teacher", {})
        not_armed = {left.ask.key: f"{left.status}, {left.why}" for left in self.exam.left}
        not_armed |= {key: _NEAR_CHANCE for key, note in notes.items() if not note["armed"]}
        return {"armed": {key: notes[key]["score"] for key in self._armed()}, "not_armed": not_armed}

    def first(self) -> dict[str, Any]:
        """What the journal's first line says: the tasks that do not count."""
        not_armed = self.told()["not_armed"]
        return {"gates_not_armed": not_armed} if not_armed else {}

    def due(self, before: int, tokens: int, *, last: bool) -> bool:
        """Whether the items are asked between these numbers of tokens."""
        return any(self._armed()) and (last or before // self.every < tokens // self.every)

    def measure(self, student: PreTrainedModel, figures: Mapping[str, float]) -> dict[str, Any]:
        """Ask the student the armed tasks. Returns a part of the journal's line: scores, and warnings if there are any.

        `figures` are the last held-out figures of the training, `kl` among them.
        """
        armed = set(self._armed())
        exam = Exam(self.exam.section, tuple(built for built in self.exam.built if built.ask.key in armed))
        answers = answer(exam, student, self.tokenizer, seed=self.seed)
        best: dict[str, Any] = {**self._notes["best"]}
        scores, warnings = {}, {}
        for key, answered in answers.items():
            values = answered.values[self._notes["teacher"][key]["metric"]]
            scores[key] = mean_score(values).value
            before = best.get(key)
            if before is None or scores[key] > mean_score(before["values"]).value:
                best[key] = {"values": values, "kl": figures.get("kl")}
            elif (words := _collapse(key, values, before, figures.get("kl"))) is not None:
                warnings[key] = words
                self.progress.say(f"warning: {words}")
        self._keep({**self._notes, "best": best})
        return {"gates": scores} | ({"gate_warnings": warnings} if warnings else {})

    def _armed(self) -> list[str]:
        return [key for key, note in self._notes.get("teacher", {}).items() if note["armed"]]

    def _keep(self, notes: dict[str, Any]) -> None:
        self._notes = notes
        write_json(self.file, plain(notes))


def _collapse(key: str, values: list[float], best: Mapping[str, Any], kl: float | None) -> str | None:
    """What a warning says: the score is clearly below the best, and KL is lower than it was then."""
    lost = paired(values, best["values"])
    if kl is None or best["kl"] is None or kl >= best["kl"] or lost["stderr"] is None:
        return None
    if lost["value"] >= 0 or -lost["value"] <= SURE * lost["stderr"]:
        return None
    was, now = mean_score(best["values"]).value, mean_score(values).value
    return (
        f"{key} fell from {was:.3f} to {now:.3f} while KL fell from {best['kl']:.4g} to {kl:.4g}: the student comes"
        " closer to its teacher on the training text and loses this task"
    )
