"""Scores: the importance of every part of a model, saved so that another cut needs no second pass.

`Statistics` are the sums of one pass. `Scores` are what a plan ranks. A scores file holds both, with the fingerprints
of the model and of the samples.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, get_args

import torch
from jaxtyping import Float32, Float64, Int64
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from halve.anatomy import Anatomy
from halve.cut.score import baselines
from halve.cut.score.importance import (
    BATCH_AGGREGATORS,
    SEQ_AGGREGATORS,
    aggregate,
    group_importance,
    head_importance,
    network,
)
from halve.disk import plain_json
from halve.disk.files import atomic_file
from halve.errors import RunError
from halve.recipe.schema import Aggregator, FfnPoint, Method

SCORES_FORMAT: Final = "halve-scores-1"
WIDTH_AXES: Final = ("hidden", "ffn", "heads")


@dataclass(frozen=True, eq=False)
class Statistics:
    """The results of one pass over the calibration samples, for all nine aggregators. Sums are float64.

    A point is one tensor that weights read, such as the input of a down projection. Axes that were not scored are
    missing.
    """

    sums: Mapping[str, Float64[Tensor, "2 3 points channels"]]
    """By axis: `importance.sums_over_batch` of every point; for heads, channels are heads x head_dim."""
    point_layers: Mapping[str, tuple[int, ...]]
    """By axis: the layer that each point is in."""
    block_sums: Float64[Tensor, " layers"]
    """`importance.block_importance` of every layer, summed over samples."""
    num_samples: int
    head_dim: int
    kv_heads: int
    ffn_point: FfnPoint = "down_input"
    """Where neurons were read (see `halve.cut.score.taps`)."""

    def scores(self, *, batch_agg: Aggregator, seq_agg: Aggregator, model: str, samples: str) -> Scores:
        """The scores under one pair of aggregators (see `halve.cut.score.importance`)."""
        num_layers = len(self.block_sums)
        by_layer: dict[str, Tensor] = {}
        for axis, sums in self.sums.items():
            points_PC = aggregate(sums, num_samples=self.num_samples, batch_agg=batch_agg, seq_agg=seq_agg)
            layer_P = torch.tensor(self.point_layers[axis])
            by_layer[axis] = points_PC.new_zeros(num_layers, points_PC.shape[1]).index_add(0, layer_P, points_PC)
        heads = kv_heads = None
        if "heads" in by_layer:
            heads = head_importance(by_layer["heads"], head_dim=self.head_dim)
            kv_heads = group_importance(heads, kv_heads=self.kv_heads).float()
        return Scores(
            hidden=by_layer["hidden"].sum(0).float() if "hidden" in by_layer else None,
            ffn=by_layer["ffn"].float() if "ffn" in by_layer else None,
            heads=None if heads is None else heads.float(),
            kv_heads=kv_heads,
            layers=(self.block_sums / self.num_samples).float(),
            model=model,
            samples=samples,
            batch_agg=batch_agg,
            seq_agg=seq_agg,
            statistics=self,
            hidden_layers=by_layer["hidden"].float() if "hidden" in by_layer else None,
        )


@dataclass(frozen=True, eq=False)
class Scores:
    """The importance of every part of a model; higher = keep. An axis that was not scored is None.

    `hidden` has one ranking for the whole network, and `layers` compares layers. The other axes can be compared only
    within one layer. `network` makes them comparable.
    """

    hidden: Float32[Tensor, " hidden"] | None
    ffn: Float32[Tensor, "layers ffn"] | None
    heads: Float32[Tensor, "layers heads"] | None
    kv_heads: Float32[Tensor, "layers kv_heads"] | None
    layers: Float32[Tensor, " layers"]
    """BI, if the method ran a forward pass. Otherwise ones, and random numbers for random scores."""
    model: str
    """Fingerprint of the weights that were scored."""
    samples: str
    """Fingerprint of the calibration samples, or a description of how the scores were made without samples."""
    batch_agg: Aggregator | None = None
    seq_agg: Aggregator | None = None
    statistics: Statistics | None = None
    """The statistics for other aggregators; None for methods other than activation."""
    method: Method = "activation"
    hidden_layers: Float32[Tensor, "layers hidden"] | None = None
    """The part of `hidden` from each layer. Parts from outside the layers, such as embeddings, are only in `hidden`."""
    layer_scores: Float32[Tensor, " layers"] | None = None
    """With taylor: Shortened LLaMA's score of whole layers (arXiv 2402.02834). Higher hurts more."""

    def by_axis(self) -> dict[str, Tensor]:
        """The axes that were scored."""
        axes = {
            "hidden": self.hidden,
            "ffn": self.ffn,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "layers": self.layers,
        }
        return {axis: scores for axis, scores in axes.items() if scores is not None}

    def network(self) -> dict[str, Tensor]:
        """By axis, [layers, entries]: scores standardized layer by layer, so that one ranking can span the network."""
        axes = {"hidden": self.hidden_layers, "ffn": self.ffn, "heads": self.heads, "kv_heads": self.kv_heads}
        return {axis: network(scores) for axis, scores in axes.items() if scores is not None}

    def save(self, path: Path) -> None:
        """Write one safetensors file: a vector or matrix per axis, and the statistics behind them.

        Raises `DiskError` when the device is full; then nothing is left.
        """
        parts = {"hidden.layers": self.hidden_layers, "layer_scores": self.layer_scores}
        tensors = self.by_axis() | {name: tensor for name, tensor in parts.items() if tensor is not None}
        about: dict[str, Any] = {
            "format": SCORES_FORMAT,
            "method": self.method,
            "model": self.model,
            "samples": self.samples,
            "batch_agg": self.batch_agg,
            "seq_agg": self.seq_agg,
        }
        if (statistics := self.statistics) is not None:
            about |= {key: getattr(statistics, key) for key in ("num_samples", "head_dim", "kv_heads", "ffn_point")}
            tensors["statistics.layers"] = statistics.block_sums
            for axis, sums in statistics.sums.items():
                tensors[f"statistics.{axis}"] = sums
                tensors[f"statistics.{axis}.layer"] = torch.tensor(statistics.point_layers[axis])
        plain = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        with atomic_file(path) as draft:
            # one entry, because safetensors writes several in an order that changes from process to process
            save_file(plain, draft, metadata={"about": json.dumps(about, sort_keys=True)})

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        batch_agg: Aggregator | None = None,
        seq_agg: Aggregator | None = None,
        model: str | None = None,
    ) -> Scores:
        """Read a file of `save`, with other aggregators if they are given.

        Scores by methods other than activation have no statistics and no aggregators, and are returned unchanged. A
        file that does not name its method is read as activation.
        Raises `RunError` for a file that is missing, damaged or no scores file, and where `model` is given,
        for scores of weights with another fingerprint.
        """
        about, tensors = _read(path)
        try:
            scores = _assemble(about, tensors)
        except (KeyError, TypeError, ValueError) as error:
            raise _broken(path, f"a part is missing or of the wrong kind ({error})") from error
        if model is not None and scores.model != model:
            raise RunError(
                f"{path} holds scores of another model",
                why=f"they are of weights {scores.model[:12]}, this model's are {model[:12]}",
                fix="score this model first (halve score)",
            )
        statistics = scores.statistics
        batch_agg, seq_agg = batch_agg or scores.batch_agg, seq_agg or scores.seq_agg
        if statistics is None or batch_agg is None or seq_agg is None:
            return scores
        return statistics.scores(batch_agg=batch_agg, seq_agg=seq_agg, model=scores.model, samples=scores.samples)


def random_scores(anatomy: Anatomy, seed: int) -> Scores:
    """Uniform random numbers for every axis: the control for importance."""
    draw = partial(baselines.random, generator=torch.Generator().manual_seed(seed))
    sizes = anatomy.sizes
    return Scores(
        hidden=draw(sizes.hidden),
        ffn=draw(sizes.layers, sizes.ffn),
        heads=draw(sizes.layers, sizes.heads),
        kv_heads=draw(sizes.layers, sizes.kv_heads),
        layers=draw(sizes.layers),
        model="",
        samples=f"random numbers, seed {seed}",
        method="random",
    )


def samples_fingerprint(samples_BS: Int64[Tensor, "batch seq"]) -> str:
    """SHA-256 over the shape and the token ids."""
    digest = hashlib.sha256(repr(tuple(samples_BS.shape)).encode())
    digest.update(samples_BS.cpu().contiguous().numpy().astype("<i8", copy=False).tobytes())
    return digest.hexdigest()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not Path(path).is_file():
        raise RunError(
            f"no scores at {path}",
            why="cutting needs a score for every part",
            fix="score the model first (halve score)",
        )
    try:
        with safe_open(path, framework="pt") as file:
            about = plain_json.parse_json((file.metadata() or {}).get("about", "{}"))
            if about.get("format") != SCORES_FORMAT:
                raise _broken(path, f"its format is {about.get('format')}, not {SCORES_FORMAT}")
            return about, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise _broken(path, str(error)) from error


def _assemble(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Scores:
    statistics = None
    if "statistics.layers" in tensors:
        axes = [axis for axis in WIDTH_AXES if f"statistics.{axis}" in tensors]
        statistics = Statistics(
            sums={axis: tensors[f"statistics.{axis}"] for axis in axes},
            point_layers={axis: tuple(tensors[f"statistics.{axis}.layer"].tolist()) for axis in axes},
            block_sums=tensors["statistics.layers"],
            num_samples=int(about["num_samples"]),
            head_dim=int(about["head_dim"]),
            kv_heads=int(about["kv_heads"]),
            ffn_point=about.get("ffn_point", "down_input"),
        )
    if (method := about.get("method", "activation")) not in get_args(Method):
        raise ValueError(f"method {method}")
    batch_agg, seq_agg = about["batch_agg"], about["seq_agg"]
    if batch_agg not in (None, *BATCH_AGGREGATORS) or seq_agg not in (None, *SEQ_AGGREGATORS):
        raise ValueError(f"aggregators {batch_agg}, {seq_agg}")
    return Scores(
        hidden=tensors.get("hidden"),
        ffn=tensors.get("ffn"),
        heads=tensors.get("heads"),
        kv_heads=tensors.get("kv_heads"),
        layers=tensors["layers"],
        model=str(about["model"]),
        samples=str(about["samples"]),
        batch_agg=batch_agg,
        seq_agg=seq_agg,
        statistics=statistics,
        method=method,
        hidden_layers=tensors.get("hidden.layers"),
        layer_scores=tensors.get("layer_scores"),
    )


def _broken(path: Path, why: str) -> RunError:
    return RunError(
        f"{path} is not a sound scores file", why=why, fix="remove it and score the model again (halve score)"
    )
