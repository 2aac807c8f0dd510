"""Code that lies beside what people bring is never run, by whatever halve starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

import halve
from halve.disk import soundness
from halve.errors import CheckpointError, RecipeError
from halve.process import fresh
from halve.recipe import read as reading

HOME = str(Path(halve.__file__).parents[1])
LIBRARIES = ("torch", "transformers", "safetensors", "tokenizers", "numpy", "yaml", "pydantic", "rich", "typer")
OWN = ("random", "json", "typing", "tempfile", "subprocess", "signal", "secrets", "multiprocessing", "pickle", "socket")
SITE = ("sitecustomize", "usercustomize")


def lay(folder: Path, *names: str) -> Path:
    """Put modules into a folder that note that they were run; gives the file of the notes."""
    folder.mkdir(exist_ok=True)
    notes = folder / "RAN"
    for name in names:
        (folder / f"{name}.py").write_text(f"open({str(notes)!r}, 'a').write('{name} ')\n", encoding="utf-8")
    return notes


def ran(notes: Path) -> str:
    return notes.read_text() if notes.exists() else ""


@pytest.fixture(autouse=True)
def shared(monkeypatch: pytest.MonkeyPatch) -> object:
    """What the suite forks, put aside: processes are started here one by one."""
    before = fresh._source
    monkeypatch.setattr(fresh, "_source", None)
    return before


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder that Python looks for code in first, in every way that it can come to that."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", ".", str(tmp_path), *sys.path])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", ".", str(tmp_path), os.environ.get("PYTHONPATH", HOME)]))
    return tmp_path


IMPORTS = "import random, json, typing, tempfile, yaml, safetensors, numpy, secrets, socket"


def test_the_canaries_sing(tmp_path: Path) -> None:
    """Python by itself does run them: the tests below can fail."""
    notes = lay(tmp_path, *LIBRARIES, *OWN)
    subprocess.run([sys.executable, "-c", "import random, yaml"], cwd=tmp_path, check=True)
    assert ran(notes).split() == ["random", "yaml"]


def test_a_fresh_process_runs_nothing_of_the_working_folder(work: Path) -> None:
    notes = lay(work, *LIBRARIES, *OWN, *SITE)
    assert fresh.python(IMPORTS) == ""
    assert ran(notes) == ""
    assert "No module named 'nowhere'" in fresh.python("import nowhere")


def test_a_fresh_process_runs_nothing_beside_recipe_or_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes, model = tmp_path / "recipes", tmp_path / "model"
    notes = [lay(folder, *LIBRARIES, *OWN, *SITE) for folder in (recipes, model)]
    (recipes / "r.yaml").write_text("name: [")
    with pytest.raises(RecipeError):
        reading.load_recipe(recipes / "r.yaml")
    with pytest.raises(CheckpointError):
        soundness.read_config(soundness.locate(model))
    monkeypatch.setattr(sys, "path", [str(recipes), str(model), *sys.path])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(model), str(recipes)]))
    assert fresh.python(IMPORTS) == ""
    assert [ran(one) for one in notes] == ["", ""]


def test_a_fresh_process_finds_what_the_user_has_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "installed").mkdir()
    (tmp_path / "installed" / "one_of_mine.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path / "installed"), *sys.path])
    assert fresh.python("import one_of_mine") == ""


TOLD = "import os, sys; open(sys.argv[1], 'a').write(f'{os.getpid()} {os.getppid()} {sys.argv[1:]}')"


def test_what_reopens_students_has_loaded_transformers_and_nothing_of_halve(
    kept: None, shared: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fresh, "_source", shared)
    assert fresh.python("import sys; assert {'torch', 'transformers'} <= {*sys.modules}") == ""
    assert fresh.python("import sys; assert not any(name.startswith('halve') for name in sys.modules)") == ""


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is forked has loaded nothing."""
    monkeypatch.setattr(fresh, "_LOADED", "")


def test_kept_processes_are_forks_of_one_that_ends_with_the_block(light: None, tmp_path: Path) -> None:
    notes = [tmp_path / name for name in ("one", "two", "three")]
    with fresh.kept(), fresh.kept():
        assert [fresh.python(TOLD, str(path), "more") for path in notes[:2]] == ["", ""]
    assert fresh.python(TOLD, str(notes[2]), "more") == ""
    said = [path.read_text().split(" ", 2) for path in notes]
    assert len({own for own, _, _ in said}) == 3
    assert said[0][1] == said[1][1]
    assert said[2][1] == str(os.getpid())
    assert not psutil.pid_exists(int(said[0][1]))
    assert [words for _, _, words in said] == [str([str(path), "more"]) for path in notes]


def test_kept_processes_know_nothing_of_the_working_folder_or_of_each_other(light: None, work: Path) -> None:
    notes = lay(work, *LIBRARIES, *OWN, *SITE)
    with fresh.kept():
        assert fresh.python(f"{IMPORTS}, builtins; builtins.mine = 1") == ""
        assert "not defined" in fresh.python("mine")
        assert ran(notes) == ""


def test_what_a_kept_process_says_is_what_one_by_itself_says(light: None) -> None:
    codes = ("import nowhere", "raise SystemExit(3)", "import os; os.kill(os.getpid(), 9)", "print('words')")
    alone = [fresh.python(code) for code in codes]
    with fresh.kept():
        assert [fresh.python(code) for code in codes] == alone
    assert [bool(said) for said in alone] == [True, True, True, False]


def test_a_kept_process_that_searches_elsewhere_or_is_gone_is_not_asked(
    light: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one_of_mine.py").touch()
    told = [tmp_path / name for name in ("before", "after")]
    with fresh.kept():
        assert "No module" in fresh.python("import one_of_mine")
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(sys, "path", [str(tmp_path), *sys.path])
            assert fresh.python("import one_of_mine") == ""
        assert fresh.python(TOLD, str(told[0])) == ""
        source = int(told[0].read_text().split()[1])
        assert source != os.getpid()
        os.kill(source, signal.SIGKILL)
        assert fresh.python(TOLD, str(told[1])) == ""
    assert told[1].read_text().split()[1] == str(os.getpid())


def test_workers_run_nothing_of_the_working_folder(work: Path) -> None:
    notes = lay(work, *LIBRARIES, *OWN, *SITE)
    before = dict(os.environ), list(sys.path)
    with fresh.pool(1, eval, "__import__('random')") as pool:
        path = pool.submit(eval, "[*map(__import__('os').path.realpath, __import__('sys').path)]").result()
    assert ran(notes) == ""
    assert str(work) not in path
    assert os.path.realpath(HOME) in path
    assert (dict(os.environ), sys.path) == before


def test_workers_of_a_users_own_program_find_its_modules(tmp_path: Path) -> None:
    """A script, or a package that is started with -m, in the working folder: the user's own code."""
    (tmp_path / "mine").mkdir()
    for folder in (tmp_path, tmp_path / "mine"):
        (folder / "go.py").write_text(
            "import helper_of_mine\nfrom halve.process import fresh\n"
            "if __name__ == '__main__':\n"
            "    with fresh.pool(1, helper_of_mine.begin) as pool:\n"
            "        print(pool.submit(helper_of_mine.answer).result())\n"
        )
    (tmp_path / "helper_of_mine.py").write_text("def begin(): pass\ndef answer(): return 42\n")
    environment = {**os.environ, "PYTHONPATH": HOME}
    for words in (["go.py"], ["-m", "go"], ["-m", "mine.go"]):
        command = [sys.executable, *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.stdout.split() == ["42"], done.stderr


@pytest.mark.parametrize("listed", [HOME, f":{HOME}", f"{HOME}:."])
def test_the_program_runs_nothing_of_the_working_folder(tmp_path: Path, listed: str) -> None:
    """What Python itself loads before the program has a say, `-P` keeps out."""
    notes = lay(tmp_path, *LIBRARIES, *OWN)
    environment = {**os.environ, "PYTHONPATH": listed}
    command = [sys.executable, "-m", "halve", "check", "none.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, ran(notes)) == (2, "")
    assert "error: cannot read recipe none.yaml" in done.stderr


def test_what_the_program_starts_is_told_to_do_likewise(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    kept = [entry for entry in sys.path if os.path.realpath(entry) != str(work)]
    fresh.shut_program()
    assert sys.path == kept
    notes = lay(work, *OWN, *SITE)
    subprocess.run([sys.executable, "-c", "import random, secrets"], check=True)
    assert ran(notes) == ""
