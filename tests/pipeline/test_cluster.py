"""The commands of docs/guides/cluster.md: torchrun through the whole pipeline, and models out of its checkpoints.

torchrun starts a whole run and one that it passes SIGTERM to. Where it has nothing to do with what is looked at, ranks
are forks of this process, told the same by their environment: they need not import anything.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from halve.cli.app import main
from halve.disk.files import file_sha256, read_json
from halve.errors import DiskError, RunError
from halve.pipeline import run as pipeline
from halve.pipeline.export import export
from halve.recipe.schema import Recipe
from halve.train.loop import checkpoints
from halve.train.ranks.group import ALONE

LIMIT_S = 300.0
TRAINING = {"tokens": 1280, "batch": 4, "warmup_steps": 2, "eval_every": 3, "eval_samples": 4, "checkpoint_every": 4}


@pytest.fixture(scope="module")
def recipe(make_recipe: Callable[..., Recipe]) -> Recipe:
    return make_recipe(correct=TRAINING, distill={**TRAINING, "intermediate": {"alpha": 0.5}})


@pytest.fixture(scope="module")
def recipe_file(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True)))
    return path


def torchrun(recipe_file: Path, out: Path, *words: str) -> list[str]:
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [*ranks, "-m", "halve", "run", str(recipe_file), "--out", str(out), *words]


@pytest.fixture(scope="module")
def done(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run that two ranks have made, and what it printed."""
    out = tmp_path_factory.mktemp("run") / "run"
    answer = subprocess.run(torchrun(recipe_file, out, "--json"), capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    return out, answer.stdout


def before_distill(done: Path, folder: Path) -> Path:
    shutil.copytree(done, folder)
    for stage in ("distill", "evaluate", "report"):
        shutil.rmtree(folder / stage)
    return folder


def course(run: Path) -> list[list[float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [[line["step"], line.get("loss", 0.0), line.get("grad_norm", 0.0)] for line in lines]


def test_two_ranks_make_the_run_of_one(done: tuple[Path, str], recipe: Recipe, tmp_path: Path) -> None:
    one = before_distill(done[0], tmp_path / "one")
    pipeline.run(recipe, one, only="distill")
    want, have = course(one / "distill"), course(done[0] / "distill")
    assert len(have) == 11
    for mine, its in zip(have, want, strict=True):
        assert mine == pytest.approx(its, rel=1e-5)
    models = [AutoModelForCausalLM.from_pretrained(run / "distill" / "model") for run in (done[0], one)]
    torch.testing.assert_close(dict(models[0].named_parameters()), dict(models[1].named_parameters()))


def test_two_ranks_correct_a_teacher_beside(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    correct = {"tokens": 640, "batch": 4, "when": "beside"}
    recipe = make_recipe(correct=correct, distill=TRAINING)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True)))
    runs = tmp_path / "one", tmp_path / "two"
    for stage in ("score", "prune"):
        pipeline.run(recipe, runs[0], only=stage)
    shutil.copytree(*runs)
    pipeline.run(recipe, runs[0], only="distill")
    answers = forked.in_ranks(["distill", str(path), "--out", str(runs[1])], 2, folder=tmp_path, limit=LIMIT_S)
    assert [answer.code for answer in answers] == [0, 0], answers
    for mine, its in zip(*(course(run / "distill") for run in runs), strict=True):
        assert mine == pytest.approx(its, rel=1e-5)
    checks = [read_json(run / "distill" / "manifest.json")["metrics"]["teacher_ce"] for run in runs]
    assert checks[1] == pytest.approx(checks[0], rel=1e-5)
    teachers = [AutoModelForCausalLM.from_pretrained(run / "distill" / "teacher") for run in runs]
    torch.testing.assert_close(dict(teachers[1].named_parameters()), dict(teachers[0].named_parameters()))


def test_two_ranks_train_students_inside_the_student(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """Both draw the same students, hold whole models, and end with the weights of one rank."""
    nest = {"sizes": [{"ffn": 32, "hidden": 24}, {"ffn": 16, "layers": 2}], "draws": 2}
    recipe = make_recipe(distill=TRAINING, nest=nest)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True)))
    runs = tmp_path / "one", tmp_path / "two"
    for stage in ("score", "prune", "nest"):
        pipeline.run(recipe, runs[0], only=stage)
    shutil.copytree(*runs)
    pipeline.run(recipe, runs[0], only="distill")
    answers = forked.in_ranks(["distill", str(path), "--out", str(runs[1])], 2, folder=tmp_path, limit=LIMIT_S)
    assert [answer.code for answer in answers] == [0, 0], answers
    for mine, its in zip(*(course(run / "distill") for run in runs), strict=True):
        assert mine == pytest.approx(its, rel=1e-5)
    for part in ("model", "nested-2/model", "nested-3/model"):
        models = [AutoModelForCausalLM.from_pretrained(run / "distill" / part) for run in runs]
        torch.testing.assert_close(dict(models[1].named_parameters()), dict(models[0].named_parameters()))


def test_one_rank_speaks_and_all_leave_one_run_behind(done: tuple[Path, str]) -> None:
    results = json.loads(done[1])  # of two ranks that spoke, this were no JSON
    assert results == read_json(done[0] / "evaluate" / "results.json")
    assert (done[0] / "report" / "report.html").is_file()
    assert [path.name for path in done[0].glob(".*") if path.name != ".lock"] == []


def test_an_error_of_the_first_rank_is_said_once(recipe: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    uneven = recipe.model_copy(update={"distill": recipe.distill and recipe.distill.model_copy(update={"batch": 3})})
    path.write_text(yaml.safe_dump(uneven.model_dump(mode="json", exclude_none=True)))
    answers = forked.in_ranks(["run", str(path), "--out", str(tmp_path / "run")], 2, folder=tmp_path, limit=LIMIT_S)
    assert answers[0].code == 2, answers
    assert answers[1].code in (1, 2), answers  # 1: the first was gone before the second had heard of the error
    said = [answer.err.count("error: a batch of 3 samples cannot be split into 2 equal shares") for answer in answers]
    assert said == [1, 0]


def test_a_run_that_gets_sigterm_goes_on(done: tuple[Path, str], recipe_file: Path, tmp_path: Path) -> None:
    run = before_distill(done[0], tmp_path / "run")
    journal = run / ".distill.work" / "metrics.jsonl"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        torchrun(recipe_file, run), stderr=subprocess.PIPE, text=True, env=environment, stdout=subprocess.DEVNULL
    ) as process:
        while not (journal.exists() and len(journal.read_text().splitlines()) > 1):
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    assert said.count("stopped by SIGTERM after step") == 1
    (kept,) = checkpoints.complete(run / ".distill.work" / ".checkpoints")
    assert f"stopped by SIGTERM after step {int(kept.name.removeprefix('step-'))}" in said

    exported = export(run, tmp_path / "exported")
    masters = checkpoints.parameters(kept, "student")
    model = AutoModelForCausalLM.from_pretrained(exported)
    assert dict(model.named_parameters()).keys() == masters.keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.detach(), masters[name])
    assert AutoTokenizer.from_pretrained(exported).get_vocab()
    assert read_json(exported / "halve.json")["step"] == int(kept.name.removeprefix("step-"))
    assert export(kept, tmp_path / "again") == tmp_path / "again"
    with pytest.raises(RunError, match="is in the way"):
        export(kept, tmp_path / "again")
    with pytest.raises(RunError, match="is in the way"):
        export(kept, exported / "config.json")
    shutil.copytree(done[0] / "distill", run / "distill")  # trained before, and now anew
    assert read_json(export(run, tmp_path / "newest") / "halve.json")["step"] == int(kept.name.removeprefix("step-"))
    shutil.rmtree(run / "distill")
    changed = tmp_path / "changed"
    shutil.copytree(run, changed)
    (kept,) = checkpoints.complete(changed / ".distill.work" / ".checkpoints")
    weights = next(kept.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(RunError, match="is damaged"):
        export(kept, tmp_path / "damaged")

    again = forked.in_ranks(["run", str(recipe_file), "--out", str(run)], 2, folder=tmp_path, limit=LIMIT_S)
    assert [answer.code for answer in again] == [0, 0], again
    assert course(run / "distill") == course(done[0] / "distill")
    student = "distill/model/model.safetensors"
    assert file_sha256(run / student) == file_sha256(done[0] / student)


def test_a_finished_run_is_exported(done: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(done[0]), "--out", str(tmp_path / "model")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "model")
    have, want = ((folder / "model.safetensors") for folder in (tmp_path / "model", done[0] / "distill" / "model"))
    assert file_sha256(have) == file_sha256(want)
    with pytest.raises(RunError, match="is in the way"):
        export(done[0], tmp_path / "model")


def test_what_a_killed_export_left_does_not_block_the_next(done: tuple[Path, str], tmp_path: Path) -> None:
    """A folder that stood there has the draft in it, a new one has it beside it."""
    new, there = tmp_path / "new", tmp_path / "there"
    for draft in (tmp_path / ".new.tmp", there / ".halve-draft"):
        (draft / "part").mkdir(parents=True)
        (draft / "model.safetensors").write_bytes(b"half")
    wanted = sorted(os.listdir(done[0] / "distill" / "model"))
    for out in (new, there):
        export(done[0], out)
        assert sorted(os.listdir(out)) == wanted
    assert sorted(os.listdir(tmp_path)) == ["new", "there"]


@pytest.mark.parametrize("out", [".", "below/.."])
def test_a_run_is_exported_to_where_one_stands(
    done: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(done[0]), "--out", out]) == 0
    assert sorted(os.listdir(".")) == sorted(os.listdir(tmp_path)) == sorted(os.listdir(done[0] / "distill" / "model"))
    assert main(["export", str(done[0]), "--out", out]) == 2


def test_a_disk_that_fills_up_under_an_export_leaves_nothing(
    done: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(100))
    copy = shutil.copy2

    def full(*args: Any, **keys: Any) -> Any:
        if next(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return copy(*args, **keys)

    monkeypatch.setattr(shutil, "copytree", functools.partial(shutil.copytree, copy_function=full))
    with pytest.raises(DiskError, match="no room left"):
        export(done[0], tmp_path / "out" / "model")
    assert not list((tmp_path / "out").iterdir())


def test_a_checkpoint_of_other_sizes_is_refused(done: tuple[Path, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(done[0], run)
    kept = run / ".distill.work" / ".checkpoints" / "step-00000004"
    model = AutoModelForCausalLM.from_pretrained(done[0] / "distill" / "model")
    wider = {name: torch.cat([value, value]) for name, value in model.named_parameters()}
    checkpoints.write({f"param.student.{name}": value.detach() for name, value in wider.items()}, kept, ALONE)
    (kept / checkpoints.FACTS).write_text(json.dumps({"step": 4, "identity": {"training": {}}}))
    with pytest.raises(RunError, match="is of a model with other sizes"):
        export(run, tmp_path / "model")


def test_the_launch_examples_can_be_read() -> None:
    text = Path(__file__).parents[2].joinpath("docs", "guides", "cluster.md").read_text()
    blocks = re.findall(r"```(bash|yaml)\n(.*?)```", text, re.DOTALL)
    assert {kind for kind, _ in blocks} == {"bash", "yaml"}
    for kind, block in blocks:
        if kind == "bash":
            subprocess.run(["bash", "-n"], input=block, text=True, check=True)
    objects = [part for kind, block in blocks if kind == "yaml" for part in yaml.safe_load_all(block)]
    assert {"Service", "Job"} <= {part.get("kind") for part in objects}


def test_what_holds_no_student_is_refused(done: tuple[Path, str], tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is neither a run folder nor a checkpoint"):
        export(tmp_path, tmp_path / "model")
    with pytest.raises(RunError, match="has no trained student"):
        export(before_distill(done[0], tmp_path / "run"), tmp_path / "model")
    lost: Any = tmp_path / "step-00000001"
    lost.mkdir()
    (lost / checkpoints.FACTS).write_text("{}")
    with pytest.raises(RunError, match="does not lie in its run"):
        export(lost, tmp_path / "model")
