"""The tournament on tiny models: what it trains, who leaves, and that a kill changes nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from halve.model.checkpoint import Checkpoint
from halve.recipe.schema import Recipe
from halve.search.halving import Ladder, ladder
from halve.search.tournament import FINALISTS, RUNGS, LowRank, Played, School, play
from halve.stages import cache
from halve.text.opened import open_text
from halve.train.loop import loop
from halve.train.ranks.group import ALONE
from halve.train.teachers import answers

BATCH, CONTEXT = 4, 32
TRAINING = {"tokens": 8 * BATCH * CONTEXT, "batch": BATCH, "lr": 3e-3, "min_lr": 1e-3, "warmup_steps": 1,
            "eval_samples": 6, "eval_every": 100, "checkpoint_every": 3, "cache": "hidden"}  # fmt: skip
PLAN = ladder(3, tokens=8 * BATCH * CONTEXT, rungs=3, keep=0.5, step=BATCH * CONTEXT)


class Killed(BaseException):
    """Not caught by anything."""


@pytest.fixture(scope="module")
def field(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Checkpoint]:
    """The tiny llama without one of its layers, three ways."""
    made = []
    for gone in (3, 2, 1):
        folder = tmp_path_factory.mktemp("field") / str(gone)
        shutil.copytree(tiny_llama, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
        tensors = {}
        for name, value in load_file(folder / "model.safetensors").items():
            layer = int(name.split("layers.")[1].split(".")[0]) if "layers." in name else -1
            if layer != gone:
                tensors[name.replace(f"layers.{layer}.", f"layers.{layer - (layer > gone)}.")] = value
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        made.append(Checkpoint.open(folder))
    return made


@pytest.fixture(scope="module")
def school(make_recipe: Callable[..., Recipe], tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> School:
    recipe, place = make_recipe(distill=TRAINING), tmp_path_factory.mktemp("school")
    teacher = Checkpoint.open(tiny_llama)
    assert recipe.distill is not None
    cache.run(recipe, teacher=teacher, cache=place / "data", out=place)
    text = open_text(recipe, recipe.distill, teacher, cache=place / "data", progress=loop.SILENT)
    store = answers.open_store(place, recipe, recipe.distill, teacher=teacher.fingerprint, text=text)
    return School(recipe, recipe.distill, text, store, "cpu", ALONE)


@pytest.fixture(scope="module")
def whole(field: list[Checkpoint], school: School, tmp_path_factory: pytest.TempPathFactory) -> tuple[Played, Any]:
    """A tournament that nobody kills, and the weights of all at the last rung that they reached."""
    return played(field, school, tmp_path_factory.mktemp("whole"))


def played(
    field: list[Checkpoint], school: School, out: Path, plan: Ladder = PLAN
) -> tuple[Played, dict[int, dict[str, torch.Tensor]]]:
    trained: dict[int, dict[str, torch.Tensor]] = {}

    def graduate(finalist: int, model: torch.nn.Module) -> None:
        trained[finalist] = {name: value.clone() for name, value in model.state_dict().items()}

    return play(field, plan, school, out=out, graduate=graduate), trained


def test_every_rung_trains_on(whole: tuple[Played, Any]) -> None:
    found = whole[0]
    assert PLAN.places == (3, 3, 2, 2)
    by_rung = [[one for one in found.showings if one.rung == rung] for rung in range(4)]
    assert [len(shown) for shown in by_rung] == [3, 3, *[len(s.kept) for s in found.selections]]
    for rung, shown in enumerate(by_rung):
        assert {one.tokens for one in shown} == {PLAN.tokens[rung]}
    start, end = (found.kl(rung, found.last).mean(1) for rung in (0, 3))
    assert bool((end < 0.8 * start).all())
    assert all(len(one.by_sample) == 6 for one in found.showings)
    for one in found.showings:
        assert one.kl == pytest.approx(sum(one.by_sample) / 6)


def test_who_leaves_is_worse(whole: tuple[Played, Any]) -> None:
    found = whole[0]
    for rung, selection in enumerate(found.selections, 1):
        kl = {one.finalist: one.kl for one in found.showings if one.rung == rung}
        assert sorted(kl, key=kl.__getitem__) == [*selection.kept, *selection.gone]
    assert float(found.kl(3, found.last[:1]).mean()) == min(one.kl for one in found.showings if one.rung == 3)


def test_who_leaves_is_handed_over_as_it_then_was(field: list[Checkpoint], school: School, tmp_path: Path) -> None:
    strict = Ladder(PLAN.tokens, PLAN.places, budget=0)  # no room for ties
    found, trained = played(field, school, tmp_path / "all", strict)
    (gone,) = found.selections[0].gone
    assert gone not in found.last
    assert {*trained} == {0, 1, 2}
    first = Ladder(PLAN.tokens[:2], (1, 1), budget=0)
    _, alone = played(field[gone : gone + 1], school, tmp_path / "alone", first)
    assert all(torch.equal(value, trained[gone][name]) for name, value in alone[0].items())


def test_pauses_change_no_bit(
    whole: tuple[Played, Any], field: list[Checkpoint], school: School, tmp_path: Path
) -> None:
    """A finalist that reached the end is what the loop makes of it in one go."""
    finalist = whole[0].last[0]
    alone = ladder(1, tokens=PLAN.tokens[-1], rungs=1, keep=0.5, step=BATCH * CONTEXT)
    trained: list[dict[str, torch.Tensor]] = []
    play([field[finalist]], alone, school, out=tmp_path, graduate=lambda _, m: trained.append(m.state_dict()))
    for name, value in trained[0].items():
        assert torch.equal(value, whole[1][finalist][name]), name


@pytest.mark.parametrize("at", [2, 7, 13, 18])
def test_a_kill_changes_no_bit(
    whole: tuple[Played, Any],
    field: list[Checkpoint],
    school: School,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at: int,
) -> None:
    """Killed at a step, and then with half of the last line written."""
    count, step = [0], loop._UnderWay.step

    def counted(self: Any, number: int) -> dict[str, Any]:
        count[0] += 1
        if count[0] == at:
            raise Killed
        return step(self, number)

    monkeypatch.setattr(loop._UnderWay, "step", counted)
    with pytest.raises(Killed):
        play(field, PLAN, school, out=tmp_path)
    lines = tmp_path / RUNGS
    lines.write_text(lines.read_text()[:-20])
    count[0] = -1000
    again, trained = played(field, school, tmp_path)
    assert again.last == whole[0].last
    assert sorted(again.showings, key=lambda one: (one.rung, one.finalist)) == sorted(
        whole[0].showings, key=lambda one: (one.rung, one.finalist)
    )
    assert again.selections == whole[0].selections
    for finalist, weights in trained.items():
        assert all(torch.equal(value, whole[1][finalist][name]) for name, value in weights.items())
    assert not any((tmp_path / FINALISTS / str(gone) / ".checkpoints").exists() for gone in {0, 1, 2} - {*again.last})


def test_a_finished_tournament_trains_nothing(
    whole: tuple[Played, Any],
    field: list[Checkpoint],
    school: School,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = play(field, PLAN, school, out=tmp_path)
    monkeypatch.setattr(loop, "train", lambda *_, **__: pytest.fail("trained again"))
    assert play(field, PLAN, school, out=tmp_path) == first


def test_no_rungs_measure_the_cuts(field: list[Checkpoint], school: School, tmp_path: Path) -> None:
    plan = ladder(3, tokens=PLAN.tokens[-1], rungs=0, keep=0.5, step=BATCH * CONTEXT)
    found = play(field, plan, school, out=tmp_path)
    assert [one.tokens for one in found.showings] == [0, 0, 0]
    assert found.selections == ()
    kl = {one.finalist: one.kl for one in found.showings}
    assert found.last == tuple(sorted(kl, key=kl.__getitem__))


def test_adapters_alone(field: list[Checkpoint], school: School, tmp_path: Path) -> None:
    lora = School(**{**vars(school), "adapter": LowRank(4, 8.0)})
    plan = ladder(1, tokens=4 * BATCH * CONTEXT, rungs=1, keep=0.5, step=BATCH * CONTEXT)
    trained: list[torch.nn.Module] = []
    found = play(field[:1], plan, lora, out=tmp_path, graduate=lambda _, model: trained.append(model))
    start, end = found.showings
    assert end.kl < start.kl
    moved = {name.split(".")[-3] for name, value in trained[0].named_parameters() if value.requires_grad}
    assert moved == {"lora_A", "lora_B"}
