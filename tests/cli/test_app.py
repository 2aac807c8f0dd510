"""The command line: its words are frozen, its errors have three lines and exit code 2, its tables are JSON too."""

from __future__ import annotations

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
from commands import assert_refused

from halve.cli.app import app, main
from halve.errors import Stopped, TrainError
from halve.pipeline import run as pipeline
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
