"""The sections of a recipe that cut: how parts are scored, and to which size the student is cut."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from halve.recipe.values import Count, PathOrName, Real, Scale, Section, Switch, Written

Aggregator = Literal["mean", "l2", "var"]
Method = Literal["activation", "random", "magnitude", "wanda", "taylor", "fluctuation"]
FfnPoint = Literal["down_input", "up_output"]
DepthCriterion = Literal["bi", "angular", "nll", "logit_mse", "task", "taylor", "random"]
DepthPattern = Literal["single", "block", "greedy"]
Gain = Literal["none", "constant", "fitted"]
Rotation = Literal["auto", "none", "pca"]
Refit = Literal["none", "outputs", "all"]
Selection = Literal["auto", "rank", "refit"]
ShapeChoice = Literal["width", "trial"]
LayerMerge = Literal["none", "laco", "laco_search"]

ONE_SIZE = "give exactly one of params, non_embedding_ratio, or sizes by hand"


class Score(Section):
    """Importance of channels, neurons, heads and layers, from one forward pass (2407.14679, Sec. 2.2)."""

    samples: Count = Field(
        256, description="number of calibration samples; the paper has 1024, which rank no better (decision 0033)"
    )
    micro_batch: Count = Field(8, description="samples in one forward pass; scores do not depend on it")
    batch_agg: Aggregator = Field("l2", description="how activations are reduced over samples")
    seq_agg: Aggregator = Field("mean", description="how activations are reduced over the tokens of a sample")
    method: Method = Field(
        "activation", description="how widths (hidden, ffn, heads) are scored; all but activation are baselines"
    )
    ffn_point: FfnPoint = Field(
        "down_input", description="where the activations of neurons are read; up_output follows the paper's formula"
    )
    depth: DepthCriterion = Field("bi", description="criterion by which layers are dropped")
    depth_pattern: DepthPattern = Field(
        "single",
        description="which sets of layers are compared; single: each layer alone; block: contiguous layers; greedy: one"
        " layer after another",
    )
    depth_samples: Count = Field(64, description="samples on which the removal of layers is measured")
    depth_task: PathOrName | None = Field(None, description="multiple-choice file for `depth: task`")

    @model_validator(mode="after")
    def _depth(self) -> Score:
        if self.depth == "task" and self.depth_task is None:
            raise ValueError("depth: task answers the multiple-choice file in depth_task: name one")
        if self.depth == "taylor" and self.method != "taylor":
            raise ValueError("depth: taylor takes the gradients of method: taylor")
        return self


class Prune(Section):
    """The size of the student: sizes by hand, or a budget from which sizes are computed.

    One of the two is required, unless the section `search` finds the size.
    """

    params: Written | None = Field(
        None, description="budget: total parameters, such as 4.5B; the nearest valid sizes are taken"
    )
    non_embedding_ratio: Real | None = Field(
        None, gt=0, lt=1, description="budget: share of the non-embedding parameters to keep"
    )
    hidden: Count | None = Field(None, description="channels of the residual stream to keep")
    ffn: Count | None = Field(None, description="MLP neurons to keep in each layer")
    heads: Count | None = Field(None, description="query heads to keep in each layer")
    kv_heads: Count | None = Field(None, description="key-value heads to keep in each layer")
    layers: Count | None = Field(None, description="number of layers to keep; the least important are dropped")
    drop_layers: Written | None = Field(None, description="layers to drop by hand, such as 16-31 or 3,5,7-9")
    shape: ShapeChoice = Field(
        "trial",
        description="how a budget becomes sizes; width: hidden and ffn shrink evenly; trial: cut and refit several"
        " shapes on a few samples and take the best",
    )
    gain: Gain = Field(
        "fitted",
        description="factor on norm weights after a cut of hidden; constant: sqrt(H / H'); fitted: by least squares",
    )
    steps: Count = Field(
        1, description="number of cuts that lead to the target, with new scores before each (iterative importance)"
    )
    selection: Selection = Field(
        "auto",
        description="how neurons and heads are chosen; rank: by score; refit: by how well a refit can compensate for"
        " their removal (groups of several query heads: by score); auto: refit if prune.refit is on, steps is 1 and"
        " score.method is activation, otherwise rank",
    )
    rotation: Rotation = Field(
        "auto",
        description="pca: rotate hidden to its principal axes before the cut; auto: pca if the norms allow it, steps"
        " is 1 and score.method is activation, and if the student starts closer with it on tokens that are not fitted;"
        " otherwise none",
    )
    untie: Switch = Field(
        False,
        description="with rotation: give a tied head its own weights; the student is then closer to the teacher but"
        " larger",
    )
    refit: Refit = Field(
        "all", description="which weights are solved for after the cut; outputs: only output and down projections"
    )
    ridge: Scale | Literal["auto"] = Field(
        "auto",
        description="ridge of the refit, relative to the mean diagonal of the Gram matrix; auto: for each matrix the"
        " one that does best on tokens that are not fitted",
    )
    refit_tokens: Count | Literal["auto"] = Field(
        "auto",
        description="calibration tokens for rotation, selection and refit; auto: 32 for each channel of the widest"
        " matrix, 32,768 at least",
    )
    refit_samples: Count | None = Field(
        None,
        description="calibration samples instead of refit_tokens; then ridge: auto is 1e-3, and the refit is not"
        " compared with the plain cut",
    )
    head_merge: Real = Field(
        0.0, ge=-100, le=100, description="coefficient of the head residual merge (2407.14679, Sec. 2.3); 0: off"
    )
    layer_merge: LayerMerge = Field(
        "none",
        description="laco: add the differences of removed layers to the layer before them; laco_search: also search for"
        " the layers to merge",
    )

    @property
    def sized_by(self) -> dict[str, bool]:
        """Which of the ways to give the student's size are used."""
        sizes = (self.hidden, self.ffn, self.heads, self.kv_heads, self.layers, self.drop_layers)
        by_hand = any(size is not None for size in sizes)
        ratio = self.non_embedding_ratio is not None
        return {"params": self.params is not None, "non_embedding_ratio": ratio, "sizes by hand": by_hand}

    @model_validator(mode="after")
    def _one_way(self) -> Prune:
        if sum(self.sized_by.values()) > 1:
            raise ValueError(ONE_SIZE)
        if self.layers is not None and self.drop_layers is not None:
            raise ValueError("give layers or drop_layers, not both")
        if self.refit_samples is not None and self.refit_tokens != "auto":
            raise ValueError("give refit_tokens or refit_samples, not both")
        if self.refit == "all" and (self.head_merge or self.layer_merge != "none"):
            raise ValueError("refit: all solves for the matrices that head_merge and layer_merge change: use outputs")
        if self.layer_merge == "laco_search" and self.layers is None:
            raise ValueError("layer_merge: laco_search merges down to a number of layers: give layers")
        if self.steps > 1 and (self.rotation == "pca" or self.selection == "refit"):
            raise ValueError("steps above 1 cannot be combined with rotation: pca or selection: refit")
        return self
