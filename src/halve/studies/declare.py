"""What a study is: arms that differ in some keys of the recipe, and the paper's claims about them. Data only."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from halve.errors import RecipeError
from halve.recipe import strict_yaml
from halve.recipe.schema import Section

_HERE = Path(__file__).parent
BASE = _HERE / "base.yaml"
ORDER = (
    "controls",
    "width-depth",
    "aggregators",
    "baselines",
    "depth-sets",
    "correction",
    "losses",
    "two-steps",
    "iterative-importance",
    "head-merge",
)
"""The order of `halve study all`: the most important results first."""

Metric = Literal["kl_before", "kl_after", "perplexity_before", "perplexity_after", "accuracy_before", "accuracy_after"]


class Arm(Section):
    """One configuration: keys that override those of the study's recipe."""

    label: str
    teacher: Literal["corrected", "original"] = "corrected"
    recipe: dict[str, Any] = Field({}, description="sizes may be shares of the teacher's, such as 62%")
    of: str | None = Field(None, description="no run of its own: the arm whose run holds these models")
    before: str | None = Field("pruned", description="the run's model before retraining; null: there is none")
    after: str = Field("distilled", description="the run's model after retraining")
    paper: dict[str, str] = Field({}, description="the paper's figures for it, by what they measure")


class Claim(Section):
    """A result of the paper: one arm is better than another by one metric."""

    text: str
    better: str
    worse: str
    metric: Metric
    paper: str = Field("", description="the paper's figures")
    tie: str = Field("", description="what an inconclusive difference says of this claim")


class Study(Section):
    """The reproduction of a table or figure of the papers."""

    name: str
    title: str
    source: str
    question: str
    note: str = ""
    items: bool = Field(False, description="needs multiple-choice items")
    base: dict[str, Any] = Field({}, description="keys laid over base.yaml")
    metrics: tuple[Metric, ...] = ("kl_before", "kl_after", "perplexity_before", "perplexity_after")
    plot: tuple[Metric, ...] = ("kl_before", "kl_after")
    arms: dict[str, Arm]
    claims: tuple[Claim, ...]

    @model_validator(mode="after")
    def _names(self) -> Study:
        for claim in self.claims:
            for name in (claim.better, claim.worse):
                if name not in self.arms:
                    raise ValueError(f"a claim names arm {name}, known: {', '.join(self.arms)}")
            if claim.metric not in self.metrics:
                raise ValueError(f"a claim is about {claim.metric}, which is not among the metrics")
        for arm in self.arms.values():
            if arm.of is not None and (arm.recipe or arm.of not in self.arms or self.arms[arm.of].of is not None):
                raise ValueError(f"{arm.label}: `of` names an arm with a run, and leaves no recipe")
        if not set(self.plot) <= set(self.metrics):
            raise ValueError("what is plotted must be among the metrics")
        return self


def names() -> tuple[str, ...]:
    """The shipped studies, in the order in which all of them run."""
    return ORDER


def load_study(name: str) -> Study:
    """A shipped study. Raises `RecipeError` for an unknown name."""
    if name not in ORDER:
        raise RecipeError(f"there is no study {name}", why=f"known: {', '.join(ORDER)}", fix="halve study --list")
    return read_study((_HERE / "catalog" / f"{name}.yaml").read_text(encoding="utf-8"), source=f"{name}.yaml")


def read_study(text: str, *, source: str) -> Study:
    """A study from YAML. Raises `RecipeError` with the mistake."""
    try:
        return Study.model_validate(strict_yaml.parse_yaml(text))
    except (ValidationError, yaml.YAMLError) as error:
        raise RecipeError(
            f"{source} is not a study", why=str(error).replace("\n", " "), fix="compare it with a shipped one"
        ) from error
