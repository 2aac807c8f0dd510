"""Results of other tools: what is imported, and what `check` refuses in three lines."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from halve.cli.app import main
from halve.errors import CorpusError, RecipeError
from halve.evaluation.imports import imported
from halve.recipe.evaluations import Imported
from halve.recipe.schema import Recipe
from halve.report.sections import estimate

MakeRecipe = Callable[..., Recipe]
HUGE = "1" + "0" * 400


def entry(tool: Any, file: Path, **more: Any) -> Imported:
    return Imported(tool=tool, file=str(file), **{"model": "teacher", "version": "1", **more})


def test_results_of_other_tools_are_imported_with_their_versions(tmp_path: Path) -> None:
    files = {
        "bfcl": "Rank,Model,Live Acc,Overall Acc\n1,small (FC),59.6%,50%\n2,large (FC),67.6%,60%\n",
        "chatrag": "doc2dial: 37.5\nquac: 42.5\n",
        "mt_bench": '{"score": 6.5, "stderr": 0.25, "judge": "big"}',
    }
    entries = []
    for tool, text in files.items():
        (tmp_path / tool).write_text(text, encoding="utf-8")
        row = "small" if tool == "bfcl" else None
        entries.append(Imported(tool=tool, file=str(tmp_path / tool), model="distilled", version="v4", row=row))
    found = {entry["tool"]: entry for entry in imported(entries)}
    assert {tool: entry["value"] for tool, entry in found.items()} == {"bfcl": 59.6, "chatrag": 40.0, "mt_bench": 6.5}
    assert all(entry["version"] == "v4" and len(entry["sha256"]) == 64 for entry in found.values())


@pytest.mark.parametrize(
    ("tool", "text", "why"),
    [
        ("bfcl", "Model,Live Acc\na,1\nb,2\n", "2 of its 2 rows are of a single model"),
        ("bfcl", "Model,Other\na,1\n", "it has no column Live Acc"),
        ("chatrag", "nothing here", "it has no score"),
        ("mt_bench", "[]", "it is no object"),
    ],
)
def test_a_file_that_is_not_the_tool_s_is_refused(tool: Any, text: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text(text, encoding="utf-8")
    with pytest.raises(CorpusError, match=why):
        imported([Imported(tool=tool, file=str(tmp_path / "file"), model="teacher", version="1")])


@pytest.mark.parametrize(
    ("tool", "text", "value"),
    [
        ("mt_bench", '{"score": 0}', 0.0),
        ("mt_bench", '{"score": 10, "stderr": 0, "judge": null}', 10.0),
        ("bfcl", "Model,Live Acc\na,100%\n", 100.0),
        ("bfcl", "Model,Live Acc\ra,50 %\r", 50.0),
        ("bfcl", "Model,Live Acc,Overall Acc\na,0,50%\n", 0.0),
        ("chatrag", '{"doc2dial": "37.5", "quac": 0}', 18.75),
        ("chatrag", "ChatRAG: all of them\r\ndoc2dial: 37.5 %\r\nquac = .5\r\n", 19.0),
    ],
)
def test_numbers_on_the_scale_are_taken(tool: str, text: str, value: float, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(text.encode())
    (found,) = imported([entry(tool, tmp_path / "file")])
    assert found["value"] == value
    assert estimate(found).value != "-"


@pytest.mark.parametrize(
    ("tool", "text", "why"),
    [
        ("mt_bench", f'{{"score": {HUGE}}}', f"its score is {HUGE[:40]}..., not a number from 0 to 10"),
        ("mt_bench", '{"score": NaN}', "its score is NaN, not a number from 0 to 10"),
        ("mt_bench", '{"score": Infinity}', "its score is Infinity, not a number from 0 to 10"),
        ("mt_bench", '{"score": true}', "its score is true, not a number from 0 to 10"),
        ("mt_bench", '{"score": "7"}', 'its score is "7", not a number from 0 to 10'),
        ("mt_bench", '{"score": 900, "stderr": -3}', "its score is 900, not a number from 0 to 10"),
        ("mt_bench", '{"score": -0.5}', "its score is -0.5, not a number from 0 to 10"),
        ("mt_bench", "{}", "its score is null, not a number from 0 to 10"),
        ("mt_bench", '{"score": 7, "stderr": "small"}', 'its stderr is "small", not a number from 0 to 10'),
        ("mt_bench", '{"score": 7, "stderr": [1]}', "its stderr is [1], not a number from 0 to 10"),
        ("mt_bench", '{"score": 7, "stderr": -3}', "its stderr is -3, not a number from 0 to 10"),
        ("mt_bench", '{"score": 7, "stderr": NaN}', "its stderr is NaN, not a number from 0 to 10"),
        ("mt_bench", '{"score": 7, "stderr": false}', "its stderr is false, not a number from 0 to 10"),
        ("mt_bench", '{"score": 7, "judge": {"a": 1}}', 'its judge is {"a": 1}, not a name'),
        ("bfcl", "Model,Live Acc\nm,nan\n", 'Live Acc is "nan", not a number from 0 to 100'),
        ("bfcl", "Model,Live Acc\nm,inf%\n", 'Live Acc is "inf%", not a number from 0 to 100'),
        ("bfcl", "Model,Live Acc\nm,N/A\n", 'Live Acc is "N/A", not a number from 0 to 100'),
        ("bfcl", "Model,Live Acc\nm,-1\n", "Live Acc is -1.0, not a number from 0 to 100"),
        ("bfcl", "Model,Live Acc\nm,101%\n", "Live Acc is 101.0, not a number from 0 to 100"),
        ("bfcl", "Model,Live Acc,Overall Acc\nm,,50%\n", 'Live Acc is "", not a number from 0 to 100'),
        ("bfcl", "Model,Live Acc\nm\n", "that row has more columns than the first line, or fewer"),
        ("bfcl", "Model,Live Acc\nm,70,60\n", "that row has more columns than the first line, or fewer"),
        ("bfcl", 'Model,Live Acc\nm,70\n"n,60\n', "it is not CSV after line 2: unexpected end of data"),
        (
            "bfcl",
            "Model,Live Acc\n" + "m" * 200_000 + ",5\n",
            "it is not CSV after line 1: field larger than field limit",
        ),
        ("bfcl", 'Rank,Model,Live Acc\r1,a"b\rc,50%\r', "2 of its 2 rows are of a single model"),
        ("chatrag", f'{{"doc2dial": {HUGE}}}', f"the score of doc2dial is {HUGE[:40]}..., not a number from 0 to 100"),
        ("chatrag", '{"doc2dial": "nan"}', 'the score of doc2dial is "nan", not a number from 0 to 100'),
        ("chatrag", '{"doc2dial": true}', "the score of doc2dial is true, not a number from 0 to 100"),
        ("chatrag", '{"doc2dial": [1]}', "the score of doc2dial is [1], not a number from 0 to 100"),
        ("chatrag", '{"doc2dial": 50, "x": -5}', "the score of x is -5, not a number from 0 to 100"),
        ("chatrag", '{"doc2dial": 1e300}', "the score of doc2dial is 1e+300, not a number from 0 to 100"),
        ("chatrag", "doc2dial: 50\nquac: nan\n", 'the score of quac is "nan", not a number from 0 to 100'),
        ("chatrag", "doc2dial: 50\nquac: -5\n", "the score of quac is -5.0, not a number from 0 to 100"),
        ("chatrag", "doc2dial: 50\ndoc2dial: 60\n", "it has two scores of doc2dial"),
    ],
)
def test_a_score_that_is_not_on_the_scale_is_refused(tool: str, text: str, why: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(text.encode())
    with pytest.raises(CorpusError) as caught:
        imported([entry(tool, file)])
    assert caught.value.what == f"{file} of evaluate.imported is no result of {tool}"
    assert caught.value.why.startswith(why)


def test_the_limit_of_a_field_is_not_who_read_before(tmp_path: Path) -> None:
    before = csv.field_size_limit(1 << 24)
    try:
        (tmp_path / "file").write_text("Model,Live Acc\n" + "m" * 200_000 + ",5\n", encoding="utf-8")
        with pytest.raises(CorpusError, match="field larger than field limit"):
            imported([entry("bfcl", tmp_path / "file")])
    finally:
        csv.field_size_limit(before)


@pytest.mark.parametrize("tool", ["mt_bench", "bfcl", "chatrag"])
@pytest.mark.parametrize(
    ("content", "why"),
    [(None, "No such file or directory"), ("", "Is a directory"), (b"\xff", "invalid start byte")],
)
def test_a_file_that_cannot_be_read_is_said_with_its_key(
    tool: str, content: bytes | str | None, why: str, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        file.mkdir()
    with pytest.raises(CorpusError, match=why) as caught:
        imported([entry(tool, file)])
    assert caught.value.what == f"cannot read {file} of evaluate.imported"
    assert caught.value.fix == "correct the path in evaluate.imported, or write that file anew"


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CorpusError, match="it is a device or a pipe"):
        imported([entry("bfcl", tmp_path / "pipe")])


def test_two_results_of_one_tool_for_one_model_are_refused(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("one.json", "two.json")]
    for file in files:
        file.write_text('{"score": 7}', encoding="utf-8")
    twice = [entry("mt_bench", file) for file in files]
    with pytest.raises(RecipeError) as caught:
        imported(twice)
    assert str(caught.value).splitlines() == [
        "evaluate.imported gives 2 results of mt_bench to the model teacher",
        f"  why: they are in {files[0]} and {files[1]}, and a table shows one",
        "  fix: leave one of them, or correct the model of the others",
    ]
    assert len(imported([twice[0], entry("mt_bench", files[1], model="distilled")])) == 2


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (None, "cannot read {file} of evaluate.imported"),
        (f'{{"score": {HUGE}}}', "{file} of evaluate.imported is no result of mt_bench"),
        ('{"score": 7, "stderr": "small"}', "{file} of evaluate.imported is no result of mt_bench"),
    ],
)
def test_check_says_it_in_three_lines(
    text: str | None, what: str, tmp_path: Path, make_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    file, written = tmp_path / "results.json", tmp_path / "recipe.yaml"
    if text is not None:
        file.write_text(text, encoding="utf-8")
    recipe = make_recipe(evaluate={"imported": [entry("mt_bench", file).model_dump()]})
    written.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_unset=True)), encoding="utf-8")
    assert main(["check", str(written)]) == 2
    first, *more = capsys.readouterr().err.splitlines()
    assert first == f"error: {what.format(file=file)}"
    assert [line[:6] for line in more] == ["  why:", "  fix:"]
