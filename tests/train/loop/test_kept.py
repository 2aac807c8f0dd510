"""What a run keeps: checkpoints, and the same bits after a kill or a pause."""

from __future__ import annotations

import errno
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from looped import CONTEXT, TIMES, Fake, Killed, killing, lines, run, same, second, taught, tiny, training, weights
from safetensors import safe_open
from torch import Tensor

from halve.disk import folders
from halve.errors import DiskError, RunError, Stopped
from halve.model.head import split
from halve.train.loop import checkpoints
from halve.train.objectives import logits as objectives


# 6 steps, a checkpoint after 2 and 4, two parts a step
@pytest.mark.parametrize(("after", "resumed"), [(0, 0), (1, 0), (3, 0), (5, 2), (7, 2), (9, 4), (11, 4)])
def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path, after: int, resumed: int) -> None:
    recipe, objective = training(micro_batch=4), taught(tiny(seed=1))
    whole, model = tiny(), tiny()
    run(tmp_path / "whole", whole, objective=objective, recipe=recipe)
    with pytest.raises(Killed):
        run(tmp_path / "killed", model, objective=killing(objective, after), recipe=recipe)
    model = tiny()
    result = run(tmp_path / "killed", model, objective=objective, recipe=recipe)
    assert result.resumed_from == resumed
    assert same(weights(model), weights(whole))
    timeless = [
        [{k: v for k, v in line.items() if k not in TIMES} for line in lines(tmp_path / name)]
        for name in ("whole", "killed")
    ]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize("pauses", [[0, 3], [1, 5], [4], [6], [2, 2]])
def test_pauses_change_no_bit(tmp_path: Path, pauses: list[int]) -> None:
    """6 steps, a checkpoint after 2 and 4. A pause after step 0 trains nothing, one after the last is the end."""
    heldout = objectives.heldout_loss(Fake().batch(99, 4), micro_batch=4)
    whole, model = tiny(), tiny()
    told = run(tmp_path / "whole", whole, heldout=heldout)
    for pause in pauses:
        model = tiny()
        result = run(tmp_path / "paused", model, heldout=heldout, until=pause)
        assert (result.steps, result.tokens) == (pause, pause * 8 * CONTEXT)
        assert result.heldout == heldout(*split(model))
    model = tiny()
    result = run(tmp_path / "paused", model, heldout=heldout)
    assert same(weights(model), weights(whole))
    assert result.as_dict() == told.as_dict()
    steps = [line["step"] for line in lines(tmp_path / "paused")]
    assert steps == list(range(7))


def test_a_checkpoint_holds_what_is_trained_and_its_state(tmp_path: Path) -> None:
    model = tiny()
    model.model.layers[0].requires_grad_(False)
    frozen = [name for name, _ in model.model.layers[0].named_parameters()]
    run(tmp_path, model)
    (kept,) = checkpoints.complete(tmp_path / "work")
    trained = {name for name, _ in model.named_parameters()} - {f"model.layers.0.{name}" for name in frozen}
    assert checkpoints.parameters(kept, "student").keys() == trained
    with safe_open(next(kept.glob("*.safetensors")), framework="pt") as file:
        names = {name.partition(".student.")[::2] for name in list(file.keys())}
    moments = {("exp_avg", name) for name in trained} | {("exp_avg_sq", name) for name in trained}
    assert names == moments | {("param", name) for name in trained} | {("step", name) for name in trained}
    assert {path.suffix for path in kept.iterdir()} == {".safetensors", ".json"}  # no pickle


def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path: Path) -> None:
    objective = taught(tiny(seed=1))
    with pytest.raises(Killed):
        run(tmp_path, tiny(), objective=killing(objective, 3))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "lo')
    run(tmp_path, tiny(), objective=objective)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("where", ["write", "sync_tree", "os.replace", "sync"])
def test_a_kill_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: Any, where: str) -> None:
    whole, model = tiny(), tiny()
    run(tmp_path / "whole", whole)
    calls = []

    def killed(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == 2:  # the second checkpoint, after step 4
            raise Killed
        original(*args, **kwargs)

    holder = {"os.replace": os, "sync": folders}.get(where, checkpoints)
    original = getattr(holder, where.removeprefix("os."))
    with monkeypatch.context() as patch:
        patch.setattr(holder, where.removeprefix("os."), killed)
        # metrics.jsonl is begun by a rename too, which is the first
        with pytest.raises(Killed):
            run(tmp_path / "killed", model, recipe=training(checkpoint_every=2))
    assert len(calls) == 2
    model = tiny()
    run(tmp_path / "killed", model)
    assert same(weights(model), weights(whole))


@pytest.mark.parametrize(("keep", "kept"), [(1, [4]), (2, [3, 4]), (9, [1, 2, 3, 4])])
def test_the_last_checkpoints_are_kept(tmp_path: Path, keep: int, kept: list[int]) -> None:
    recipe = training(checkpoint_every=1, keep_checkpoints=keep, tokens=5 * 8 * CONTEXT)
    run(tmp_path, tiny(), recipe=recipe)
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == [f"step-{step:08d}" for step in kept]


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: Any) -> None:
    write, going_on, objective, steps = checkpoints.write, threading.Event(), taught(tiny(seed=1)), iter(range(1, 100))

    def waiting(*args: Any) -> None:
        assert going_on.wait(timeout=60), "the third step did not begin before the checkpoint of the second was written"
        write(*args)

    def noted(*args: Any) -> tuple[Tensor, int]:
        if next(steps) == 3:
            going_on.set()
        return objective(*args)

    monkeypatch.setattr(checkpoints, "write", waiting)
    run(tmp_path, tiny(), objective=noted, recipe=training(checkpoint_every=2))
    assert [path.name[-1] for path in checkpoints.complete(tmp_path / "work")] == ["4"]


def test_what_learns_beside_resumes_with_the_same_bits(tmp_path: Path) -> None:
    objective, recipe = taught(tiny(seed=1)), training(micro_batch=4)
    whole, other = tiny(), second()
    run(tmp_path / "whole", whole, objective=objective, recipe=recipe, beside=other)
    assert [line["second_loss"] > 0 for line in lines(tmp_path / "whole")] == [True] * 6
    with pytest.raises(Killed):
        run(tmp_path / "killed", tiny(), objective=killing(objective, 9), recipe=recipe, beside=second())
    model, again = tiny(), second(seed=6)
    result = run(tmp_path / "killed", model, objective=objective, recipe=recipe, beside=again)
    assert result.resumed_from == 4
    assert same(weights(model), weights(whole))
    assert same(weights(again.model), weights(other.model))


def test_a_checkpoint_of_another_recipe_is_not_taken(tmp_path: Path) -> None:
    run(tmp_path, tiny())
    assert run(tmp_path, tiny(), recipe=training(lr=2e-2)).resumed_from == 0
    assert run(tmp_path, tiny(), recipe=training(lr=2e-2)).resumed_from == 4
    assert run(tmp_path, tiny(), recipe=training(lr=2e-2), name="other").resumed_from == 0


@pytest.mark.parametrize("what", ["cut", "gone", "facts", "flipped"])
def test_a_damaged_checkpoint_is_not_taken_but_the_one_before_it(tmp_path: Path, what: str) -> None:
    whole, model, recipe = tiny(), tiny(), training(checkpoint_every=1, keep_checkpoints=2)
    objective = taught(tiny(seed=1))
    run(tmp_path / "whole", whole, objective=objective, recipe=recipe)
    with pytest.raises(Killed):
        run(tmp_path / "killed", tiny(), objective=killing(objective, 4), recipe=recipe)
    *_, before, newest = checkpoints.complete(tmp_path / "killed" / "work")

    def damage(folder: Path) -> None:
        (weights_file,) = folder.glob("*.safetensors")
        if what == "cut":
            weights_file.write_bytes(weights_file.read_bytes()[:500])
        elif what == "gone":
            weights_file.unlink()
        elif what == "flipped":
            content = bytearray(weights_file.read_bytes())
            content[-100] ^= 1
            weights_file.write_bytes(content)
        else:
            (folder / checkpoints.FACTS).write_text("")

    damage(newest)
    with pytest.warns(UserWarning, match=newest.name):
        result = run(tmp_path / "killed", model, objective=objective, recipe=recipe)
    assert result.resumed_from == int(before.name[-2:])
    assert same(weights(model), weights(whole))

    with pytest.raises(Killed):
        run(tmp_path / "lost", tiny(), objective=killing(objective, 2), recipe=recipe)
    for kept in checkpoints.complete(tmp_path / "lost" / "work"):
        damage(kept)
    with pytest.warns(UserWarning, match="cannot be read"), pytest.raises(RunError, match="can be read") as caught:
        run(tmp_path / "lost", tiny(), objective=objective, recipe=recipe)
    assert "remove that folder" in caught.value.fix


def test_a_sigterm_in_the_last_step_is_heeded(tmp_path: Path) -> None:
    objective, whole, model = taught(tiny(seed=1)), tiny(), tiny()
    wanted = run(tmp_path / "whole", whole, objective=objective)
    steps = iter(range(1, 100))

    def ending(*args: Any) -> tuple[Tensor, int]:
        if next(steps) == 6:
            signal.raise_signal(signal.SIGTERM)
        return objective(*args)

    with pytest.raises(Stopped, match="stopped by SIGTERM after step 6"):
        run(tmp_path / "ended", tiny(), objective=ending)
    assert run(tmp_path / "ended", model, objective=objective) == replace(wanted, resumed_from=6)
    assert same(weights(model), weights(whole))
    assert len(lines(tmp_path / "ended")) == len(lines(tmp_path / "whole"))


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "write", full)
    with pytest.raises(DiskError, match="no room left while writing"):
        run(tmp_path, tiny())
    assert not list((tmp_path / "work").iterdir())
