"""The recipe: every setting of a run, typed and checked, without importing torch.

A recipe is one YAML file. Its sections have the names of the stages. `read` turns it into a `Recipe`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from halve.recipe.trainings import (
    HOW,
    Baseline,
    Cache,
    Correct,
    Distill,
    Intermediate,
    Logger,
    LossTerm,
    Phase,
    State,
    Training,
)
from halve.recipe.values import Context, Count, PathOrName, Real, Scale, Section, Seed, Switch, TextSource, Written

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
    "LossTerm",
    "Method",
    "Phase",
    "Prune",
    "Recipe",
    "Refit",
    "Rotation",
    "Score",
    "Section",
    "Selection",
    "ShapeChoice",
    "Source",
    "State",
    "Step",
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
ShapeChoice = Literal["width", "trial"]
LayerMerge = Literal["none", "laco", "laco_search"]
Boundary = Literal["auto", "bos", "eos", "both", "none"]
Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16"]

CHAT_PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Explain in two sentences why the sky is blue.",
    "Write a short, friendly message to a colleague who starts today.",
)
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
"""Keys that a correction beside a distillation shares with it."""


class Source(Section):
    """One part of a mixture."""

    sources: tuple[TextSource, ...] = Field(min_length=1, description="files, folders or hub data sets of this part")
    weight: Scale = Field(description="share of the samples, relative to the weights of the other parts")
    plain: Switch = Field(False, description="this part is plain text, also where data.messages_field is set")


class Data(Section):
    """Where the text comes from.

    A source is a file (text, `.jsonl`, `.parquet`; text and JSON lines also `.gz`, `.xz`, `.zst`), a folder of such
    files, or `hub:owner/name`, `hub:owner/name:split` for a data set of the hub.
    """

    train: Annotated[
        Annotated[tuple[TextSource, ...], Field(min_length=1), Tag("[sources]")]
        | Annotated[dict[str, Source], Field(min_length=1), Tag("[parts]")],
        Discriminator(lambda given: "[parts]" if isinstance(given, dict) else "[sources]"),
    ] = Field(description="training text: a list of sources, or a mixture of named parts with sources and weights")
    valid: tuple[TextSource, ...] = Field(
        min_length=1, description="held-out text, for the evaluation and for measurements during training"
    )
    text_field: str = Field(
        "text", min_length=1, description="field that holds the text in JSON lines, CSV, parquet and hub rows"
    )
    messages_field: str | None = Field(
        None,
        min_length=1,
        description="field that holds a conversation in JSON lines, parquet and hub rows: a list of messages with role"
        " and content, or from and value; rendered by the tokenizer's chat template",
    )
    count: Literal["assistant", "all"] = Field(
        "assistant", description="which tokens of a conversation losses and measurements count"
    )
    context: Context = Field(512, description="tokens in one sample: of packed text, or at most of one conversation")
    boundary: Boundary = Field(
        "auto",
        description="special tokens at document boundaries; bos: BOS before each document and sample; eos: EOS after"
        " each document; auto: BOS if the tokenizer adds it, EOS unless the teacher never learned it",
    )
    documents: Literal["joined", "apart"] = Field(
        "joined",
        description="apart: in training, attention and prediction do not cross document boundaries; conversations are"
        " always apart, and several are packed in one sample",
    )
    workers: Count = Field(1, description="number of processes that tokenize; the result is the same for any number")

    @property
    def train_sources(self) -> tuple[str, ...]:
        """The sources of the training text; for a mixture, those of all parts in order."""
        if isinstance(self.train, dict):
            return tuple(source for part in self.train.values() for source in part.sources)
        return self.train

    @property
    def reads_text(self) -> bool:
        """Whether some of the training text is no conversations."""
        parts = self.train.values() if isinstance(self.train, dict) else ()
        return self.messages_field is None or any(part.plain for part in parts)

    @model_validator(mode="after")
    def _of_conversations(self) -> Data:
        if self.messages_field is None and self.count != "assistant":
            raise ValueError("count says which tokens of conversations count: set messages_field as well")
        if self.messages_field is None and isinstance(self.train, dict) and any(p.plain for p in self.train.values()):
            raise ValueError("plain says which part is no conversations: set messages_field as well")
        return self


class Score(Section):
    """Importance of channels, neurons, heads and layers, from one forward pass (2407.14679, Sec. 2.2)."""

    samples: Count = Field(1024, description="number of calibration samples; the default is the paper's number")
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
    """The size of the student: sizes by hand, or a budget from which sizes are computed."""

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
        " is 1 and score.method is activation, otherwise none",
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

    @model_validator(mode="after")
    def _one_way(self) -> Prune:
        sizes = (self.hidden, self.ffn, self.heads, self.kv_heads, self.layers, self.drop_layers)
        by_hand = any(size is not None for size in sizes)
        ways = [self.params is not None, self.non_embedding_ratio is not None, by_hand]
        if sum(ways) != 1:
            raise ValueError("give exactly one of params, non_embedding_ratio, or sizes by hand")
        if self.layers is not None and self.drop_layers is not None:
            raise ValueError("give layers or drop_layers, not both")
        if self.refit == "all" and (self.head_merge or self.layer_merge != "none"):
            raise ValueError("refit: all solves for the matrices that head_merge and layer_merge change: use outputs")
        if self.layer_merge == "laco_search" and self.layers is None:
            raise ValueError("layer_merge: laco_search merges down to a number of layers: give layers")
        if self.steps > 1 and (self.rotation == "pca" or self.selection == "refit"):
            raise ValueError("steps above 1 cannot be combined with rotation: pca or selection: refit")
        return self


class Evaluate(Section):
    """What is measured for every model of the run."""

    samples: Count = Field(64, description="packed held-out samples for perplexity, KL and agreement")
    choices: tuple[PathOrName, ...] = Field(
        (),
        description="multiple-choice files: JSON lines with the keys context, choices and answer, or contexts, ending"
        " and answer",
    )
    prompts: tuple[str, ...] = Field((), description="prompts whose completions the report shows")
    chat_prompts: tuple[str, ...] = Field(
        CHAT_PROMPTS,
        description="what a user asks; the report shows the answers of models with a chat template, given through it",
    )
    completion_tokens: Annotated[Count, Field(le=100_000)] = Field(48, description="tokens generated for each prompt")
    speed: Switch = Field(True, description="measure prefill speed, decode speed and peak memory")


class Step(Section):
    """A further round of iterative compression: prune the last student again and distill it (as in 15B to 8B to 4B)."""

    prune: Prune = Field(description="the size of this round's student")
    distill: Distill | None = Field(None, description="the training of this round's student")
    teacher: Literal["original", "previous"] = Field(
        "original",
        description="teacher of this round: the run's teacher (corrected, if the run corrects it) or the last student",
    )


def _unturned(prune: Prune) -> Prune:
    return prune.model_copy(update={"rotation": "none"}) if prune.rotation == "auto" else prune


class Recipe(Section):
    """A whole run, from a teacher to a report."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100, description="label of the run and name of its folder"
    )
    model: PathOrName = Field(description="the teacher: a folder, a hub name or a GGUF file")
    seed: Seed = Field(0, description="seed of all random numbers: order of samples, random weights, draws")
    device: Device = Field("auto", description="where models run; auto: CUDA if there is a GPU")
    dtype: Dtype = Field("auto", description="precision of the weights; auto: that of the checkpoint")
    data: Data
    correct: Correct | None = Field(None, description="without this section, the teacher is not corrected")
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

    @field_validator("prune", "then")
    @classmethod
    def _basis(cls, cuts: Prune | tuple[Step, ...], given: Any) -> Prune | tuple[Step, ...]:
        """Leave the basis alone where another method ranks the channels: principal axes bring their own ranking.

        `given` is pydantic's `ValidationInfo`. Its `data` holds the valid fields above this one.
        """
        score = given.data.get("score")
        if score is None or score.method == "activation":
            return cuts
        if isinstance(cuts, Prune):
            return _unturned(cuts)
        return tuple(step.model_copy(update={"prune": _unturned(step.prune)}) for step in cuts)

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
            raise ValueError("correct.when: beside needs a distillation: add distill, or set when: before")
        for key in _OF_DISTILLATION:
            value, allowed = getattr(self.correct, key), [Correct.model_fields[key].default]
            if value not in [*allowed, *(getattr(part, key) for part in distillations)]:
                raise ValueError(
                    f"correct.{key} differs from distill.{key}: with when: beside, both use the value of distill"
                )
        for part in distillations:
            if part.cache != "none":
                raise ValueError(
                    "with correct.when: beside the teacher changes, so the answers in distill.cache would be stale"
                )
            if set(part.terms) == {"ce"}:
                raise ValueError(
                    "correct.when: beside corrects the teacher of distill, and objective: ce needs no teacher"
                )
            if part.teacher_device != "same" or part.offload_teacher or not part.shard_teacher:
                raise ValueError(
                    "with correct.when: beside the teacher trains on the student's device: leave out"
                    " teacher_device, offload_teacher and shard_teacher"
                )
        return self
