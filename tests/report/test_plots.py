"""Numbers in words, and plots."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest

from halve.report import plots, sections
from halve.report.plots import Series


@pytest.mark.parametrize(
    ("one", "options", "want"),
    [
        ({"value": 12.3456, "stderr": 0.123}, {}, ("12.35", "0.12")),
        ({"value": 0.7421, "stderr": 0.0212}, {"percent": True}, ("74.2", "2.1")),
        ({"value": 5.0, "stderr": None}, {}, ("5.000", "")),
        ({"value": 512.3, "stderr": 37.0}, {}, ("512", "37")),
        ({"value": 0.5, "stderr": 0.1}, {"signed": True}, ("+0.50", "0.10")),
        ({"value": None, "stderr": None}, {}, ("-", "")),
        (None, {}, ("-", "")),
    ],
)
def test_estimates_read_to_the_second_digit_of_their_error(one: Any, options: Any, want: tuple[str, str]) -> None:
    cell = sections.estimate(one, **options)
    assert (cell.value, cell.error) == want


def test_only_clear_differences_are_colored() -> None:
    assert sections.estimate({"value": -0.3, "stderr": 0.1}, signed=True).clear
    assert not sections.estimate({"value": -0.15, "stderr": 0.1}, signed=True).clear


@pytest.mark.parametrize(("num_bytes", "want"), [(512, "512 B"), (4_132_800, "4.13 MB"), (16e9, "16 GB")])
def test_sizes_in_bytes(num_bytes: float, want: str) -> None:
    assert sections.short_bytes(num_bytes) == want


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.013, 0.94), (2.1, 2.2), (0, 2_457_600), (-3, 5)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    found = plots.ticks(low, high)
    assert 3 <= len(found) <= 8
    assert low <= found[0] < found[-1] <= high
    assert len({round(b - a, 9) for a, b in itertools.pairwise(found)}) == 1


def coordinates(svg: str, tag: str, name: str) -> list[float]:
    return [float(value) for value in re.findall(rf'<{tag} [^>]*\b{name}="([-0-9.]+)"', svg)]


@pytest.mark.parametrize("log_y", [False, True])
def test_curves_stay_inside_and_labels_apart(log_y: bool) -> None:
    series = [Series(str(i), "ce", ((0.0, 5.0), (1e6, 1.0 + i / 1000))) for i in range(6)]
    svg = plots.curves(series, title="t", x_label="tokens", log_y=log_y)
    width, height = (float(x) for x in re.findall(r'viewBox="0 0 ([0-9.]+) ([0-9.]+)"', svg)[0])
    assert all(0 <= x <= width for x in coordinates(svg, "circle", "cx"))
    assert all(0 <= y <= height for y in coordinates(svg, "circle", "cy"))
    labels = sorted(float(y) for y in re.findall(r'<text class="label ce" x="[^"]*" y="([^"]*)"', svg))
    assert len(labels) == 6
    assert min(b - a for a, b in itertools.pairwise(labels)) >= 13.9


def test_cut_entries_are_outlines() -> None:
    svg = plots.bars([3.0, 1.0, 2.0], [True, False, True], title="t", x_label="layer")
    assert re.findall(r'class="bar (\w+)"', svg) == ["kept", "cut", "kept"]
    heights = coordinates(svg, "rect", "height")
    assert heights[0] > heights[2] > heights[1] > 0
    svg = plots.grid([[1.0, 0.5]], [[True, False]], ["0"], title="t", x_label="head", group=1)
    assert re.findall(r'class="(cell[^"]*)"', svg) == ["cell", "cell cut"]


def test_plots_survive_what_models_do() -> None:
    assert "nan" not in plots.dots([plots.Interval("one", "ce", 1.0, None)], title="t")
    assert "nan" not in plots.bars([0.0, 0.0], [True, True], title="t", x_label="x")
    assert "nan" not in plots.profile([1.0] * 5, 5, title="t", x_label="x")
    flat = [Series("a", "ce", ((0.0, 1.0), (10.0, 1.0)))]
    assert "nan" not in plots.curves(flat, title="t", x_label="x")
    assert "&lt;" in plots.curves([Series("<", "ce", ((0.0, 1.0), (1.0, 2.0)))], title="<", x_label="x")
