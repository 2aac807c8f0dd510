"""The page's section about a search, from made-up facts."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from halve.cli import searching
from halve.report import plots
from halve.report import searched as report
from halve.report.searched import search_rows, search_words, searched
from halve.search import agreement

SIZES = {"hidden": 104, "heads": 4, "kv_heads": 2, "head_dim": 32, "vocab": 2048}
RECIPE = {"distill": {"tokens": 2_000_000}}


def facts(**changes: Any) -> dict[str, Any]:
    """Five finalists, of which the second wins though the first was best straight after the cut."""
    ends = [(0.40, 0.21, 0.16), (0.46, 0.20, 0.14, 0.11), (0.47, 0.205, 0.145, 0.115), (0.55, 0.32), (0.70, 0.42)]
    finalists = [
        {
            "arch": {**SIZES, "layers": 9 - i % 3, "ffn": 160 + 40 * i},
            "kept_layers": list(range(9 - i % 3)),
            "params": 850_000 + i,
            "non_embedding": 640_000 + i,
            "trial_kl": kl[0],
            "curve": [{"tokens": 200_000 * rung, "kl": value, "stderr": 0.01} for rung, value in enumerate(kl)],
        }
        for i, kl in enumerate(ends)
    ]
    return {
        "method": "tournament",
        "finalists": finalists,
        "rungs": [{"tokens": 200_000 * rung} for rung in range(4)],
        "chosen": 1,
        "second": {"finalist": 2, "gap": {"value": 0.005, "stderr": 0.004}, "clear": False},
        "straight": 4,
        "trial": 0,
        "agreement": [{"rung": 1, "tau": 0.6, "low": 0.4, "high": 0.8, "candidates": 5}],
        "rises": [],
        "choices": None,
        "samples": 96,
        "tokens": 1_800_000,
        "flops": {"search": 0.8e13, "run": 1e13},
        **changes,
    }


def test_the_choice_and_how_sure_it_is() -> None:
    words = " ".join(search_words(facts(), RECIPE))
    assert "Finalist 2 has the lowest KL." in words
    assert (
        "Finalist 3 is 0.0050 ± 0.0040 behind, sample by sample, which two standard errors do not tell apart." in words
    )
    assert "A trial without training would have chosen finalist 1" in words
    assert "0.4 against 0.46 straight after the cut, and 0.16 against 0.14 after 400k tokens" in words
    assert "0.60 (0.40 to 0.80) after 200k tokens, 5 finalists" in words
    assert "90 % of those of the distillation and 18 % of what distilling every finalist would have taken" in words


def test_the_cost_is_that_of_the_whole_search() -> None:
    parts = {"layers": 0.4e12, "trial": 0.41e12, "cache": 0.08e12, "finalists": 1.15e12, "rungs": 0.54e12}
    words = " ".join(search_words(facts(flops={**parts, "run": 5.23e12}), RECIPE))
    each = "the comparison of layers 8 %, the trial 8 %, the teacher's answers 2 %, the cuts of finalists 22 %,"
    assert f"the rungs alone take 10 % of the distillation, and the whole search 49 %: {each} the rungs 10 %." in words
    assert "Measurements on held-out samples, and questions, are not counted." in words
    family = RECIPE | {"search": {"targets": ["70%", "50%"]}}
    assert "the teacher's answers for all sizes 2 %" in " ".join(
        search_words(facts(flops={**parts, "run": 5.23e12}), family)
    )
    words = " ".join(search_words(facts(flops={**parts, "run": None}), {}))
    assert "tokens. In FLOPs the rungs alone take 21 % of the whole search: the comparison of layers 16 %" in words


def test_what_earlier_versions_counted_is_called_the_rungs() -> None:
    words = " ".join(search_words(facts(), RECIPE))
    assert "; in FLOPs these rungs alone are 80 % of the distillation." in words


def test_a_trial_that_agrees_and_a_clear_gap() -> None:
    second = {"finalist": 2, "gap": {"value": 0.05, "stderr": 0.004}, "clear": True}
    words = " ".join(search_words(facts(trial=1, second=second), RECIPE))
    assert "A trial without training would have chosen it as well." in words
    assert "0.0500 ± 0.0040 behind, sample by sample. " in words


def test_a_finalist_that_overtakes_is_said_to_be_behind_now() -> None:
    overtakes = {
        "finalist": 2,
        "behind": {"value": 0.0027, "stderr": 0.002},
        "ahead": {"value": 0.0152, "stderr": 0.0021},
        "tokens": 1_500_000,
    }
    second = {"finalist": 2, "gap": overtakes["ahead"], "clear": True}
    words = " ".join(search_words(facts(overtakes=overtakes, second=second), RECIPE))
    assert "Finalist 2 is chosen because it trains faster than finalist 3, which has the lowest KL at the last" in words
    assert "There it is 0.0027 ± 0.0020 behind, sample by sample." in words
    assert "it is 0.0152 ± 0.0021 ahead after 1.5M tokens." in words
    assert "Finalist 2 has the lowest KL" not in words


def closing(before: float, now: float) -> str:
    """What is said of a third finalist that was so far behind at the last two rungs, at 400k and 600k tokens."""
    found = facts()
    for rung, gap in ((2, before), (3, now)):
        found["finalists"][2]["curve"][rung]["kl"] = found["finalists"][1]["curve"][rung]["kl"] + gap
    return " ".join(search_words(found, RECIPE))


def test_a_lead_that_shrinks_too_fast_is_named() -> None:
    """2M tokens are 2.97 times as far from 600k as that is from 400k, in the logarithm."""
    words = closing(0.0100, 0.0070)
    assert "between 400k and 600k tokens, that over finalist 3 from 0.01 to 0.007." in words.lower()
    assert "the choice is behind after the 2M tokens of the distillation" in words
    for before, now in ((0.0100, 0.0076), (0.0100, 0.0100), (0.0050, 0.0070)):
        assert "The lead shrinks" not in closing(before, now)


def test_no_lead_is_continued_without_a_distillation_or_beyond_its_end() -> None:
    found = facts()
    found["finalists"][2]["curve"][3]["kl"] = 0.1101
    assert "The lead shrinks" in " ".join(search_words(found, RECIPE))
    for recipe in ({}, {"distill": {"tokens": 600_000}}):
        assert "The lead shrinks" not in " ".join(search_words(found, recipe))


def test_a_trial_may_have_chosen_a_shape_that_is_no_finalist() -> None:
    found = facts(trial=None)
    assert "A trial without training would have chosen a shape that is none of the finalists." in search_words(
        found, RECIPE
    )
    section = searched(found, RECIPE)
    assert section is not None
    assert "Colored: the choice, 2. Dashed" in section.figures[0].note


def test_one_sample_has_no_standard_error() -> None:
    second = {"finalist": 2, "gap": {"value": 0.028, "stderr": math.nan}, "clear": False}
    agreement = [{"rung": 1, "tau": 0.6, "low": None, "high": None, "candidates": 5}]
    found = facts(samples=1, second=second, agreement=agreement)
    words = " ".join(search_words(found, RECIPE))
    assert "Finalist 3 is 0.028 behind. One sample has no standard error" in words
    assert "two standard errors" not in words
    assert "later, on one held-out sample: 0.60 after 200k tokens, 5 finalists." in words
    section = searched(found, RECIPE)
    assert section is not None
    assert "measured on one held-out sample, in nats per token." in section.note
    assert "±" not in section.note


def test_a_rise_is_a_warning() -> None:
    rises = [{"finalist": i, "rung": 1, "value": 0.02, "stderr": 0.004} for i in (3, 4)]
    (words,) = (line for line in search_words(facts(rises=rises), RECIPE) if line.startswith("Warning"))
    assert "finalist 4 by 0.0200 ± 0.0040 until 200k tokens, 5 by 0.0200 ± 0.0040 until 200k tokens." in words


def test_two_finalists_have_no_ranks_to_speak_of() -> None:
    agreement = [{"rung": 3, "tau": -1.0, "low": -1.0, "high": -1.0, "candidates": 2}]
    assert "Kendall" not in " ".join(search_words(facts(agreement=agreement), RECIPE))


TOO_SMALL = "The number of finalists is too small for an interval"


@pytest.mark.parametrize("interval", [(None, None), (-1.0, -1.0)])  # the second by earlier versions
def test_three_finalists_are_too_few_for_an_interval(interval: tuple[float | None, float | None]) -> None:
    assert report._RANKED == agreement.RANKED
    low, high = interval
    few = {"rung": 2, "tau": -1.0, "low": low, "high": high, "candidates": 3}
    words = " ".join(search_words(facts(agreement=[few]), RECIPE))
    assert f"and later: -1.00 after 400k tokens, 3 finalists. {TOO_SMALL}." in words
    more = {"rung": 1, "tau": 0.6, "low": 0.4, "high": 0.8, "candidates": 5}
    words = " ".join(search_words(facts(agreement=[more, few]), RECIPE))
    assert "later, with a 95 % interval over the held-out samples: 0.60 (0.40 to 0.80) after" in words
    assert f"; -1.00 after 400k tokens, 3 finalists. {TOO_SMALL} where none is given." in words
    same = {**more, "low": low, "high": high}
    assert f"{TOO_SMALL}: the samples, drawn anew, give one value." in " ".join(
        search_words(facts(agreement=[same]), RECIPE)
    )


def test_a_narrow_range_has_ticks() -> None:
    points = [(0, 0.31), (1, 0.38)]
    svg = plots.tracks([plots.Series("1", "ce", tuple(points))], title="", x_label="", marks=[])
    assert len(re.findall(r'class="tick end"', svg)) >= 2


@pytest.mark.parametrize(
    ("best", "says"),
    [
        (1, "No finalist answers more of the 400 items of next-line than the choice. Each was asked at the last rung"),
        (2, "the winner is another: finalist 3, after 600k tokens, answers 2.0 ± 1.5 percentage points more"),
        (4, "the winner is another: finalist 5, after 200k tokens, answers 2.0 ± 1.5 percentage points more"),
    ],
)
def test_both_winners_are_named(best: int, says: str) -> None:
    accuracies = {str(i): {"value": 0.6 + 0.02 * (i == best), "stderr": 0.02} for i in range(5)}
    gap = {"value": 0.02, "stderr": 0.015}
    choices = {
        "name": "next-line",
        "items": 400,
        "accuracies": accuracies,
        "best": best,
        "gap": gap,
        "agrees": best == 1,
    }
    found = facts(choices=choices)
    assert says in " ".join(search_words(found, RECIPE))
    head, rows = search_rows(found)
    assert head[-1] == "next-line, %"
    assert [row[-1] for row in rows] == ["62.0 ± 2.0" if i == best else "60.0 ± 2.0" for i in range(5)]
    choices["accuracies"] = {name: accuracies[name] for name in ("1", "2")}
    assert "Asked were those that reached the last rung." in " ".join(search_words(found, RECIPE))
    assert [row[-1] for row in search_rows(found)[1]][3:] == ["-", "-"]


def test_every_finalist_has_a_row_and_a_curve() -> None:
    section = searched(facts(), RECIPE)
    assert section is not None
    assert section.table is not None
    assert [row.label for row in section.table.rows] == ["1", "2", "3", "4", "5"]
    assert {len(row.cells) for row in section.table.rows} == {len(section.table.head) - 1}
    assert [row.subject for row in section.table.rows] == [False, True, False, False, False]
    svg = section.figures[0].svg
    assert len(re.findall('class="curve', svg)) == 5
    assert svg.count('<path class="level"') == 2
    assert svg.rindex('class="curve distilled"') > svg.rindex('class="curve teacher"')  # the choice lies on top


def untrained(method: str, **changes: Any) -> dict[str, Any]:
    """Three shapes in a trial, of which the deepest is chosen though another has the lowest KL."""
    tried: list[dict[str, Any]] = [
        {
            "arch": {**SIZES, "layers": 9 - i, "ffn": 160 + 40 * i},
            "kept_layers": list(range(9 - i)),
            "params": 850_000 + 10_000 * i,
            "non_embedding": 640_000,
            "kl": kl,
            "by_sample": [kl] * 6,
            "stderr": 0.01,
        }
        for i, kl in enumerate((0.42, 0.40, 0.60))
    ]
    choice = {key: value for key, value in tried[0].items() if key not in ("by_sample", "stderr")}
    behind = {"value": 0.02, "stderr": 0.004}
    found = {"method": method, "tried": tried, "choice": choice, "candidates": 3, "behind": behind, "ties": 1}
    if method == "additive":
        found |= {"tried": [], "behind": None, "ties": 0}
    return {**found, **changes}


def test_a_trial_shows_its_candidates_and_its_choice() -> None:
    found = untrained("trial", candidates=4)
    section = searched(found, RECIPE)
    assert section is not None
    assert section.table is not None
    assert "3 shapes were cut, refit and measured, and none was trained." in section.note
    assert "on 6 calibration samples" in section.note
    head, rows = search_rows(found)
    assert head[-2:] == ("parameters", "KL in the trial") == section.table.head[-2:]
    assert [row[0] for row in rows] == ["1", "2 *", "3"]
    assert [row[-2:] for row in rows] == [
        ("860k", "0.400 ± 0.010"),
        ("850k", "0.420 ± 0.010"),
        ("870k", "0.600 ± 0.010"),
    ]
    assert [row.subject for row in section.table.rows] == [False, True, False]
    (words,) = search_words(found, RECIPE)
    assert section.between == words
    assert "Shape 2 is chosen: it is 0.0200 ± 0.0040 above the lowest KL, sample by sample, and the deepest" in words
    assert "It keeps layers 0, 1, 2, 3, 4, 5, 6, 7, 8, counted from 0." in words
    assert "1 of 4 candidates broke the budget" in words


def test_the_lowest_kl_of_a_trial_is_called_so() -> None:
    found = untrained("trial", ties=0)
    found["choice"] = {key: found["tried"][1][key] for key in found["choice"]}
    (words,) = search_words(found, RECIPE)
    assert words.startswith("Shape 1 is chosen: it has the lowest KL. It keeps")


def test_a_sum_of_blocks_shows_its_choice_and_what_it_predicts() -> None:
    found = untrained("additive")
    section = searched(found, RECIPE)
    assert section is not None
    assert "No shape was cut or trained." in section.note
    head, rows = search_rows(found)
    assert (head[-1], [(row[0], row[-1]) for row in rows]) == ("sum of harms", [("1 *", "0.420")])
    assert "predicted harm of 0.420, which is no measurement" in section.between


def test_earlier_versions_did_not_name_the_choice_of_a_trial() -> None:
    assert searched({"method": "trial", "tried": []}, RECIPE) is None


@pytest.mark.parametrize(("method", "title"), [("trial", "KL to the teacher"), ("additive", "sum of blocks")])
def test_it_is_printed_as_well(method: str, title: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = untrained(method)
    searching._table(found, RECIPE, {"sizes": found["choice"]["arch"]})
    said = " ".join(capsys.readouterr().out.split())
    assert title in said
    assert "* is chosen" in said
    assert "It keeps layers 0, 1, 2" in said
    assert "chosen: hidden 104" in said
    searching._table({"method": method, "tried": []}, RECIPE, {"sizes": found["choice"]["arch"]})
