"""The types of the command's flags, with the same bounds as the keys of a recipe."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from halve.errors import RecipeError
from halve.recipe import values


def place(given: Any) -> Any:
    """Raise `RecipeError` for an impossible path or name, or for a list with one."""
    for path in given if isinstance(given, list) else [] if given is None else [given]:
        try:
            values.path_or_name(str(path))
        except ValueError as error:
            raise RecipeError(f"cannot use {str(path)[:80]!r} as a path", why=str(error), fix="give another") from None
    return given


def new_folder(given: Path | None) -> Path | None:
    """`place` for a folder that may not exist yet. `new/..` means the current folder and does not create `new`."""
    place(given)
    return given.resolve() if given is not None and ".." in given.parts else given


def finite(given: float | None) -> float | None:
    """Refuse NaN and infinity. A range does not exclude NaN, because every comparison with it is false."""
    if given is not None and not math.isfinite(given):
        raise typer.BadParameter(f"{given} is not a finite number.")
    return given


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A model folder (config.json is enough), a hub name or a GGUF file.", callback=place
    ),
]
RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML recipe.", callback=place)]
Out = Annotated[
    Path | None, typer.Option(help="The run folder. Default: runs/NAME, with the recipe's name.", callback=new_folder)
]
BudgetFlag = Annotated[
    list[str] | None,
    typer.Option(
        metavar="BUDGET",
        help='What a shape may cost, such as "memory<=8GB@8192", "total=4.5B" or "flops<=70%"; may be repeated.',
    ),
]
AxisFlag = Annotated[
    list[str] | None,
    typer.Option(metavar="AXIS", help="With --budget: hidden=64 (steps), ffn=frozen or layers=12,16; may be repeated."),
]
Timings = Annotated[
    Path | None,
    typer.Option(help="With --budget: file that keeps measured times for the next call.", callback=place),
]
OnSpike = Annotated[
    Literal["stop", "skip", "rewind"] | None,
    typer.Option(help="Reaction to a loss spike; overrides the recipe's on_spike."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of a table.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print no progress on stderr.")]
RanksFlag = Annotated[
    int | None,
    typer.Option(min=1, max=10**6, help="With --dry-run: plan for this many H100s instead of this machine."),
]
Mfu = Annotated[
    float | None,
    typer.Option(
        min=0.01,
        max=1.0,
        callback=finite,
        help="With --dry-run: plan for an H100 at this share of its peak FLOP/s. Default: 0.4.",
    ),
]
Card = Annotated[
    float | None,
    typer.Option(
        min=1.0, max=1e6, callback=finite, help="With --dry-run: plan for a GPU with this many GB, as fast as an H100."
    ),
]
Exported = Annotated[
    str, typer.Argument(metavar="SOURCE", help="A run folder, or one of its checkpoints.", callback=place)
]
StudentFlag = Annotated[
    str | None,
    typer.Option(help="Of a run: another student, by its name in the report, such as distilled-2. Default: the last."),
]
NewFolder = Annotated[Path, typer.Option(help="The new model folder.", callback=new_folder)]
DemoOut = Annotated[Path, typer.Option(help="The run folder.", callback=new_folder)]
Corpus = Annotated[
    Path | None,
    typer.Option(help="Text to distill on if the standard library's sources are missing.", callback=place),
]
StudyOut = Annotated[
    Path,
    typer.Option(help="Folder for runs and results; what several studies need is made once.", callback=new_folder),
]
TeacherFlag = Annotated[str | None, typer.Option(help="A teacher to use instead of the demo's.", callback=place)]
Train = Annotated[
    list[str] | None, typer.Option(help="Text to distill on, with --model; may be repeated.", callback=place)
]
Valid = Annotated[list[str] | None, typer.Option(help="Held-out text, with --model; may be repeated.", callback=place)]
Choices = Annotated[Path | None, typer.Option(help="Multiple-choice items, for the study depth-sets.", callback=place)]
Seeds = Annotated[int, typer.Option(min=1, max=1000, help="Number of seeds.")]
TokensFlag = Annotated[int | None, typer.Option(min=1, max=values.MOST, help="Training tokens of each configuration.")]
ContextFlag = Annotated[int | None, typer.Option(min=2, max=values.MOST, help="Tokens in one sample.")]
