"""SFT and preference optimization on a real model: what a step takes, and RPO beside DPO on the same pairs and steps.

    python benchmarks/align.py MODEL --sft TALKS --pairs PAIRS --work DIR

MODEL is a chat model's folder. TALKS are rows with `instruction`, `input` and `output`. PAIRS are rows with `prompt`,
`response_1`, `response_2` and `p_prefer_2`, the probability that the second one is better. The reward of an answer is
the log-odds of being preferred, so that with eta = 1 the target of RPO is that probability itself. Or they are GSM8K's
example solutions, rows with `question` and several models' `solution` and `is_correct`: of each question every right
and every wrong solution are a pair, and the verifier's rewards are 1 and 0.

Held-out pairs are of prompts that no training pair has, one of each prompt: those of one prompt share an answer and are
no independent trials. `longer` is the share of them in which the better answer has more tokens: an accuracy near it may
have learned no more than that. The model is trained on conversations first, and
from there on pairs, by each of `--kinds` with each seed. Every result is a line of JSON on stdout; a run that is in DIR
already is not made again. With three seeds or more, the last line compares the first two kinds as the studies do: held,
reversed or inconclusive by Student's t-test of the paired differences in held-out accuracy, 5 %.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from halve.align import measured, trainers
from halve.align.examples import Dialogue, LeftOut, Preference, dialogues, encoded_pair, preference_rows
from halve.align.setting import StepSetting
from halve.disk.files import read_json, write_json
from halve.disk.textfiles import open_packed
from halve.model import saving
from halve.model.checkpoint import Checkpoint
from halve.progress import SILENT
from halve.recipe.schema import Alignment, Data
from halve.studies.statistics import differences, mean, standard_error, verdict

CERTAIN = 1e-3
"""A probability is not taken to be closer than this to 0 or 1: log-odds of 7."""


def main() -> None:
    """Run what is not in the folder, and print every line."""
    given = _arguments()
    torch.set_num_threads(given.threads)
    given.work.mkdir(parents=True, exist_ok=True)
    start = Checkpoint.open(given.model)
    talks = _talks(given, start)
    train, heldout = _pairs(given, start)
    print(
        json.dumps(
            {"talks": len(talks), "pairs": len(train), "heldout": len(heldout), "longer": _longer(heldout)}
            | _settings(given)
        ),
        flush=True,
    )
    tuned = given.work / "sft"
    if not (tuned / "result.json").is_file():
        _sft(given, start, talks, tuned)
    print(json.dumps(read_json(tuned / "result.json")), flush=True)
    pairs = Pairs(Checkpoint.open(tuned / "model"), train, heldout)
    accuracy: dict[str, list[float]] = {kind: [] for kind in given.kinds}
    for seed in range(given.seeds):
        for kind in given.kinds:
            done = given.work / f"{kind}-{seed}.json"
            if not done.is_file():
                write_json(done, _preferences(given, pairs, kind, seed))
            result = read_json(done)
            accuracy[kind].append(result["accuracy"]["value"])
            print(json.dumps(result), flush=True)
    if given.seeds > 2 and len(given.kinds) > 1:
        print(json.dumps(_compared(given.kinds[0], given.kinds[1], accuracy)), flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--sft", type=Path, required=True)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--kinds", nargs="+", default=["rpo", "dpo"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--sft-steps", type=int, default=20)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--heldout", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--method", default="full")
    parser.add_argument("--half", action="store_true", help="train in bfloat16 by autocast, the weights in float32")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def _settings(given: argparse.Namespace) -> dict[str, Any]:
    keys = ("kinds", "seeds", "context", "batch", "sft_steps", "steps", "lr", "beta", "method", "half")
    return {"model": Path(given.model).name, **{key: getattr(given, key) for key in keys}}


# ---- data


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with open_packed(path) as file:
        yield from (json.loads(line) for line in file if line.strip())


def _talks(given: argparse.Namespace, start: Checkpoint) -> list[Dialogue]:
    written = given.work / "talks.jsonl"
    with written.open("w", encoding="utf-8") as file:
        for row in _lines(given.sft):
            asked = "\n".join(filter(None, (row["instruction"], row["input"])))
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]
            if asked.strip() and row["output"].strip():
                file.write(json.dumps({"messages": messages}) + "\n")
    step = Alignment(kind="sft", data=(str(written),))
    data = Data(train=(str(written),), valid=(str(written),))
    return list(dialogues(step, data, start.tokenizer, context=given.context, left_out=LeftOut()))


def _pairs(given: argparse.Namespace, start: Checkpoint) -> tuple[list[Preference], list[Preference]]:
    """Pairs that fit the context whole: to train on, and held-out ones of other prompts."""
    written = given.work / "pairs.jsonl"
    with written.open("w", encoding="utf-8") as file:
        for row in _lines(given.pairs):
            for answers in _solutions(row) if "question" in row else [_preferred(row)]:
                if all(answers[part].strip() for part in ("prompt", "chosen", "rejected")):
                    file.write(json.dumps(answers) + "\n")
    step = Alignment(kind="rpo", data=(str(written),))
    by_prompt: dict[str, list[Preference]] = {}
    for row, place in preference_rows(step):
        pair = encoded_pair(row, place, start.tokenizer, context=1 << 20, left_out=LeftOut())
        if pair and len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) <= given.context:
            by_prompt.setdefault(row["prompt"][-1]["content"], []).append(pair)
    prompts = sorted(by_prompt)
    draw = random.Random(0)
    draw.shuffle(prompts)
    heldout = [draw.choice(by_prompt[prompts.pop()]) for _ in range(min(given.heldout, len(prompts)))]
    train = [pair for prompt in prompts for pair in by_prompt[prompt]]
    if not train or not heldout:
        raise SystemExit(f"{len(by_prompt)} prompts have pairs that fit: too few for {given.heldout} held-out ones")
    random.Random(1).shuffle(train)
    return train[: given.batch * given.steps], heldout


def _longer(pairs: Sequence[Preference]) -> float:
    """The accuracy of preferring the longer answer; equal lengths count half."""
    longer = [len(pair.chosen) - len(pair.rejected) for pair in pairs if pair.gap > 0]
    return sum((gap > 0) + 0.5 * (gap == 0) for gap in longer) / len(longer)


def _preferred(row: dict[str, Any]) -> dict[str, Any]:
    second = min(max(row["p_prefer_2"], CERTAIN), 1 - CERTAIN)
    rewards = {"chosen_reward": 0.0, "rejected_reward": math.log(second / (1 - second))}
    return {"prompt": row["prompt"], "chosen": row["response_1"], "rejected": row["response_2"], **rewards}


def _solutions(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Every right solution beside every wrong one."""
    found = [value for value in row.values() if isinstance(value, dict)]
    right, wrong = ([one["solution"] for one in found if one["is_correct"] is correct] for correct in (True, False))
    both = {"prompt": row["question"], "chosen_reward": 1.0, "rejected_reward": 0.0}
    return [{**both, "chosen": chosen, "rejected": rejected} for chosen in right for rejected in wrong]


# ---- the trainings


def _setting(given: argparse.Namespace, kind: str, seed: int, scratch: Path) -> StepSetting:
    step = Alignment(
        kind=kind,
        data=("none.jsonl",),
        batch=given.batch,
        micro_batch=1,
        lr=given.lr,
        warmup_steps=2,
        method=given.method,
        **({} if kind == "sft" else {"beta": given.beta}),
    )
    return StepSetting(step, f"{kind}-{seed}", scratch, given.context, seed, "cpu", given.half, SILENT)


def _sft(given: argparse.Namespace, start: Checkpoint, talks: Sequence[Dialogue], folder: Path) -> None:
    """`sft_steps` steps, each of as many conversations as there are samples in a batch, and a tenth held out."""
    draw = random.Random(2)
    talks = draw.sample(list(talks), len(talks))
    heldout, train = talks[: given.heldout // 2], talks[given.heldout // 2 :][: given.batch * given.sft_steps]
    model, began = _opened(start), time.process_time()
    before = measured.dialogue_logps(model, heldout)
    taken = time.process_time()
    done = trainers.train_on_dialogues(model, start.tokenizer, train, _setting(given, "sft", 0, folder / "scratch"))
    trained = time.process_time() - taken
    told = measured.told_of_dialogues(heldout, before, measured.dialogue_logps(done.model.eval(), heldout))
    saving.save_model(done.model, folder / "model", extra_from=start.files, record=None)
    write_json(folder / "result.json", {"kind": "sft", **_took(done, trained, began), **told})


@dataclass(frozen=True)
class Pairs:
    """What every training on pairs begins with and is held against."""

    start: Checkpoint
    train: Sequence[Preference]
    heldout: Sequence[Preference]

    @functools.cached_property
    def before(self) -> Tensor:
        """The held-out answers' log-probabilities under the start."""
        return measured.pair_logps(_opened(self.start), self.heldout)


def _preferences(given: argparse.Namespace, pairs: Pairs, kind: str, seed: int) -> dict[str, Any]:
    before = pairs.before
    model, began = _opened(pairs.start), time.process_time()
    how = _setting(given, kind, seed, given.work / f"{kind}-{seed}")
    done = trainers.train_on_pairs(model, pairs.start.tokenizer, pairs.train, how)
    trained = time.process_time() - began
    after = measured.pair_logps(done.model.eval(), pairs.heldout)
    told = measured.told_of_pairs(pairs.heldout, before, after, beta=given.beta)
    return {"kind": kind, "seed": seed, **_took(done, trained, began), **told}


def _opened(start: Checkpoint) -> PreTrainedModel:
    return start.load(dtype="float32")


def _took(done: trainers.AlignedModel, trained: float, began: float) -> dict[str, Any]:
    steps = len(done.log)
    return {
        "steps": steps,
        "tokens": done.log[-1]["tokens"],
        "loss": [round(line["loss"], 4) for line in done.log],
        "cpu_seconds_a_step": round(trained / steps, 2),
        "cpu_seconds": round(time.process_time() - began, 1),
    }


def _compared(first: str, second: str, accuracy: dict[str, list[float]]) -> dict[str, Any]:
    """The verdict on the claim that the first kind reaches a higher accuracy than the second."""
    gains = differences(accuracy[first], accuracy[second])
    claim = {"claim": f"{first} above {second}", "gains": gains}
    return claim | {"mean": mean(gains), "stderr": standard_error(gains), "verdict": verdict(gains)}


if __name__ == "__main__":
    main()
