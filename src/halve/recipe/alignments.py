"""The section of a recipe that aligns: supervised fine-tuning and preference optimization of the distilled student."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from halve.recipe.values import Context, Count, CountFromZero, PathOrName, Rate, Real, Scale, Section, TextSource

Rewards = Literal["data", "gsm8k", "model"]
PairForm = Literal["backward", "forward", "squared"]

HOW_ALIGNED = ("checkpoint_every", "activation_checkpointing")
"""Keys that affect how a step runs but not its result: a run may resume with other values of them."""

_OF_PREFERENCES = ("beta", "rewards", "reward_model", "answers", "answer_tokens", "temperature")
_OF_RPO = ("form", "eta")


class Alignment(Section):
    """One step of alignment. Each step starts from the model of the step before; the first from the last student.

    `sft` trains on conversations, `rpo`, `dpo` and `ipo` on pairs of answers to the same prompt (2408.11796, on
    instruction tuning: math and code, then instructions, then two rounds of rpo).
    """

    kind: Literal["sft", "rpo", "dpo", "ipo"] = Field(
        description="sft: supervised fine-tuning; rpo: reward-aware preference optimization, which uses how much better"
        " an answer is; dpo, ipo: only which answer is better"
    )
    data: tuple[TextSource, ...] = Field(
        min_length=1, description="JSON lines, parquet or hub data sets: conversations for sft, otherwise pairs"
    )
    messages_field: str | None = Field(
        None,
        min_length=1,
        description="with sft: field that holds a conversation; default: that of data, otherwise messages",
    )
    tokens: Count | None = Field(None, description="tokens to train on, rounded up to whole steps")
    epochs: Scale | None = Field(None, description="passes over the data instead of tokens; default: 1")
    context: Context | None = Field(
        None, description="tokens in one sample, or at most of a prompt with its answer; default: that of data"
    )
    batch: Count = Field(32, description="samples or pairs in one optimizer step")
    micro_batch: Count | None = Field(
        None, description="samples or pairs in one forward pass; default: the whole batch"
    )
    lr: Rate = Field(1e-5, description="peak learning rate of a cosine schedule that ends at zero")
    warmup_steps: CountFromZero = Field(10, description="steps of linear warm-up to the peak learning rate")
    method: Literal["full", "lora"] = Field("full", description="what is trained; lora: adapters, merged at the end")
    lora_rank: Count = Field(16, description="rank of the LoRA adapters")
    lora_alpha: Scale = Field(32.0, description="LoRA scale: an adapter is multiplied by lora_alpha / lora_rank")
    activation_checkpointing: Literal["none", "full"] = Field(
        "none", description="full: each layer is computed again in the backward pass"
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="compute precision; master weights stay float32; auto: bfloat16 on CUDA"
    )
    checkpoint_every: Count = Field(200, description="steps between checkpoints; a kill loses at most this many")
    heldout: CountFromZero = Field(
        64,
        description="conversations or prompts that are measured before and after; at most a tenth of the data",
    )
    beta: Scale = Field(0.1, description="with rpo, dpo, ipo: how strongly the model is held to its start")
    form: PairForm = Field("backward", description="with rpo: the divergence between rewards and model")
    eta: Scale = Field(1.0, description="with rpo: scale of the rewards; as it grows, rpo becomes dpo")
    rewards: Rewards = Field(
        "data",
        description="where the rewards come from; data: fields of the rows; gsm8k: whether an answer's last number is"
        " that of the row's answer; model: a reward model",
    )
    reward_model: PathOrName | None = Field(
        None, description="with rewards: model, a folder or hub name of a sequence classifier"
    )
    answers: Count | None = Field(
        None,
        ge=2,
        le=64,
        description="the current model writes this many answers to each prompt; the best and the worst become the pair",
    )
    answer_tokens: Count = Field(256, description="with answers: tokens of an answer at most")
    temperature: Real = Field(1.0, ge=0.01, le=100, description="with answers: temperature of the draws")

    @property
    def passes(self) -> float | None:
        """Passes over the data; None if `tokens` says how long the step is."""
        return None if self.tokens is not None else self.epochs or 1.0

    @model_validator(mode="after")
    def _fits(self) -> Alignment:
        foreign = {"sft": (*_OF_PREFERENCES, *_OF_RPO), "rpo": ("messages_field",)}
        for key in foreign.get(self.kind, ("messages_field", *_OF_RPO)):
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} does not belong to a step of kind {self.kind}")
        if self.tokens is not None and self.epochs is not None:
            raise ValueError("give tokens or epochs, not both")
        if self.micro_batch is not None and self.batch % self.micro_batch:
            raise ValueError(f"batch {self.batch} is not a multiple of micro_batch {self.micro_batch}")
        if (self.rewards == "model") != (self.reward_model is not None):
            raise ValueError("rewards: model and reward_model belong together: give both or neither")
        if self.answers is not None and self.rewards == "data":
            raise ValueError("new answers have no rewards in the data: set rewards: gsm8k, or model with reward_model")
        return self
