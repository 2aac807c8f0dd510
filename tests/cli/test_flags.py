"""What is given to flags is bounded as the recipe's values are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from halve.cli.app import main
from halve.recipe.schema import Recipe

LONG = "a" * 5000
HUGE = "9" * 5000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspect", LONG], "cannot use 'aaa.*4000 bytes"),
        (["inspect", "~no-such-user/x"], "there is no user no-such-user"),
        (["inspect", ""], "cannot use '' as a path"),
        (["inspect", "a\0b"], "control characters"),
        (["check", LONG], "4000 bytes"),
        (["run", "r.yaml", "--out", "x/" + "a" * 300], "255 between two slashes"),
        (["export", LONG, "--out", "x"], "4000 bytes"),
        (["export", "x", "--out", LONG], "4000 bytes"),
        (["demo", "--out", LONG], "4000 bytes"),
        (["demo", "--corpus", LONG], "4000 bytes"),
        (["study", "losses", "--out", LONG], "4000 bytes"),
        (["study", "losses", "--model", "m", "--train", "good", "--train", LONG], "4000 bytes"),
        (["study", "losses", "--model", "m", "--choices", LONG], "4000 bytes"),
        (["study", LONG], "there is no study aaa"),
        (["plan", "m", "--hidden", "0"], "these flags make no plan\n  why: hidden: .*greater than 0"),
        (["plan", "m", "--kv-heads", "9" * 40], "these flags make no plan\n  why: kv-heads: the largest count is"),
        (["plan", "m", "--non-embedding-ratio", "nan"], "why: non-embedding-ratio: .*finite"),
        (["plan", "m", "--params", ""], "why: params: "),
        (["demo", "--corpus", "/"], "cannot read /"),
        (["study", "losses", "--out", "/dev/null"], "cannot read or write /dev/null/texts"),
    ],
)
def test_flags_that_nothing_can_be_done_with(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    said = capsys.readouterr().err
    assert re.match(r"\Aerror: [^\n]+\n  why: [^\n]+\n  fix: [^\n]+\n\Z", said), said
    assert re.search(message, said, re.DOTALL), said


@pytest.mark.parametrize(
    "words",
    [
        ["plan", "m", "--params", "1k", "--context", "-5"],
        ["plan", "m", "--params", "1k", "--most", "0"],
        ["plan", "m", "--ffn", HUGE],
        ["run", "r.yaml", "--dry-run", "--ranks", "9" * 30],
        ["run", "r.yaml", "--dry-run", "--card", "nan"],
        ["run", "r.yaml", "--dry-run", "--mfu", "nan"],
        ["study", "losses", "--seeds", "9" * 30],
        ["study", "losses", "--tokens", "9" * 30],
    ],
)
def test_numbers_out_of_range_name_their_flag(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    flag = next(word for word in reversed(words) if word.startswith("--"))
    assert f"Invalid value for '{flag}'" in capsys.readouterr().err


def test_a_run_folder_below_a_file_is_refused_by_check(
    make_recipe: object, tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert callable(make_recipe)
    recipe: Recipe = make_recipe()
    (tmp_path / "r.yaml").write_text(recipe.model_dump_json(exclude_none=True))
    assert main(["check", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "r.yaml" / "run")]) == 2
    assert "cannot make run folder" in capsys.readouterr().err


def test_a_run_folder_above_one_that_is_not_there_is_looked_at(
    make_recipe: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert callable(make_recipe)
    recipe: Recipe = make_recipe()
    (tmp_path / "r.yaml").write_text(recipe.model_dump_json(exclude_none=True))
    monkeypatch.chdir(tmp_path)
    for command in ("check", "run"):
        assert main([command, "r.yaml", "--out", "new/.."]) == 2
        assert f"{tmp_path} is not a run folder\n  why: it holds r.yaml" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
