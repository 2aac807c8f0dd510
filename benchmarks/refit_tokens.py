"""How many calibration tokens a refit needs: KL to the teacher by their number, with fixed and with chosen ridges.

    python benchmarks/real_text.py DATA TEXT
    python benchmarks/refit_tokens.py MODEL TEXT --results FILE [--context 256] [--tokens 2048 16384] [--cuts ffn depth]

The model is cut to 70 % of its non-embedding parameters in one way each: ffn alone, depth alone, hidden and ffn, and
the latter in the rotated basis. Entries are ranked by activations. KL is measured on held-out documents that no refit
has seen, and every refit is paired with the plain cut over these documents. A line is appended to FILE as it comes, and
what is already in FILE is not measured again.

    python benchmarks/refit_tokens.py MODEL TEXT --results FILE --random 20

makes cuts to random sizes on 64 to 65,536 random tokens instead, by the default. It ends with 1 if one of them is worse
than the plain cut of the same sizes by more than two standard errors over the documents. `make cuts` does the same with
the demo's teacher.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from real_text import KINDS, held_documents
from transformers import PreTrainedModel

from halve.anatomy import Arch
from halve.cut.apply import Goal, Repair, Turned, cut, cut_once, plainly, turn
from halve.cut.plan.sizes import target
from halve.cut.repair.gram import SingularGramWarning
from halve.cut.score import width
from halve.cut.score.calibration import Calibration
from halve.cut.score.scores import Scores
from halve.model import measure
from halve.model.checkpoint import Checkpoint
from halve.recipe.schema import Data, Prune, Recipe, Source
from halve.text.mixture import open_mixture

RATIO, HELD_SHARE, MICRO_BATCH = 0.7, 0.2, 8
SCORED_TOKENS = 65_536
COMPARED_TOKENS = 4_096
PLAIN: dict[str, Any] = {"refit": "none", "rotation": "none", "selection": "rank", "gain": "none"}


def main() -> None:
    """Measure what is not known yet."""
    parser = argparse.ArgumentParser(description="KL of refit cuts by the number of calibration tokens.")
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("real-cache"), help="token files")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 16384, 65536])
    parser.add_argument("--cuts", nargs="+", choices=("ffn", "depth", "width", "rotated"), default=["ffn", "depth"])
    parser.add_argument("--of-each", type=int, default=6, help="held-out documents of each kind of text")
    parser.add_argument("--random", type=int, default=0, help="so many random cuts, each beside the plain one")
    args = parser.parse_args()
    warnings.simplefilter("ignore", SingularGramWarning)
    known = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []
    bench = _Bench(args)
    if args.random:
        sys.exit(max(_random(bench, args.results, known, seed) for seed in range(args.random)))
    for name in args.cuts:
        settings = [(0, False), *((tokens, chosen) for tokens in args.tokens for chosen in (False, True))]
        for tokens, chosen in settings:
            key = {"cut": name, "tokens": tokens, "chosen": chosen, "context": args.context}
            if not any(key.items() <= line.items() for line in known):
                known.append(key | bench.measured(name, tokens, chosen))
                with args.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(known[-1]) + "\n")
            plain = next(line for line in known if line["cut"] == name and line["tokens"] == 0)
            line = next(line for line in known if key.items() <= line.items())
            print(key, said(line["by_document"], plain["by_document"]), f"{line['seconds']:.0f} s", flush=True)


def _random(bench: _Bench, results: Path, known: Sequence[dict[str, Any]], seed: int) -> bool:
    """Whether a random cut is worse than the plain one by more than two standard errors."""
    line = next((line for line in known if line.get("seed") == seed), None)
    if line is None:
        line = {"seed": seed, **bench.beside_plain(seed)}
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    gaps = [a - b for a, b in zip(line["by_document"], line["plain"], strict=True)]
    gap, error = statistics.mean(gaps), statistics.stdev(gaps) / len(gaps) ** 0.5
    print(
        f"{seed}: {line['sizes']}, {line['tokens']} tokens, {line['kept']} kept: {gap:+.4f} ± {error:.4f}", flush=True
    )
    return bool(gap > 2 * error)


def said(found: Sequence[float], plain: Sequence[float]) -> str:
    """The mean KL, and how far it is below the plain cut's, paired over documents."""
    gaps = [b - a for a, b in zip(found, plain, strict=True)]
    error = statistics.stdev(gaps) / len(gaps) ** 0.5
    return f"KL {statistics.mean(found):.3f}, {statistics.mean(gaps):.3f} ± {error:.3f} below the plain cut"


class _Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        parts = {kind: Source(sources=(str(args.text / f"{kind}-train.jsonl"),), weight=1.0) for kind in KINDS}
        recipe = Recipe(
            name="refit-tokens",
            model=args.model,
            data=Data(train=parts, valid=(str(args.text / "web-held.jsonl"),), context=args.context),
            prune=Prune(non_embedding_ratio=RATIO),
        )
        teacher = Checkpoint.open(args.model)
        self.model, self.anatomy = teacher.load().requires_grad_(False), teacher.anatomy
        mixture = open_mixture(recipe, cache=args.cache, tokenizer=teacher.tokenizer)
        tokens = max(SCORED_TOKENS, *args.tokens) + (COMPARED_TOKENS if args.random else 0)
        self.samples_BS = mixture.calibration(tokens // args.context)
        self.documents = held_documents(args.text, teacher.tokenizer, of_each=args.of_each, context=args.context)
        self.scores: Scores = width.score(
            self._on(SCORED_TOKENS // args.context),
            method="activation",
            ffn_point="down_input",
            batch_agg="l2",
            seq_agg="mean",
            seed=0,
            model_fingerprint="",
            samples_fingerprint="",
        )

    def measured(self, name: str, tokens: int, chosen: bool) -> dict[str, Any]:
        """One cut, refit on so many tokens; none: the plain cut."""
        began = time.perf_counter()
        asked = PLAIN | {"rotation": "pca" if name == "rotated" else "none"}
        prune = Prune(non_embedding_ratio=RATIO, **asked | ({"refit": "all"} if tokens else {}))
        after = self._sizes(name)
        samples = tokens // self.samples_BS.shape[1]
        turned = turn(self._on(max(samples, 8)), prune.model_copy(update={"refit": "none"}), sizes=[after])
        held = round(HELD_SHARE * samples) if chosen else 0
        on = self._on(max(samples, 1))
        student = cut_once(on, self.scores, prune, Goal(after), turned=turned, repair=Repair(held)).student
        return {"by_document": self._divergences(student), "seconds": time.perf_counter() - began}

    def beside_plain(self, seed: int) -> dict[str, Any]:
        """A cut to random sizes on a random number of tokens, by the default, and the plain cut."""
        draw, before = random.Random(seed), self.anatomy.sizes
        sizes = {
            "ffn": before.ffn - 32 * draw.randint(1, before.ffn // 64),
            "hidden": before.hidden - 32 * draw.randint(0, before.hidden // 128),
            "layers": before.layers - draw.randint(0, before.layers // 4),
        }
        tokens = round(2 ** draw.uniform(6, 16))
        prune, after = Prune(**sizes, refit_tokens=tokens), before.at(**sizes)
        calibration = self._on(len(self.samples_BS))
        turned = turn(calibration, prune, sizes=[after])
        ours = cut(calibration, self.scores, prune, Goal(after), turned=turned)
        unturned = Turned(self.model, self.anatomy, None)
        plain = cut(calibration, self.scores, plainly(prune), Goal(after), turned=unturned)
        return {
            "sizes": sizes,
            "tokens": tokens,
            "kept": ours.figures["kept"],
            "by_document": self._divergences(ours.student),
            "plain": self._divergences(plain.student),
        }

    def _sizes(self, name: str) -> Arch:
        before = self.anatomy.sizes
        if name in ("width", "rotated"):
            return target(self.anatomy, Prune(non_embedding_ratio=RATIO, shape="width"))[0]
        axis = {"ffn": "ffn", "depth": "layers"}[name]
        goal = RATIO * self.anatomy.ledger.count(before).non_embedding
        sizes = [before.at(**{axis: size}) for size in range(1, getattr(before, axis) + 1)]
        return min(sizes, key=lambda arch: abs(self.anatomy.ledger.count(arch).non_embedding - goal))

    def _divergences(self, student: PreTrainedModel) -> list[float]:
        return [
            float(measure.divergence(student, self.model, ids, micro_batch=1).kl.mean()) for _, ids in self.documents
        ]

    def _on(self, samples: int) -> Calibration:
        return Calibration(self.model, self.anatomy, self.samples_BS[:samples], MICRO_BATCH)


if __name__ == "__main__":
    main()
