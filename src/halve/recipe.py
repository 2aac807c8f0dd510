"""The recipe: every knob of a run, typed and checked, without importing torch.

A recipe is one YAML file whose sections carry the names of the stages; `reading` makes a `Recipe` of it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from halve.trainings import (
    HOW,
    Baseline,
    Cache,
    Correct,
    Distill,
    Intermediate,
    Logger,
    Phase,
    State,
    Term,
    Training,
)
from halve.values import Context, Count, Factor, Place, Real, Section, Seed, Switch, TextSource, Written

__all__ = [
    "HOW",
    "Aggregator",
    "Baseline",
    "Cache",
    "Correct",
    "Data",
    "DepthCriterion",
    "DepthPattern",
    "Device",
    "Distill",
    "Dtype",
    "Evaluate",
    "FfnPoint",
    "Gain",
    "Intermediate",
    "LayerMerge",
    "Logger",
    "Method",
    "Phase",
    "Prune",
    "Recipe",
    "Refit",
    "Rotation",
    "Score",
    "Section",
    "Selection",
    "Shape",
    "Source",
    "State",
    "Step",
    "Term",
    "Training",
]

Aggregator = Literal["mean", "l2", "var"]
Method = Literal["activation", "random", "magnitude", "wanda", "taylor", "fluctuation"]
FfnPoint = Literal["down_input", "up_output"]
DepthCriterion = Literal["bi", "angular", "nll", "logit_mse", "task", "taylor", "random"]
DepthPattern = Literal["single", "block", "greedy"]
Gain = Literal["none", "constant", "fitted"]
Rotation = Literal["auto", "none", "pca"]
Refit = Literal["none", "outputs", "all"]
Selection = Literal["auto", "rank", "refit"]
Shape = Literal["width", "trial"]
LayerMerge = Literal["none", "laco", "laco_search"]
Boundary = Literal["auto", "bos", "eos", "both", "none"]
Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16"]

_OF_DISTILLATION = (
    "batch",
    "micro_batch",
    "phases",
    "replicas",
    "checkpoint_every",
    "keep_checkpoints",
    "on_spike",
    "spike_factor",
    "loggers",
    "eval_every",
    "eval_samples",
    "precision",
)
"""What a correction beside a distillation shares with it."""


class Source(Section):
    """One part of a mixture."""

    sources: tuple[TextSource, ...] = Field(min_length=1)
    weight: Factor = Field(description="its share of the samples, relative to the other parts'")


class Data(Section):
    """Where the text comes from.

    A source is a file (text, `.jsonl`, `.parquet`; text and JSON lines also `.gz`, `.xz`, `.zst`), a folder of such
    files, or `hub:owner/name`, `hub:owner/name:split` for a data set of the hub.
    """

    train: Annotated[
        Annotated[tuple[TextSource, ...], Field(min_length=1), Tag("[sources]")]
        | Annotated[dict[str, Source], Field(min_length=1), Tag("[parts]")],
        Discriminator(lambda given: "[parts]" if isinstance(given, dict) else "[sources]"),
    ] = Field(description="sources, or a mixture: parts by name, each with sources and a weight")
    valid: tuple[TextSource, ...] = Field(min_length=1, description="held-out text; also measured during training")
    text_field: str = Field(
        "text", min_length=1, description="the field of JSON lines, parquet and hub rows that holds the text"
    )
    context: Context = Field(512, description="tokens in one packed sample")
    boundary: Boundary = Field(
        "auto", description="special tokens: in front of documents and samples (bos), behind documents (eos), or both"
    )
    documents: Literal["joined", "apart"] = Field(
        "joined", description="apart: in training, attention and prediction end at a document's border"
    )
    workers: Count = Field(1, description="processes that tokenize; the result does not depend on them")

    @property
    def train_sources(self) -> tuple[str, ...]:
        """The sources of the training text, those of a mixture's parts one after another."""
        if isinstance(self.train, dict):
            return tuple(source for part in self.train.values() for source in part.sources)
        return self.train


class Score(Section):
    """Importance of every axis from one forward pass (2407.14679, Sec. 2.2; its default of 1024 samples)."""

    samples: Count = 1024
    micro_batch: Count = 8
    batch_agg: Aggregator = "l2"
    seq_agg: Aggregator = "mean"
    method: Method = Field("activation", description="how width is scored; all but activation are baselines")
    ffn_point: FfnPoint = Field("down_input", description="where neurons are read; up_output is the paper's formula")
    depth: DepthCriterion = Field("bi", description="how layers are scored")
    depth_pattern: DepthPattern = Field(
        "single", description="which sets are compared: single layers, contiguous blocks, or one by one greedily"
    )
    depth_samples: Count = Field(64, description="samples that a removal is measured on")
    depth_task: Place | None = Field(None, description="multiple-choice file for depth: task")

    @model_validator(mode="after")
    def _depth(self) -> Score:
        if self.depth == "task" and self.depth_task is None:
            raise ValueError("depth: task answers the multiple-choice file in depth_task: name one")
        if self.depth == "taylor" and self.method != "taylor":
            raise ValueError("depth: taylor takes the gradients of method: taylor")
        return self


class Prune(Section):
    """What the student looks like: sizes by hand, or a budget that the planner meets."""

    params: Written | None = Field(
        None, description="total parameters, such as 4.5B; the nearest legal sizes are taken"
    )
    non_embedding_ratio: Real | None = Field(None, gt=0, lt=1, description="share of non-embedding parameters to keep")
    hidden: Count | None = None
    ffn: Count | None = None
    heads: Count | None = None
    kv_heads: Count | None = None
    layers: Count | None = Field(None, description="layers to keep, the least important dropped")
    drop_layers: Written | None = Field(None, description="layers to drop by hand, such as 16-31 or 3,5,7-9")
    shape: Shape = Field(
        "trial",
        description="what a budget is spent on; trial: cut and refit every mix of depth and width on a few samples",
    )
    gain: Gain = Field("fitted", description="how norm gains make up for fewer channels")
    steps: Count = Field(1, description="cut in so many steps, scored anew before each (iterative importance)")
    selection: Selection = Field(
        "auto",
        description="refit: choose neurons and heads (groups of several query heads aside) by what a refit cannot"
        " make up for; rank: by their scores; auto: refit where a one-shot cut by activations is refit",
    )
    rotation: Rotation = Field(
        "auto", description="basis of hidden; auto: the principal one where norms allow it and activations score width"
    )
    untie: Switch = Field(False, description="let rotation give a tied head weights of its own: closer, and larger")
    refit: Refit = Field("all", description="solve for the weights that read or write what was cut")
    ridge: Factor = Field(1e-3, description="ridge of the refit, relative to the mean of the Gram's diagonal")
    refit_samples: Count = Field(128, description="calibration samples of rotation and refit")
    head_merge: Real = Field(0.0, ge=-100, le=100, description="coefficient of the head residual merge; 0 is off")
    layer_merge: LayerMerge = Field(
        "none",
        description="laco: add removed layers' differences to the one before; laco_search: and find these layers",
    )

    @model_validator(mode="after")
    def _one_way(self) -> Prune:
        sizes = (self.hidden, self.ffn, self.heads, self.kv_heads, self.layers, self.drop_layers)
        by_hand = any(size is not None for size in sizes)
        ways = [self.params is not None, self.non_embedding_ratio is not None, by_hand]
        if sum(ways) != 1:
            raise ValueError("give exactly one of params, non_embedding_ratio, or sizes by hand")
        if self.layers is not None and self.drop_layers is not None:
            raise ValueError("layers and drop_layers say the same thing twice")
        if self.refit == "all" and (self.head_merge or self.layer_merge != "none"):
            raise ValueError("refit: all solves for the matrices that head_merge and layer_merge change: use outputs")
        if self.layer_merge == "laco_search" and self.layers is None:
            raise ValueError("layer_merge: laco_search merges down to a number of layers: give layers")
        if self.steps > 1 and (self.rotation == "pca" or self.selection == "refit"):
            raise ValueError("steps above 1 score what is left anew: not with rotation: pca or selection: refit")
        return self


class Evaluate(Section):
    """What is measured of every model of the run."""

    samples: Count = Field(64, description="packed held-out samples for perplexity, KL and agreement")
    choices: tuple[Place, ...] = Field(
        (),
        description="multiple-choice files: JSON lines with context, choices, answer or contexts, ending, answer",
    )
    prompts: tuple[str, ...] = Field((), description="texts that the report shows completed")
    completion_tokens: Annotated[Count, Field(le=100_000)] = 48
    speed: Switch = Field(True, description="measure prefill and decode speed and peak memory")


class Step(Section):
    """A further round of iterative compression: prune the last student again and distil it (15B to 8B to 4B)."""

    prune: Prune
    distill: Distill | None = None
    teacher: Literal["original", "previous"] = Field(
        "original", description="whom it learns from: the run's teacher, corrected if it corrects, or the last student"
    )


def _unturned(prune: Prune) -> Prune:
    return prune.model_copy(update={"rotation": "none"}) if prune.rotation == "auto" else prune


class Recipe(Section):
    """A whole run, from a teacher to a report."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    model: Place = Field(description="the teacher: a folder or a hub name")
    seed: Seed = 0
    device: Device = "auto"
    dtype: Dtype = Field("auto", description="precision that weights are held in; auto: the checkpoint's own")
    data: Data
    correct: Correct | None = Field(None, description="off unless the section is there")
    score: Score = Score()
    prune: Prune
    distill: Distill | None = None
    then: tuple[Step, ...] = Field((), description="further rounds of prune and distill, each from the last student")
    evaluate: Evaluate = Evaluate()

    @property
    def corrects_before(self) -> bool:
        """Whether there is a corrected teacher before anything is scored and cut."""
        return self.correct is not None and self.correct.when == "before"

    @property
    def corrects_beside(self) -> bool:
        """Whether every distillation corrects the teacher that it learns from."""
        return self.correct is not None and self.correct.when == "beside"

    @model_validator(mode="after")
    def _basis(self) -> Recipe:
        """Principal axes are a ranking of their own: what is ranked by another method stays in its own basis."""
        if self.score.method != "activation":
            then = tuple(step.model_copy(update={"prune": _unturned(step.prune)}) for step in self.then)
            self.__dict__.update(prune=_unturned(self.prune), then=then)
        return self

    @model_validator(mode="after")
    def _searched(self) -> Recipe:
        searches = any(part.layer_merge == "laco_search" for part in (self.prune, *(step.prune for step in self.then)))
        if searches and (self.score.depth, self.score.depth_pattern) != ("bi", "single"):
            raise ValueError("layer_merge: laco_search finds the layers: leave out score.depth and score.depth_pattern")
        return self

    @model_validator(mode="after")
    def _beside(self) -> Recipe:
        distillations = [part for part in (self.distill, *(step.distill for step in self.then)) if part is not None]
        if self.correct is None or self.correct.when == "before":
            return self
        if not distillations:
            raise ValueError("correct.when: beside is beside a distillation: add distill, or say when: before")
        for key in _OF_DISTILLATION:
            value, allowed = getattr(self.correct, key), [Correct.model_fields[key].default]
            if value not in [*allowed, *(getattr(part, key) for part in distillations)]:
                raise ValueError(f"correct.{key} has no say when the teacher is corrected beside: it is distill's")
        for part in distillations:
            if part.cache != "none":
                raise ValueError("a teacher that is corrected beside changes: what distill.cache keeps would be stale")
            if set(part.terms) == {"ce"}:
                raise ValueError("correct.when: beside corrects the teacher that distill asks; objective: ce asks none")
            if part.teacher_device != "same" or part.offload_teacher or not part.shard_teacher:
                raise ValueError(
                    "a teacher that is corrected beside trains where and as the student does: leave out"
                    " teacher_device, offload_teacher and shard_teacher"
                )
        return self
