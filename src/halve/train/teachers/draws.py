"""Tokens drawn from a teacher's distribution, and their compact encoding.

The shares s of tokens among K draws from p are an unbiased estimate of p: E[s] = p for every token. So the gradient
`q - s` is right in expectation. The K most likely tokens are not an unbiased estimate: the rest of the distribution is
never learned (Sparse Logit Sampling, 2503.16870, Sec. 3).

Shapes: N tokens, K draws, U different tokens drawn at N tokens together, V vocab, W bytes of an entry.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from halve.train.losses.divergences import Sampled


class Packed(NamedTuple):
    """The draws at N tokens: each distinct token with its count in W bytes, their number, and the entropy."""

    entries: UInt8[Tensor, "different width"]
    different: Int[Tensor, " tokens"]
    entropy: Float[Tensor, " tokens"]


def uniforms(num_tokens: int, draws: int, *, seed: int, sample: int) -> Float[Tensor, "tokens draws"]:
    """Return the random numbers in [0, 1) for the draws at a sample's tokens: float64, on the CPU.

    They depend only on the seed and the sample's number, so a sample has the same draws on every device and in any
    order.
    """
    digest = hashlib.sha256(f"draws {seed} {sample}".encode()).digest()
    random = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.rand(num_tokens, draws, generator=random, dtype=torch.float64)


def draw(
    logits: Float[Tensor, "tokens vocab"], uniform: Float[Tensor, "tokens draws"], *, temperature: float
) -> Int[Tensor, "tokens draws"]:
    """Draw tokens from `softmax(logits / temperature)` with replacement, by inverting its cumulative sum at `uniform`.

    The sum is float64: in float32 the steps of 6e-8 near its end would leave out the least likely tokens. Memory is one
    float64 array of the logits' size.
    """
    sum_NV = torch.softmax(logits / temperature, -1).to(torch.float64).cumsum(-1)
    ids_NK = torch.searchsorted(sum_NV, uniform * sum_NV[:, -1:], right=True)
    return ids_NK.clamp_(max=logits.shape[-1] - 1)


def entropy(logits: Float[Tensor, "tokens vocab"], *, temperature: float) -> Float[Tensor, " tokens"]:
    """Return the entropy of `softmax(logits / temperature)` in nats: cross-entropy minus KL."""
    log_p_NV = torch.log_softmax(logits / temperature, -1)
    return -(log_p_NV.exp() * log_p_NV).sum(-1)


def entry_bytes(vocab: int, draws: int) -> int:
    """Return the bytes of a token and its count: 3 for 16 draws from a vocabulary of up to a million."""
    return -(-(vocab * draws - 1).bit_length() // 8) or 1


def draw_bytes(vocab: int, draws: int) -> int:
    """Return the most bytes of the draws at a token, which is when all are distinct."""
    return draws * entry_bytes(vocab, draws) + _counter(draws).itemsize + torch.float32.itemsize


def pack(ids: Int[Tensor, "tokens draws"], entropy: Float[Tensor, " tokens"], *, vocab: int) -> Packed:
    """Encode draws: an entry is `id * draws + count - 1`, least significant byte first."""
    draws = ids.shape[1]
    ids_NK, _ = ids.sort(dim=-1)
    first_NK = torch.ones_like(ids_NK, dtype=torch.bool)
    first_NK[:, 1:] = ids_NK[:, 1:] != ids_NK[:, :-1]
    places_U = first_NK.flatten().nonzero().squeeze(-1)
    counts_U = places_U.diff(append=places_U.new_tensor([ids_NK.numel()]))
    codes_U = ids_NK.flatten()[places_U] * draws + counts_U - 1
    shifts_W = 8 * torch.arange(entry_bytes(vocab, draws), device=ids.device)
    entries_UW = (codes_U[:, None] >> shifts_W & 255).to(torch.uint8)
    return Packed(entries_UW, first_NK.sum(-1).to(_counter(draws)), entropy.float())


def unpack(packed: Packed, *, draws: int) -> Sampled:
    """Decode draws. The shares of each token are padded with zeros to the longest."""
    entries_UW, different_N, entropy_N = packed
    shifts_W = 8 * torch.arange(entries_UW.shape[1], device=entries_UW.device)
    codes_U = (entries_UW.long() << shifts_W).sum(-1)
    counts_N = different_N.long()
    rows_U = torch.repeat_interleave(torch.arange(len(counts_N), device=counts_N.device), counts_N)
    columns_U = torch.arange(len(codes_U), device=counts_N.device) - (counts_N.cumsum(0) - counts_N)[rows_U]
    width = int(counts_N.max()) if len(counts_N) else 0
    ids_NK = counts_N.new_zeros(len(counts_N), width)
    shares_NK = entropy_N.new_zeros(ids_NK.shape)
    ids_NK[rows_U, columns_U] = codes_U // draws
    shares_NK[rows_U, columns_U] = (codes_U % draws + 1).to(shares_NK.dtype) / draws
    return Sampled(ids_NK, shares_NK, entropy_N)


def _counter(draws: int) -> torch.dtype:
    return torch.uint8 if draws < 256 else torch.int32
