"""The teacher and texts of a benchmark: the demo's, or a model folder with text files of its own."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from halve.demo.run import make_recipe
from halve.model.checkpoint import Checkpoint
from halve.progress import RichProgress
from halve.recipe.schema import Recipe
from halve.text.boundary import bounded, settled


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What names a teacher."""
    parser.add_argument("--name", default="demo", help="of the teacher, for the file of results")
    parser.add_argument("--model", type=Path, help="another teacher than the demo's; it is not corrected")
    parser.add_argument("--train", type=Path, nargs="+", help="its text")
    parser.add_argument("--valid", type=Path, nargs="+", help="its held-out text")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--dtype", default="float32", help="of its cuts and trainings; the demo's is its recipe's")


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, with all that another teacher needs."""
    args = parser.parse_args()
    if args.model is not None and not (args.train and args.valid and args.name != "demo"):
        parser.error("--model needs --name, --train and --valid")
    return args


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The demo's recipe, or one of another teacher's text and defaults, with its boundary settled."""
    if args.model is None:
        return make_recipe(args.work / "texts", long=False, corpus=None)
    text = {split: [str(path.resolve()) for path in getattr(args, split)] for split in ("train", "valid")}
    data = {**text, "context": args.context}
    raw = {"name": args.name, "model": str(args.model.resolve()), "dtype": args.dtype, "data": data}
    recipe = Recipe.model_validate({**raw, "prune": {"non_embedding_ratio": 0.5}, "distill": {"tokens": 1}})
    boundary = settled(recipe, Checkpoint.open(args.model), cache=args.work / "data", progress=RichProgress(Console()))
    return bounded(recipe, boundary)
