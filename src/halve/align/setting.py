"""How a step of alignment runs, beside what it learns from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from halve.progress import Progress
from halve.recipe.schema import Alignment


@dataclass(frozen=True)
class StepSetting:
    """A step, and where and how it runs."""

    step: Alignment
    name: str
    scratch: Path
    """The folder of checkpoints and of answers, which is not kept."""
    context: int
    seed: int
    device: str
    half: bool
    progress: Progress

    @property
    def micro_batch(self) -> int:
        """Samples or pairs of one forward pass."""
        return self.step.micro_batch or self.step.batch
