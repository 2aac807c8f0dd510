"""One interface to all importance scores of width: `score`, with the name of a method.

    activation    Minitron: the activations of each part (`halve.cut.score.taps`), any of nine aggregators
    random        uniform numbers
    magnitude     squared weights                        every parameter that carries the axis
    taylor        |weight x gradient|                    every parameter that carries the axis
    wanda         |weight| x norm of its input           matrices that read the axis
    fluctuation   variance of input x squared weight     matrices that read the axis

The last four methods add up a function of `halve.cut.score.baselines` over all weights of a structure. Methods that use
only weights include rows and columns, norms, biases and embeddings. Methods that use inputs include the columns that
read a structure's output: down projections for ffn, output projections for heads, and for hidden all matrices inside
the layers that read the residual stream. A head's score is the sum over its channels. The score of a key-value group is
the sum over its query heads and, for methods of weights, over its own keys and values.

Taylor is LLM-Pruner's element-wise first-order form, as in its released code. In the paper's vector-wise form the
weights of a structure can cancel: at a minimum of the loss, its sum over any scale that the model ignores is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from halve.cut.score import baselines, gradients, taps
from halve.cut.score.calibration import Calibration
from halve.cut.score.importance import group_importance, token_moments, token_variance
from halve.cut.score.scores import WIDTH_AXES, Scores, random_scores
from halve.cut.score.sites import input_dim
from halve.cut.score.structures import AxisPlace, row_scores, totals
from halve.errors import AnatomyError
from halve.model.hooks import on_input
from halve.recipe.schema import Aggregator, FfnPoint, Method


@dataclass(frozen=True, eq=False)
class _Job:
    """The arguments of `score`."""

    calibration: Calibration
    ffn_point: FfnPoint
    batch_agg: Aggregator
    seq_agg: Aggregator
    seed: int
    model_fingerprint: str
    samples_fingerprint: str


def score(
    calibration: Calibration,
    *,
    method: Method,
    ffn_point: FfnPoint,
    batch_agg: Aggregator,
    seq_agg: Aggregator,
    seed: int,
    model_fingerprint: str,
    samples_fingerprint: str,
) -> Scores:
    """Score every axis that can be cut. The model is unchanged on return.

    Only activation uses `ffn_point` and the aggregators, and only random uses `seed`. `layers` is BI if the method
    makes a forward pass, otherwise ones (random: random numbers). taylor also gives `layer_scores`. Axes that the
    anatomy refuses are None, except for kv_heads in families where every query head has its own key and value.

    Raises `AnatomyError` if the model does not call its modules as the anatomy says, and `CheckpointError` if
    activations, loss or gradients are not finite.
    """
    job = _Job(calibration, ffn_point, batch_agg, seq_agg, seed, model_fingerprint, samples_fingerprint)
    return replace(METHODS[method](job), method=method, model=model_fingerprint)


# ---- methods


def _activation(job: _Job) -> Scores:
    statistics = taps.measure_activations(job.calibration, ffn_point=job.ffn_point)
    return statistics.scores(
        batch_agg=job.batch_agg,
        seq_agg=job.seq_agg,
        model=job.model_fingerprint,
        samples=job.samples_fingerprint,
    )


def _random(job: _Job) -> Scores:
    return random_scores(job.calibration.anatomy, job.seed)


def _magnitude(job: _Job) -> Scores:
    parameters = dict(job.calibration.model.named_parameters())

    @torch.no_grad()
    def weigh(place: AxisPlace) -> Tensor:
        weight = parameters[place.name]
        return row_scores(baselines.magnitude, weight, dim=place.dim, positions_NP=place.positions)

    layers_L = torch.ones(job.calibration.anatomy.sizes.layers)
    return replace(_by_weights(job, weigh, layers_L), samples="weights alone")


def _taylor(job: _Job) -> Scores:
    weight_gradients = gradients.measure_gradients(job.calibration)
    parameters = dict(job.calibration.model.named_parameters())

    @torch.no_grad()
    def weigh(place: AxisPlace) -> Tensor:
        weight, gradient = parameters[place.name], weight_gradients.by_name[place.name]
        return row_scores(baselines.taylor_element, weight, gradient, dim=place.dim, positions_NP=place.positions)

    scores = _by_weights(job, weigh, (weight_gradients.block_sums / len(job.calibration.samples_BS)).float())
    return replace(scores, layer_scores=_layer_taylor(job.calibration, weight_gradients))


def _layer_taylor(calibration: Calibration, found: gradients.Gradients) -> Tensor:
    """Shortened LLaMA, arXiv 2402.02834, Sec. 3: the sum of |weight x gradient| over a layer's matrices.

    Its "+" (first four and last two layers always kept) is left out, as `halve.cut.layers.depth` protects no layer.
    """
    anatomy = calibration.anatomy
    layers_L = torch.zeros(anatomy.sizes.layers, dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in calibration.model.named_parameters():
            layer = anatomy.layer_of(name)
            if layer is not None and name.removesuffix(".weight") in anatomy.modules:
                gradient = found.by_name[name]
                layers_L[layer] += baselines.taylor_element(parameter.flatten(1), gradient.flatten(1)).sum().cpu()
    return layers_L.float()


def _wanda(job: _Job) -> Scores:
    return _by_inputs(job, _token_squares, lambda sums: sums[0].sqrt(), baselines.activation_times_weight)


def _token_squares(act_BSC: Tensor) -> Tensor:
    wide = torch.promote_types(act_BSC.dtype, torch.float32)
    norms_BC = torch.linalg.vector_norm(act_BSC, dim=1, dtype=wide).double()
    squares_1C: Tensor = norms_BC.square().sum(0, keepdim=True)
    return squares_1C


def _fluctuation(job: _Job) -> Scores:
    num_samples, num_tokens = len(job.calibration.samples_BS), job.calibration.samples_BS.numel()

    def variance(moments: Tensor) -> Tensor:
        return token_variance(moments, num_samples=num_samples, num_tokens=num_tokens)

    return _by_inputs(job, token_moments, variance, baselines.fluctuation)


METHODS: Final[Mapping[Method, Callable[[_Job], Scores]]] = {
    "activation": _activation,
    "random": _random,
    "magnitude": _magnitude,
    "wanda": _wanda,
    "taylor": _taylor,
    "fluctuation": _fluctuation,
}


# ---- from places and points to axes


def _by_weights(job: _Job, weigh: Callable[[AxisPlace], Tensor], layers_L: Tensor) -> Scores:
    """Sum a score of rows over every parameter that carries an axis."""
    anatomy = job.calibration.anatomy
    sums = {axis: totals(anatomy, axis, weigh) for axis in WIDTH_AXES if axis not in anatomy.refusals}
    by_layer = {axis: total.layers for axis, total in sums.items()}
    groups_LG = totals(anatomy, "kv_heads", weigh).layers if "heads" in sums else None
    outside_D = sums["hidden"].outside if "hidden" in sums else None
    return _scores(job, by_layer, layers_L, own_groups_LG=groups_LG, outside_D=outside_D)


def _by_inputs(
    job: _Job,
    reduce: Callable[[Tensor], Tensor],
    finish: Callable[[Tensor], Tensor],
    weigh: Callable[[Tensor, Tensor], Tensor],
) -> Scores:
    """Collect the inputs of matrices, and sum a score of input channels over the matrices that read an axis."""
    model, anatomy = job.calibration.model, job.calibration.anatomy
    if "hidden" not in anatomy.refusals and anatomy.mixers:
        raise AnatomyError(
            f"cannot score hidden of {anatomy.family} by what its matrices read",
            why="routers and experts read it with weights that are no plain matrices",
            fix="score.method: activation, magnitude or taylor",
        )
    readers = taps.find_readers(model, anatomy)
    points = {
        axis: [taps.Tap(layer, names[0], on_input) for layer, names in axis_readers]
        for axis, axis_readers in readers.items()
    }
    heard = taps.listen(job.calibration, points, reduce)
    parameters = dict(model.named_parameters())
    by_layer = {}
    for axis, axis_readers in readers.items():
        numbers_PC = finish(heard.sums[axis])
        channels_LC = numbers_PC.new_zeros(anatomy.sizes.layers, numbers_PC.shape[1])
        for numbers_C, (layer, names) in zip(numbers_PC, axis_readers, strict=True):
            for name in names:
                weight_YC = parameters[f"{name}.weight"].detach().movedim(input_dim(anatomy, name), -1)
                channels_LC[layer] += weigh(numbers_C.to(weight_YC.device), weight_YC).cpu()
        by_layer[axis] = channels_LC
    if "heads" in by_layer:
        channels_LC = by_layer["heads"]
        by_layer["heads"] = channels_LC.view(len(channels_LC), anatomy.sizes.heads, -1).sum(-1)
    layers_L = (heard.block_sums / len(job.calibration.samples_BS)).float()
    return _scores(job, by_layer, layers_L, own_groups_LG=None, outside_D=None)


def _scores(
    job: _Job,
    by_layer: Mapping[str, Tensor],
    layers_L: Tensor,
    *,
    own_groups_LG: Tensor | None,
    outside_D: Tensor | None,
) -> Scores:
    hidden_LD, heads_LH = by_layer.get("hidden"), by_layer.get("heads")
    hidden_D = groups_LG = None
    if hidden_LD is not None:
        hidden_D = hidden_LD.sum(0) if outside_D is None else hidden_LD.sum(0) + outside_D
    if heads_LH is not None:
        groups_LG = group_importance(heads_LH, kv_heads=job.calibration.anatomy.sizes.kv_heads)
        groups_LG = groups_LG if own_groups_LG is None else groups_LG + own_groups_LG
    return Scores(
        hidden=_single(hidden_D),
        ffn=_single(by_layer.get("ffn")),
        heads=_single(heads_LH),
        kv_heads=_single(groups_LG),
        layers=layers_L,
        model=job.model_fingerprint,
        samples=job.samples_fingerprint,
        hidden_layers=_single(hidden_LD),
    )


def _single(scores: Tensor | None) -> Tensor | None:
    return None if scores is None else scores.float()
