"""The journal's loggers: they get the numbers of every line, and a missing package is named."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from looped import lines, run, tiny, training

from halve.errors import TrainError
from halve.train.loop import journal
from halve.train.loop.journal import flat, open_journal

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def test_the_numbers_of_a_line() -> None:
    line = {"step": 3, "loss": 2, "heldout": {"kl": 0.5}, "spike": "skip", "samples": [1]}
    assert flat(line) == {"loss": 2.0, "heldout/kl": 0.5}


def test_tensorboard_gets_what_the_lines_say(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, tiny(), recipe=training(loggers=("tensorboard",)))
    events = EventAccumulator(str(tmp_path / "tensorboard" / "train"))
    events.Reload()
    have = [(event.step, event.value) for event in events.Scalars("loss")]
    assert have == [(line["step"], pytest.approx(line["loss"])) for line in lines(tmp_path)]


def test_wandb_gets_what_the_lines_say_and_writes_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    seen, log = [], wandb.Run.log

    def spy(run: Any, figures: dict[str, float], step: int) -> None:
        seen.append((run.name, step, figures))
        log(run, figures, step=step)

    monkeypatch.setattr(wandb.Run, "log", spy)
    with open_journal(tmp_path / "metrics.jsonl", step=0, loggers=["wandb"], name="one") as opened:
        opened.write({"step": 1, "loss": 2.5, "heldout": {"kl": 0.75}})
    assert seen == [("one", 1, {"loss": 2.5, "heldout/kl": 0.75})]
    (written,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert written.stat().st_size > 0


def test_wandb_without_a_login_is_refused_before_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    journal.require_loggers(["wandb"])
    monkeypatch.setenv("WANDB_MODE", "online")
    wandb.teardown()  # it remembers the mode of the first call
    with pytest.raises(TrainError, match="the logger wandb does not start\n  why: it has no API key"):
        journal.require_loggers(["wandb"])
    monkeypatch.setattr(wandb, "login", lambda **keys: True)
    journal.require_loggers(["wandb"])


def test_trackio_gets_what_the_lines_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    fake = SimpleNamespace(
        init=lambda **keys: calls.append(("init", keys)),
        log=lambda figures, step: calls.append((step, figures)),
        finish=lambda: calls.append(("finish",)),
    )
    monkeypatch.setitem(sys.modules, "trackio", fake)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with open_journal(tmp_path / "metrics.jsonl", step=0, loggers=["trackio"], name="one") as opened:
        opened.write({"step": 1, "loss": 2.5})
    settings = {"project": "halve", "name": "one", "resume": "allow"}
    assert calls == [("init", settings), (1, {"loss": 2.5}), ("finish",)]


@pytest.mark.parametrize("name", journal.LOGGERS)
def test_a_missing_logger_is_named_with_its_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TrainError) as caught:
        journal.require_loggers([name])
    assert f"pip install 'halve[{name}]'" in caught.value.fix


def test_a_logger_that_does_not_start_is_a_mistake_that_can_be_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(folder: Path, name: str) -> Any:
        raise RuntimeError("No API key configured.")

    monkeypatch.setitem(journal.LOGGERS, "tensorboard", fails)
    with (
        pytest.raises(TrainError, match=r"tensorboard does not start\n  why: No API key configured\.\n  fix: log in"),
        open_journal(tmp_path / "metrics.jsonl", step=0, loggers=("tensorboard",)),
    ):
        pass
