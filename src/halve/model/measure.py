"""The quality of a model: nats, perplexity, bits per byte, and the divergence from another model.

Everything is measured sample by sample, so that two models can be compared in pairs on the same samples. Every result
is an `Estimate` with its standard error. Weights may be bfloat16, but log-softmax is float32 and sums are float64.
Logits exist for one chunk of tokens at a time.

Shape suffixes: `B` samples, `S` tokens of a sample, `T` predictions of a sample (S - 1), `N` rows of a chunk,
`D` hidden, `V` vocab.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from halve.anatomy.configs import context_length
from halve.errors import CorpusError
from halve.model.head import Head, split

CHUNK_ELEMENTS = 1 << 24  # 64 MiB of float32 logits: enough rows to keep a GPU busy, few enough for a laptop


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error."""

    value: float
    stderr: float

    def as_dict(self) -> dict[str, float]:
        """The pair as plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Divergence:
    """Results of one pass of a student and a teacher over the same samples, one entry per sample (float64, CPU).

    `nll` is the student's mean nats per predicted token. `kl` is the mean of KL(teacher || student) over the positions.
    `agreement` is the share of positions at which both rank the same token first.
    """

    nll: Float[Tensor, " samples"]
    kl: Float[Tensor, " samples"]
    agreement: Float[Tensor, " samples"]


def average(values: Float[Tensor, " samples"], weights: Int[Tensor, " samples"] | None = None) -> Estimate:
    """Mean over samples with standard error s / sqrt(B), where s divides by B - 1. One sample has no error.

    Samples are treated as independent draws from the held-out text. Neighboring samples of one document are not quite
    independent, so the error is a little too small if documents are much longer than samples.

    `weights` are the numbers of tokens that the values are means over. The result is then the mean over all tokens, a
    ratio of means. Its error comes from the residuals `w_b (x_b - mean)`.

    >>> average(torch.tensor([1.0, 4.0]), torch.tensor([3, 1])).value
    1.75
    """
    values = values.double()
    if weights is not None:
        share_B = weights.double() / weights.double().mean()
        mean = (share_B * values).mean()
        return Estimate(mean.item(), average(share_B * (values - mean)).stderr)
    spread = values.std().item() if len(values) > 1 else math.nan
    return Estimate(values.mean().item(), spread / math.sqrt(len(values)))


def difference(
    ours: Float[Tensor, " samples"],
    theirs: Float[Tensor, " samples"],
    weights: Int[Tensor, " samples"] | None = None,
) -> Estimate:
    """Mean of ours minus theirs on the same samples. What is hard for both cancels in the error."""
    return average(ours.double() - theirs.double(), weights)


def proportion(hits: Bool[Tensor, " items"]) -> Estimate:
    """Share of hits with its binomial standard error sqrt(p (1 - p) / n)."""
    share = hits.double().mean().item()
    return Estimate(share, math.sqrt(share * (1 - share) / len(hits)))


def perplexity(nll: Float[Tensor, " samples"], weights: Int[Tensor, " samples"] | None = None) -> Estimate:
    """exp of the mean nats per token; the error by the delta method, perplexity times that of the mean."""
    mean = average(nll, weights)
    value = math.exp(mean.value) if mean.value < 700 else math.inf
    return Estimate(value, value * mean.stderr)


def bits_per_byte(
    nll: Float[Tensor, " samples"], num_bytes: Int[Tensor, " samples"], *, num_targets: int | Int[Tensor, " samples"]
) -> Estimate:
    """Bits that the model needs for one byte of text, comparable between tokenizers.

        bpb = sum_b nats_b / (ln 2 * sum_b bytes_b),   nats_b = nll_b * num_targets

    The standard error is that of a ratio of means, from the residuals nats_b / ln 2 - bpb * bytes_b.
    `num_bytes` comes from `target_bytes`, `num_targets` is the number of predictions in a sample, or in each.
    """
    bits_B = nll.double() * num_targets / math.log(2)
    bytes_B = num_bytes.double()
    value = (bits_B.sum() / bytes_B.sum()).item()
    residual = average(bits_B - value * bytes_B)
    return Estimate(value, residual.stderr / bytes_B.mean().item())


def target_bytes(
    tokenizer: PreTrainedTokenizerBase,
    samples: Int[Tensor, "samples seq"],
    predicted: Bool[Tensor, "samples predictions"] | None = None,
) -> Int[Tensor, " samples"]:
    """UTF-8 bytes of the text of each sample's predicted tokens (all but the first).

    These are the bytes that each run of predicted tokens adds to the decoded sample. Special tokens count no bytes, so
    separators between documents cost only bits. The result is exact, except for a character that the end of a run cuts
    in two.
    """

    def size(ids: list[int]) -> int:
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return len(str(text).encode("utf-8", errors="replace"))

    rows = samples.tolist()
    if predicted is None:
        return torch.tensor([size(row) - size(row[:1]) for row in rows])
    return torch.tensor(
        [
            sum(size(row[:end]) - size(row[:begin]) for begin, end in _runs(which))
            for row, which in zip(rows, predicted, strict=True)
        ]
    )


def _runs(predicted_T: Bool[Tensor, " predictions"]) -> list[tuple[int, int]]:
    """The runs of predicted tokens in a sample: the place of the first, and the place behind the last."""
    outside = torch.zeros(1, dtype=torch.int)
    edges = torch.diff(predicted_T.int(), prepend=outside, append=outside).nonzero().flatten() + 1
    return [(int(begin), int(end)) for begin, end in edges.view(-1, 2)]


@torch.no_grad()
def language_modeling(
    model: PreTrainedModel,
    samples: Int[Tensor, "samples seq"],
    *,
    micro_batch: int,
    predicted: Bool[Tensor, "samples predictions"] | None = None,
) -> Float[Tensor, " samples"]:
    """Mean negative log-likelihood of each sample's tokens after its first, in nats per token (float64, CPU).

    `predicted` says which of them are measured. By default, all are.
    Raises `CorpusError` if the samples are longer than the model's context.
    """
    require_context(model.config, samples.shape[1], "a held-out sample")
    body, head = split(model)
    nll = []
    for start in range(0, len(samples), micro_batch):
        rows = slice(start, start + micro_batch)
        ids_BS = samples[rows].to(model.device)
        nats_BT = token_nll(head, body(ids_BS), ids_BS)
        nll.append(_mean(nats_BT.cpu(), None if predicted is None else predicted[rows]))
    return torch.cat(nll)


@torch.no_grad()
def sample_nll(
    head: Head, hidden: Float[Tensor, "samples seq hidden"], ids: Int[Tensor, "samples seq"]
) -> Float[Tensor, " samples"]:
    """Mean nats of each sample's tokens after its first, from the last hidden states (float64, on their device)."""
    return token_nll(head, hidden, ids).mean(1)


@torch.no_grad()
def token_nll(
    head: Head, hidden: Float[Tensor, "samples seq hidden"], ids: Int[Tensor, "samples seq"]
) -> Float[Tensor, "samples predictions"]:
    """Nats of each token after a sample's first, from the last hidden states (float64, on their device)."""
    targets_N = ids[:, 1:].flatten()
    rows_ND = hidden[:, :-1].flatten(0, 1)
    nats_N = torch.empty(targets_N.shape, dtype=torch.float64, device=targets_N.device)
    for rows in row_chunks(len(targets_N), head.weight.shape[0]):
        nats_N[rows] = -token_log_probs(head.logits(rows_ND[rows]), targets_N[rows]).double()
    return nats_N.view(len(ids), -1)


def _mean(values_BT: Tensor, predicted_BT: Tensor | None) -> Tensor:
    """The mean over each sample's predictions."""
    if predicted_BT is None:
        return values_BT.mean(-1)
    return torch.where(predicted_BT, values_BT, 0.0).sum(-1) / predicted_BT.sum(-1)


@torch.no_grad()
def divergence(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    samples: Int[Tensor, "samples seq"],
    *,
    micro_batch: int,
    predicted: Bool[Tensor, "samples predictions"] | None = None,
) -> Divergence:
    """Measure a student against a teacher on the same samples: nll, KL(teacher || student), top-1 agreement.

        KL = sum_v p_t(v) (log p_t(v) - log p_s(v)),   float32 log-softmax over the full vocabulary

    Only positions that predict a token of the sample count. If `predicted` is given, only those in it count. If one
    vocabulary is padded further than the other, both distributions are taken over the entries that they share.

    Raises `CorpusError` if the samples are longer than either model's context.
    """
    for model in (student, teacher):
        require_context(model.config, samples.shape[1], "a held-out sample")
    (body_s, head_s), (body_t, head_t) = split(student), split(teacher)
    shared = min(head_s.weight.shape[0], head_t.weight.shape[0])
    parts: list[Tensor] = []
    for start in range(0, len(samples), micro_batch):
        part = slice(start, start + micro_batch)
        ids_BS = samples[part]
        hidden_s = body_s(ids_BS.to(student.device))[:, :-1].flatten(0, 1)
        hidden_t = body_t(ids_BS.to(teacher.device))[:, :-1].flatten(0, 1)
        targets = ids_BS[:, 1:].flatten().to(student.device)
        figures = torch.empty((3, len(targets)), dtype=torch.float64, device=student.device)
        for rows in row_chunks(len(targets), 2 * shared):
            logits_NV = head_s.logits(hidden_s[rows])
            figures[0, rows] = -token_log_probs(logits_NV, targets[rows]).double()
            log_s = logits_NV[:, :shared].log_softmax(-1)
            log_t = head_t.logits(hidden_t[rows])[:, :shared].to(student.device).log_softmax(-1)
            figures[1, rows] = (log_t.exp() * (log_t - log_s)).sum(-1).double()
            figures[2, rows] = (log_t.argmax(-1) == log_s.argmax(-1)).double()
        parts.append(_mean(figures.view(3, len(ids_BS), -1).cpu(), None if predicted is None else predicted[part]))
    nll, kl, agreement = torch.cat(parts, dim=1)
    return Divergence(nll, kl, agreement)


def token_log_probs(logits: Float[Tensor, "rows vocab"], targets: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """Log-probability of each row's target; log-softmax in the logits' own precision."""
    return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)


def row_chunks(num_rows: int, width: int) -> Iterator[slice]:
    """Slices over rows so that a chunk of rows of this width has at most `CHUNK_ELEMENTS` entries."""
    step = max(1, CHUNK_ELEMENTS // width)
    return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))


def require_context(config: PretrainedConfig, num_tokens: int, what: str, *, key: str = "data.context") -> None:
    """Raise `CorpusError` if `what`, which has this many tokens, is longer than the model's context.

    `key` is the recipe's key that says how many it has.
    """
    limit = context_length(config)
    if limit is not None and num_tokens > limit:
        raise CorpusError(
            f"{what} has {num_tokens} tokens, the model's context has {limit}",
            why="positions past the context were never trained, so that their likelihood means nothing",
            fix=f"set {key} to {limit} or less, or shorten the text",
        )


@torch.no_grad()
def generate_greedily(
    model: PreTrainedModel, prompt_1S: Int[Tensor, "1 seq"], *, num_new_tokens: int, end: int | list[int] | None = None
) -> Int[Tensor, "1 longer"]:
    """Greedy generation from the prompt with the key-value cache; stops after the token `end`.

    The checkpoint's generation_config.json (penalties, beams, forced tokens, stop strings) is ignored.
    """
    checkpoint_config = model.generation_config
    pad = end[0] if isinstance(end, list) else end
    model.generation_config = GenerationConfig()
    try:
        made: Tensor = model.generate(
            prompt_1S,
            attention_mask=torch.ones_like(prompt_1S),
            generation_config=GenerationConfig(
                max_new_tokens=num_new_tokens, do_sample=False, use_cache=True, eos_token_id=end, pad_token_id=pad
            ),
        )
    finally:
        model.generation_config = checkpoint_config
    return made


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """The tokens that end a text: those of generation_config.json if they are valid, otherwise the tokenizer's."""
    return named_ends(model.generation_config, tokenizer)


def named_ends(generation: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """The same by a generation config alone."""
    named = generation.eos_token_id if generation else None
    for given in (named, tokenizer.eos_token_id):
        ids = [token for token in (given if isinstance(given, list) else [given]) if type(token) is int]
        if ids:
            return ids
    return None
