"""Everything that needs a GPU: exact losses, their memory, resume, speed, and the plan against what is measured.

    make gpu-check        writes a dated page into benchmarks/results; without a GPU it says so

The pair is that of a 3B-class teacher and a 1B-class student at 128,256 tokens of vocabulary, random weights, 8192
tokens a step (Llama 3.2's sizes; the student's heads are as wide as the teacher's). MFU counts teacher, student and
both heads by DESIGN's formula, attention's causal half, against the data sheet's dense bf16 rate of the card.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from halve.model.head import Head, split
from halve.model.products import add_product, product
from halve.preflight import forecast as dryrun
from halve.recipe.schema import Data, Distill, Prune, Recipe, Training
from halve.text.batch import Batch
from halve.text.course import Course
from halve.train.loop import loop
from halve.train.loop.optimizers import make_optimizer
from halve.train.loop.step import Trained, apply, gradients
from halve.train.losses import chunked, divergences
from halve.train.objectives import logits as objectives
from halve.train.teachers.live import Live

CARDS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}
"""Dense bf16 rates of data sheets (SXM), FLOP/s."""

VOCAB, TOKENS, SEQ = 128256, 8192, 2048
MFU, LOSS_BYTES, PLAN, HEAD_RATE = 0.40, 1.1e9, 0.10, 0.40
BF16, DEVICE = torch.bfloat16, "cuda"


@dataclass(frozen=True)
class Check:
    """One line of the page."""

    what: str
    found: str
    good: bool

    def __str__(self) -> str:
        return f"- {'reached' if self.good else 'MISSED'}: {self.what}: {self.found}"


def main() -> None:
    """Run all checks; exit with 1 if one falls short."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu-check: no CUDA device here, nothing checked")
        return
    card = torch.cuda.get_device_name()
    checks: list[Check] = []
    for check in (products_are_exact, losses_are_exact, resume_is_exact, loss_memory, lambda: speed(args.steps)):
        checks += check()
        print(*map(str, checks), sep="\n", flush=True)
        torch.cuda.empty_cache()
    today = datetime.date.today()
    lines = [f"# GPU check, {today}", "", f"{card}, torch {torch.__version__}", "", *map(str, checks), ""]
    (args.out / f"gpu-check-{today}.md").write_text("\n".join(lines))
    raise SystemExit(not all(check.good for check in checks))


def products_are_exact() -> list[Check]:
    """Half-precision factors, float32 results: against float64 of the same factors."""
    a, b = draw(512, 2048).to(BF16), draw(2048, 4096).to(BF16)
    want = a.double() @ b.double()
    with torch.no_grad():
        total = draw(512, 4096)
        want_total = total.double() + want
        add_product(total, a, b)
        errors = apart(product(a, b), want), apart(total, want_total)
    return [Check("product and sum of products, error", f"{max(errors):.1e}", max(errors) < 1e-5)]


def losses_are_exact() -> list[Check]:
    """The chunked KL and its gradients on the card against autograd in float64, from the same factors."""
    found = []
    for dtype, bound in ((torch.float32, 1e-4), (BF16, 2**-7)):
        hidden, taught = draw(700, 256).to(dtype), draw(700, 384).to(dtype)
        weight, master = (draw(VOCAB, width).mul_(0.1).to(dtype) for width in (256, 384))
        with matmul_in_full():
            ours = kl_gradients(hidden.float(), Head(nn.Parameter(weight.float())), taught, Head(master), operand=dtype)
            want = plain_gradients(hidden.double(), weight.double(), taught.double(), master.double())
        loss = abs(float(ours[0] / want[0]) - 1)
        grads = max(apart(a, b) for a, b in zip(ours[1:], want[1:], strict=True))
        found.append(
            Check(
                f"KL in {dtype}, errors of loss, gradients", f"{loss:.1e}, {grads:.1e}", loss < 1e-4 and grads < bound
            )
        )
    return found


def kl_gradients(
    hidden: Tensor, head: Head, taught: Tensor, master: Head, *, operand: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and its gradients by hidden states and weight."""
    hidden.requires_grad_()
    vocab = head.weight.shape[0]
    target = chunked.follow(taught, master, divergences.kl_rows, vocab=vocab, operand=operand)
    size = chunked.chunk_tokens(vocab, cuda=True)
    loss = chunked.chunked(hidden, head, target, vocab=vocab, chunk=size, operand=operand)
    by_hidden, by_weight = torch.autograd.grad(loss, (hidden, head.weight))
    return loss.detach(), by_hidden, by_weight


def plain_gradients(hidden: Tensor, weight: Tensor, taught: Tensor, master: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same by the formula, in float64."""
    hidden.requires_grad_(), weight.requires_grad_()
    log_p, log_q = torch.log_softmax(taught @ master.t(), -1), torch.log_softmax(hidden @ weight.t(), -1)
    loss = (log_p.exp() * (log_p - log_q)).sum()
    by_hidden, by_weight = torch.autograd.grad(loss, (hidden, weight))
    return loss.detach(), by_hidden, by_weight


class Killed(BaseException):
    """Simulates a kill."""


def resume_is_exact() -> list[Check]:
    """A run of 6 steps, and one that is killed in the fifth and resumes: bit-identical."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for kill in (None, 4):
            student, objective = small(0), taught_by(small(1))
            work = Path(folder, str(kill))
            if kill is not None:
                try:
                    short(student, killing(objective, kill), work)
                except Killed:
                    student = small(0)
            short(student, objective, work)
            found.append([parameter.detach().cpu() for parameter in student.parameters()])
    same = all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    return [Check("killed and resumed, bit-identical", "yes" if same else "no", same)]


def short(student: PreTrainedModel, objective: objectives.Objective, work: Path) -> None:
    """Six steps of the loop on the card, in bfloat16."""
    work.mkdir(exist_ok=True)
    training = Training(tokens=6 * 4 * 128, batch=4, checkpoint_every=2, precision="bfloat16", warmup_steps=2)
    course = Course(training, Drawn(128, 512))
    files = loop.TrainFiles(work / "work", work / "metrics.jsonl", seed=0)
    loop.train(student, loop.Lesson(objective), course, files, device=DEVICE)


def killing(objective: objectives.Objective, after: int) -> objectives.Objective:
    """The objective, which dies when it is asked once more than so often."""
    calls = iter(range(after))

    def killed(*args: Any) -> Any:
        if next(calls, None) is None:
            raise Killed
        return objective(*args)

    return killed


@dataclass(frozen=True)
class Drawn:
    """Random tokens by step."""

    context: int
    vocab: int

    def batch(self, step: int, batch: int) -> Batch:
        """The samples of a step."""
        random = torch.Generator().manual_seed(step)
        ids_BS = torch.randint(self.vocab, (batch, self.context), generator=random)
        return Batch(ids_BS, self.numbers(step, batch))

    def numbers(self, step: int, batch: int) -> tuple[int, ...]:
        """Counted on from step to step."""
        return tuple(range(step * batch, (step + 1) * batch))


def loss_memory() -> list[Check]:
    """The most that the loss of 8192 tokens holds beside its arguments and the head's gradient; the head's rate."""
    hidden, taught = draw(TOKENS, 2048), draw(TOKENS, 3072).to(BF16)
    head, master = Head(nn.Parameter(draw(VOCAB, 2048).mul_(0.02))), Head(draw(VOCAB, 3072).mul_(0.02).to(BF16))
    kl_gradients(hidden, head, taught, master, operand=BF16)  # the libraries take their own memory once
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kl_gradients(hidden, head, taught, master, operand=BF16)
    most = torch.cuda.max_memory_allocated() - before - head.weight.nbytes
    took = statistics.median(clock(lambda: kl_gradients(hidden, head, taught, master, operand=BF16)) for _ in range(5))
    rate = TOKENS * VOCAB * (6 * 2048 + 2 * 3072) / took / peak_rate()
    return [
        Check("working memory of the loss beside the head's gradient", f"{most / 1e9:.2f} GB", most <= LOSS_BYTES),
        Check("rate of the head, else a kernel is due", f"{rate:.0%} of the card's", rate >= HEAD_RATE),
    ]


def speed(steps: int) -> list[Check]:
    """MFU of whole steps, and the most memory against the plan of the dry run."""
    training = Training(tokens=TOKENS, batch=TOKENS // SEQ, precision="bfloat16")
    teacher = llama(3072, 8192, 28, 24).to(BF16).requires_grad_(False)
    student = llama(2048, 8192, 16, 16)
    objective, (body, own_head) = taught_by(teacher), split(student)
    head = replace(own_head, accumulates=True)
    trained = Trained({"student": student}, make_optimizer(student.parameters(), training))
    batch = Drawn(SEQ, VOCAB).batch(0, TOKENS // SEQ).to(DEVICE)

    def summed(part: Batch) -> tuple[Tensor, int]:
        with loop.autocast(training, DEVICE):
            return objective(body, head, part)

    def step() -> None:
        apply(trained, gradients(trained, summed, [batch]), lr=1e-5, clip=1.0)

    for _ in range(3):
        step()
    torch.cuda.reset_peak_memory_stats()
    took = statistics.median(clock(step) for _ in range(steps))
    peak = torch.cuda.max_memory_allocated()
    mfu = flops(teacher.config, student.config) * TOKENS / took / peak_rate()
    rate = f"{mfu:.1%}, {TOKENS / took:.0f} tokens/s, {took * 1e3:.0f} ms a step"
    planned = plan(teacher, student)
    off = planned / peak - 1
    return [
        Check(f"MFU of {steps} steps", rate, mfu >= MFU),
        Check(
            "peak memory planned, measured", f"{planned / 1e9:.1f}, {peak / 1e9:.1f} GB ({off:+.0%})", abs(off) <= PLAN
        ),
    ]


def plan(teacher: PreTrainedModel, student: PreTrainedModel) -> float:
    """What the dry run says of this pair on one card: the student as if it were cut from the teacher."""
    with tempfile.TemporaryDirectory() as folder:
        teacher.config.save_pretrained(folder)
        sizes = student.config
        prune = Prune(
            hidden=sizes.hidden_size, layers=sizes.num_hidden_layers, heads=sizes.num_attention_heads, rotation="none"
        )
        distill = Distill(tokens=TOKENS, batch=TOKENS // SEQ, precision="bfloat16")
        data = Data(train=("train.txt",), valid=("valid.txt",), context=SEQ)
        recipe = Recipe(name="pair", model=folder, dtype="bfloat16", data=data, prune=prune, distill=distill)
        return float(dryrun.forecast(recipe).memory["distill"].total_bytes)


def flops(teacher: LlamaConfig, student: LlamaConfig) -> float:
    """Of one token: `(2 N_T + a_T) + 3 (2 N_S + a_S) + V (6 H_S + 2 H_T)`."""
    work = [_body_flops(config) for config in (teacher, student)]
    return float(work[0] + 3 * work[1] + VOCAB * (6 * student.hidden_size + 2 * teacher.hidden_size))


def _body_flops(config: LlamaConfig) -> float:
    width, heads = config.hidden_size, config.num_attention_heads
    narrow = width // heads * config.num_key_value_heads
    matrices = 2 * width * width + 2 * width * narrow + 3 * width * config.intermediate_size
    return float(config.num_hidden_layers * (2 * matrices + 2 * SEQ * width))


def llama(hidden: int, ffn: int, layers: int, heads: int, vocab: int = VOCAB) -> PreTrainedModel:
    """A Llama with random weights on the card, in float32, with tied embeddings."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=min(heads, 8),
        vocab_size=vocab,
        max_position_embeddings=SEQ,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()


def small(seed: int) -> PreTrainedModel:
    """A small one whose weights are this seed's."""
    model = llama(128, 256, 2, 2, vocab=512)
    random = torch.Generator(DEVICE).manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05, generator=random)
    return model


def taught_by(teacher: PreTrainedModel) -> objectives.Objective:
    """Forward KL from this teacher."""
    return objectives.distillation(Live(*split(teacher.requires_grad_(False))), vocab=teacher.config.vocab_size)


def draw(*shape: int) -> Tensor:
    """Random numbers on the card."""
    return torch.randn(*shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(sum(shape)))


def apart(have: Tensor, want: Tensor) -> float:
    """The relative error of a whole tensor."""
    return float((have.double() - want).norm() / want.norm())


def peak_rate() -> float:
    """The card's bf16 rate by its data sheet; an unknown card's is measured."""
    name = torch.cuda.get_device_name()
    known = [rate for card, rate in CARDS.items() if card in name]
    if known:
        return known[0]
    a = draw(8192, 8192).to(BF16)
    return 2 * 8192**3 / min(clock(lambda: a @ a) for _ in range(10))


def clock(work: Callable[[], object]) -> float:
    """Seconds until the card has done it."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


@contextmanager
def matmul_in_full() -> Iterator[None]:
    """Without TensorFloat-32."""
    matmul: Any = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, False
    try:
        yield
    finally:
        matmul.allow_tf32 = before


if __name__ == "__main__":
    main()
