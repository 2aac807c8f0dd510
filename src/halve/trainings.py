"""The recipe's sections that train: how long, how fast, on what, and from whom."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from halve.values import Context, Count, CountFromZero, Factor, Rate, Real, Section, Switch, Whole

Term = Literal["kl", "reverse_kl", "jsd", "mse", "cosine", "ce"]
State = Literal["embedding", "input", "output", "attention"]
Cache = Literal["none", "hidden", "logits"]
Logger = Literal["tensorboard", "wandb", "trackio"]
Baseline = Literal["ce", "random_init", "random_prune"]
Beta = Annotated[Real, Field(ge=0, lt=1)]

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


class Phase(Section):
    """From some token on, train on another mixture, in another context or at another rate (2407.14679, Table 20)."""

    from_tokens: Count = Field(description="tokens after which it begins, rounded up to whole steps")
    mixture: Annotated[dict[str, Factor], Field(min_length=1)] | None = Field(
        None, description="weights of the parts of data.train; a part that is not named is not drawn from"
    )
    context: Context | None = Field(None, description="tokens in one packed sample; a step keeps its number of samples")
    lr: Rate | None = Field(None, description="what the cosine is scaled to from here on")


class Training(Section):
    """One run of the training loop."""

    tokens: Count = Field(description="tokens to train on, rounded up to whole steps")
    batch: Count = Field(32, description="samples in one optimizer step")
    micro_batch: Count | None = Field(None, description="samples in one forward pass; default: the whole batch")
    lr: Rate = Field(1e-4, description="peak learning rate")
    min_lr: Real = Field(1e-5, ge=0, description="learning rate at the end of the cosine")
    warmup_steps: CountFromZero = 40
    weight_decay: Real = Field(0.0, ge=0, le=10)
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    clip: Factor = Field(1.0, description="largest gradient norm")
    phases: tuple[Phase, ...] = ()
    optimizer: Literal["adamw", "muon", "adamw8bit"] = Field(
        "adamw",
        description="muon: for matrices between hidden states, AdamW for the rest; adamw8bit: moments in 8 bits",
    )
    offload_optimizer: Switch = Field(False, description="masters' moments wait in main memory (CUDA)")
    activation_checkpointing: Literal["none", "full", "selective"] = Field(
        "none", description="what of each layer is computed again on the way back: nothing, all, all but its products"
    )
    compile: Switch = Field(False, description="compile each layer; the first step takes a minute more")
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
    spike_factor: Factor = Field(
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
    lora_alpha: Factor = Field(32.0, description="an adapter counts alpha / rank times")
    when: Literal["before", "beside"] = Field(
        "before",
        description="beside: in the same loop as the distillation, on its samples and for as many of its tokens as"
        " `tokens` says (Sec. 4.2); batch, precision, ranks, checkpoints and measurements are then its own",
    )


class Intermediate(Section):
    """Losses on intermediate states beside the logits' (2407.14679, Sec. 3): `alpha * L_is`."""

    states: tuple[State, ...] = Field(("embedding", "output"), min_length=1)
    layers: dict[int, Whole] | None = Field(
        None, description="teacher's layer: student's layer, negative from the end; default {-2: -2} (Table 17)"
    )
    alpha: Factor | None = Field(None, description="weight; default: L_logits / L_is of the moment, as the paper")


class Distill(Training):
    """Recovery of the pruned student; forward KL on logits alone is the papers' choice (2407.14679, Table 15)."""

    objective: Term | Annotated[dict[Term, Factor], Field(min_length=1)] = Field(
        "kl", description="a term, or a sum of terms with their weights, such as {kl: 0.5, ce: 0.5}"
    )
    temperature: Real = Field(1.0, ge=0.01, le=100, description="of kl, reverse_kl and jsd")
    beta: Real = Field(0.5, gt=0, lt=1, description="jsd: the teacher's share of the mixture")
    top_k: Count | None = Field(None, description="kl: only the teacher's likeliest tokens")
    top_k_tail: Switch = Field(False, description="and the rest of its probability as one token more")
    intermediate: Intermediate | None = None
    cache: Cache = Field(
        "none", description="the teacher's answers, from disk: hidden states (exact) or sampled logits (unbiased)"
    )
    cache_samples: Count = Field(16, description="draws a token for cache: logits")
    teacher_device: str = Field(
        "same",
        pattern=r"^(same|cpu|cuda(:[0-9]{1,4})?)$",
        description="another device for the teacher, such as cuda:1 or cpu",
    )
    offload_teacher: Switch = Field(False, description="the teacher's layers wait in main memory and visit the device")
    shard_teacher: Switch = Field(True, description="with several ranks: shard the teacher too, or hold it on each")
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
