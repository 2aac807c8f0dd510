"""What the plan says of times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from halve.preflight.forecast import forecast
from halve.recipe.schema import Recipe
from halve.report.tables import forecast_tables


@pytest.mark.parametrize(
    ("half", "precision", "said"),
    [(4e11, "auto", True), (1.5e11, "auto", False), (4e11, "bfloat16", False), (4e11, "float32", True)],
)
def test_the_plan_names_bfloat16_where_this_cpu_is_much_faster_in_it(
    half: float, precision: str, said: bool, make_recipe: Callable[..., Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    distill = {"tokens": 4096, "batch": 4, "micro_batch": 4, "precision": precision}
    found = forecast(make_recipe(distill=distill, prune={"ffn": 32}, device="cpu"))
    forecast_tables(replace(found, device=replace(found.device, flops=half, full_flops=1e11)))
    told = " ".join(capsys.readouterr().out.split())
    assert ("multiplies 4.0 times as fast in bfloat16, which the key `precision: bfloat16`" in told) == said


def test_a_run_without_a_training_has_no_such_line(
    make_recipe: Callable[..., Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    found = forecast(make_recipe(distill=None, prune={"ffn": 32}, device="cpu"))
    forecast_tables(replace(found, device=replace(found.device, flops=4e11, full_flops=1e11)))
    assert "times as fast in bfloat16" not in capsys.readouterr().out
