"""How fast a distillation step is: halve beside the loss code of others, all against the floor of their products.

    pip install -r benchmarks/requirements-peers.txt      (in an environment of its own, with halve)
    python benchmarks/distill_step.py [--vocab 32000 128000] [--rounds 3] [--threads N] [--compile] [--out FOLDER]

Two Llamas with random weights, the teacher 512 wide and the student 384, 8 layers each; 4096 tokens a step in
samples of 1024. All systems share models, samples, precision, clipping and AdamW, and differ in what makes the
loss; each takes the micro-batch that is fastest for it. They take turns within a round, and so do the matrix
products of the floor, so that a busy machine slows all of them alike; ratios are medians over rounds. Who is
more than twice as slow as the fastest peer in the first round sits the others out.

A system counts where its loss is that of float64 within 1e-4, on a pair of models that are near each other and
as sure of themselves as trained ones are: there rounded logits show.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from distill_floor import products, seconds
from distill_peers import PEERS, Loss, Pair, batch_of, compiled, halve, summed, versions
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from halve.train.batch import Batch
from halve.train.step import Trained, apply, gradients

OURS, COMPILED = "halve", "halve, compiled layers"
SYSTEMS: dict[str, Callable[[Pair], Loss]] = {OURS: halve, **PEERS}
SAMPLES, SEQ, LR = 4, 1024, 1e-5
TOLERANCE = 1e-4
FLOOR = {False: 0.80, True: 0.70}
FASTER = {32000: 1.15, 128000: 1.4}
HALF_FASTER, LEANER, PARITY = 1.4, 4.0, 0.005


@dataclass
class Case:
    """What was measured of one system at one vocabulary and precision."""

    micro_batch: int
    times: list[float] = field(default_factory=list)
    bytes: int | None = None

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(self.times)


Cases = dict[tuple[int, bool, str], Case]
Floors = dict[tuple[int, bool], list[float]]


def main() -> None:
    """Measure, print, and write one dated page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--vocab", type=int, nargs="+", default=[32000, 128000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seq", type=int, default=SEQ)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--parity-steps", type=int, default=200)
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--compile", action="store_true", help="halve once more with compiled layers, for the floor")
    parser.add_argument("--out", type=Path, help="a folder for the page; default: it is only printed")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    began = time.perf_counter()
    systems = {**SYSTEMS, **({COMPILED: halve} if args.compile else {})}
    errors = {
        (half, name): exactness(make, compiled if name == COMPILED else None, half=half)
        for half in (False, True)
        for name, make in systems.items()
    }
    cases: Cases = {}
    floors: Floors = {}
    for vocab in args.vocab:
        measure(vocab, args, cases, floors)
    parity = parity_of_half(args.parity_steps)
    lines = page(args, cases, floors, errors, parity, minutes=(time.perf_counter() - began) / 60)
    print("\n".join(lines))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"distill-step-{datetime.date.today()}.md").write_text("\n".join(lines) + "\n")


def models(vocab: int, seq: int) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The teacher and the student, drawn at random."""
    torch.manual_seed(0)
    return llama(vocab, seq, 512, 1408, 8).requires_grad_(False), llama(vocab, seq, 384, 1024, 6)


def llama(vocab: int, seq: int, hidden: int, ffn: int, heads: int, layers: int = 8) -> PreTrainedModel:
    """A Llama with random weights, in float32."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=vocab,
        max_position_embeddings=seq,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()


def measure(vocab: int, args: argparse.Namespace, cases: Cases, floors: Floors) -> None:
    """Time all systems in both precisions on one pair, and the floor beside them."""
    teacher, student = models(vocab, args.seq)
    optimizer = torch.optim.AdamW(student.parameters(), lr=LR, fused=True)
    ids_BS = torch.randint(vocab, (SAMPLES, args.seq), generator=torch.Generator().manual_seed(1))
    work = products(teacher.config, student.config, samples=SAMPLES, seq=args.seq)
    torch.compiler.reset()  # code of other shapes counts against what it will compile
    for half in (False, True):
        pair = Pair(teacher, student, half, SAMPLES * (args.seq - 1))
        losses = {name: make(pair) for name, make in SYSTEMS.items()}
        steps = {name: partial(step, loss, student, optimizer) for name, loss in losses.items()}
        students = dict.fromkeys(losses, student)
        for name, one in {OURS: pair, **({COMPILED: compiled(pair)} if args.compile else {})}.items():
            own, students[name] = summed(one), one.student
            moved = optimizer if name == OURS else torch.optim.AdamW(one.student.parameters(), lr=LR, fused=True)
            losses[name] = partial(_sum, own)
            steps[name] = partial(own_step, own, Trained({"student": one.student}, moved))
        for name, loss in losses.items():
            sizes = [cases[vocab, half, OURS].micro_batch] if name == COMPILED else args.micro_batches
            case = cases[vocab, half, name] = Case(_best(loss, students[name], ids_BS, sizes))
            if not half:
                case.bytes = working_bytes(loss, students[name], ids_BS[:2])
        floors[vocab, half] = []
        running = list(losses)
        for turn in range(args.rounds):
            floors[vocab, half].append(seconds(work, half=half))
            for name in running[turn % len(running) :] + running[: turn % len(running)]:
                case = cases[vocab, half, name]
                case.times.append(_clock(partial(steps[name], ids_BS, case.micro_batch)))
                print(f"{vocab} {_word(half)} {name}: {case.times[-1]:.2f} s", flush=True)
            fastest = min(cases[vocab, half, name].median for name in PEERS)
            running = [name for name in running if cases[vocab, half, name].median <= 2 * fastest]


def step(
    loss: Loss, student: PreTrainedModel, optimizer: torch.optim.Optimizer, ids_BS: Tensor, micro_batch: int
) -> None:
    """Micro-batches, clipping, AdamW."""
    backward(loss, ids_BS, micro_batch)
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0, foreach=True)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _sum(of_batch: Callable[[Batch], tuple[Tensor, int]], ids_BS: Tensor) -> Tensor:
    """The loss as halve's loop has it."""
    return of_batch(batch_of(ids_BS))[0]


def own_step(
    of_batch: Callable[[Batch], tuple[Tensor, int]], trained: Trained, ids_BS: Tensor, micro_batch: int
) -> None:
    """The same in halve's loop: sums, and one pass that takes the mean and clips."""
    found = gradients(trained, of_batch, batch_of(ids_BS).split(micro_batch))
    apply(trained, found, lr=LR, clip=1.0)


def backward(loss: Loss, ids_BS: Tensor, micro_batch: int) -> None:
    """The gradients of all samples."""
    for part_BS in torch.split(ids_BS, micro_batch):
        torch.autograd.backward(loss(part_BS))


def _best(loss: Loss, student: PreTrainedModel, ids_BS: Tensor, candidates: Sequence[int]) -> int:
    """The micro-batch that is fastest on the samples of the largest; this warms up, too."""
    some_BS = ids_BS[: max(candidates)]
    times = {size: _clock(partial(backward, loss, some_BS, size)) for size in candidates}
    student.zero_grad(set_to_none=True)
    return min(times, key=lambda size: times[size])


def working_bytes(loss: Loss, student: PreTrainedModel, ids_BS: Tensor) -> int:
    """The most bytes in tensors at any moment, less those of the gradients (parameters were there before).

    One sample at a time for all, whichever micro-batch is fastest.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        backward(loss, ids_BS, 1)
    gradients: int = sum(p.grad.nbytes for p in student.parameters() if p.grad is not None)
    student.zero_grad(set_to_none=True)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    live, peak = 0, 0
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"]):
        live += int(event["args"]["Bytes"])
        peak = max(peak, live)
    return peak - gradients


def exactness(make: Callable[[Pair], Loss], made_of: Callable[[Pair], Pair] | None, *, half: bool) -> float:
    """The relative error of a loss against float64 from the same hidden states, those of `made_of` the models.

    In bfloat16 the factors may be rounded: the reference is the nearer of those from whole and rounded factors.
    """
    teacher, student = _near(vocab=32000)
    ids_BS = torch.randint(32000, (1, 256), generator=torch.Generator().manual_seed(2))
    pair = Pair(teacher, student, half, 255)
    pair = pair if made_of is None else made_of(pair)
    with torch.no_grad():
        found = float(make(pair)(ids_BS))
        with pair.autocast():
            states = [model.base_model(ids_BS, use_cache=False)[0][0, :-1] for model in (pair.teacher, pair.student)]
    weights = [model.get_output_embeddings().weight.detach() for model in (teacher, student)]
    wanted = [_kl(states, weights)]
    if half:
        wanted.append(_kl([h.bfloat16() for h in states], [w.bfloat16() for w in weights]))
    return min(abs(found / want - 1) for want in wanted)


def _near(vocab: int) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A teacher with logits of the size of a trained one's, and a student a little beside it."""
    torch.manual_seed(3)
    teacher = llama(vocab, 256, 384, 1024, 6, layers=2).requires_grad_(False)
    teacher.get_output_embeddings().weight.mul_(8.0)
    student = copy.deepcopy(teacher)
    for parameter in student.parameters():
        parameter.mul_(1 + 0.03 * torch.randn_like(parameter))
    return teacher, student.requires_grad_()


def _kl(states: Sequence[Tensor], weights: Sequence[Tensor]) -> float:
    log_p, log_q = (torch.log_softmax(h.double() @ w.double().t(), -1) for h, w in zip(states, weights, strict=True))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def parity_of_half(steps: int) -> tuple[float, float]:
    """The mean loss of the last tenth of a short run in float32 and in bfloat16: a pair 128 and 96 wide, 2 deep."""
    found = []
    for half in (False, True):
        torch.manual_seed(0)
        teacher, student = llama(4096, 128, 128, 352, 2, layers=2), llama(4096, 128, 96, 256, 2, layers=2)
        teacher.requires_grad_(False).get_output_embeddings().weight.mul_(8.0)
        loss = halve(Pair(teacher, student, half, 4 * 127))
        optimizer, losses = torch.optim.AdamW(student.parameters(), lr=2e-3, fused=True), []
        for ids_BS in _samples(steps):
            value = loss(ids_BS)
            torch.autograd.backward(value)
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(value.detach()))
        found.append(statistics.mean(losses[-max(1, steps // 10) :]))
    return found[0], found[1]


def _samples(steps: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (torch.randint(4096, (4, 128), generator=generator) for _ in range(steps))


def page(
    args: argparse.Namespace,
    cases: Cases,
    floors: Floors,
    errors: dict[tuple[bool, str], float],
    parity: tuple[float, float],
    *,
    minutes: float,
) -> list[str]:
    """What was found, as markdown, with a verdict on every target."""
    threads = f"{torch.get_num_threads()} threads of {platform.processor() or platform.machine()}"
    lines = [f"# Distillation step, {datetime.date.today()}", "", f"{threads}; {args.rounds} rounds, {minutes:.0f} min"]
    kept = [f"{name}={os.environ[name]}" for name in sorted(os.environ) if name.startswith("MALLOC_")]
    lines += ["", ", ".join(f"{name} {version}" for name, version in versions().items())]
    lines += ["", f"In the environment of all: {' '.join(kept)}"] if kept else []
    lines += ["", "DistillKit: in no package index, left out.", ""]
    lines += ["| precision | system | error of the loss | counts |", "|---|---|---|---|"]
    for (half, name), error in errors.items():
        lines.append(f"| {_word(half)} | {name} | {error:.1e} | {'yes' if error < TOLERANCE else 'no'} |")
    for vocab in args.vocab:
        lines += ["", f"## Vocabulary {vocab}", ""]
        lines += ["| precision | system | micro-batch | s/step | tokens/s | of the floor | working MB |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for (size, half, name), case in cases.items():
            if size == vocab:
                lines.append(_row(half, name, case, floors[vocab, half], SAMPLES * args.seq))
    verdicts = [line for vocab in args.vocab for line in _verdicts(vocab, cases, floors, errors)]
    drift = abs(parity[1] / parity[0] - 1)
    verdicts.append(_verdict(f"bf16 loss after {args.parity_steps} steps", drift, PARITY, "at most", "{:.2%}"))
    return [*lines, "", "## Targets", "", *verdicts]


def _row(half: bool, name: str, case: Case, floor: list[float], tokens: int) -> str:
    spread = f"{min(case.times):.2f} to {max(case.times):.2f}"
    memory = "" if case.bytes is None else f"{case.bytes / 1e6:.0f}"
    return (
        f"| {_word(half)} | {name} | {case.micro_batch} | {case.median:.2f} ({spread}) | {tokens / case.median:.0f} |"
        f" {_share(floor, case):.0%} | {memory} |"
    )


def _share(floor: list[float], case: Case) -> float:
    """Of the floor that was measured in the same round, at the median."""
    return statistics.median(least / took for least, took in zip(floor, case.times, strict=False))


def _verdicts(vocab: int, cases: Cases, floors: Floors, errors: dict[tuple[bool, str], float]) -> Iterator[str]:
    """The issue's targets at one vocabulary."""
    exact = [(half, name) for half in (False, True) for name in PEERS if errors[half, name] < TOLERANCE]
    whole = [cases[vocab, False, name] for half, name in exact if not half]
    best = min((cases[vocab, half, name] for half, name in exact), key=lambda case: case.median)
    for half, rivals in ((False, whole), (True, [best])):
        ours, rival = cases[vocab, half, OURS], min(rivals, key=lambda case: case.median)
        ratios = [theirs / mine for theirs, mine in zip(rival.times, ours.times, strict=False)]
        wanted = HALF_FASTER if half else FASTER.get(vocab, min(FASTER.values()))
        what = f"{vocab}, {_word(half)}: tokens/s of the fastest exact peer ({min(ratios):.2f} to {max(ratios):.2f})"
        yield _verdict(what, statistics.median(ratios), wanted, "at least", "{:.2f} times")
        for name in (OURS, COMPILED):
            if (vocab, half, name) in cases:
                share = _share(floors[vocab, half], cases[vocab, half, name])
                what = f"{vocab}, {_word(half)}: {name}, share of the floor"
                yield _verdict(what, share, FLOOR[half], "at least", "{:.0%}")
    if vocab != max(size for size, *_ in cases):
        return
    lean = min(case.bytes or 0 for case in whole)
    share = (cases[vocab, False, OURS].bytes or 0) / lean
    yield _verdict(
        f"{vocab}, float32: working memory of the leanest exact peer's", share, 1 / LEANER, "at most", "{:.0%}"
    )


def _verdict(what: str, found: float, wanted: float, bound: str, form: str) -> str:
    reached = found >= wanted if bound == "at least" else found <= wanted
    gap = "" if reached else f", the gap is {form.format(abs(found - wanted))}"
    target = f"{bound} {form.format(wanted)}"
    return f"- {'reached' if reached else 'MISSED'}: {what} {form.format(found)} ({target}{gap})"


def _word(half: bool) -> str:
    return "bf16" if half else "float32"


def _clock(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
