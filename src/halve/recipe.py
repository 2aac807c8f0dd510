"""The recipe: every knob of a run, typed and checked, without importing torch.

A recipe is one YAML file whose sections carry the names of the stages; `reading` makes a `Recipe` of it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

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
LayerMerge = Literal["none", "laco"]
Term = Literal["kl", "reverse_kl", "jsd", "mse", "cosine", "ce"]
State = Literal["embedding", "input", "output", "attention"]
Cache = Literal["none", "hidden", "logits"]
Logger = Literal["tensorboard", "wandb", "trackio"]
Baseline = Literal["ce", "random_init", "random_prune"]
Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16"]
Count = Annotated[int, Field(gt=0)]

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

HOW = (
    "checkpoint_every",
    "keep_checkpoints",
    "activation_checkpointing",
    "compile",
    "replicas",
    "shard_teacher",
    "teacher_device",
    "offload_teacher",
    "offload_optimizer",
    "on_spike",
    "spike_factor",
    "loggers",
)
"""What says of a training how it is carried out, not what comes of it: a run goes on with other values of these."""


class Section(BaseModel):
    """A part of the recipe: immutable, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Source(Section):
    """One part of a mixture."""

    sources: tuple[str, ...] = Field(min_length=1)
    weight: float = Field(gt=0, description="its share of the samples, relative to the other parts'")


class Data(Section):
    """Where the text comes from.

    A source is a file (text, `.jsonl`, `.parquet`; text and JSON lines also `.gz`, `.xz`, `.zst`), a folder of such
    files, or `hub:owner/name`, `hub:owner/name:split` for a data set of the hub.
    """

    train: Annotated[
        Annotated[tuple[str, ...], Field(min_length=1), Tag("[sources]")]
        | Annotated[dict[str, Source], Field(min_length=1), Tag("[parts]")],
        Discriminator(lambda given: "[parts]" if isinstance(given, dict) else "[sources]"),
    ] = Field(description="sources, or a mixture: parts by name, each with sources and a weight")
    valid: tuple[str, ...] = Field(min_length=1, description="held-out text; also measured during training")
    text_field: str = Field("text", description="the field of JSON lines, parquet and hub rows that holds the text")
    context: Count = Field(512, description="tokens in one packed sample")
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


class Phase(Section):
    """From some token on, train on another mixture, in another context or at another rate (2407.14679, Table 20)."""

    from_tokens: Count = Field(description="tokens after which it begins, rounded up to whole steps")
    mixture: Annotated[dict[str, Annotated[float, Field(gt=0)]], Field(min_length=1)] | None = Field(
        None, description="weights of the parts of data.train; a part that is not named is not drawn from"
    )
    context: Count | None = Field(None, description="tokens in one packed sample; a step keeps its number of samples")
    lr: float | None = Field(None, gt=0, description="what the cosine is scaled to from here on")


class Training(Section):
    """One run of the training loop."""

    tokens: Count = Field(description="tokens to train on, rounded up to whole steps")
    batch: Count = Field(32, description="samples in one optimizer step")
    micro_batch: Count | None = Field(None, description="samples in one forward pass; default: the whole batch")
    lr: float = Field(1e-4, gt=0, description="peak learning rate")
    min_lr: float = Field(1e-5, ge=0, description="learning rate at the end of the cosine")
    warmup_steps: int = Field(40, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = Field(1.0, gt=0, description="largest gradient norm")
    phases: tuple[Phase, ...] = ()
    optimizer: Literal["adamw", "muon", "adamw8bit"] = Field(
        "adamw",
        description="muon: for matrices between hidden states, AdamW for the rest; adamw8bit: moments in 8 bits",
    )
    offload_optimizer: bool = Field(False, description="masters' moments wait in main memory (CUDA)")
    activation_checkpointing: Literal["none", "full", "selective"] = Field(
        "none", description="what of each layer is computed again on the way back: nothing, all, all but its products"
    )
    compile: bool = Field(False, description="compile each layer; the first step takes a minute more")
    replicas: Count = Field(1, description="groups of ranks that each hold a whole model; 1 shards it over all of them")
    checkpoint_every: Count = Field(
        200, description="steps between checkpoints; a kill loses at most these, twice as many while one is written"
    )
    keep_checkpoints: Count = Field(1, description="how many checkpoints stay on the disk")
    on_spike: Literal["stop", "skip", "rewind"] = Field(
        "stop",
        description="what a loss that is not finite or leaps leads to: an error, the step left out,"
        " or the last checkpoint again and those samples left out",
    )
    spike_factor: float = Field(
        3.0, gt=1, description="a leap: so many running means above the mean, and 6 standard deviations"
    )
    loggers: tuple[Logger, ...] = Field((), description="where metrics go beside the JSON lines")
    eval_every: Count = Field(50, description="steps between held-out measurements")
    eval_samples: Count = Field(16, description="held-out samples in such a measurement")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="compute precision; masters and reductions stay float32. auto: bfloat16 on CUDA"
    )

    @model_validator(mode="after")
    def _rates(self) -> Training:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} is above lr {self.lr}")
        if self.offload_optimizer and self.optimizer != "adamw":
            raise ValueError("offload_optimizer is of optimizer: adamw")
        if self.micro_batch is not None and self.batch % self.micro_batch:
            raise ValueError(f"batch {self.batch} is not a multiple of micro_batch {self.micro_batch}")
        begins = [phase.from_tokens for phase in self.phases]
        if any(phase.lr is not None and phase.lr < self.min_lr for phase in self.phases):
            raise ValueError(f"a phase's lr is below min_lr {self.min_lr}")
        if begins != sorted(set(begins)) or any(begin >= self.tokens for begin in begins):
            raise ValueError("phases begin one after another, each before tokens is reached")
        return self


class Correct(Training):
    """Teacher correction (2408.11796, Sec. 2.1): the teacher learns the corpus with cross-entropy."""

    method: Literal["full", "lora", "norms"] = Field(
        "full", description="what is trained: all, adapters that are merged at the end, or the norms alone"
    )
    lora_rank: Count = 16
    lora_alpha: float = Field(32.0, gt=0, description="an adapter counts alpha / rank times")
    when: Literal["before", "beside"] = Field(
        "before",
        description="beside: in the same loop as the distillation, on its samples and for as many of its tokens as"
        " `tokens` says (Sec. 4.2); batch, precision, ranks, checkpoints and measurements are then its own",
    )


class Intermediate(Section):
    """Losses on intermediate states beside the logits' (2407.14679, Sec. 3): `alpha * L_is`."""

    states: tuple[State, ...] = Field(("embedding", "output"), min_length=1)
    layers: dict[int, int] | None = Field(
        None, description="teacher's layer: student's layer, negative from the end; default {-2: -2} (Table 17)"
    )
    alpha: float | None = Field(None, gt=0, description="weight; default: L_logits / L_is of the moment, as the paper")


class Distill(Training):
    """Recovery of the pruned student; forward KL on logits alone is the papers' choice (2407.14679, Table 15)."""

    objective: Term | dict[Term, Annotated[float, Field(gt=0)]] = Field(
        "kl", description="a term, or a sum of terms with their weights, such as {kl: 0.5, ce: 0.5}"
    )
    temperature: float = Field(1.0, gt=0, description="of kl, reverse_kl and jsd")
    beta: float = Field(0.5, gt=0, lt=1, description="jsd: the teacher's share of the mixture")
    top_k: Count | None = Field(None, description="kl: only the teacher's likeliest tokens")
    top_k_tail: bool = Field(False, description="and the rest of its probability as one token more")
    intermediate: Intermediate | None = None
    cache: Cache = Field(
        "none", description="the teacher's answers, from disk: hidden states (exact) or sampled logits (unbiased)"
    )
    cache_samples: Count = Field(16, description="draws a token for cache: logits")
    teacher_device: str = Field("same", description="another device for the teacher, such as cuda:1 or cpu")
    offload_teacher: bool = Field(False, description="the teacher's layers wait in main memory and visit the device")
    shard_teacher: bool = Field(True, description="with several ranks: shard the teacher too, or hold it on each")
    baselines: tuple[Baseline, ...] = Field(
        (), description="controls on the same tokens: the same cut trained with CE, a random start, a random cut"
    )

    @property
    def terms(self) -> dict[Term, float]:
        """The objective's terms with their weights."""
        return {self.objective: 1.0} if isinstance(self.objective, str) else self.objective

    @model_validator(mode="after")
    def _fits(self) -> Distill:
        taught = set(self.terms) - {"ce"}
        if not taught and self.terms["ce"] != 1.0:
            raise ValueError("a sum of ce alone is objective: ce")
        if self.top_k is not None and "kl" not in taught:
            raise ValueError("top_k truncates the term kl, which objective does not have")
        if self.top_k_tail and self.top_k is None:
            raise ValueError("top_k_tail says what becomes of the tokens beyond top_k: give top_k")
        if self.cache == "logits" and (taught - {"kl"} or self.top_k is not None):
            raise ValueError("cache: logits holds draws of the teacher, from which only kl over all tokens can be told")
        if self.intermediate is not None and (not taught or self.cache != "none" or self.compile):
            raise ValueError("intermediate listens to the running teacher: not with ce alone, a cache, or compile")
        if self.cache != "none" and not taught:
            raise ValueError("cache keeps what the teacher answers, and ce alone does not ask it")
        if self.teacher_device != "same" and (self.offload_teacher or self.intermediate is not None):
            raise ValueError("teacher_device is another device: not with offload_teacher or intermediate")
        return self


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
    depth_task: str | None = Field(None, description="multiple-choice file for depth: task")

    @model_validator(mode="after")
    def _depth(self) -> Score:
        if self.depth == "task" and self.depth_task is None:
            raise ValueError("depth: task answers the multiple-choice file in depth_task: name one")
        if self.depth == "taylor" and self.method != "taylor":
            raise ValueError("depth: taylor takes the gradients of method: taylor")
        return self


class Prune(Section):
    """What the student looks like: sizes by hand, or a budget that the planner meets."""

    params: str | None = Field(None, description="total parameters, such as 4.5B; the nearest legal sizes are taken")
    non_embedding_ratio: float | None = Field(None, gt=0, lt=1, description="share of non-embedding parameters to keep")
    hidden: Count | None = None
    ffn: Count | None = None
    heads: Count | None = None
    kv_heads: Count | None = None
    layers: Count | None = Field(None, description="layers to keep, the least important dropped")
    drop_layers: str | None = Field(None, description="layers to drop by hand, such as 16-31 or 3,5,7-9")
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
    untie: bool = Field(False, description="let rotation give a tied head weights of its own: closer, and larger")
    refit: Refit = Field("all", description="solve for the weights that read or write what was cut")
    ridge: float = Field(1e-3, gt=0, description="ridge of the refit, relative to the mean of the Gram's diagonal")
    refit_samples: Count = Field(128, description="calibration samples of rotation and refit")
    head_merge: float = Field(0.0, description="coefficient of the head residual merge; 0 is off")
    layer_merge: LayerMerge = Field("none", description="laco: add removed layers' differences to the one before")

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
        if self.steps > 1 and (self.rotation == "pca" or self.selection == "refit"):
            raise ValueError("steps above 1 score what is left anew: not with rotation: pca or selection: refit")
        return self


class Evaluate(Section):
    """What is measured of every model of the run."""

    samples: Count = Field(64, description="packed held-out samples for perplexity, KL and agreement")
    choices: tuple[str, ...] = Field((), description="multiple-choice files: JSON lines with context, choices, answer")
    prompts: tuple[str, ...] = Field((), description="texts that the report shows completed")
    completion_tokens: Count = 48
    speed: bool = Field(True, description="measure prefill and decode speed and peak memory")


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

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    model: str = Field(description="the teacher: a folder or a hub name")
    seed: int = Field(0, ge=0)
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
