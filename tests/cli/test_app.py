"""The command line: its words are frozen, its errors have three lines and exit code 2, its tables are JSON too."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from signal import SIGINT, SIGTERM
from typing import Any

import psutil
import pytest
import typer
from chat import turns, write_rows
from transformers import BloomConfig

from halve.cli import app as cli
from halve.cli.app import app, main
from halve.disk.files import file_sha256, sealed, write_json
from halve.disk.rundir import RunDir
from halve.errors import Stopped, TrainError
from halve.pipeline import run as pipeline
from halve.recipe.read import load_recipe
from halve.recipe.schema import Recipe
from halve.report import tables as show
from halve.train.ranks.group import Elsewhere

# Changing a line here changes what users type: say so in CHANGELOG.md.
RUN = ["recipe", "--out", "--quiet", "--json"]
FLAGS = {
    "demo": ["--long", "--out", "--corpus", "--json"],
    "inspect": ["model", "--proof", "--no-proof", "--json"],
    "plan": [
        *("model", "--params", "--non-embedding-ratio", "--hidden", "--ffn", "--heads", "--kv-heads"),
        *("--layers", "--drop-layers", "--context", "--budget", "--axis", "--timings", "--most", "--json"),
    ],
    "run": ["recipe", "--out", "--dry-run", "--ranks", "--mfu", "--card", "--on-spike", "--quiet", "--json"],
    "check": ["recipe", "--out", "--json"],
    "export": ["source", "--out", "--student", "--json"],
    "cost": ["recipe", "--scratch", "--sizes", "--tokens", "--device", "--mfu", "--price", "--json"],
    "study": [
        *("name", "--list", "--out", "--model", "--train", "--valid", "--choices"),
        *("--seeds", "--tokens", "--context", "--quiet", "--json"),
    ],
    "judge": [
        *("data", "--student", "--student-model", "--judge", "--judge-model", "--out"),
        *("--student-key", "--judge-key", "--json"),
    ],
    "correct": ["recipe", "--out", "--on-spike", "--quiet", "--json"],
    "score": RUN,
    "search": ["recipe", "--out", "--on-spike", "--quiet", "--json"],
    "prune": RUN,
    "nest": RUN,
    "cache": RUN,
    "distill": ["recipe", "--out", "--on-spike", "--quiet", "--json"],
    "align": RUN,
    "evaluate": RUN,
    "report": RUN,
}

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "vocab_size": 500,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
# 64 x 500 outside; a layer: q and o 2 x 64 x 64, k and v 2 x 64 x 32, mlp 3 x 64 x 160, norms 2 x 64; final norm 64
TINY_PARAMS = 64 * 500 + 4 * (8_192 + 4_096 + 30_720 + 128) + 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY), encoding="utf-8")
    return folder


@pytest.fixture
def recipe(model: Path, tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("some words\n" * 100, encoding="utf-8")
    path = tmp_path / "tiny.yaml"
    path.write_text(
        f"""
name: tiny
model: {model}
data: {{train: [text.txt], valid: [text.txt], context: 32}}
prune: {{ffn: 80}}
distill: {{tokens: 1000, batch: 4}}
""",
        encoding="utf-8",
    )
    return path


def said(capsys: pytest.CaptureFixture[str]) -> Any:
    """The JSON on stdout; anything else there fails."""
    return json.loads(capsys.readouterr().out)


def finished_stage(folder: Path, metrics: dict[str, Any], **contents: Any) -> None:
    """A stage's folder as a run leaves it: JSON files and the manifest."""
    for name, content in contents.items():
        write_json(folder / f"{name}.json", content)
    files = {path.name: {"sha256": file_sha256(path)} for path in folder.glob("*.json")}
    write_json(folder / "manifest.json", sealed({"metrics": metrics, "files": files}))


def assert_refused(code: int, capsys: pytest.CaptureFixture[str], *words: str) -> None:
    """Exit code 2, nothing on stdout, three lines on stderr: what, why, fix."""
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    what, why, fix = (line for line in err.splitlines() if not line.startswith("[transformers]"))
    assert what.startswith("error: ")
    assert why.startswith("  why: ")
    assert fix.startswith("  fix: ")
    for word in words:
        assert word in err


# ---- the words


def test_verbs_and_flags_are_frozen() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    found = {
        verb: [
            word
            for p in command.params
            for word in ([p.name] if p.param_type_name == "argument" else [*p.opts, *p.secondary_opts])
        ]
        for verb, command in commands.items()
    }
    assert found == FLAGS


@pytest.mark.parametrize("verb", FLAGS)
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    page = capsys.readouterr().out
    for word in FLAGS[verb]:
        assert (word if word.startswith("-") else word.upper()) in page


def test_stage_verbs_are_the_pipelines_sections() -> None:
    assert list(FLAGS)[-len(pipeline.SECTIONS) :] == list(pipeline.SECTIONS)


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\nfrom halve.cli.app import main\nassert main(['--help']) == 0\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "inspect" in done.stdout


def test_without_a_verb_it_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "Commands:" in capsys.readouterr().out


# ---- exit codes


@pytest.mark.parametrize(
    "arguments", [["halve-it"], ["plan"], ["run", "x.yaml", "--fast"], ["plan", "x", "--ffn", "a"]]
)
def test_what_the_parser_refuses_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Error" in err


def test_the_installed_command_exits_with_2_and_three_lines(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "halve", "run", str(tmp_path / "none.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert [line.strip().split(":")[0] for line in done.stderr.splitlines()] == ["error", "why", "fix"]


def test_an_interrupt_exits_with_130(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run", interrupted)
    assert main(["run", str(recipe), "--quiet"]) == 130
    assert capsys.readouterr().err.splitlines() == [
        f"interrupted; the same command resumes where it stopped: halve run {recipe} --quiet"
    ]


@pytest.mark.parametrize("stage", ["correct", "score", "prune", "cache", "distill", "align", "evaluate", "report"])
@pytest.mark.parametrize(("number", "code", "word"), [(SIGINT, 130, "interrupted"), (SIGTERM, 143, "ended by SIGTERM")])
def test_a_signal_in_any_stage_says_how_to_go_on(
    stage: str,
    number: int,
    code: int,
    word: str,
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def asked_to_end(*_: Any, **__: Any) -> Path:
        os.kill(os.getpid(), number)
        time.sleep(5)
        raise AssertionError("nothing happened")

    monkeypatch.setattr(pipeline, "run", asked_to_end)
    before = signal.getsignal(SIGTERM)
    assert main([stage, str(recipe)]) == code
    assert signal.getsignal(SIGTERM) is before
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"{word}; the same command resumes where it stopped: halve {stage} {recipe}"


@pytest.mark.parametrize(("number", "code"), [(SIGINT, 130), (SIGTERM, 143)])
def test_a_signal_while_text_is_tokenized_by_others(
    number: int, code: int, tiny_llama: Path, corpus: Path, tmp_path: Path
) -> None:
    """Ctrl-C reaches every process of a terminal, SIGTERM the first alone; one of them speaks, and none stays."""
    (tmp_path / "long.txt").write_text((corpus / "train.txt").read_text(encoding="utf-8") * 40, encoding="utf-8")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
name: tiny
model: {tiny_llama}
data: {{train: [long.txt], valid: [{corpus / "valid.txt"}], context: 32, workers: 2}}
prune: {{ffn: 40}}
""",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "halve", "score", str(recipe), "--out", "run", "--quiet"]
    options: dict[str, Any] = {"cwd": tmp_path, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    # whoever starts the tests in the background has them ignore Ctrl-C
    with psutil.Popen(command, **options, preexec_fn=lambda: signal.signal(SIGINT, signal.SIG_DFL)) as process:
        end = time.monotonic() + 60
        while not (children := [c for c in process.children() if "spawn_main" in " ".join(c.cmdline())]):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end
            time.sleep(0.01)
        if number == SIGINT:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in err
    assert err.splitlines()[-1].endswith(f"resumes where it stopped: halve score {recipe} --out run --quiet")
    assert not psutil.wait_procs(children, timeout=30)[1]
    assert not list((tmp_path / "run" / "score").glob("*"))


def test_a_sigterm_exits_with_143(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*args: Any, **kwargs: Any) -> None:
        raise Stopped("stopped by SIGTERM after step 3", why="its state is in run/step-3", fix="the same command")

    monkeypatch.setattr(pipeline, "run", stopped)
    assert main(["run", str(recipe)]) == 143
    plan, said, *_ = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"plan: distill takes .* per rank; .* FLOP, .* of an H100 at 40% MFU; disk .*", plan)
    assert said == "stopped by SIGTERM after step 3"


def test_of_several_ranks_the_first_speaks(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert main(["study", "--list"]) == 0
        assert bool(capsys.readouterr().out) == (rank == "0")

    def failed(*args: Any, **kwargs: Any) -> None:
        raise Elsewhere("rank 0 fails", why="of this", fix="do that")

    monkeypatch.setattr(pipeline, "run", failed)
    assert main(["run", str(recipe)]) == 2
    assert capsys.readouterr().err == ""


def test_an_error_of_a_stage_has_three_lines(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*_: Any, **__: Any) -> Path:
        raise TrainError("the loss is not finite", why="it is nan", fix="lower lr")

    monkeypatch.setattr(pipeline, "run", failing)
    assert_refused(main(["distill", str(recipe)]), capsys, "not finite")


def test_an_unknown_key_of_a_recipe_names_the_nearest(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("ffn: 80", "fnn: 80"), encoding="utf-8")
    assert_refused(main(["run", str(recipe)]), capsys, "prune.fnn", "did you mean ffn?")


# ---- inspect and plan


def test_inspect(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(model), "--no-proof"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("llama: layers 4, hidden 64, ffn 160, heads 8/4 x 8, vocab 500\n")
    assert "model.layers.0.mlp.down_proj.weight" in out
    assert "model.layers.1." not in out
    assert f"next: halve plan {model}" in err


def test_inspect_as_json_says_what_can_be_cut(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(model), "--no-proof", "--json"]) == 0
    found = said(capsys)
    assert found["family"] == "llama"
    assert found["params"] == TINY_PARAMS
    assert found["weights"]["model.layers.3.mlp.down_proj.weight"] == ["hidden", "ffn"]
    assert found["can_be_cut"] == ["layers", "hidden", "ffn", "heads", "kv_heads"]
    assert set(found["refused"]) == {"head_dim", "vocab", "experts", "expert_ffn"}
    assert found["proof"] is None


def test_inspect_proves_by_default(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(model), "--json"]) == 0
    checks = said(capsys)["proof"]
    assert checks
    assert all(check["passed"] for check in checks)
    assert {check["axis"] for check in checks} == {"layers", "hidden", "ffn", "heads", "kv_heads"}


def test_plan_by_hand(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(model), "--ffn", "80", "--drop-layers", "1-2", "--json"]) == 0
    found = said(capsys)
    (only,) = found["candidates"]
    assert only["arch"]["ffn"] == 80
    assert only["arch"]["layers"] == 2
    assert only["kept_layers"] == [0, 3]
    assert only["counts"]["params"] == 64 * 500 + 2 * (8_192 + 4_096 + 3 * 64 * 80 + 128) + 64
    assert [runtime["name"] for runtime in only["runtimes"]] == ["transformers", "vLLM", "llama.cpp"]


def test_plan_near_a_budget(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(model), "--params", "120k", "--most", "3", "--json"]) == 0
    candidates = said(capsys)["candidates"]
    assert 1 <= len(candidates) <= 3
    for candidate in candidates:
        assert abs(candidate["counts"]["params"] / 120_000 - 1) <= 0.05
    assert main(["plan", str(model), "--non-embedding-ratio", "0.6"]) == 0
    out, err = capsys.readouterr()
    assert "candidates, best guess first" in out
    assert "next: " in err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--heads", "7"], ("7 query heads in 4 key-value groups", "--heads 4 or 8")),
        (["--ffn", "200"], ("200 of 160 ffn",)),
        (["--params", "1k"], ("no valid sizes have about", "nearest:")),
        (["--params", "many"], ("'many'",)),
        (["--drop-layers", "0-3"], ("cannot drop layers 0-3",)),
        (["--params", "100k", "--ffn", "80"], ("these flags make no plan", "exactly one")),
        ([], ("these flags make no plan",)),
    ],
)
def test_plan_refuses(
    flags: list[str], words: tuple[str, ...], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(main(["plan", str(model), *flags]), capsys, *words)


def test_plan_lists_what_is_proved_of_a_family_without_a_limit_of_positions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    BloomConfig(vocab_size=100, hidden_size=32, n_head=4, n_layer=4).save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), "--non-embedding-ratio", "0.5", "--json"]) == 0
    assert {one["arch"]["hidden"] for one in said(capsys)["candidates"]} == {32}
    assert_refused(main(["plan", str(tmp_path), "--hidden", "24"]), capsys, "will not cut hidden of bloom")


@pytest.mark.parametrize("verb", ["inspect", "plan"])
def test_a_model_that_is_not_there(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--ffn", "8"] if verb == "plan" else []
    assert_refused(main([verb, str(tmp_path / "none"), *flags]), capsys, "none")


def test_a_family_that_nobody_knows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "model_type": "lama"}), encoding="utf-8")
    assert_refused(main(["inspect", str(tmp_path)]), capsys, "lama")


# ---- check and run


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
    RunDir.open(tmp_path / "runs" / "tiny", load_recipe(recipe)).close()
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
