"""The verb `halve study`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from halve.cli import flags
from halve.cli.flags import AsJson, Quiet
from halve.cli.hints import say_next
from halve.errors import HalveError
from halve.studies import declare
from halve.studies.declare import Study


def study(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="A study, or all. --list shows the names.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the studies.")] = False,
    out: flags.StudyOut = Path("runs/studies"),
    model: flags.TeacherFlag = None,
    train: flags.Train = None,
    valid: flags.Valid = None,
    choices: flags.Choices = None,
    seeds: flags.Seeds = 3,
    tokens: flags.TokensFlag = None,
    context: flags.ContextFlag = None,
    quiet: Quiet = False,
    json_: AsJson = False,
) -> None:
    """Reproduce a table of the papers on a small scale.

    A study trains several configurations with several seeds and gives a verdict on each claim of the paper. An
    interrupted study resumes with the same command.
    """
    from halve.report import tables as show

    if list_ or name is None:
        _list_studies(json_=json_)
        return
    from halve.studies import engine
    from halve.studies import setting as settings

    wanted = [declare.load_study(each) for each in (declare.names() if name == "all" else (name,))]
    changes, texts = _changes(tokens, context), out / "texts"
    if model is None:
        setting = settings.of_demo(texts, changes=changes)
    else:
        setting = settings.of_ones_own(
            model, train=train or (), valid=valid or (), choices=choices, texts=texts, changes=changes
        )
    given = {"model": model and Path(model).name, "seeds": seeds, "tokens": tokens, "context": context}
    said = "".join(f" --{key} {value}" for key, value in given.items() if value not in (None, 3))
    console = Console(stderr=True, quiet=quiet, highlight=False)

    def run(each: Study) -> dict[str, Any]:
        command = f"halve study {each.name}{said}"
        results = engine.run(each, setting, seeds=range(seeds), out=out, command=command, say=console.print)
        if not json_:
            show.study_table(results)
            print(out / each.name / "results.json")
        return results

    all_results = _run_all(wanted, run)
    if json_:
        show.as_json(all_results if name == "all" else all_results[0])
    if len(all_results) < len(wanted):
        raise typer.Exit(2)


def _changes(tokens: int | None, context: int | None) -> dict[str, Any]:
    """What the flags change of every recipe of a study."""
    changes: dict[str, Any] = {}
    if tokens is not None:
        changes["distill"] = {"tokens": tokens}
    if context is not None:
        changes["data"] = {"context": context}
    return changes


def _run_all(wanted: Sequence[Study], run: Callable[[Study], dict[str, Any]]) -> list[dict[str, Any]]:
    """The results of all that could be run; of several, one that cannot is said and does not stop the others."""
    results = []
    for each in wanted:
        try:
            results.append(run(each))
        except HalveError as error:
            if len(wanted) == 1:
                raise
            print(f"error: {each.name}: {error}", file=sys.stderr)
    return results


def _list_studies(*, json_: bool) -> None:
    from halve.report import tables as show

    listed = [declare.load_study(each) for each in declare.names()]
    if json_:
        show.as_json([{"name": s.name, "title": s.title, "source": s.source, "arms": [*s.arms]} for s in listed])
        return
    rows = [(s.name, s.title, f"arXiv {s.source}", len(s.arms)) for s in listed]
    show.table("studies", ("name", "title", "source", "arms"), rows)
    say_next("halve study NAME, or halve study all")
