"""Spikes: what is one, and what each policy makes of it; the figures that a run is watched by."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from looped import (
    CONTEXT,
    TIMES,
    Killed,
    killing,
    lines,
    run,
    same,
    second,
    taught,
    tiny,
    training,
    weights,
)

from halve.errors import TrainError
from halve.recipe.read import on_spikes
from halve.recipe.schema import Recipe
from halve.text import batch as batches
from halve.text.batch import Batch
from halve.text.course import Course
from halve.train.loop import checkpoints, watch
from halve.train.loop.watch import Running
from halve.train.objectives.logits import Objective


def breaking(objective: Objective, first_samples: set[int], factor: float = math.nan) -> Objective:
    """Spoil the loss of the steps whose first sample is one of these, as bad samples do, in whichever run."""

    def broken(body: Any, head: Any, batch: Any) -> Any:
        loss, count = objective(body, head, batch)
        return (loss * factor if batch.numbers[0] in first_samples else loss), count

    return broken


def timeless(folder: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines(folder)]


def test_the_running_mean_is_plain_first_and_then_forgets() -> None:
    running = Running()
    for loss in (1.0, 2.0, 6.0):
        running = running.accept(loss)
    assert running.mean == pytest.approx(3.0)
    for _ in range(1000):
        running = running.accept(1.0)
    assert running.mean == pytest.approx(1.0, abs=1e-6)
    assert Running.of(running.notes()) == running


def test_what_is_a_spike() -> None:
    running = Running().accept(2.0)
    assert running.objection(7.9, 1.0, factor=3.0) is None
    assert "running mean 2" in str(running.objection(8.1, 1.0, factor=3.0))
    assert Running().objection(1e9, 1.0, factor=3.0) is None  # nothing to compare it with
    assert str(running.objection(math.nan, 1.0, factor=3.0)) == "loss is nan"
    assert running.objection(1.0, math.inf, factor=3.0) == watch.Spike("grad_norm", math.inf)
    assert running.objection(8.1, 1.0, factor=3.0) == watch.Spike("loss", 8.1, running.mean)
    assert Running().accept(1e-6).objection(0.01, 1.0, factor=3.0) is None  # trembles near zero


def test_a_loss_that_scatters_about_zero_is_no_spike() -> None:
    """As one that is estimated from a few draws does, which an exact divergence never would."""
    random = torch.Generator().manual_seed(0)
    for _ in range(50):
        running = Running()
        for _ in range(100):
            loss = 0.005 + 0.03 * float(torch.randn((), generator=random))
            assert running.objection(loss, 1.0, factor=3.0) is None
            running = running.accept(loss)
    assert running.variance == pytest.approx(0.03**2, rel=0.5)
    assert running.objection(0.3, 1.0, factor=3.0) is not None
    assert Running.of(running.notes()) == running


def test_too_many_within_a_while() -> None:
    running = Running()
    for step in range(1, watch.MOST + 1):
        running = running.leave_out(step)
    assert not running.exhausted
    assert running.leave_out(watch.MOST + 1).exhausted
    assert not running.leave_out(watch.MOST + watch.WITHIN).exhausted


def test_a_spike_stops_with_step_samples_and_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(TrainError) as caught:
        run(tmp_path, tiny(), objective=breaking(taught(tiny(seed=1)), {32}, 50.0))  # step 5 begins with sample 4 * 8
    assert caught.value.what == "the loss spikes at step 5"
    assert "samples are 32, 33, 34, 35, 36, 37, 38, 39" in caught.value.why
    assert "step-00000004" in caught.value.why
    assert "--on-spike skip or rewind" in caught.value.fix


@pytest.mark.parametrize("factor", [math.nan, math.inf, 50.0])
def test_skip_leaves_the_update_out(tmp_path: Path, factor: float) -> None:
    model, clean = tiny(), tiny()
    run(tmp_path / "short", clean, objective=taught(tiny(seed=1)), recipe=training(lr=1e-2, min_lr=1e-2))
    bad = breaking(taught(tiny(seed=1)), {48}, factor)  # the last step
    recipe = training(lr=1e-2, min_lr=1e-2, on_spike="skip", tokens=7 * 8 * CONTEXT)
    result = run(tmp_path / "long", model, objective=breaking(bad, set()), recipe=recipe)
    assert same(weights(model), weights(clean)) == (result.steps == 7)
    spike = lines(tmp_path / "long")[-1]
    assert (spike["step"], spike["spike"], spike["samples"]) == (7, "skip", list(range(48, 56)))
    assert "loss" not in spike
    assert result.loss == lines(tmp_path / "short")[-1]["loss"]


def test_rewind_takes_up_the_last_checkpoint_and_goes_on_after_the_spike(tmp_path: Path) -> None:
    objective = breaking(taught(tiny(seed=1)), {24})  # step 4; the last checkpoint is after step 2
    run(tmp_path, tiny(), objective=objective, recipe=training(on_spike="rewind", keep_checkpoints=9))
    spike = lines(tmp_path)[3]
    assert (spike["step"], spike["spike"], spike["back_to"]) == (4, "rewind", 2)
    kept = [checkpoints.parameters(folder, "student") for folder in checkpoints.complete(tmp_path / "work")]
    assert [path.name[-1] for path in checkpoints.complete(tmp_path / "work")] == ["0", "2", "4"]
    assert all(torch.equal(kept[1][name], kept[2][name]) for name in kept[1])
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_rewind_in_the_first_steps_goes_back_to_the_start(tmp_path: Path) -> None:
    objective = breaking(taught(tiny(seed=1)), {0})
    run(tmp_path, tiny(), objective=objective, recipe=training(on_spike="rewind"))
    assert lines(tmp_path)[0]["back_to"] == 0


# calls of the objective are steps; a spike at step 4, checkpoints after 2 and 4
@pytest.mark.parametrize("policy", ["skip", "rewind"])
@pytest.mark.parametrize("after", [3, 4, 5])
def test_a_kill_around_a_spike_changes_no_bit(tmp_path: Path, policy: str, after: int) -> None:
    objective, recipe = breaking(taught(tiny(seed=1)), {24}), training(on_spike=policy)
    whole, model = tiny(), tiny()
    run(tmp_path / "whole", whole, objective=objective, recipe=recipe)
    with pytest.raises(Killed):
        run(tmp_path / "killed", tiny(), objective=killing(objective, after), recipe=recipe)
    run(tmp_path / "killed", model, objective=objective, recipe=recipe)
    assert same(weights(model), weights(whole))
    assert timeless(tmp_path / "killed") == timeless(tmp_path / "whole")


def test_a_run_that_a_spike_stopped_goes_on_with_skip(tmp_path: Path) -> None:
    objective = breaking(taught(tiny(seed=1)), {32})
    with pytest.raises(TrainError, match="not finite at step 5"):
        run(tmp_path, tiny(), objective=objective)
    assert run(tmp_path, tiny(), objective=objective, recipe=training(on_spike="skip")).resumed_from == 4


def test_spikes_without_end_stop_even_where_they_are_skipped(tmp_path: Path) -> None:
    objective = breaking(taught(tiny(seed=1)), set(range(0, 999, 8)))
    with pytest.raises(TrainError) as caught:
        run(tmp_path, tiny(), objective=objective, recipe=training(on_spike="skip"))
    assert caught.value.what == f"the loss is not finite at step {watch.MOST + 1}"
    assert f"after {watch.MOST} others" in caught.value.why


def test_what_learns_beside_counts_while_it_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "matrix_rate", lambda device, half: 1e9)
    run(tmp_path, tiny(), flops=lambda context: 1e3 * context, beside=second())
    for line in lines(tmp_path):
        work = (1e3 + line["step"]) * CONTEXT
        assert line["mfu"] == pytest.approx(line["tokens_per_second"] * work / 1e9, rel=0.02, abs=1e-4)


def test_a_step_says_how_well_the_device_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "matrix_rate", lambda device, half: 1e9)
    run(tmp_path, tiny(), flops=lambda context: 1e3 * context)
    for line in lines(tmp_path):
        assert line["mfu"] == pytest.approx(line["tokens_per_second"] * 1e3 * CONTEXT / 1e9, rel=0.02, abs=1e-4)
        assert 0 <= line["data_wait"] < 1
        assert line["peak_memory_bytes"] > 1e7


def test_padding_that_is_not_computed_is_no_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Course.batch
    contexts: list[int] = []
    attended = torch.arange(CONTEXT) < CONTEXT // 2

    def padded(self: Course, step: int) -> Batch:
        made = whole(self, step)
        return replace(made, attended=attended.expand_as(made.ids))

    def work(context: int) -> float:
        contexts.append(context)
        return 1e3

    done: list[tuple[float, float]] = []
    monkeypatch.setattr(batches, "_WIDTHS", 1)
    monkeypatch.setattr(Course, "batch", padded)
    monkeypatch.setattr(watch, "mfu", lambda flops, seconds, **_: done.append((flops, seconds)) or 0.5)
    run(tmp_path, tiny(), flops=work)
    assert {*contexts} == {CONTEXT // 2}
    assert {flops for flops, _ in done} == {1e3 * 8 * CONTEXT // 2}
    for line, (flops, seconds) in zip(lines(tmp_path), done, strict=True):
        assert line["tokens_per_second"] == pytest.approx(flops / 1e3 / seconds, rel=1e-3)


def test_the_matrix_rate_of_a_cpu_is_measured_and_of_an_unknown_device_is_not_guessed() -> None:
    rate = watch.matrix_rate("cpu", False)
    assert rate is not None
    assert 1e8 < rate < 1e14
    assert watch.matrix_rate("meta", False) is None
    assert watch.mfu(1.0, 1.0, device="meta", half=False, ranks=1) is None


def test_one_policy_for_all_trainings() -> None:
    distill, data = {"tokens": 1, "on_spike": "rewind"}, {"train": ["a"], "valid": ["b"]}
    then = [{"prune": {"ffn": 2}, "distill": distill}, {"prune": {"ffn": 1}}]
    raw = {"name": "a", "model": "m", "data": data, "prune": {"ffn": 3}, "distill": distill, "then": then}
    recipe = Recipe.model_validate(raw)
    changed = on_spikes(recipe, "skip")
    assert changed.distill is not None
    assert changed.then[0].distill is not None
    assert (changed.distill.on_spike, changed.then[0].distill.on_spike) == ("skip", "skip")
    assert (changed.correct, changed.then[1].distill) == (None, None)
    assert on_spikes(changed, "rewind") == recipe


def test_losses_of_different_kinds_are_not_compared() -> None:
    """A small student's loss is no spike of a large one's; a checkpoint keeps the statistics of every kind."""
    running = Running()
    for _ in range(20):
        running = running.at("large").accept(0.02)
        running = running.at("small").accept(2.0)
    assert running.at("large").objection(2.0, 1.0, factor=3.0) is not None
    assert running.at("small").objection(2.1, 1.0, factor=3.0) is None
    again = Running.of(json.loads(json.dumps(running.notes())))
    assert again == running
    assert again.at("large") == running.at("large")
    assert again.at("large").mean == pytest.approx(0.02)
