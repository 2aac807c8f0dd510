"""The papers' own numbers for their models: 2408.11796, Tables 1 and 2 of the anonymous revision.

ChatRAG, on a subset, stands in Table 2 of the first version alone, whose students were aligned in another way.

A number of a table is shown beside ours only where teacher and sizes are the paper's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_AXES = ("layers", "hidden", "ffn", "heads", "kv_heads")


@dataclass(frozen=True)
class PaperModel:
    """A column of a table: its name there, the teacher's name, the sizes, and the numbers by suite and task."""

    label: str
    teacher: str
    sizes: tuple[int, int, int, int, int]
    base: Mapping[str, float]
    instruct: Mapping[str, float]


_BASE = ("winogrande", "arc_challenge", "mmlu", "hellaswag", "gsm8k", "truthfulqa_mc2", "xlsum_en", "mbpp", "humaneval")
_INSTRUCT = ("mt_bench", "mmlu", "gsm8k", "gpqa", "humaneval", "mbpp", "ifeval", "bfcl")


def _numbers(tasks: tuple[str, ...], *numbers: float | None) -> dict[str, float]:
    return {task: number for task, number in zip(tasks, numbers, strict=True) if number is not None}


PAPER_MODELS = (
    PaperModel(
        "Llama 3.1 8B",
        "Llama-3.1-8B",
        (32, 4096, 14336, 32, 8),
        _numbers(_BASE, 77.3, 57.9, 65.3, 81.8, 48.6, 45.0, 30.0, 42.3, 24.8),
        _numbers(_INSTRUCT, 7.78, 69.4, 83.8, 30.4, 72.6, 72.8, 80.4, 44.3),
    ),
    PaperModel(
        "4B-Depth",
        "Llama-3.1-8B",
        (16, 4096, 14336, 32, 8),
        _numbers(_BASE, 72.1, 52.6, 58.7, 73.2, 16.8, 38.2, 27.2, 30.7, None),
        _numbers(_INSTRUCT, 6.16, 60.4, 72.5, 23.2, 33.5, 54.2, 71.0, 56.3) | {"chatrag": 40.1},
    ),
    PaperModel(
        "4B-Width",
        "Llama-3.1-8B",
        (32, 3072, 9216, 32, 8),
        _numbers(_BASE, 73.5, 55.6, 60.5, 76.1, 41.2, 42.9, 28.7, 32.4, None),
        _numbers(_INSTRUCT, 6.78, 61.1, 75.2, 30.1, 36.2, 56.9, 76.6, 59.6) | {"chatrag": 44.0},
    ),
    PaperModel(
        "Mistral NeMo 12B-Base",
        "Mistral-Nemo-Base",
        (40, 5120, 14336, 32, 8),
        _numbers(_BASE, 82.2, 65.1, 69.0, 85.2, 56.4, 49.8, 33.4, 42.6, 23.8),
        {},
    ),
    PaperModel(
        "MN-Compressed 8B",
        "Mistral-Nemo-Base",
        (40, 4096, 11520, 32, 8),
        _numbers(_BASE, 80.4, 64.4, 69.5, 83.0, 58.5, 47.6, 32.0, 43.8, 36.2),
        _numbers(_INSTRUCT, 7.86, 70.4, 87.1, 31.5, 71.3, 72.5, 84.4, 67.6),
    ),
)


def paper_models(model: str, plans: tuple[Mapping[str, Any], ...]) -> list[PaperModel]:
    """The paper's models that this run began with or made. `model` is what the recipe calls its teacher."""
    sizes = [plans[0]["before"], *(plan["after"] for plan in plans)] if plans else []
    there = [tuple(arch[axis] for axis in _AXES) for arch in sizes]
    return [column for column in PAPER_MODELS if column.sizes in there and column.teacher.lower() in model.lower()]
