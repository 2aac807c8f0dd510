"""The sections of a recipe that train: tokens, learning rate, data, teacher and loss."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from halve.recipe.evaluations import Gates
from halve.recipe.values import Context, Count, CountFromZero, Rate, Real, Scale, Section, Switch, Whole

LossTerm = Literal["kl", "reverse_kl", "jsd", "mse", "cosine", "ce"]
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
    "gates",
)
"""Keys that affect how a training runs but not its result: a run may resume with other values of them."""


class Phase(Section):
    """After some tokens, another mixture, context or learning rate (2407.14679, Table 20)."""

    from_tokens: Count = Field(description="tokens after which the phase begins, rounded up to whole steps")
    mixture: Annotated[dict[str, Scale], Field(min_length=1)] | None = Field(
        None, description="new weights of the parts of data.train; parts that are not named are no longer drawn"
    )
    context: Context | None = Field(
        None, description="tokens in one packed sample; the number of samples per step stays the same"
    )
    lr: Rate | None = Field(None, description="new peak learning rate of the same cosine schedule")


class Training(Section):
    """One run of the training loop."""

    tokens: Count = Field(description="tokens to train on, rounded up to whole steps")
    batch: Count = Field(32, description="samples in one optimizer step")
    micro_batch: Count | None = Field(None, description="samples in one forward pass; default: the whole batch")
    lr: Rate = Field(1e-4, description="peak learning rate")
    min_lr: Real = Field(1e-5, ge=0, description="learning rate at the end of the cosine")
    warmup_steps: CountFromZero = Field(40, description="steps of linear warm-up to the peak learning rate")
    weight_decay: Real = Field(0.0, ge=0, le=10, description="weight decay of the optimizer")
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="decay rates of the first and second moment (AdamW)")
    clip: Scale = Field(1.0, description="gradients are clipped to this global norm")
    phases: tuple[Phase, ...] = Field((), description="changes of mixture, context or learning rate, in order")
    optimizer: Literal["adamw", "muon", "adamw8bit"] = Field(
        "adamw",
        description="muon: Muon for matrices inside layers, AdamW for the rest; adamw8bit: AdamW with 8-bit moments",
    )
    offload_optimizer: Switch = Field(False, description="keep the optimizer's moments in main memory (CUDA)")
    activation_checkpointing: Literal["none", "full", "selective"] = Field(
        "none",
        description="recomputation in the backward pass; full: the whole layer; selective: all but matrix products and"
        " attention",
    )
    compile: Switch = Field(False, description="torch.compile each layer; the first step takes about a minute longer")
    replicas: Count = Field(
        1, description="number of groups of ranks that each hold a whole model; 1: sharded over all ranks"
    )
    checkpoint_every: Count = Field(
        200,
        description="steps between checkpoints; a kill loses at most this many steps, or twice as many while a"
        " checkpoint is being written",
    )
    keep_checkpoints: Count = Field(1, description="number of checkpoints that are kept on disk")
    on_spike: Literal["stop", "skip", "rewind"] = Field(
        "stop",
        description="reaction to a loss spike or a loss that is not finite; stop: end with an error; skip: skip the"
        " step; rewind: return to the last checkpoint and skip those samples",
    )
    spike_factor: Scale = Field(
        3.0,
        gt=1,
        description="a spike is a loss that exceeds its running mean by this factor times the mean, and by 6 standard"
        " deviations",
    )
    loggers: tuple[Logger, ...] = Field((), description="where metrics go in addition to metrics.jsonl")
    eval_every: Count = Field(50, description="steps between held-out measurements")
    eval_samples: Count = Field(16, description="held-out samples in each measurement")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="compute precision; master weights and reductions stay float32; auto: bfloat16 on CUDA"
    )

    @model_validator(mode="after")
    def _rates(self) -> Training:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} is above lr {self.lr}")
        if self.offload_optimizer and self.optimizer != "adamw":
            raise ValueError("offload_optimizer works only with optimizer: adamw")
        if self.micro_batch is not None and self.batch % self.micro_batch:
            raise ValueError(f"batch {self.batch} is not a multiple of micro_batch {self.micro_batch}")
        if self.batch % self.replicas:
            raise ValueError(f"batch {self.batch} is not a multiple of replicas {self.replicas}")
        begins = [phase.from_tokens for phase in self.phases]
        if any(phase.lr is not None and phase.lr < self.min_lr for phase in self.phases):
            raise ValueError(f"a phase's lr is below min_lr {self.min_lr}")
        if begins != sorted(set(begins)) or any(begin >= self.tokens for begin in begins):
            raise ValueError("phases begin one after another, each before tokens is reached")
        return self


class Correct(Training):
    """Teacher correction (2408.11796, Sec. 2.1): fine-tune the teacher on the corpus with cross-entropy."""

    method: Literal["full", "lora", "norms"] = Field(
        "full", description="what is trained; lora: adapters that are merged at the end; norms: only the norms"
    )
    lora_rank: Count = Field(16, description="rank of the LoRA adapters")
    lora_alpha: Scale = Field(32.0, description="LoRA scale: an adapter is multiplied by lora_alpha / lora_rank")
    when: Literal["before", "beside"] = Field(
        "before",
        description="before: a stage of its own; beside: during the distillation, on its first `tokens` tokens (Sec."
        " 4.2). Batch, precision, ranks, checkpoints and measurements are then those of distill",
    )


class Intermediate(Section):
    """An additional loss on intermediate states, `alpha * L_is` (2407.14679, Sec. 3)."""

    states: tuple[State, ...] = Field(
        ("embedding", "output"), min_length=1, description="which states of teacher and student are compared"
    )
    layers: dict[int, Whole] | None = Field(
        None,
        description="teacher layer: student layer; negative numbers count from the end; default {-2: -2} (Table 17)",
    )
    alpha: Scale | None = Field(
        None, description="weight of the loss; default: the current ratio L_logits / L_is, as in the paper"
    )


class Distill(Training):
    """Train the pruned student on the teacher's distribution, by default with forward KL (2407.14679, Table 15)."""

    objective: LossTerm | Annotated[dict[LossTerm, Scale], Field(min_length=1)] = Field(
        "kl", description="one loss term, or a weighted sum of terms such as {kl: 0.5, ce: 0.5}"
    )
    temperature: Real = Field(1.0, ge=0.01, le=100, description="softmax temperature of kl, reverse_kl and jsd")
    beta: Real = Field(
        0.5, gt=0, lt=1, description="with jsd: share of the teacher's distribution in the mixture of both"
    )
    top_k: Count | None = Field(
        None, description="with kl: compare only this many of the teacher's most likely tokens; default: all"
    )
    top_k_tail: Switch = Field(False, description="with top_k: count the remaining probability as one extra token")
    intermediate: Intermediate | None = Field(
        None, description="an additional loss on intermediate states; without this section there is none"
    )
    cache: Cache = Field(
        "none", description="store the teacher's answers on disk: hidden states (exact) or sampled logits (unbiased)"
    )
    cache_samples: Count = Field(16, description="with cache: logits, tokens drawn from the teacher at each position")
    teacher_device: str = Field(
        "same",
        pattern=r"^(same|cpu|cuda(:[0-9]{1,4})?)$",
        description="device of the teacher: same (as the student), cpu, cuda or cuda:1",
    )
    offload_teacher: Switch = Field(
        False, description="keep the teacher's layers in main memory and copy them to the device one at a time"
    )
    shard_teacher: Switch = Field(
        True, description="with several ranks: shard the teacher; false: a whole copy on each rank"
    )
    gates: Gates | None = Field(
        None, description="generative items that are asked during the training; without this section there are none"
    )
    baselines: tuple[Baseline, ...] = Field(
        (),
        description="control models that train on the same tokens; ce: the same cut with cross-entropy; random_init:"
        " random weights; random_prune: a random cut",
    )

    @property
    def terms(self) -> dict[LossTerm, float]:
        """The objective's terms with their weights."""
        return {self.objective: 1.0} if isinstance(self.objective, str) else self.objective

    @model_validator(mode="after")
    def _fits(self) -> Distill:
        taught = set(self.terms) - {"ce"}
        if not taught and self.terms["ce"] != 1.0:
            raise ValueError("a sum with only ce: write objective: ce")
        if self.top_k is not None and "kl" not in taught:
            raise ValueError("top_k applies to the term kl, which objective does not have")
        if self.top_k_tail and self.top_k is None:
            raise ValueError("top_k_tail needs top_k: give top_k")
        if self.cache == "logits" and (taught - {"kl"} or self.top_k is not None):
            raise ValueError(
                "cache: logits stores draws of the teacher, from which only kl over all tokens can be computed"
            )
        if self.intermediate is not None and (not taught or self.cache != "none" or self.compile):
            raise ValueError(
                "intermediate needs a running teacher: it cannot be combined with ce alone, a cache, or compile"
            )
        if self.cache != "none" and not taught:
            raise ValueError("cache stores the teacher's answers, and objective: ce does not use them")
        if self.teacher_device != "same" and (self.offload_teacher or self.intermediate is not None):
            raise ValueError("teacher_device cannot be combined with offload_teacher or intermediate")
        return self
