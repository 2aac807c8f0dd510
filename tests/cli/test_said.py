"""What `halve check`, `halve run` and the stages print."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from chat import turns, write_rows
from commands import TINY_PARAMS, finished_stage, said

from halve.cli import app as cli
from halve.cli.app import main
from halve.disk.rundir import RunDir
from halve.pipeline import run as pipeline
from halve.recipe.read import load_recipe
from halve.recipe.schema import Recipe
from halve.report import tables as show


def test_dry_run(recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["run", str(recipe), "--dry-run", "--json"]) == 0
    found = said(capsys)
    assert found["student"]["ffn"] == 80
    assert found["teacher_counts"]["params"] == TINY_PARAMS
    assert found["tokens"]["distill"] == 1000
    assert found["fits"] is True
    assert found["memory"]["distill"]["fits"] is True
    assert main(["run", str(recipe), "--dry-run"]) == 0
    page = capsys.readouterr().out
    for word in ("tiny: plan", "teacher", "student", "this CPU", "of an H100", "disk", "schedule: "):
        assert word in page
    assert not (recipe.parent / "runs").exists()


def test_check_names_everything_that_is_wrong(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("ffn: 80", "ffn: 800"), encoding="utf-8")
    assert main(["check", str(recipe), "--out", str(recipe.parent / "run"), "--json"]) == 2
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert all(set(error) == {"error", "why", "fix"} for error in found)
    assert any("800 of 160 ffn" in error["error"] for error in found)
    assert len(found) >= 2  # the folder has no weights either
    assert err.count("  fix: ") == len(found)
    assert not (recipe.parent / "run").exists()


def test_check_of_a_sound_recipe(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sound: Recipe = make_recipe()
    monkeypatch.setattr(cli, "load_recipe", lambda path: sound)
    assert main(["check", "sound.yaml", "--out", str(tmp_path / "run"), "--json"]) == 0
    assert said(capsys) == []
    assert main(["check", "sound.yaml", "--out", str(tmp_path / "run")]) == 0
    assert "no errors found" in capsys.readouterr().out


def test_check_says_what_is_left_out(
    make_recipe: Any, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_bytes((corpus / "train.txt").read_bytes())
    (folder / "README.md").write_text("about a")
    data = {"train": [str(folder)], "valid": [str(corpus / "valid.txt")], "context": 32}
    monkeypatch.setattr(cli, "load_recipe", lambda path: make_recipe(data=data))
    assert main(["check", "sound.yaml", "--out", str(tmp_path / "run")]) == 0
    assert f"{folder}: left out README.md\n" in capsys.readouterr().out


def test_check_says_what_an_alignment_leaves_out(
    make_recipe: Any,
    chat_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    talks = write_rows(tmp_path / "talks.jsonl", turns("Who sees it?"), turns("Who?", "A cat."), turns("Who?"))
    step = {"kind": "sft", "data": [str(talks)], "context": 96}
    monkeypatch.setattr(cli, "load_recipe", lambda path: make_recipe(model=str(chat_model), align=[step]))
    assert main(["check", "sound.yaml", "--out", str(tmp_path / "run")]) == 0
    words = "step 1 of align (sft): of the first 3 rows, 2 have no answer of the assistant and are left out\n"
    assert words in capsys.readouterr().out


def test_align_prints_the_folder_of_every_step(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = "align: [{kind: sft, data: [a.jsonl]}, {kind: rpo, data: [b.jsonl]}]"
    recipe.write_text(f"{recipe.read_text(encoding='utf-8')}{steps}\n", encoding="utf-8")
    for number, name in enumerate(("align-sft", "align-2-rpo")):
        finished_stage(tmp_path / name, {"steps": number})
    monkeypatch.setattr(pipeline, "run", lambda *_, **__: tmp_path)
    assert main(["align", str(recipe), "--json"]) == 0
    assert said(capsys) == {"align-sft": {"steps": 0}, "align-2-rpo": {"steps": 1}}
    assert main(["align", str(recipe)]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [str(tmp_path / "align-sft"), str(tmp_path / "align-2-rpo")]
    assert f"halve evaluate {recipe}" in err


def test_results_are_printed_as_a_table_and_as_json(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    estimate = {"value": 3.14159, "stderr": 0.01}
    results = {
        "reference": "teacher",
        "models": {
            "teacher": {"params": 1000, "non_embedding_params": 800, "perplexity": estimate},
            "distilled": {"params": 500, "non_embedding_params": 400, "perplexity": estimate, "kl": estimate},
        },
    }
    finished_stage(tmp_path / "evaluate", {}, results=results)
    asked: list[dict[str, Any]] = []

    def finished(loaded: Recipe, out: Path, **how: Any) -> Path:
        asked.append({"name": loaded.name, "out": out, **how})
        return tmp_path

    monkeypatch.setattr(pipeline, "run", finished)
    assert main(["run", str(recipe), "--json", "--quiet"]) == 0
    assert said(capsys) == results
    assert asked == [{"name": "tiny", "out": Path("runs/tiny"), "only": None, "needed": False, "console": None}]
    assert main(["evaluate", str(recipe), "--out", str(tmp_path / "elsewhere")]) == 0
    out, err = capsys.readouterr()
    assert "3.142 ± 0.01" in out
    assert "next: halve report" in err
    assert asked[-1]["only"] == "evaluate"
    assert asked[-1]["out"] == tmp_path / "elsewhere"


def test_the_first_line_names_an_equal_run_under_another_name(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline, "run", lambda *_, **__: sys.exit(3))
    with RunDir.open(tmp_path / "runs" / "tiny", load_recipe(recipe)) as begun:
        begun.work("score", "k")
    recipe.write_text(recipe.read_text().replace("name: tiny", "name: other"))
    assert main(["run", str(recipe)]) == 3
    first = capsys.readouterr().err.splitlines()[0]
    assert first == "runs/tiny is this recipe under another name; --out runs/tiny resumes it"
    for words in (["--out", "elsewhere"], ["--quiet"]):
        assert main(["run", str(recipe), *words]) == 3
        assert "another name" not in capsys.readouterr().err


def test_a_stage_prints_its_metrics_as_json(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finished_stage(tmp_path / "score", {"samples": 8})
    monkeypatch.setattr(pipeline, "run", lambda *_, **__: tmp_path)
    assert main(["score", str(recipe), "--json"]) == 0
    assert said(capsys) == {"samples": 8}
    assert main(["score", str(recipe)]) == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'score'}\n"
    assert "next: halve prune" in err


def test_a_stage_without_its_inputs_names_the_command(make_recipe: Any, tmp_path: Path) -> None:
    pytest.importorskip("halve.stages.prune")
    from halve.errors import RunError

    with pytest.raises(RunError, match="halve score"):
        pipeline.run(make_recipe(), tmp_path / "run", only="prune")


def test_a_cut_says_what_it_did(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"layers": 5, "hidden": 64}
    figures = {"teacher_params": 260032, "params": 217792}
    figures |= {"teacher_perplexity": {"value": 6.5112, "stderr": 0.74}, "perplexity": {"value": 20.12, "stderr": 2.5}}
    made = {"cut": "refit", "compared": {}, "rotation": "none", "unrotated": "its norms allow no other"}
    show.pruned({"before": sizes, "after": {**sizes, "layers": 4}, "made": made}, figures)
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for row in ("layers 5 4", "hidden 64 64", "parameters 260,032 217,792", "perplexity 6.511 ± 0.74 20.12 ± 2.5"):
        assert row in said
    assert "were refit. hidden was cut in the model's own basis: its norms allow no other." in said
    figures["perplexity"] = {"value": 20.12, "stderr": None}  # of one sample
    show.pruned({"before": sizes, "after": sizes}, figures)
    assert "perplexity 6.511 ± 0.74 20.12" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_an_extra_of_ours_says_nothing_at_its_import() -> None:
    code = "import halve; from transformers import PreTrainedModel"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
