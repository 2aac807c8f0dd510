"""How much the removal of a set of layers hurts. Every criterion is a `Compare` function.

A `Compare` takes sets of layers, and layers that are already removed, and returns a value for each set. Higher hurts
more.

    bi          1 - E[cos(x_in, x_out)] over tokens                    one pass, no removal
    angular     arccos(cos(x_in, x_out)) / pi at the last token        one pass, no removal
    nll         nats per token of the model without the set            a removal each
    logit_mse   sum (z - z_full)^2 / sum z_full^2                      a removal each
    task        share of multiple-choice items answered wrongly        a removal each
    taylor      sum of given scores of single layers                   no pass
    random      a uniform number for each set                          no pass

Cosines are float32 and their means float64, angles float64, logits float32 (float64 in a float64 model), their sums
float64.

Legend: B batch, S seq, D hidden, N rows of a chunk, V vocab, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halve.anatomy import Anatomy
from halve.anatomy.configs import context_length
from halve.cut.layers import removal
from halve.cut.layers.removal import Trace
from halve.cut.score.calibration import Calibration
from halve.model import choices
from halve.model.choices import Item
from halve.model.finite import require_finite
from halve.model.head import Head, split
from halve.model.measure import require_context, row_chunks, sample_nll
from halve.progress import SILENT, Progress

LayerSet = tuple[int, ...]


@dataclass(frozen=True)
class Compared:
    """The result of a `Compare`: a value for each set, and its cost in full forward passes."""

    values: tuple[float, ...]
    passes: float
    whole: float | None
    """The value with no set removed, or None."""


Compare = Callable[[Sequence[LayerSet], Collection[int]], Compared]
Distance = Callable[[Tensor, Tensor], Tensor]


# ---- from the states of one pass


def angular_distance(
    input_BSD: Float[Tensor, "batch seq hidden"], output_BSD: Float[Tensor, "batch seq hidden"]
) -> Float[Tensor, " batch"]:
    """Angle between a block's input and output at each sample's last token, as a share of pi: 0 alike, 1 opposite.

    Gromov et al., arXiv 2403.17887: `d = arccos( x_in . x_out / (|x_in| |x_out|) ) / pi` at the last token, as in the
    paper: with a causal mask, only this token has seen the whole sample. (`bi` is the mean over all tokens.) Computed
    in float64, because the arccosine of similar states loses half of the digits.

    >>> x = torch.tensor([[[9.0, 9.0], [1.0, 0.0]]])
    >>> y = torch.tensor([[[-9.0, 3.0], [0.0, 2.0]]])
    >>> angular_distance(x, y).tolist(), angular_distance(x, x).tolist()
    ([0.5], [0.0])
    """
    x_BD, y_BD = input_BSD[:, -1].double(), output_BSD[:, -1].double()
    cosine_B = torch.nn.functional.cosine_similarity(x_BD, y_BD, dim=-1, eps=1e-30)
    return cosine_B.clamp(-1, 1).arccos() / torch.pi


def state_values(
    states: Sequence[Float[Tensor, "batch seq hidden"]], sets: Sequence[LayerSet], distance: Distance
) -> Float[Tensor, "sets batch"]:
    """Distance between the states in front of and behind each set's layers, which are contiguous.

    `states` are those in front of every layer and behind the last (L + 1).
    """
    assert all(chosen == tuple(range(chosen[0], chosen[-1] + 1)) for chosen in sets), "states see contiguous layers"
    return torch.stack([distance(states[chosen[0]], states[chosen[-1] + 1]).double() for chosen in sets])


def from_states(calibration: Calibration, *, distance: Distance) -> Compare:
    """Values from the states of one pass: `block_importance` (bi) or `angular_distance`; sets are contiguous."""
    layers = removal.layers_of(calibration.model, calibration.anatomy)
    batches, progress = calibration.batches, calibration.progress

    def compare(sets: Sequence[LayerSet], removed: Collection[int]) -> Compared:
        sums = torch.zeros(len(sets), dtype=torch.float64)

        def whole(_: int, before: Trace) -> None:
            sums.add_(state_values(before.states, sets, distance).sum(1).cpu())

        passes = removal.sweep(
            layers, batches, (), removed=removed, whole=whole, each=removal.ignore, progress=progress
        )
        return Compared(finite_values(sums / len(calibration.samples_BS), sets), passes, None)

    return compare


# ---- from removals


def nll(calibration: Calibration) -> Compare:
    """Mean nats per token without the set; its exponential is the perplexity.

    Shortened LLaMA's PPL (arXiv 2402.02834) and SLEB's measure (arXiv 2402.09025), which is the same average.
    """
    layers, head = _whole_samples(calibration)
    batches, progress = calibration.batches, calibration.progress

    def compare(sets: Sequence[LayerSet], removed: Collection[int]) -> Compared:
        sums = torch.zeros(len(sets) + 1, dtype=torch.float64)

        def add(b: int, s: int, hidden_BSD: Tensor) -> None:
            sums[s] += sample_nll(head, hidden_BSD, batches[b].to(hidden_BSD.device)).sum().cpu()

        passes = removal.sweep(
            layers, batches, sets, removed=removed, whole=lambda b, t: add(b, -1, t.hidden), each=add, progress=progress
        )
        *values, whole = finite_values(sums / len(calibration.samples_BS), (*sets, ()))
        return Compared(tuple(values), passes, whole)

    return compare


def logit_mse(calibration: Calibration) -> Compare:
    """Squared error of the logits against those of the whole model, relative to the size of these.

    Nemotron Elastic, arXiv 2511.16664: `sum (z_full - z)^2 / sum z_full^2`, over all tokens and the vocabulary. The
    reference is the model with all layers, even if some are already removed. Its last hidden states of all samples are
    kept in main memory: samples x seq x hidden numbers in the model's type.
    """
    layers, head = _whole_samples(calibration)
    batches, progress = calibration.batches, calibration.progress
    reference: dict[int, Tensor] = {}

    def keep(b: int, before: Trace) -> None:
        reference[b] = before.hidden.cpu()

    def compare(sets: Sequence[LayerSet], removed: Collection[int]) -> Compared:
        passes = 0.0
        if removed and not reference:
            passes += removal.sweep(layers, batches, (), removed=(), whole=keep, each=removal.ignore, progress=progress)
        sums = torch.zeros(2, len(sets) + 1, dtype=torch.float64)

        def add(b: int, s: int, hidden_BSD: Tensor) -> None:
            sums[:, s] += squares(head, hidden_BSD, reference[b].to(hidden_BSD.device)).cpu()

        def whole(b: int, before: Trace) -> None:
            if not removed:
                keep(b, before)
            add(b, -1, before.hidden)

        passes += removal.sweep(layers, batches, sets, removed=removed, whole=whole, each=add, progress=progress)
        *values, whole_value = finite_values(sums[0] / sums[1], (*sets, ()))
        return Compared(tuple(values), passes, whole_value)

    return compare


def _whole_samples(calibration: Calibration) -> tuple[removal.Layers, Head]:
    """Layers and head of a model that can read these samples whole."""
    model = calibration.model
    require_context(model.config, calibration.samples_BS.shape[1], "a sample")
    return removal.layers_of(model, calibration.anatomy), split(model)[1]


@torch.no_grad()
def squares(
    head: Head, hidden: Float[Tensor, "batch seq hidden"], reference: Float[Tensor, "batch seq hidden"]
) -> Tensor:
    """Sums over tokens and vocabulary of the squared difference of two states' logits, and of the second's squares."""
    rows_ND, wanted_ND = hidden.flatten(0, 1), reference.flatten(0, 1)
    sums = torch.zeros(2, dtype=torch.float64, device=hidden.device)
    for rows in row_chunks(len(rows_ND), 2 * head.weight.shape[0]):
        wanted_NV = head.logits(wanted_ND[rows])
        difference_NV = head.logits(rows_ND[rows]) - wanted_NV
        sums += torch.stack([z_NV.square().sum(dtype=torch.float64) for z_NV in (difference_NV, wanted_NV)])
    return sums


def task(
    model: PreTrainedModel,
    anatomy: Anatomy,
    items: Sequence[Item],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_tokens: int = 4096,
    progress: Progress = SILENT,
) -> Compare:
    """Share of multiple-choice items that the model answers wrongly without the set: one minus its accuracy.

    2408.11796 chooses its depth by a downstream task (Winogrande) rather than by loss: items with a context for each
    option and one ending. Items are scored as in `halve.model.choices`.
    """
    layers, (_, head) = removal.layers_of(model, anatomy), split(model)
    encoded = choices.encode(tokenizer, items, max_tokens=context_length(model.config))
    batches = choices.batch_up(encoded, batch_tokens=batch_tokens)

    def compare(sets: Sequence[LayerSet], removed: Collection[int]) -> Compared:
        nats: list[list[Tensor]] = [[] for _ in range(len(sets) + 1)]

        def add(b: int, s: int, hidden_BSD: Tensor) -> None:
            nats[s].append(choices.choice_nats(head, hidden_BSD, batches[b]))

        passes = removal.sweep(
            layers,
            [batch.ids for batch in batches],
            sets,
            removed=removed,
            whole=lambda b, t: add(b, -1, t.hidden),
            each=add,
            progress=progress,
        )
        finite_values(torch.stack([torch.cat(set_nats).sum() for set_nats in nats]), (*sets, ()))
        right = [choices.answers(encoded, batches, set_nats).right for set_nats in nats]
        *values, whole = (1 - answers.double().mean().item() for answers in right)
        return Compared(tuple(values), passes, whole)

    return compare


# ---- without a pass


def additive(scores_L: Float[Tensor, " layers"]) -> Compare:
    """The sum of the scores of all removed layers. In a first-order Taylor expansion, these add up.

    Shortened LLaMA's Taylor (arXiv 2402.02834). The paper's Taylor+ also protects the first four and the last two
    layers; nothing is protected here.
    """

    def compare(sets: Sequence[LayerSet], removed: Collection[int]) -> Compared:
        values = torch.stack([scores_L[[*removed, *chosen]].double().sum() for chosen in sets])
        return Compared(tuple(values.tolist()), 0.0, None)

    return compare


def random_values(seed: int) -> Compare:
    """A uniform random number for each set, which does not depend on other removals: the control."""
    generator = torch.Generator().manual_seed(seed)

    def compare(sets: Sequence[LayerSet], removed: Collection[int]) -> Compared:
        return Compared(tuple(torch.rand(len(sets), generator=generator).tolist()), 0.0, None)

    return compare


def finite_values(values: Tensor, sets: Sequence[LayerSet]) -> tuple[float, ...]:
    """The values as numbers. Raises `CheckpointError` naming the first set whose value is not finite."""
    numbers = values.tolist()
    for value, chosen in zip(numbers, sets, strict=True):
        names = ", ".join(str(layer) for layer in chosen)
        require_finite(f"without layers {names} the logits" if chosen else "the model's logits", value)
    return tuple(numbers)
