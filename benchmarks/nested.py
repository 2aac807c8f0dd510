"""Students inside one student against separate runs with the same total of training tokens.

    python benchmarks/nested.py WORK [--tokens 393216] [--seeds 0] [--arms ...] [--out FILE.jsonl]
    python benchmarks/nested.py WORK --model FOLDER --name NAME --train FILE ... --valid FILE ... [--context 512]
        --sizes 7x192x512 6x160x384 5x128x256 [--lr 1e-3] [--batch 8]

On the demo's teacher and texts, or a model folder with its own. Three sizes. All arms see the same number of training
tokens over all three sizes:

    nested          one run with a nest; the largest student is cut with halve's default refit
    nested-plain    the same from a plain cut: no refit, no rotation
    separate        three runs with a third of the tokens each, every cut with the default refit
    separate-plain  the same from plain cuts

A row for each student and seed: parameters, KL to the teacher, bits per byte and their standard errors, straight after
the cut and after training (a nest's smaller students after the cut are on the samples of the training's measurements).
Sizes are layers x hidden x ffn. Runs live in WORK and resume; a row that stands in the file is not made again. The
teacher is not corrected. The last lines compare arms: the difference in KL for each size, paired by seed, and the
studies' verdict on "lower".
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from teachers import add_arguments, parsed, recipe_of

from halve.pipeline import run as pipeline
from halve.recipe.schema import Recipe
from halve.studies.statistics import differences, mean, standard_error, verdict

PLAIN = {"refit": "none", "rotation": "none", "selection": "rank"}
ARMS = ("nested", "separate", "separate-plain", "nested-plain")


def main() -> None:
    """Run every arm that is missing and print its rows."""
    parser = argparse.ArgumentParser(description="Students inside one student against separate runs.")
    parser.add_argument("work", type=Path)
    parser.add_argument("--tokens", type=int, default=393_216, help="of all three sizes together")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--draws", type=int, default=1, help="students that learn in one step of a nest")
    parser.add_argument("--sizes", nargs=3, default=["10x96x224", "9x80x160", "8x64x112"], help="from large to small")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--precision", default="float32", help="of the products in training")
    parser.add_argument("--out", type=Path, help="default: of its name, in results")
    add_arguments(parser)
    args = parsed(parser)
    args.sizes = [dict(zip(("layers", "hidden", "ffn"), map(int, one.split("x")), strict=True)) for one in args.sizes]
    args.out = args.out or Path(__file__).parent / "results" / "nested" / f"{args.name}.jsonl"
    base = recipe_of(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    known = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    for seed in args.seeds:
        for arm in args.arms:
            about = {"arm": arm, "seed": seed, "tokens": args.tokens, "draws": args.draws}
            if any(about.items() <= row.items() for row in known):
                continue
            with args.out.open("a") as file:
                for row in list(rows(base, arm, seed, args)):
                    file.write(json.dumps(about | row) + "\n")
                    print(json.dumps(about | row), flush=True)
                    known.append(about | row)
    asked = [row for row in known if (row["tokens"], row["draws"]) == (args.tokens, args.draws)]
    for line in compared(asked, args.seeds):
        print(json.dumps(line))


PAIRS = (("nested", "separate"), ("nested-plain", "separate-plain"), ("nested", "nested-plain"))


def compared(known: list[dict[str, Any]], seeds: list[int]) -> Iterator[dict[str, Any]]:
    """The claims that the first arm of a pair has a lower KL, for each size."""
    for first, second in PAIRS:
        for number in sorted({row["size"] for row in known}):
            kl = {(row["arm"], row["seed"]): row["kl"] for row in known if row["size"] == number}
            if all((arm, seed) in kl for arm in (first, second) for seed in seeds):
                gains = differences([kl[second, seed] for seed in seeds], [kl[first, seed] for seed in seeds])
                about = {"claim": f"{first} below {second}", "size": number, "gains": gains}
                yield about | {"mean": mean(gains), "stderr": standard_error(gains), "verdict": verdict(gains)}


def rows(base: Recipe, arm: str, seed: int, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of one arm: one for each size, from large to small."""
    cut = PLAIN if arm.endswith("plain") else {}
    place, sizes = args.work / f"{arm}-{args.tokens}-{args.draws}-seed{seed}", args.sizes
    if arm.startswith("nested"):
        nest = {"sizes": sizes[1:], "draws": args.draws}
        results = evaluated(recipe(base, args, seed, sizes[0] | cut, args.tokens, nest=nest), place, args.work)
        first = json.loads((place / "distill" / "metrics.jsonl").read_text().splitlines()[0])["heldout"]
        for number, name in enumerate(("distilled", "nested-2", "nested-3")):
            at_first = first["kl" if number == 0 else f"kl-{number + 1}"]
            yield row(number, sizes[number], results["models"][name], kl_cut=at_first)
        return
    for number, size in enumerate(sizes):
        made = recipe(base, args, seed, size | cut, args.tokens // len(sizes))
        results = evaluated(made, place / str(number), args.work)
        yield row(number, size, results["models"]["distilled"], kl_cut=results["models"]["pruned"]["kl"]["value"])


def recipe(
    base: Recipe, args: argparse.Namespace, seed: int, prune: dict[str, Any], tokens: int, **more: Any
) -> Recipe:
    """The recipe with this seed, cut and number of training tokens, without correction and baselines."""
    raw, step = base.model_dump(mode="json", exclude_unset=True), args.batch * base.data.context
    rate = {"lr": args.lr, "min_lr": args.lr / 20, "batch": args.batch, "micro_batch": min(8, args.batch)}
    often = {"precision": args.precision, "warmup_steps": 10, "checkpoint_every": 24, "eval_every": 16}
    raw["distill"] |= {**rate, **often, "tokens": tokens // step * step, "baselines": []}
    quiet = {"speed": False, "choices": [], "prompts": [], "chat_prompts": []}
    raw["evaluate"] = raw.get("evaluate", {}) | quiet | {"samples": 96}
    return Recipe.model_validate({**raw, "seed": seed, "correct": None, "prune": prune, **more})


def evaluated(made: Recipe, place: Path, work: Path) -> dict[str, Any]:
    """The evaluation of a run, which resumes or is done."""
    pipeline.run(made, place, cache=work / "cache")
    results: dict[str, Any] = json.loads((place / "evaluate" / "results.json").read_text())
    return results


def row(number: int, size: dict[str, int], model: dict[str, Any], *, kl_cut: float) -> dict[str, Any]:
    """What is told of one student."""
    return {
        "size": number + 1,
        **size,
        "params": model["params"],
        "kl_cut": kl_cut,
        "kl": model["kl"]["value"],
        "kl_stderr": model["kl"]["stderr"],
        "bits_per_byte": model["bits_per_byte"]["value"],
        "bits_per_byte_stderr": model["bits_per_byte"]["stderr"],
    }


if __name__ == "__main__":
    main()
