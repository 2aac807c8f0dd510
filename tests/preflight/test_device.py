"""What a dry run is planned for: the device at hand, or the card that its flags name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from halve.cli.app import main
from halve.preflight.device import GPU_MFU, GPU_RATES, at_hand, card, device_name
from halve.preflight.forecast import forecast
from halve.recipe.schema import Recipe
from halve.report import tables as show
from halve.train.loop import watch

MakeRecipe = Callable[..., Recipe]
DISTILL = {"tokens": 4096, "batch": 4}


@pytest.fixture
def without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(watch, "matrix_rate", lambda device, half: 50e9)


def with_card(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(name=name, total_memory=150_000_000_000)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    monkeypatch.setattr(watch, "matrix_rate", watch.matrix_rate.__wrapped__)


def test_a_cpu_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = at_hand("auto")
    assert found == at_hand("cpu")
    assert not found.cuda
    assert found.memory_bytes == psutil.virtual_memory().total
    assert found.flops is not None
    assert found.flops == watch.matrix_rate("cpu", False) > 1e8


def test_a_cpu_is_measured_in_the_precision_of_the_models(
    without_cuda: None, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It scores in that of the checkpoint, and trains in float32 unless the recipe says otherwise."""
    monkeypatch.setattr(watch, "matrix_rate", lambda device, half: 200e9 if half else 50e9)
    hours = {
        (dtype, precision): forecast(
            make_recipe(device="auto", dtype=dtype, distill={**DISTILL, "precision": precision})
        ).hours_by_stage
        for dtype in ("float32", "bfloat16")
        for precision in ("auto", "bfloat16")
    }
    slow, fast = hours["float32", "auto"], hours["bfloat16", "auto"]
    assert slow["score"] == pytest.approx(4 * (fast["score"] or 0))
    assert slow["distill"] == fast["distill"]
    assert slow["distill"] == pytest.approx(4 * (hours["bfloat16", "bfloat16"]["distill"] or 0))


def test_a_recipe_that_asks_for_cuda_is_planned_for_a_card(without_cuda: None) -> None:
    assert at_hand("cuda") == card()


def test_the_plan_speaks_of_this_cpu(without_cuda: None, make_recipe: MakeRecipe) -> None:
    """Float32, the machine's memory, its rate; the H100's hours stand beside."""
    recipe = make_recipe(device="auto", dtype="bfloat16", distill=DISTILL)
    found = forecast(recipe, compare=True)
    assert (found.place.cuda, found.place.half) == (False, False)
    assert found.memory["distill"].teacher_bytes == 4 * found.teacher_counts.params
    assert found.memory["distill"].moment_bytes == 8 * found.student_counts.params
    training = found.flops["distill"]
    assert found.hours_by_stage["distill"] == pytest.approx(training / (50e9 * 0.5) / 3600)
    assert found.gpu_hours_by_stage["distill"] == pytest.approx(training / (989e12 * GPU_MFU) / 3600)
    assert found.hours == pytest.approx(sum(hours or 0.0 for hours in found.hours_by_stage.values()))
    assert found.gpu_hours == pytest.approx(sum(found.gpu_hours_by_stage.values()))
    assert found.hours_by_stage.keys() == found.gpu_hours_by_stage.keys() == found.flops.keys()
    assert found.settings == (), "they are ways to fit a card"
    said = found.to_json()
    assert said["device"]["name"] == "this CPU"
    assert said["device"]["memory_bytes"] == psutil.virtual_memory().total
    assert said["hours"] == found.hours
    line = show.plan_in_a_line(found)
    cores = torch.get_num_threads()
    assert f"on this CPU ({cores} core{'s' if cores > 1 else ''}, 50 GFLOP/s measured); about " in line
    assert " of an H100 at 40% MFU" in line
    assert forecast(recipe, ranks=2).hours == found.hours, "ranks share the CPU"


def test_the_page_compares_with_the_machines_memory(
    without_cuda: None, make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(make_recipe(device="auto", distill=DISTILL).model_dump_json(exclude_none=True), encoding="utf-8")
    assert main(["run", str(path), "--dry-run"]) == 0
    page = capsys.readouterr().out
    assert "memory on this CPU, float32" in page
    assert show.bytes_in_words(psutil.virtual_memory().total).split()[0] in page
    assert "50 GFLOP/s measured" in page
    for flags in (["--card", "24"], ["--mfu", "0.3"], ["--ranks", "2"]):
        assert main(["run", str(path), "--dry-run", *flags]) == 0
        page = capsys.readouterr().out
        assert "bfloat16 products" in page
        assert "CPU" not in page
        assert f" of an H100 at {'30' if '0.3' in flags else '40'}% MFU" in page
    assert "on 2 of them" in page


def test_the_plan_speaks_of_the_card_at_hand(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(device="auto", distill=DISTILL)
    with_card("NVIDIA B200", monkeypatch)
    found = forecast(recipe)
    assert found.place.half
    assert found.room_bytes == 150e9
    assert found.hours_by_stage["distill"] == pytest.approx(found.gpu_hours_by_stage["distill"] * 989 / 2250)
    assert " on NVIDIA B200 at 40% MFU; about " in show.plan_in_a_line(found)
    with_card("Some GPU of tomorrow", monkeypatch)
    unknown = forecast(recipe)
    assert unknown.hours is None
    assert set(unknown.hours_by_stage.values()) == {None}
    assert "40% MFU; the speed of Some GPU of tomorrow is not known; disk" in show.plan_in_a_line(unknown)
    assert forecast(make_recipe(distill=DISTILL), device=card()).device.name == "this CPU", "the recipe says so"


def test_flags_name_a_card() -> None:
    assert device_name(None, None, None) is None
    assert device_name(24.0, None, None) == card(24e9)
    assert device_name(None, 0.3, None) == card(mfu=0.3)
    assert device_name(None, None, 8) == card()


def test_every_gpu_that_trains_at_a_known_rate_cuts_at_one() -> None:
    assert list(GPU_RATES) == list(watch.GPU_FLOPS)
