"""The command `halve`: one verb for each job, errors in three lines with exit code 2, tables with --json.

Imports of torch and transformers wait until a verb needs them, so that --help answers at once.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from halve.cli import flags
from halve.cli.cost import cost
from halve.cli.flags import AsJson, Model, OnSpike, Out, Quiet, RecipeFile
from halve.cli.hints import say_next
from halve.cli.judge import judge
from halve.cli.study import study
from halve.errors import HalveError, PlanError, Stopped, of_the_system
from halve.process.interrupts import INTERRUPTED, TERMINATED, Terminated, farewell, heeded
from halve.process.rank import leads
from halve.process.waits import heard
from halve.recipe.cutting import ONE_SIZE
from halve.recipe.read import load_recipe, on_spikes
from halve.recipe.schema import Prune, Recipe

app = typer.Typer(
    name="halve",
    help="Make a Hugging Face language model smaller by pruning and distillation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and give its exit code: 0, 2 for a mistake that can be fixed, 130 or 143 when interrupted."""
    words = sys.argv[1:] if argv is None else list(argv)
    first = leads()
    try:
        shown = nullcontext() if first else redirect_stdout(io.StringIO())
        with heeded(), heard(partial(print, file=sys.stderr) if first else None), shown:
            app(args=words or ["--help"], prog_name="halve")
    except (Stopped, Terminated) as stopped:
        if first:
            print(stopped if isinstance(stopped, Stopped) else farewell(TERMINATED, words), file=sys.stderr)
        return TERMINATED
    except HalveError as error:
        if not error.told:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, MemoryError, RuntimeError) as error:
        if (refusal := of_the_system(error)) is None:
            raise
        print(f"error: {refusal}", file=sys.stderr)
        return 2
    except SystemExit as finished:  # the parser prints its own errors and always ends so
        code = finished.code if isinstance(finished.code, int) else int(finished.code is not None)
        if code == INTERRUPTED and first:
            print(farewell(code, words), file=sys.stderr)
        return code
    raise AssertionError("the parser ends with SystemExit")


@app.command()
def demo(
    long: Annotated[bool, typer.Option("--long", help="Use larger budgets: about an hour instead of minutes.")] = False,
    out: flags.DemoOut = Path("runs/demo"),
    corpus: flags.Corpus = None,
    json_: AsJson = False,
) -> None:
    """Run the whole pipeline on a small built-in teacher, offline."""
    from halve.demo.run import run as run_demo

    _show_results(run_demo(out=out, long=long, corpus=corpus, console=Console(stderr=True)), json_=json_)


@app.command()
def inspect(
    model: Model,
    proof: Annotated[
        bool, typer.Option(help="Prove on a tiny random model which axes can be cut (takes seconds).")
    ] = True,
    json_: AsJson = False,
) -> None:
    """Show what a model is made of and which axes can be cut."""
    from halve.cut.proof.prove import prove
    from halve.model.checkpoint import Checkpoint
    from halve.report import tables as show

    anatomy = Checkpoint.open(model).anatomy
    proved = prove(anatomy) if proof else None
    if json_:
        show.as_json(show.inspection(anatomy, proved))
    else:
        show.inspection_tables(anatomy, proved)
        say_next(f"halve plan {model} --params ...")


@app.command()
def plan(
    model: Model,
    params: Annotated[str | None, typer.Option(help="Budget of total parameters, such as 4.5B.")] = None,
    non_embedding_ratio: Annotated[
        float | None, typer.Option(help="Budget as the share of the teacher's non-embedding parameters to keep.")
    ] = None,
    hidden: Annotated[int | None, typer.Option(help="Channels of the residual stream to keep.")] = None,
    ffn: Annotated[int | None, typer.Option(help="MLP neurons to keep in every layer.")] = None,
    heads: Annotated[int | None, typer.Option(help="Query heads to keep in every layer.")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="Key-value heads to keep in every layer.")] = None,
    layers: Annotated[int | None, typer.Option(help="Layers to keep.")] = None,
    drop_layers: Annotated[str | None, typer.Option(help="Layers to drop, such as 16-31.")] = None,
    context: Annotated[
        int, typer.Option(min=1, max=10**9, help="Context length at which FLOPs per token are counted.")
    ] = 4096,
    budget: flags.BudgetFlag = None,
    axis: flags.AxisFlag = None,
    timings: flags.Timings = None,
    most: Annotated[int, typer.Option(min=1, max=10**4, help="Number of candidates to list.")] = 10,
    json_: AsJson = False,
) -> None:
    """List valid sizes within a budget, with exact counts.

    Sizes can also be given by hand. MODEL may be a recipe: its section search then gives the budget. No weights are
    read.
    """
    from halve.cli import planned
    from halve.cut.plan.sizes import near
    from halve.cut.repair.rotate import student_anatomy
    from halve.model.checkpoint import Checkpoint

    asked = {"hidden": hidden, "ffn": ffn, "heads": heads, "kv_heads": kv_heads}
    wishes = {"params": params, "non_embedding_ratio": non_embedding_ratio, **asked}
    wishes |= {"layers": layers, "drop_layers": drop_layers}
    if budget or axis or model.endswith(planned.RECIPE_SUFFIXES):
        given = [f"--{name.replace('_', '-')}" for name, value in wishes.items() if value is not None]
        listed = partial(planned.spoken, most=most, context=context, timings=timings, json_=json_)
        listed(model, budget or (), axis or (), given=given)
        return
    prune = _prune(wishes)
    anatomy = Checkpoint.open(model).anatomy
    shapes = near(student_anatomy(anatomy, prune), prune, context=context)[:most]
    planned.show_shapes(anatomy, [planned.Listing("candidates, best guess first", shapes)], json_=json_)


@app.command()
def run(
    recipe: RecipeFile,
    out: Out = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan, tokens, cost, memory and disk; run nothing.")
    ] = False,
    ranks: flags.RanksFlag = None,
    mfu: flags.Mfu = None,
    card: flags.Card = None,
    on_spike: OnSpike = None,
    quiet: Quiet = False,
    json_: AsJson = False,
) -> None:
    """Run all stages of a recipe, or resume an earlier run."""
    from halve.disk.rundir import equal_run
    from halve.report.tables import plan_before

    loaded = _spiking(load_recipe(recipe), on_spike)
    if dry_run:
        from halve.preflight.device import device_name
        from halve.preflight.forecast import forecast
        from halve.report import tables as show

        expected = forecast(loaded, ranks=ranks or 1, device=device_name(card, mfu, ranks), compare=True)
        if json_:
            show.as_json(expected.to_json())
        else:
            show.forecast_tables(expected)
        return
    if not quiet:
        if out is None and (twin := equal_run(loaded, Path("runs"))) and leads():
            print(f"{twin} is this recipe under another name; --out {twin} resumes it", file=sys.stderr)
        if leads() and (line := plan_before(loaded, ranks=int(os.environ.get("WORLD_SIZE", "1")))):
            print(line, file=sys.stderr)
    folder = _run(loaded, out, only=None, quiet=quiet)
    _show_results(folder, json_=json_)


@app.command()
def check(recipe: RecipeFile, out: Out = None, json_: AsJson = False) -> None:
    """Find every error that can be found without loading weights."""
    from halve.model.checkpoint import Checkpoint
    from halve.pipeline.run import check as preflight
    from halve.preflight import alignment
    from halve.preflight.searches import long_caches
    from halve.preflight.sizes import planned_rounds
    from halve.preflight.work import trials
    from halve.report import tables as show
    from halve.report.times import times_of_the_cut
    from halve.text import sources

    loaded = load_recipe(recipe)
    ranks = os.environ.get("WORLD_SIZE")
    errors = preflight(loaded, _folder(loaded, out), ranks=None if ranks is None else int(ranks))
    if json_:
        show.as_json([{"error": e.what, "why": e.why, "fix": e.fix} for e in errors])
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    if errors:
        raise typer.Exit(2)
    if not json_:
        print(f"{recipe}: no errors found")
        for line in sources.left_out((*loaded.data.train_sources, *loaded.data.valid)):
            print(line)
        teacher = Checkpoint.open(loaded.model)
        left_out, ends = alignment.rows_left_out(loaded, teacher), alignment.new_ends(loaded, teacher)
        for line in (*left_out, *ends, *long_caches(loaded, teacher)):
            print(line)
        shapes = planned_rounds(loaded, teacher)
        show.trial(trials(loaded, shapes))
        for line in times_of_the_cut(loaded, teacher, shapes):
            print(line)
        say_next(f"halve run {recipe}")


@app.command()
def export(
    source: flags.Exported,
    out: flags.NewFolder,
    student: flags.StudentFlag = None,
    json_: AsJson = False,
) -> None:
    """Write the student of a run as an ordinary model folder.

    This also works while the student is being trained.
    """
    from halve.pipeline.export import export as write
    from halve.report import tables as show

    folder = write(source, out, student=student)
    if json_:
        show.as_json({"model": str(folder)})
    else:
        print(folder)
        say_next(f"halve inspect {folder}")


app.command()(cost)
app.command()(study)
app.command()(judge)


def _stage_command(section: str, summary: str, following: str) -> None:
    def command(recipe: RecipeFile, out: Out = None, quiet: Quiet = False, json_: AsJson = False) -> None:
        _stage(section, following, load_recipe(recipe), recipe, out, quiet=quiet, json_=json_)

    def training(
        recipe: RecipeFile, out: Out = None, on_spike: OnSpike = None, quiet: Quiet = False, json_: AsJson = False
    ) -> None:
        _stage(section, following, _spiking(load_recipe(recipe), on_spike), recipe, out, quiet=quiet, json_=json_)

    chosen = training if section in ("correct", "distill") else command
    chosen.__doc__ = summary
    app.command(name=section)(chosen)


def _stage(
    section: str, following: str, loaded: Recipe, recipe: Path, out: Path | None, *, quiet: bool, json_: bool
) -> None:
    from halve.disk.files import read_json
    from halve.disk.rundir import read_manifest
    from halve.pipeline.order import stages
    from halve.report import tables as show

    folder = _run(loaded, out, only=section, quiet=quiet)
    if section == "evaluate":
        _show_results(folder, json_=json_)
    elif section == "align":
        made = [folder / stage.name for stage in stages(loaded) if stage.section == section]
        if json_:
            show.as_json({path.name: read_manifest(path)["metrics"] for path in made})
        for path in () if json_ else made:
            print(path)
    elif json_:
        show.as_json(read_manifest(folder / section)["metrics"])
    else:
        print(folder / section)
        if section == "prune":
            show.pruned(read_json(folder / section / "plan.json"), read_manifest(folder / section)["metrics"])
    if following and not json_:
        say_next(f"halve {following} {recipe}")


def _spiking(recipe: Recipe, policy: Literal["stop", "skip", "rewind"] | None) -> Recipe:
    return recipe if policy is None else on_spikes(recipe, policy)


@app.command()
def search(
    recipe: RecipeFile, out: Out = None, on_spike: OnSpike = None, quiet: Quiet = False, json_: AsJson = False
) -> None:
    """Find which shape to train.

    Runs the search of a recipe and the stages that it needs.
    """
    from halve.cli.searching import show_search

    loaded = _spiking(load_recipe(recipe), on_spike)
    show_search(_run(loaded, out, only="search", needed=True, quiet=quiet), loaded, json_=json_)
    if not json_:
        say_next(f"halve run {recipe}")


_stage_command("correct", "Fine-tune the teacher on the corpus.", "score")
_stage_command("score", "Score each channel, neuron, head and layer in one forward pass.", "prune")
_stage_command("prune", "Cut the model to its new size and check the result.", "distill")
_stage_command("nest", "Sort the student's axes for the students inside it.", "distill")
_stage_command("cache", "Store the teacher's answers on disk (distill.cache).", "distill")
_stage_command("distill", "Train the student on the teacher's distribution.", "evaluate")
_stage_command("align", "Align the student on conversations and preferences.", "evaluate")
_stage_command("evaluate", "Measure every model of the run.", "report")
_stage_command("report", "Write the HTML page and the model card.", "")


def _run(recipe: Recipe, out: Path | None, *, only: str | None, quiet: bool, needed: bool = False) -> Path:
    from halve.pipeline import run as pipeline

    console = None if quiet else Console(stderr=True)
    return pipeline.run(recipe, _folder(recipe, out), only=only, needed=needed, console=console)


def _folder(recipe: Recipe, out: Path | None) -> Path:
    return out if out is not None else Path("runs") / recipe.name


def _prune(wishes: dict[str, Any]) -> Prune:
    try:
        prune = Prune.model_validate(wishes)
        lines = ["", ONE_SIZE, ""]
    except ValueError as error:
        prune = Prune()
        lines = [line.strip() for line in str(error).splitlines()]
    if not any(prune.sized_by.values()):
        key = f"{lines[1].replace('_', '-')}: " if lines[1] in wishes else ""
        message = key + lines[2 if key else -2].removeprefix("Value error, ").split(" [type")[0]
        raise PlanError(
            "these flags make no plan",
            why=message,
            fix="halve plan MODEL --params 4.5B, or --hidden 3072 --ffn 9216, or --drop-layers 16-31",
        )
    return prune


def _show_results(folder: Path, *, json_: bool) -> None:
    from halve.disk.files import read_object
    from halve.disk.rundir import read_manifest, sound
    from halve.report import tables as show

    evaluated = folder / "evaluate"
    results = read_object(sound(evaluated, read_manifest(evaluated), "results.json"))
    if json_:
        show.as_json(results)
        return
    show.results(results)
    subject = (results.get("differences") or {}).get("subject", "distilled")
    student = folder / subject.replace("distilled", "distill").replace("aligned", "align") / "model"
    for path in (folder / "report" / "report.html", student):
        if path.exists():
            print(path)
