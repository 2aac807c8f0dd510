"""How many calibration tokens a refit needs: KL to the teacher by their number, with fixed and with chosen ridges.

    python benchmarks/real_text.py DATA TEXT
    python benchmarks/refit_tokens.py MODEL TEXT --results FILE [--context 256] [--tokens 2048 16384] [--cuts ffn depth]

The model is cut to 70 % of its non-embedding parameters in one way each: ffn alone, depth alone, hidden and ffn, and
the latter in the rotated basis. Entries are ranked by activations. KL is measured on held-out documents that no refit
has seen, and every refit is paired with the plain cut over these documents. A line is appended to FILE as it comes, and
what is already in FILE is not measured again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from real_text import KINDS, held_documents
from transformers import PreTrainedModel

from halve.anatomy import Arch
from halve.cut.apply import Goal, Repair, cut_once, turn
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
    args = parser.parse_args()
    warnings.simplefilter("ignore", SingularGramWarning)
    known = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []
    bench = _Bench(args)
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
        self.samples_BS = mixture.calibration(max(SCORED_TOKENS, *args.tokens) // args.context)
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
